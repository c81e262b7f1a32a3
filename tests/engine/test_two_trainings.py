"""What the trainer must do alike in every process; the processes' part stands in two_trainings.py."""

import importlib
import signal
from pathlib import Path

import pytest
import torch

from fcclip.engine import launch, load_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes left what they did."""
    if not hasattr(signal, "SIGUSR1"):
        pytest.skip("needs the signals of POSIX")
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCCLIP_TIMEOUT_SECONDS", "60")
        launch(importlib.import_module("tests.engine.two_trainings").everything, str(folder), num_processes=2)
    return folder


def left_by_both(folder: Path) -> dict:
    """What process 0 told, after a look at the weights of process 1."""
    first, second = (torch.load(folder / f"of_{rank}.pth") for rank in range(2))
    assert_equal_weights(first["model"], second["model"])
    return first


def assert_equal_weights(one: dict, other: dict) -> None:
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_broken_loss_of_one_process_makes_both_leave_the_step_out(folder, policy):
    told = left_by_both(folder / policy)
    assert told["left_out"] == [3]
    final = load_checkpoint(folder / policy / "model_final.pth")
    assert final["iteration"] == 5 and final["left_out"] == [3]
    assert all(state["step"] == 5 for state in final["optimizer"]["state"].values())
    whole = left_by_both(folder / "whole")
    assert not torch.equal(told["model"]["void_embedding.weight"], whole["model"]["void_embedding.weight"])


@pytest.mark.parametrize("asked", [0, 1])
def test_both_processes_stop_when_one_is_asked_and_go_on_alike(folder, asked):
    told = left_by_both(folder / f"stop_{asked}")
    assert told["finished"] is False and told["stopped_at"] == [3, 3]
    assert_equal_weights(told["model"], left_by_both(folder / "whole")["model"])


def test_an_evaluation_of_both_is_broken_off_and_done_again(folder):
    told = left_by_both(folder / "stop_evaluation")
    assert told["finished"] is False and told["seen"] == [2, 4, 6]
    assert_equal_weights(told["model"], left_by_both(folder / "whole")["model"])


def test_a_dry_run_of_both_changes_nothing(folder):
    told = left_by_both(folder / "dry_run")
    assert told["found"]["batch"] == ["0_0.jpg", "0_1.jpg"]
    assert_equal_weights(told["model"], left_by_both(folder / "whole")["model"])


def test_the_files_of_a_run_are_those_of_one_process(folder):
    assert sorted(path.name for path in (folder / "whole").iterdir()) == [
        "last_checkpoint",
        "model_0000001.pth",
        "model_0000003.pth",
        "model_final.pth",
        "of_0.pth",
        "of_1.pth",
    ]
