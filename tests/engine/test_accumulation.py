"""A step that is cut into micro-batches is the step of the whole batch, in one process and in two."""

import importlib
from pathlib import Path

import pytest
import torch

from fcclip.engine import launch
from fcclip.structures import TrainingBatch
from tests.engine.record_golden_losses import split_into_batches

# Sums over images are taken in another order, in float32: losses move by 3e-7 of their size, gradients by 4e-7 of
# theirs, weights by 3e-7.
TOLERANCE = 1e-6


def assert_same_steps(found: dict, wanted: dict, tolerance: float = TOLERANCE) -> None:
    """Of `three_steps`: losses and gradients agree within the tolerance of their size, weights within the tolerance.

    The size of gradients is that of the largest, since rounding in one parameter comes from sums in others.
    """
    assert found["losses"].keys() == wanted["losses"].keys()
    assert len(found["gradients"]) == len(wanted["gradients"]) == 3
    for name, values in wanted["losses"].items():
        assert found["losses"][name] == pytest.approx(values, rel=tolerance, abs=0), name
    for step, gradients in enumerate(wanted["gradients"]):
        size = max(float(value.abs().max()) for value in gradients.values())
        for name, value in gradients.items():
            assert farthest(found["gradients"][step][name], value) < tolerance * size, f"{name} in step {step}"
    for name, value in wanted["weights"].items():
        assert farthest(found["weights"][name], value) < tolerance, name


def farthest(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors."""
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """training_processes.py, which started processes find by that name; text features go to a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield importlib.import_module("training_processes")


@pytest.fixture(scope="module")
def whole(training) -> dict:
    """Steps of a batch of eight: images without segments, and one with more segments than there are queries."""
    return training.three_steps()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_step_like_the_whole_batch(training, whole, parts):
    assert_same_steps(training.three_steps(**{"SOLVER.ACCUMULATE": parts}), whole)


def test_parts_without_a_segment_step_like_a_batch_without_one(training):
    nothing = (0, 0, 0, 0)
    assert_same_steps(training.three_steps(nothing, **{"SOLVER.ACCUMULATE": 2}), training.three_steps(nothing))


def test_parts_with_normalisers_of_their_own_would_step_otherwise(training, whole, monkeypatch):
    monkeypatch.setattr(TrainingBatch, "split", split_into_batches)
    found = training.three_steps(**{"SOLVER.ACCUMULATE": 4})
    assert abs(found["losses"]["total_loss"][0] / whole["losses"]["total_loss"][0] - 1) > 0.01


# ---- two processes ----


@pytest.fixture(scope="module")
def steps(training, tmp_path_factory):
    """Function (rule of the class loss, parts, rank) -> what that process did."""
    folder = tmp_path_factory.mktemp("accumulated")
    launch(training.accumulate, str(folder), num_processes=2)
    return lambda ce_norm, parts, rank: torch.load(Path(folder, f"{ce_norm}_{parts}_{rank}.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("ce_norm", ["rank", "global"])
def test_parts_in_two_processes_step_like_whole_batches_in_two(steps, ce_norm, parts):
    for rank in range(2):
        assert_same_steps(steps(ce_norm, parts, rank), steps(ce_norm, 1, rank))


@pytest.mark.slow
@pytest.mark.parametrize("ce_norm", ["rank", "global"])
def test_two_processes_with_parts_agree_bit_for_bit(steps, ce_norm):
    first, second = (steps(ce_norm, 4, rank) for rank in range(2))
    assert first["losses"] == second["losses"]
    for one, other in zip(first["gradients"], second["gradients"]):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


@pytest.mark.slow
def test_with_the_global_rule_parts_in_two_processes_step_like_one_process(steps, whole):
    assert_same_steps(steps("global", 2, 0), whole)
    assert steps("rank", 2, 0)["losses"]["loss_ce"] != pytest.approx(whole["losses"]["loss_ce"], rel=1e-3)
