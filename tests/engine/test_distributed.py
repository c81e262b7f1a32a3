"""Two CPU processes; what they do stands in talking_processes.py and training_processes.py."""

import importlib
import signal
from pathlib import Path

import pytest
import torch

from fcclip.engine import ProcessFailedError, get_rank, get_world_size, launch

# Sums over pictures and processes are taken in another order, in float32; gradients are of the size of 0.1 to 1.
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
    sum(model(training.pictures()).values()).backward()
    one = training.gradients(model)
    if ce_norm == "global":
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, **TOLERANCE, msg=name)
    else:  # the published class loss weighs every process alike, whatever its pictures contain
        assert any(not torch.allclose(two[name], value, **TOLERANCE) for name, value in one.items())


def test_two_processes_train_to_the_same_weights_and_write_once(trained):
    first, second = (torch.load(trained / f"weights_{rank}.pth") for rank in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    content = torch.load(trained / "model_final.pth")
    assert len(content["random"]) == 2 and content["iteration"] == 2
    assert len((trained / "metrics.json").read_text().splitlines()) == 1
    assert not any(key.startswith("module.") for key in content["model"])


def test_a_broken_loss_on_one_process_stops_both_with_its_pictures(trained):
    texts = [(trained / f"broken_{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "not finite at iteration 0: process 1: " in texts[0] and "pictures: 2.jpg, 3.jpg" in texts[0]


def test_processes_can_talk_and_rank_0_returns_its_result(talking):
    assert launch(talking.talk, num_processes=2) == [[[0, 10], "from 0", [0.5, 2.0], 2]] * 2


def test_an_error_in_one_process_ends_all_and_is_told_with_its_rank(talking):
    with pytest.raises(ProcessFailedError, match=r"^process 1 of 2 failed: picture 7 is broken$") as error:
        launch(talking.one_raises, num_processes=2)
    assert error.value.kind == "ValueError" and "talking_processes.py" in error.value.trace


def test_a_process_that_dies_ends_all_and_is_named(talking):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ProcessFailedError, match=r"^process 1 of 2 failed: it was ended by SIGKILL$"):
        launch(talking.one_dies, num_processes=2)
    assert signal.getsignal(signal.SIGINT) is handler


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
