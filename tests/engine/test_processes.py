"""Two CPU processes; what they do stands in talking_processes.py."""

import importlib
import json
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fcclip.comm import get_rank, get_world_size
from fcclip.engine import REQUEUE_EXIT_CODE, ProcessFailedError, launch, processes
from fcclip.errors import InputError, is_users
from tests.engine.programs import PATIENCE_S, Program

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def talking() -> Iterator:
    """talking_processes.py, which started processes find by that name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module("talking_processes")


@pytest.fixture
def start(start_program) -> Callable[..., Program]:
    """(function, its arguments, options of launch) -> talking_processes.py, started by hand."""

    def run(function: str, *words: object, starter: tuple[str, ...] = (), **options: object) -> Program:
        file = Path(__file__).with_name("talking_processes.py")
        return start_program(file, function, json.dumps(options), *words, starter=starter)

    return run


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def pids(folder: Path) -> list[int]:
    """Of both processes, as soon as they have begun to work."""
    files = [folder / f"pid_{rank}" for rank in range(2)]
    wait_until(lambda: all(file.exists() for file in files), "the processes did not start")
    return [int(file.read_text()) for file in files]


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


# ---- two processes ----


@slow
def test_processes_talk_share_uneven_batches_and_rank_0_returns_its_result(talking):
    talked, seen = launch(talking.talk_and_share, num_processes=2)
    assert talked == [[[0, 10], "from 0", [0.5, 2.0]]] * 2
    assert seen == [[0, 2], [1]]


@slow
def test_an_error_in_one_process_ends_all_and_is_told_with_its_rank(talking):
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    with pytest.raises(ProcessFailedError, match=r"^process 1 of 2 failed: image 7 is broken$") as error:
        launch(talking.one_raises, num_processes=2)
    assert is_users(error.value) and error.value.__cause__ is None
    assert handlers == [signal.getsignal(number) for number in numbers]


@slow
def test_a_process_that_dies_ends_all_and_is_named(talking):
    with pytest.raises(ProcessFailedError, match=r"^process 1 of 2 failed: it was ended by SIGKILL$"):
        launch(talking.one_is_killed, num_processes=2)


@slow
def test_a_process_that_hangs_ends_all_and_the_stacks_are_told(start, monkeypatch):
    monkeypatch.setenv("FCCLIP_TIMEOUT_SECONDS", "4")
    program = start("one_sleeps", num_processes=2)
    assert program.exit_code() == 1
    text = "\n".join(program.lines)
    assert re.search(r'talking_processes.py", line \d+ in one_sleeps', text)  # where it hangs
    assert "process 0 of 2 failed: RuntimeError: " in text and "in barrier" in text  # who waited for it


@slow
def test_a_signal_to_one_of_two_machines_lets_all_save_and_asks_for_a_new_start(start, tmp_path):
    options = {"num_machines": 2, "dist_url": f"tcp://127.0.0.1:{free_port()}"}
    zero, one = (start("works_until_asked", tmp_path, machine_rank=rank, **options) for rank in range(2))
    pids(tmp_path)
    os.killpg(one.pid, signal.SIGUSR1)  # to its launcher and to its process, as some schedulers do
    assert zero.exit_code() == one.exit_code() == REQUEUE_EXIT_CODE
    steps = {(tmp_path / f"saved_{rank}").read_text() for rank in range(2)}
    assert len(steps) == 1


@slow
def test_a_signal_to_a_process_of_torchrun_lets_all_save(start, tmp_path):
    starter = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    program = start("works_until_asked", tmp_path, starter=starter)
    os.kill(pids(tmp_path)[1], signal.SIGUSR1)
    assert program.exit_code() == 1  # torchrun's own code for any other than 0
    assert all((tmp_path / f"saved_{rank}").exists() for rank in range(2))


@slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_no_process_stays_behind_when_the_launcher_is_killed(start, tmp_path):
    program = start("works_until_asked", tmp_path, num_processes=2)
    left = pids(tmp_path)
    program.kill()
    wait_until(lambda: not any(map(is_running, left)), f"{left} are still there")


# ---- what the launcher makes of it ----


@pytest.fixture
def explain(tmp_path, monkeypatch) -> Callable[..., ProcessFailedError]:
    """(exit code, errors of the processes) -> what the launcher raises; torch saw process 0 end first."""
    monkeypatch.setattr(processes, "_PRECEDENCE_S", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(exit_code: int, *errors: BaseException | None, was_asked: bool = False) -> ProcessFailedError:
        files = [tmp_path / str(rank) / "error.json" for rank in range(2)]
        for rank, error in reversed(list(enumerate(errors))):  # process 1 failed before process 0
            files[rank].parent.mkdir()
            if error is not None:
                monkeypatch.setenv("RANK", str(rank))
                monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(files[rank]))
                processes._report(error)
        failure = processes.ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file=str(files[0]))
        logs = processes.DefaultLogsSpecs(log_dir=str(tmp_path))
        config = processes.LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, logs_specs=logs)
        error, cause = processes._explain(0, failure, config, was_asked=was_asked)
        error.__cause__ = cause
        return error

    return run


def test_the_first_error_is_named_and_a_mistake_of_ours_keeps_its_traceback(explain):
    error = explain(1, RuntimeError("connection closed"), KeyError("x"))
    assert str(error) == "process 1 of 2 failed: KeyError: 'x'"
    assert not is_users(error) and "KeyError" in str(error.__cause__)


def test_a_process_that_dies_without_a_word_is_named_by_its_signal_or_code(explain):
    assert str(explain(-signal.SIGSEGV)) == "process 0 of 2 failed: it was ended by SIGSEGV"
    assert str(explain(3)) == "process 0 of 2 failed: it left with exit code 3"
    assert "FCCLIP_GRACE_SECONDS is 600" in str(explain(-signal.SIGKILL, was_asked=True))
    assert is_users(explain(3))


def test_a_process_that_exits_on_purpose_is_no_mistake_of_ours(explain):
    error = explain(1, SystemExit(4))
    assert str(error) == "process 0 of 2 failed: it left with exit code 4" and is_users(error)


def sleep_through_signals(ready) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_is_passed_on_and_a_process_that_does_not_leave_in_time_is_killed():
    before = signal.getsignal(signal.SIGTERM)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    with processes._passing_signals_on(0.3) as passed_on:
        with pytest.raises(SystemExit, match="143"):  # there is nobody yet
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        process = context.Process(target=sleep_through_signals, args=(ready,))
        process.start()
        assert ready.wait(20)
        os.kill(os.getpid(), signal.SIGTERM)
        process.join(20)
    assert process.exitcode == -signal.SIGKILL and passed_on == {signal.SIGTERM}
    assert signal.getsignal(signal.SIGTERM) == before


# ---- one process ----


def test_one_process_runs_in_this_one():
    assert launch(lambda number: (number, get_rank(), get_world_size()), 5, num_processes=0) == (5, 0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_machines": 2}, "--num-machines 2 needs --dist-url tcp://HOST:PORT"),
        ({"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://a:1"}, r"--machine-rank must lie in 0..1"),
        ({"dist_url": "localhost:1234"}, "--dist-url must be 'auto' or tcp://HOST:PORT, got 'localhost:1234'"),
        ({"num_processes": 99, "device_type": "cuda"}, f"--num-gpus 99, .* {torch.cuda.device_count()} GPU"),
    ],
)
def test_numbers_and_addresses_that_cannot_work_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        launch(print, **({"num_processes": 2} | changes))


@pytest.mark.parametrize("name", ["FCCLIP_TIMEOUT_SECONDS", "FCCLIP_GRACE_SECONDS"])
@pytest.mark.parametrize("value", ["soon", "0", "inf", "nan"])
def test_times_that_cannot_be_used_are_refused_by_the_name_of_their_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name} .* positive number of seconds, got '{value}'"):
        launch(print, num_processes=2)


def test_a_process_that_torchrun_started_starts_no_others(monkeypatch):
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert launch(lambda: "ran") == "ran"
    with pytest.raises(InputError, match="torchrun has started 1 processes.*--num-gpus says 4"):
        launch(print, num_processes=4)
