"""SEED makes runs identical; DETERMINISTIC refuses operations that could differ between runs."""

import json
import os

import pytest
import torch

from fcclip.engine import apply_numeric_settings, load_checkpoint
from fcclip.losses import SetCriterion


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    """A process has one such setting, so that of the tests before is put back."""
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def train(tiny_cfg, tmp_path, shapes_world, monkeypatch, train_net):
    """Function (name, KEY, VALUE, ...) -> the final checkpoint and the recorded scalars of a run of `train_net.py`."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_world))
    tiny_cfg.DATASETS.TEST = ()
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.STEPS = 2, 3, (2,)
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg.dump())

    def run(name: str, *overrides: object) -> tuple[dict, list[dict]]:
        out = tmp_path / name
        words = map(str, ("OUTPUT_DIR", out, *overrides))
        assert train_net.main(["--config-file", str(config), *words]) == 0
        lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
        timeless = [
            {key: value for key, value in line.items() if "time" not in key and key != "eta_seconds"} for line in lines
        ]
        return load_checkpoint(out / "model_final.pth"), timeless

    return run


def assert_bit_identical(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_one_seed_gives_identical_runs_and_another_seed_gives_others(train):
    (one, one_scalars), (same, same_scalars), (other, other_scalars) = (
        train("one", "SEED", 7),
        train("same", "SEED", 7),
        train("other", "SEED", 8),
    )
    assert one_scalars == same_scalars != other_scalars
    assert_bit_identical(one["model"], same["model"])
    assert one["optimizer"]["state"].keys() == same["optimizer"]["state"].keys()
    for key, state in one["optimizer"]["state"].items():
        assert_bit_identical(state, same["optimizer"]["state"][key])
    assert torch.equal(one["random"][0]["torch"], same["random"][0]["torch"])
    key = "sem_seg_head.predictor.query_feat.weight"
    assert not torch.equal(one["model"][key], other["model"][key])


def test_a_negative_seed_is_drawn_and_can_be_asked_for_again(train):
    drawn, scalars = train("drawn", "SEED", -1)
    again, same_scalars = train("again", "SEED", drawn["seed"])
    assert drawn["seed"] >= 0 and scalars == same_scalars
    assert_bit_identical(drawn["model"], again["model"])


def test_deterministic_runs_train_with_torchs_setting_and_to_the_same_weights(train, monkeypatch):
    plain, _ = train("plain", "SEED", 7)
    seen, forward = [], SetCriterion.forward

    def watching(*args, **kwargs):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(SetCriterion, "forward", watching)
    strict, _ = train("strict", "SEED", 7, "DETERMINISTIC", True)
    assert seen == [True] * 3
    assert_bit_identical(strict["model"], plain["model"])


def test_an_operation_without_a_deterministic_form_raises_only_when_asked_to(train, monkeypatch):
    forward = SetCriterion.forward

    def with_put(*args, **kwargs):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))  # the last of two writes wins, or the first
        return forward(*args, **kwargs)

    monkeypatch.setattr(SetCriterion, "forward", with_put)
    train("plain")
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        train("strict", "DETERMINISTIC", True)


def test_deterministic_settings_turn_the_choice_of_kernels_by_speed_off(tiny_cfg, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    tiny_cfg.CUDNN_BENCHMARK = True
    apply_numeric_settings(tiny_cfg, training=True)
    assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    tiny_cfg.DETERMINISTIC = True
    apply_numeric_settings(tiny_cfg, training=True)
    assert not torch.backends.cudnn.benchmark and torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # cuBLAS raises without it
