"""Two CPU processes; what they do stands in talking_processes.py and training_processes.py."""

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fcclip.comm import get_rank, get_world_size
from fcclip.engine import ProcessFailedError, launch
from fcclip.engine.signals import REQUEUE_EXIT_CODE

SHORT = "4"  # seconds of time-out for processes that hang
PATIENCE_S = 150  # on a busy machine each process takes a while to start
NAMED = rf" \(host {re.escape(socket.gethostname())}, last reported step 12\)"
# Sums over images and processes are taken in another order, in float32; gradients are of the size of 0.1 to 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def importable(tmp_path_factory):
    """Started processes find the two modules by name, and keep text features in a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def talking(importable):
    return importlib.import_module("talking_processes")


@pytest.fixture(scope="module")
def training(importable):
    return importlib.import_module("training_processes")


@pytest.fixture(scope="module")
def trained(training, tmp_path_factory) -> Path:
    """The folder in which two processes left what they did."""
    folder = tmp_path_factory.mktemp("trained")
    launch(training.everything, str(folder), num_processes=2)
    return folder


class Program(subprocess.Popen):
    """talking_processes.py, started by hand; it has a folder of its own."""

    def __init__(self, folder: Path, *words: object, start: tuple[str, ...] = (), **variables: str) -> None:
        self.folder = folder
        file = Path(__file__).with_name("talking_processes.py")
        super().__init__(
            [sys.executable, *start, str(file), *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def programs(importable, tmp_path_factory) -> Iterator[dict[str, list[Program]]]:
    """Programs that mostly wait, so all of them are started at once."""
    hang = {"FCCLIP_TIMEOUT_SECONDS": SHORT}
    folders = [tmp_path_factory.mktemp("program") for _ in range(3)]

    def machines(folder: Path, *words: object, **variables: str) -> list[Program]:
        url = f"tcp://127.0.0.1:{free_port()}"
        both = ("--num-machines", 2, "--dist-url", url)
        return [Program(folder, *words, *both, "--machine-rank", rank, **variables) for rank in range(2)]

    torchrun = ("-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2")
    torchrun += ("--master-port", str(free_port()))
    started = {
        "torchrun": [Program(folders[0], "one_sleeps", start=torchrun, **hang)],
        "machines": machines(folders[1], "one_sleeps", **hang),
        "asked": machines(folders[2], "works_until_asked", folders[2], 1.5),
    }
    yield started
    for run in (run for runs in started.values() for run in runs):
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"{files} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize("ce_norm", ["rank", "global"])
def test_gradients_of_two_processes_are_the_mean_of_both(training, trained, ce_norm):
    both = [torch.load(trained / f"{ce_norm}_{rank}.pth") for rank in range(2)]
    first, second = both[0]["alone"]
    assert sum(training.SEGMENTS[:2]) != sum(training.SEGMENTS[2:])
    assert not torch.allclose(first["void_embedding.weight"], second["void_embedding.weight"])
    for name, together in both[0]["together"].items():
        torch.testing.assert_close(together, (first[name] + second[name]) / 2, **TOLERANCE, msg=name)
        assert torch.equal(together, both[1]["together"][name]), name


@pytest.mark.parametrize("ce_norm", ["rank", "global"])
def test_only_the_global_class_norm_makes_two_processes_equal_one(training, trained, ce_norm):
    two = torch.load(trained / f"{ce_norm}_0.pth")["together"]
    model = training.small_model(training.small_cfg(**{"SOLVER.CE_NORM": ce_norm}))
    sum(model(training.images()).values()).backward()
    one = training.gradients(model)
    if ce_norm == "global":
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, **TOLERANCE, msg=name)
    else:  # the published class loss weighs every process alike, whatever its images contain
        assert any(not torch.allclose(two[name], value, **TOLERANCE) for name, value in one.items())


def test_two_processes_train_to_the_same_weights_and_write_once(trained):
    first, second = (torch.load(trained / f"weights_{rank}.pth") for rank in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    content = torch.load(trained / "model_final.pth")
    assert len(content["random"]) == 2 and content["iteration"] == 2
    assert len((trained / "metrics.json").read_text().splitlines()) == 1
    assert not any(key.startswith("module.") for key in content["model"])


def test_a_broken_loss_on_one_process_stops_both_with_its_images(trained):
    texts = [(trained / f"broken_{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "not finite at iteration 0: process 1: " in texts[0] and "images: 2.jpg, 3.jpg" in texts[0]


def test_processes_can_talk_and_share_uneven_batches_and_rank_0_returns_its_result(talking, programs):
    talked, seen = launch(talking.talk_and_share, num_processes=2)
    assert talked == [[[0, 10], "from 0", [0.5, 2.0], 2]] * 2
    assert seen == [[0, 2], [1]]


def test_an_error_in_one_process_ends_all_and_is_told_with_its_rank(talking):
    with pytest.raises(ProcessFailedError, match=r"^process 1 of 2 failed: image 7 is broken$") as error:
        launch(talking.one_raises, num_processes=2)
    assert error.value.kind == "ValueError" and "talking_processes.py" in error.value.trace


def test_a_process_that_dies_ends_all_and_is_named_with_its_host_and_step(talking, monkeypatch):
    monkeypatch.setenv("FCCLIP_TIMEOUT_SECONDS", SHORT)  # then it reports more often, too
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(ProcessFailedError, match=f"^process 1 of 2{NAMED} failed: it was ended by SIGKILL$") as error:
        launch(talking.one_is_killed, num_processes=2)
    assert (error.value.rank, error.value.host, error.value.step) == (1, socket.gethostname(), 12)
    assert handlers == {one: signal.getsignal(one) for one in handlers}


def test_a_process_that_waits_for_one_that_has_left_ends_with_its_name(talking, monkeypatch):
    monkeypatch.setenv("FCCLIP_TIMEOUT_SECONDS", SHORT)
    with pytest.raises(ProcessFailedError, match=r"^process 1 of 2 \(host .*\) failed: it has already left, while"):
        launch(talking.one_leaves_early, num_processes=2)


def test_a_process_that_stands_still_ends_all_within_the_time_out(talking, monkeypatch):
    monkeypatch.setenv("FCCLIP_TIMEOUT_SECONDS", SHORT)
    with pytest.raises(ProcessFailedError, match=f"^process 1 of 2{NAMED} failed: it does not answer any more"):
        launch(talking.one_is_stopped, num_processes=2)


def test_a_process_that_hangs_under_torchrun_is_named_with_the_line_it_is_at(programs):
    (run,) = programs["torchrun"]
    text = run.communicate(timeout=PATIENCE_S)[1]
    assert run.returncode == 1
    # Rank 0 says so, which had waited; torch's own report only knows which process it has ended first.
    assert re.search(rf"error: process 1 of 2{NAMED} failed: .* at talking_processes.py:\d+ \(one_sleeps\)", text)


def test_a_process_that_hangs_on_another_machine_is_named_on_both(programs):
    for run in programs["machines"]:
        text = run.communicate(timeout=PATIENCE_S)[1]
        assert run.returncode == 1
        assert re.search(rf"error: process 1 of 2{NAMED} failed: .* at talking_processes.py:\d+ \(one_sleeps\)", text)


def test_a_signal_to_one_of_two_machines_lets_all_save_and_asks_for_a_new_start(programs):
    zero, one = programs["asked"]
    wait_for(one.folder / "pid_0", one.folder / "pid_1")
    os.killpg(one.pid, signal.SIGUSR1)  # to its launcher and to its process, as some schedulers do
    assert zero.wait(PATIENCE_S) == one.wait(PATIENCE_S) == REQUEUE_EXIT_CODE
    assert {path.name for path in one.folder.glob("saved_*")} == {"saved_0", "saved_1"}


# ---- one process ----


def test_one_process_runs_in_this_one():
    assert launch(lambda number: (number, get_rank(), get_world_size()), 5, num_processes=0) == (5, 0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_machines": 2}, "--num-machines 2 needs --dist-url tcp://HOST:PORT"),
        ({"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://a:1"}, r"--machine-rank must lie in 0..1"),
        ({"dist_url": "localhost:1234"}, "--dist-url must be 'auto' or tcp://HOST:PORT, got 'localhost:1234'"),
    ],
)
def test_numbers_and_addresses_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        launch(print, **({"num_processes": 2} | changes))


@pytest.mark.parametrize("name", ["FCCLIP_TIMEOUT_SECONDS", "FCCLIP_GRACE_SECONDS"])
@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan"])
def test_times_that_are_none_are_refused_by_the_name_of_their_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be a positive number of seconds, got '{value}'"):
        launch(print, num_processes=2)


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match=rf"--num-gpus 99, but this machine has {torch.cuda.device_count()} GPU"):
        launch(print, num_processes=99, device_type="cuda")


def test_a_process_that_torchrun_started_starts_no_others(monkeypatch):
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert launch(lambda: "ran") == "ran"
    with pytest.raises(ValueError, match="torchrun has started 1 processes.*--num-gpus says 4"):
        launch(print, num_processes=4)
