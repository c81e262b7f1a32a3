"""What processes do on SIGTERM and SIGUSR1; some of them stand in stopping_processes.py."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fcclip.engine.signals import REQUEUE_EXIT_CODE, StopRequest, StopRequested, shield_worker

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])


@pytest.fixture
def start(start_program):
    """(function) -> stopping_processes.py running it."""
    return lambda function: start_program(Path(__file__).with_name("stopping_processes.py"), function)


# ---- the first signal ----


@BOTH
def test_the_first_signal_lets_the_step_end_and_is_logged_once(start, number):
    run = start("train").until("step 1 begun")
    for again in (number, number, signal.SIGUSR1):  # the same request by several ways is one
        run.send(again)
        time.sleep(0.02)
    assert run.exit_code() == REQUEUE_EXIT_CODE == 75
    name = signal.Signals(number).name
    assert run.lines[-2:] == ["step 1 done", f"saved after {name}"]
    assert len([line for line in run.lines if line.startswith(f"log: {name}: ")]) == 1


@BOTH
def test_a_signal_is_noted_and_nothing_else_happens(number, caplog):
    with StopRequest() as stop:
        assert not stop.requested and stop.signal_name == ""
        os.kill(os.getpid(), number)
        assert stop.requested and stop.signal_name == signal.Signals(number).name
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_handlers_are_as_before_when_it_is_left_without_a_request():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(KeyError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_it_has_no_effect():
    def work():
        with StopRequest():
            pass

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


# ---- interrupting ----


@BOTH
def test_work_without_a_state_is_broken_off_even_where_exceptions_are_caught(number):
    with StopRequest() as stop, pytest.raises(StopRequested, match=signal.Signals(number).name), stop.interrupting():
        try:
            os.kill(os.getpid(), number)
            time.sleep(20)
        except Exception:
            pytest.fail("swallowed")
    assert stop.requested


def test_a_request_outside_the_block_does_not_raise_there_but_breaks_the_next_one_off_at_once():
    with StopRequest() as stop:
        with stop.interrupting():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested), stop.interrupting():
            pytest.fail("entered")


@pytest.mark.parametrize(("name", "expected"), [("SIGTERM", StopRequested), ("", RuntimeError)])
def test_an_error_that_follows_a_request_counts_as_the_request(name, expected):
    with StopRequest() as stop, pytest.raises(expected), stop.interrupting():
        stop.signal_name = name  # noted while the main thread was in a collective
        raise RuntimeError("connection closed by peer")


# ---- the second signal ----


@pytest.mark.parametrize("scenario", ["hang", "hold_the_log"])
def test_a_second_signal_leaves_at_once_even_from_a_process_that_hangs(start, scenario):
    run = start(scenario).until("ready")
    run.send(signal.SIGTERM)
    time.sleep(0.6)  # the first line waits for a log that is held, in vain
    run.send(signal.SIGUSR1)
    assert run.exit_code() == 128 + signal.SIGUSR1
    assert scenario == "hold_the_log" or run.lines[-1].startswith("log: SIGUSR1 again")


@BOTH
def test_after_the_end_the_same_request_means_nothing_and_a_second_signal_what_it_meant_before(start, number):
    run = start("leave_soon").until("ready")
    run.send(number)
    run.until("saved").send(number)
    time.sleep(1.2)
    assert run.poll() is None
    run.send(number)
    assert run.exit_code() == -number


# ---- other processes of the job ----


def test_one_of_several_processes_that_hangs_tells_its_stack(start):
    run = start("hang_among_others").until("ready")
    run.send(signal.SIGTERM)
    run.until("in hang")


def test_a_forked_child_does_not_count_for_its_parent(start):
    run = start("fork").until("child ")
    os.kill(int(run.lines[-1].split()[1]), signal.SIGUSR1)
    time.sleep(0.4)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.exit_code() == 0
    assert f"child ended by {signal.SIGTERM.value}" in run.lines


def test_workers_of_a_loader_outlive_a_signal_to_the_whole_job(start):
    run = start("load").until("batch 3")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.killpg(run.pid, number)
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
