"""Who is blamed, and when; two watchdogs in one process share a store in memory."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from fcclip.engine import watchdog
from fcclip.engine.watchdog import (
    ProcessFailedError,
    Report,
    Seen,
    Watchdog,
    announce,
    announced,
    failure_of,
    last_report,
    lost_processes_named,
    missing,
    stuck,
    watch,
)

CLOSED = "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:15025"
LATE = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"
STORE_LATE = "wait timeout after 3000ms, keys: /default_pg/0//2//cpu//0/1"
TIMEOUT_S = 0.8  # the beat is a tenth of a second then


def seen(rank: int, *, idle: float = 0.0, silent: float = 0.0, **changes) -> Seen:
    fields = {"beat": 7, "host": "", "step": 12, "where": f"file_{rank}.py:1 (f)", "waiting": False} | changes
    return Seen(report=Report(rank=rank, idle=idle, **fields), silent=silent)


def rank_of(found: tuple[Report, str] | None) -> int | None:
    return None if found is None else found[0].rank


@pytest.fixture
def store() -> dist.HashStore:
    return dist.HashStore()


@pytest.fixture
def told() -> list[ProcessFailedError]:
    """What watchdogs said before they ended the process."""
    return []


@pytest.fixture
def dogs(store, told, monkeypatch) -> Iterator[Callable[..., Watchdog]]:
    """Started watchdogs that end nothing."""
    ended, started = threading.Event(), []

    def end(_: int) -> None:
        ended.set()
        for dog in started:
            dog._stopped.set()

    monkeypatch.setattr(watchdog.os, "_exit", end)

    def start(rank: int, **changes) -> Watchdog:
        dog = Watchdog(
            changes.pop("store", store),
            **{"rank": rank, "world_size": 2, "timeout": TIMEOUT_S, "tell": told.append} | changes,
        )
        dog.start()
        dog.process_ended = ended
        started.append(dog)
        return dog

    yield start
    for dog in started:
        dog.stop()


# ---- who is missing when a collective broke ----


def test_a_process_without_reports_is_missing_whatever_the_error():
    for late in (False, True):
        found = missing([seen(1, idle=90.0), seen(2, silent=9.0)], silent_after=5.0, late=late)
        assert rank_of(found) == 2 and "does not answer any more; it was last seen at file_2.py:1 (f)" in found[1]


def test_the_longest_silent_one_was_the_first_to_go():
    assert rank_of(missing([seen(1, silent=6.0), seen(2, silent=9.0)], silent_after=5.0, late=False)) == 2


def test_a_process_that_has_left_is_missing_and_its_silence_is_no_crash():
    found = missing([seen(1, waiting=True), seen(2, ended=True, silent=90.0)], silent_after=5.0, late=False)
    assert rank_of(found) == 2 and "already left" in found[1]


def test_the_one_that_does_not_wait_is_late_and_none_is_when_a_connection_broke():
    others = [seen(1, waiting=True, idle=99.0), seen(2, idle=3.0), seen(3, idle=40.0)]
    found = missing(others, silent_after=5.0, late=True)
    assert rank_of(found) == 3 and "it has been at file_3.py:1 (f) for 40 s" in found[1]
    assert missing(others, silent_after=5.0, late=False) is None
    assert missing([seen(1, waiting=True)], silent_after=5.0, late=True) is None


# ---- who is stuck when nobody raises ----


def test_one_that_stands_still_without_waiting_is_stuck_though_others_work():
    everyone = [seen(0), seen(1, idle=31.0), seen(2, waiting=True, idle=31.0)]
    assert rank_of(stuck(everyone, timeout=30.0, silent_after=5.0)) == 1
    assert stuck(everyone, timeout=32.0, silent_after=5.0) is None


def test_nobody_is_stuck_while_one_works_and_the_others_wait_for_it():
    everyone = [seen(0, waiting=True, idle=999.0), seen(1, idle=1.0), seen(2, ended=True, silent=999.0)]
    assert stuck(everyone, timeout=30.0, silent_after=5.0) is None


def test_a_process_that_stopped_reporting_counts_as_standing_still():
    everyone = [seen(0, waiting=True, idle=40.0), seen(1, idle=1.0, silent=30.0)]
    assert rank_of(stuck(everyone, timeout=30.0, silent_after=5.0)) == 1


def test_when_all_wait_the_silent_one_is_blamed_then_one_that_left_then_the_lowest_step():
    waits = {"waiting": True, "idle": 40.0}
    silent, left = seen(2, silent=9.0, **waits), seen(3, ended=True)
    late, other = seen(0, step=11, **waits), seen(1, **waits)
    assert rank_of(stuck([late, other, silent, left], timeout=30.0, silent_after=5.0)) == 2
    assert rank_of(stuck([late, other, left], timeout=30.0, silent_after=5.0)) == 3
    found = stuck([other, late], timeout=30.0, silent_after=5.0)
    assert rank_of(found) == 0 and "all wait for each other; it has been at file_0.py:1 (f) for 40 s" in found[1]
    assert stuck([left], timeout=30.0, silent_after=5.0) is None


# ---- errors ----


def test_a_failure_names_its_process_and_what_is_known_of_it_and_survives_the_way_through_the_store():
    plain = ProcessFailedError(rank=1, world_size=2, reason="it broke")
    assert str(plain) == "process 1 of 2 failed: it broke"
    full = ProcessFailedError(
        rank=1, world_size=2, kind="ValueError", reason="it broke", trace="trace", host="node7", step=12
    )
    assert str(full) == "process 1 of 2 (host node7, last reported step 12) failed: it broke"
    again = ProcessFailedError.from_json(full.to_json())
    assert str(again) == str(full) and (again.kind, again.trace) == ("ValueError", "trace")


def test_a_failure_of_this_process_keeps_kind_text_and_traceback():
    try:
        {}["missing"]
    except KeyError as error:
        failure = failure_of(error, rank=0, world_size=2)
    assert failure.kind == "KeyError" and "test_watchdog.py" in failure.trace
    assert failure_of(SystemExit(3), rank=0, world_size=2).reason == "it left with exit code 3"
    assert failure_of(KeyboardInterrupt(), rank=0, world_size=2).reason == "KeyboardInterrupt"
    assert failure_of(failure, rank=1, world_size=2) is failure


def test_only_the_first_failure_is_kept(store):
    for reason in ("first", "second"):
        announce(store, ProcessFailedError(rank=1, world_size=2, reason=reason))
    assert announced(store).reason == "first"


@pytest.mark.parametrize("error", [ValueError(CLOSED), RuntimeError("shape mismatch"), KeyError("gloo/")])
def test_errors_that_no_other_process_caused_stay_as_they_are(dogs, error):
    dog = dogs(0)
    dogs(1).stop()
    assert dog.explain(error) is None


@pytest.mark.parametrize("error", [RuntimeError(CLOSED), RuntimeError(LATE), dist.DistStoreError(STORE_LATE)])
def test_a_process_whose_reports_cease_is_named_with_its_step(dogs, error):
    dog, other = dogs(0), dogs(1)
    other.watch(12)
    time.sleep(2 * other.beat)
    other.stop()
    assert str(dog.explain(error)).endswith("last reported step 12) failed: " + dog.explain(error).reason)
    assert dog.explain(error).rank == 1 and "does not answer any more" in str(dog.explain(error))


def test_a_process_that_has_left_is_named(dogs):
    dog, other = dogs(0), dogs(1)
    other.leave()
    other.stop()
    assert str(dog.explain(RuntimeError(CLOSED))) == (
        "process 1 of 2 failed: it has already left, while others still wait for it"
    )


def test_what_another_process_has_said_itself_comes_first(dogs):
    dog, other = dogs(0), dogs(1)
    other.announce(failure_of(ValueError("image 7 is broken"), rank=1, world_size=2))
    for error in (RuntimeError(CLOSED), RuntimeError("evaluation stopped because process 1 failed: ValueError")):
        assert str(dog.explain(error)) == "process 1 of 2 failed: image 7 is broken"


def test_processes_that_all_wait_are_listed_in_the_log(dogs, caplog):
    dog, other = dogs(0), dogs(1)
    other._explaining = True
    time.sleep(2 * other.beat)
    assert dog.explain(RuntimeError(LATE)) is None
    assert "process 0 waits for others that wait themselves: process 1 at watchdog.py:" in caplog.text


def test_inside_the_context_an_error_of_a_collective_names_the_process(dogs):
    dogs(0)
    dogs(1).announce(failure_of(ValueError("image 7 is broken"), rank=1, world_size=2))
    with pytest.raises(ProcessFailedError, match="process 1 of 2 failed: image 7"), lost_processes_named():
        raise RuntimeError(CLOSED)
    with pytest.raises(KeyError), lost_processes_named():
        raise KeyError("mine")


def test_without_other_processes_nothing_is_watched_or_renamed():
    watch(3)
    with pytest.raises(RuntimeError, match="Connection closed"), lost_processes_named():
        raise RuntimeError(CLOSED)


# ---- the thread ----


def test_reports_say_step_place_and_host_once_there_is_a_step(dogs, store):
    dog = dogs(0)
    assert last_report(store, 0).host == "" and last_report(store, 0).step is None
    watch(12)
    watch()  # a sign of life that leaves the step as it is
    time.sleep(2 * dog.beat)
    report = last_report(store, 0)
    assert (report.step, report.host) == (12, os.uname().nodename)
    assert report.where.startswith("test_watchdog.py:") and "(test_reports_say_step" in report.where
    assert not report.waiting and last_report(store, 1) is None


def test_a_main_thread_that_stands_still_for_the_time_out_ends_its_process_with_its_place(dogs, told, caplog):
    dog = dogs(0, world_size=1)
    assert dog.process_ended.wait(20)
    assert told[0].rank == 0 and "it has been at test_watchdog.py" in str(told[0])
    assert "This process stood at:" in caplog.text and "process_ended.wait" in caplog.text


def test_a_process_that_keeps_reporting_steps_is_left_alone(dogs):
    dog = dogs(0, world_size=1)
    for step in range(25):
        watch(step)
        time.sleep(TIMEOUT_S / 10)
    assert not dog.process_ended.is_set() and dog.failure() is None


def test_a_failure_elsewhere_ends_a_process_that_does_not_end_by_itself(dogs, store, told):
    dog = dogs(0, timeout=2.0)
    announce(store, ProcessFailedError(rank=1, world_size=2, reason="it broke"))
    began = time.monotonic()
    while not dog.process_ended.is_set() and time.monotonic() - began < 20:
        watch(0)
        time.sleep(0.01)
    assert told[0].reason == "it broke" and time.monotonic() - began >= dog.farewell


def test_a_process_whose_launcher_is_gone_ends(dogs, told):
    dog = dogs(0, parent=os.getppid() + 1)
    assert dog.process_ended.wait(20)
    assert "the program that started it is gone" in str(told[0])


class Disconnected:
    """A store whose server goes."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self.gone = store, False

    def __getattr__(self, name: str):
        if self.gone:
            raise dist.DistNetworkError("Broken pipe")
        return getattr(self._store, name)


def test_a_store_that_cannot_be_reached_ends_the_process_and_explains_its_error(dogs, store, told, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node0")
    connection = Disconnected(store)
    dog = dogs(0, store=connection)
    connection.gone = True
    text = "process 0 of 2 (host node0) failed: its launcher cannot be reached any more"
    assert str(dog.explain(RuntimeError(CLOSED))) == text
    deadline = time.monotonic() + 20
    while not dog.process_ended.is_set() and time.monotonic() < deadline:
        watch(0)
        time.sleep(0.01)
    assert str(told[0]) == text


def test_all_must_start_and_the_one_that_does_not_is_named(dogs):
    dog = dogs(0)
    with pytest.raises(ProcessFailedError, match="process 1 of 2 failed: it did not start within 0 s; does the same"):
        dog.meet(0.2)
    dogs(1)
    dog.meet(5)


def test_a_process_can_wait_until_all_have_left(dogs, store):
    dog, other = dogs(0), dogs(1)
    dog.leave()
    threading.Timer(0.3, other.leave).start()
    dog.wait_until_all_left(20)
    assert json.loads(store.get("report/1"))["ended"]
