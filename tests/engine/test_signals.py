import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcclip.engine.signals import REQUEUE_EXIT_CODE, StopRequest, StopRequested, shield_worker

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
PROGRAM = Path(__file__).with_name("stopping_processes.py")
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])


class Running:
    """A function of stopping_processes.py in a process (and a process group) of its own."""

    def __init__(self, scenario: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), scenario],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def until(self, text: str) -> "Running":
        """Reads until a line holds the text."""
        while not (self.lines and text in self.lines[-1]):
            line = self.process.stdout.readline()
            assert line, f"ended without '{text}': {self.lines}"
            self.lines.append(line.rstrip("\n"))
        return self

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        self.lines += self.process.communicate(timeout=20)[0].splitlines()
        return self.process.returncode


@pytest.fixture
def start() -> Iterator:
    """Starts scenarios, and kills what is left of them."""
    running = []

    def run(scenario: str) -> Running:
        running.append(Running(scenario))
        return running[-1]

    yield run
    for one in running:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        one.process.stdout.close()


def signal_me(number: int) -> None:
    os.kill(os.getpid(), number)


# ---- the first signal ----


@BOTH
def test_the_first_signal_lets_the_step_end_and_is_logged_once(start, number):
    run = start("train").until("step 1 begun")
    run.send(number)
    assert run.exit_code() == REQUEUE_EXIT_CODE == 75
    name = signal.Signals(number).name
    line = f"log: {name}: finishing this iteration, then saving and leaving; a second signal leaves at once"
    assert run.lines[-3:] == [line, "step 1 done", f"saved after {name}"] and run.lines.count(line) == 1


@BOTH
def test_a_signal_is_noted_and_nothing_else_happens(number, caplog):
    with StopRequest() as stop:
        assert not stop.requested and stop.signal_name == ""
        signal_me(number)
        assert stop.requested and stop.signal_name == signal.Signals(number).name
    assert stop.requested
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_other_signals_are_not_a_request():
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: seen.append(number))
    try:
        with StopRequest() as stop:
            signal_me(signal.SIGUSR2)
            time.sleep(0.05)
            assert seen and not stop.requested
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_handlers_are_as_before_when_it_is_left():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(KeyError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_it_has_no_effect():
    requested = []

    def work():
        with StopRequest() as stop:
            requested.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requested == [False] and signal.getsignal(signal.SIGTERM) is before


# ---- interrupting ----


@BOTH
def test_work_without_a_state_is_broken_off_even_where_exceptions_are_caught(number):
    done = []
    name = signal.Signals(number).name
    with StopRequest() as stop, pytest.raises(StopRequested, match=name), stop.interrupting():
        try:
            signal_me(number)
            time.sleep(20)
        except Exception:
            done.append("swallowed")
        done.append("went on")
    assert not done and stop.requested


def test_a_request_from_before_breaks_off_at_once():
    with StopRequest() as stop:
        signal_me(signal.SIGTERM)
        with pytest.raises(StopRequested), stop.interrupting():
            pytest.fail("entered")


def test_a_signal_outside_the_block_does_not_raise():
    with StopRequest() as stop:
        with stop.interrupting():
            pass
        signal_me(signal.SIGTERM)
        assert stop.requested


def test_an_error_that_follows_the_request_counts_as_the_request():
    with StopRequest() as stop, pytest.raises(StopRequested) as caught, stop.interrupting():
        stop.signal_name = "SIGTERM"  # noted while the main thread was in a collective
        raise RuntimeError("connection closed by peer")
    assert str(caught.value.__cause__) == "connection closed by peer"


def test_an_error_without_a_request_stays_itself():
    with StopRequest() as stop, pytest.raises(RuntimeError, match="disk"), stop.interrupting():
        raise RuntimeError("disk")


# ---- the second signal ----


@BOTH
def test_a_second_signal_leaves_at_once(start, number):
    run = start("save_slowly").until("ready")
    run.send(signal.SIGTERM)
    run.until("saving")
    time.sleep(0.3)
    run.send(number)
    assert run.exit_code() == 128 + number
    assert run.lines[-1] == f"log: {signal.Signals(number).name} again: leaving at once"


def test_the_same_request_by_two_ways_is_one(start):
    run = start("train").until("step 0 begun")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        run.send(number)
        time.sleep(0.02)
    assert run.exit_code() == REQUEUE_EXIT_CODE


@pytest.mark.parametrize("scenario", ["hang", "hold_the_log"])
def test_a_second_signal_ends_a_process_that_hangs(start, scenario):
    run = start(scenario).until("ready")
    run.send(signal.SIGTERM)
    time.sleep(0.6)  # the first line waits for a log that is held, in vain
    run.send(signal.SIGUSR1)
    assert run.exit_code() == 128 + signal.SIGUSR1


@BOTH
def test_after_the_end_the_same_request_means_nothing_and_a_second_signal_what_it_meant_before(start, number):
    run = start("leave_soon").until("ready")
    run.send(number)
    run.until("saved").send(number)
    time.sleep(1.2)
    assert run.process.poll() is None
    run.send(number)
    assert run.exit_code() == -number


# ---- other processes of the job ----


def test_one_of_several_processes_that_hangs_tells_its_stack(start):
    run = start("hang_among_others").until("ready")
    run.send(signal.SIGTERM)
    run.until("in hang")
    assert any("Timeout" in line for line in run.lines)


def test_a_forked_child_does_not_count_for_its_parent(start):
    run = start("fork").until("child ")
    child = int(run.lines[-1].split()[1])
    os.kill(child, signal.SIGUSR1)
    time.sleep(0.4)
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.exit_code() == 0
    assert f"child ended by {signal.SIGTERM.value}" in run.lines


def test_workers_of_a_loader_outlive_a_signal_to_the_whole_job(start):
    run = start("load").until("batch 3")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.killpg(run.process.pid, number)
    assert run.exit_code() == 0
    assert "batch 39" in run.lines and run.lines[-1].startswith("all batches, SIG")


def wait_shielded(ready) -> None:
    shield_worker()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who sent a signal")
def test_a_shielded_worker_ends_when_its_parent_says_so():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=wait_shielded, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(10)
    subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, 15); os.kill({worker.pid}, 10)"])
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
