"""The launcher's side of signals and failures, with shell commands for processes."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from fcclip.engine import warden
from fcclip.engine.warden import Warden
from fcclip.engine.watchdog import ProcessFailedError, announce, connect

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are passed on where there are POSIX signals")

LEAVES = 'trap "exit 75" TERM; echo; while :; do sleep 0.05; done'
STAYS = 'trap "" TERM USR1; echo; while :; do sleep 0.05; done'


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[int, str], subprocess.Popen]]:
    """(rank, shell command that prints a line when it is ready) -> the process, known to a warden of the test's
    folder."""
    started = []

    def run(rank: int, command: str) -> subprocess.Popen:
        process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE)
        started.append(process)
        process.stdout.readline()
        (tmp_path / f"{rank}.pid").write_text(str(process.pid))
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(warden, "_HEARING_S", 0.2)


def new(folder: Path, **changes) -> Warden:
    return Warden(folder, **{"grace": 30.0, "farewell": 30.0, "world_size": 2} | changes)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_polite_signal_is_passed_on_to_all_and_ends_nobody_else(tmp_path, start, name):
    both = [start(rank, LEAVES.replace("TERM", name[3:])) for rank in range(2)]
    with new(tmp_path) as one:
        os.kill(os.getpid(), getattr(signal, name))
        assert [process.wait(20) for process in both] == [75, 75]
    assert one.signals == [getattr(signal, name)] and not one.killed


def test_a_process_that_starts_after_the_signal_gets_it_too(tmp_path, start):
    with new(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        assert start(0, LEAVES).wait(20) == 75


def test_a_process_that_is_done_gets_no_signal(tmp_path, start):
    done, other = start(0, LEAVES), start(1, LEAVES)
    (tmp_path / "0.done").touch()
    with new(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        assert other.wait(20) == 75
        assert done.poll() is None


def test_a_process_that_has_heard_the_first_signal_gets_no_copy_of_it_but_the_second(tmp_path, start, monkeypatch):
    monkeypatch.setattr(warden, "ECHO_S", 0.3)
    process = start(0, LEAVES)
    with new(tmp_path) as one:
        os.kill(os.getpid(), signal.SIGTERM)
        (tmp_path / "0.heard").touch()  # less than 0.2 s later, as if a scheduler had sent it to both
        time.sleep(1.2)
        assert process.poll() is None and len(one.signals) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert process.wait(20) == 75


def test_an_echo_is_not_passed_on_but_a_second_signal_is(tmp_path, start, monkeypatch):
    monkeypatch.setattr(warden, "ECHO_S", 0.3)
    start(0, f'trap "echo >> {tmp_path}/count" TERM; echo; while :; do sleep 0.05; done')
    count = tmp_path / "count"
    with new(tmp_path) as one:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(count.exists)
        time.sleep(1.0)
        assert count.read_text() == "\n" and len(one.signals) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: count.read_text() == "\n\n")
    assert len(one.signals) == 2


def test_who_does_not_heed_a_signal_is_killed_after_the_grace_time(tmp_path, start):
    stays = start(1, STAYS)
    with new(tmp_path, grace=0.5) as one:
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stays.wait(20) == -signal.SIGKILL and time.monotonic() - began >= 0.5
    assert one.killed == {1: "it did not leave within 0.5 s after SIGTERM"}


def test_a_second_signal_shortens_the_grace_time(tmp_path, start, monkeypatch):
    monkeypatch.setattr(warden, "ECHO_S", -1.0)
    monkeypatch.setattr(warden, "END_S", 0.4)
    stays = start(0, STAYS)
    with new(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stays.wait(20) == -signal.SIGKILL


def test_after_a_failure_those_that_do_not_end_are_killed_even_when_they_are_stopped(tmp_path, start):
    stopped = start(0, STAYS)
    stopped.send_signal(signal.SIGSTOP)
    with new(tmp_path, farewell=0.3) as one:
        time.sleep(0.6)
        assert stopped.poll() is None
        (tmp_path / "1.failed").write_text(ProcessFailedError(rank=1, world_size=2, reason="broken").to_json())
        assert stopped.wait(20) == -signal.SIGKILL
    assert one.killed == {0: "it did not end when another process had failed"}
    assert [(rank, str(failure)) for rank, failure in one.failures()] == [(1, "process 1 of 2 failed: broken")]


def test_a_process_that_disappears_without_a_word_is_a_failure_and_one_that_is_done_is_none(tmp_path, start):
    gone, stays = start(0, "echo"), start(1, STAYS)
    gone.wait(20)
    (tmp_path / "0.done").touch()
    with new(tmp_path, farewell=0.3):
        time.sleep(0.8)
        assert stays.poll() is None
        (tmp_path / "0.done").unlink()
        assert stays.wait(20) == -signal.SIGKILL


def test_a_failure_on_another_machine_and_the_end_of_its_store_are_heard_of(tmp_path, start, monkeypatch):
    monkeypatch.setattr(warden, "_STORE_PERIOD_S", 0.05)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    stays = start(1, STAYS)
    with new(tmp_path, farewell=0.3, store=("127.0.0.1", server.port, "run/0")) as one:
        wait_until(lambda: one.store is not None)
        assert one.elsewhere is None
        failure = ProcessFailedError(rank=0, world_size=2, reason="broken")
        announce(connect("127.0.0.1", server.port, run="run/0"), failure)
        assert stays.wait(20) == -signal.SIGKILL and str(one.elsewhere) == str(failure)
    stays = start(1, STAYS)
    with new(tmp_path, farewell=0.3, store=("127.0.0.1", server.port, "another/0")) as one:
        wait_until(lambda: one.store is not None)
        del server
        assert stays.wait(20) == -signal.SIGKILL
    assert str(one.elsewhere) == "process 0 of 2 (host 127.0.0.1) failed: its launcher cannot be reached any more"


def test_handlers_are_put_back(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with new(tmp_path, handled=(signal.SIGHUP,)):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert [signal.getsignal(number) for number in numbers] == before


def test_in_another_thread_no_handler_is_touched(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> None:
        with new(tmp_path):
            assert signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
