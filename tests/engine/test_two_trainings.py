"""What the trainer must do alike in every process; the processes' part stands in two_trainings.py and, with a model,
in training_processes.py."""

import importlib
import signal
from pathlib import Path

import pytest
import torch

from fcclip.engine import launch, load_checkpoint
from tests.engine import training_processes as training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of POSIX"),
]
# Sums over images and processes are taken in another order, in float32; gradients are of the size of 0.1 to 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes left what they did."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCCLIP_TIMEOUT_SECONDS", "60")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        launch(importlib.import_module("tests.engine.two_trainings").everything, str(folder), num_processes=2)
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """Where they left what they did with a model."""
    return folder / "with_model"


def left_by_both(folder: Path) -> dict:
    """What process 0 told, after a look at the weights of process 1."""
    first, second = (torch.load(folder / f"of_{rank}.pth") for rank in range(2))
    assert_equal_weights(first["model"], second["model"])
    return first


def assert_equal_weights(one: dict, other: dict) -> None:
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_broken_loss_of_one_process_makes_both_leave_the_step_out(folder):
    told = left_by_both(folder / "skip")
    final = load_checkpoint(folder / "skip" / "model_final.pth")
    assert final["iteration"] == 5
    assert all(state["step"] == 5 for state in final["optimizer"]["state"].values())
    whole = left_by_both(folder / "whole")
    assert not torch.equal(told["model"]["void_embedding.weight"], whole["model"]["void_embedding.weight"])


def test_both_processes_save_and_say_why_when_one_has_no_batch(folder):
    told = left_by_both(folder / "unreadable")
    assert told["error"] == "process 1: 150.jpg cannot be read" and told["iteration"] == 3
    saved = load_checkpoint(folder / "unreadable" / "model_0000002.pth")
    assert saved["iteration"] == 2 and {float(state["step"]) for state in saved["optimizer"]["state"].values()} == {3}
    assert_equal_weights(saved["model"], {key: told["model"][key] for key in saved["model"]})


@pytest.mark.parametrize("asked", [0, 1])
def test_both_processes_stop_when_one_is_asked_and_go_on_alike(folder, asked):
    told = left_by_both(folder / f"stop_{asked}")
    assert told["finished"] is False and told["stopped_at"] == [3, 3]
    assert_equal_weights(told["model"], left_by_both(folder / "whole")["model"])


def test_an_evaluation_of_both_is_broken_off_and_done_again(folder):
    told = left_by_both(folder / "stop_evaluation")
    assert told["finished"] is False and told["seen"] == [2, 4, 6]
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


# ---- with a model ----


@pytest.mark.parametrize("ce_norm", ["rank", "global"])
def test_gradients_of_two_processes_are_the_mean_of_both(trained, ce_norm):
    both = [torch.load(trained / f"{ce_norm}_{rank}.pth") for rank in range(2)]
    first, second = both[0]["alone"]
    assert sum(training.SEGMENTS[:2]) != sum(training.SEGMENTS[2:])
    assert not torch.allclose(first["void_embedding.weight"], second["void_embedding.weight"])
    for name, together in both[0]["together"].items():
        torch.testing.assert_close(together, (first[name] + second[name]) / 2, **TOLERANCE, msg=name)
        assert torch.equal(together, both[1]["together"][name]), name


@pytest.mark.parametrize("ce_norm", ["rank", "global"])
def test_only_the_global_class_norm_makes_two_processes_equal_one(trained, ce_norm):
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


def test_frozenseg_starts_from_the_published_layout_and_resumes_to_the_bit(trained):
    runs = [
        torch.load(trained / "frozenseg" / f"{run}_{rank}.pth") for run in ("whole", "resumed") for rank in range(2)
    ]
    assert len(runs[0]["sem_seg_head.pixel_decoder.sam_transformer.level_embed"]) == 3
    for run in runs[1:]:
        assert_equal_weights(runs[0], run)
