"""A training on a GPU: the numbers of the CPU, mixed precision, the frozen copy, time and memory."""

import math

import pytest
import torch

from fcclip.engine import build_trainer, dry_run
from fcclip.engine.metrics import History
from fcclip.modeling import build_model
from tests.engine.training_processes import WORDS, images, small_cfg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def trainer_on(device: str, **changes):
    """A trainer that sees the four images at every iteration; equal weights on every device."""
    cfg = small_cfg(**{"MODEL.DEVICE": device, **changes})
    torch.manual_seed(0)
    model = build_model(small_cfg(), train_vocabulary=WORDS).to(device)

    def batches(start: int):
        while True:
            yield images()

    return build_trainer(cfg, model, batches=batches, device=torch.device(device), vocabulary=WORDS)


def losses_of(trainer, steps: int = 3) -> list[float]:
    """Total loss of each step."""
    found = []
    trainer.history = History(window=1)
    trainer.model.train()
    batches = trainer.batches(0)
    for _ in range(steps):
        trainer.step(batches)
        found.append(
            trainer.history.medians()["total_loss"] if not found else trainer.history._values["total_loss"][-1]
        )
    return found


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_losses_are_those_of_the_cpu_as_long_as_points_are_drawn_alike():
    """The generators of the two devices differ, so the points do; the class loss does not see them in one step."""
    gpu, cpu = trainer_on("cuda", **{"SOLVER.AMP.ENABLED": False}), trainer_on("cpu", **{"SOLVER.AMP.ENABLED": False})
    first = [losses_of(trainer, 1)[0] for trainer in (gpu, cpu)]
    assert first[0] == pytest.approx(first[1], rel=0.05)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_mixed_precision_trains_and_stays_near_full_precision(dtype, accumulate):
    full = losses_of(trainer_on("cuda", **{"SOLVER.AMP.ENABLED": False}), 5)
    mixed = trainer_on(
        "cuda", **{"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": dtype, "SOLVER.ACCUMULATE": accumulate}
    )
    assert mixed.scaler.is_enabled() == (dtype == "float16")
    found = losses_of(mixed, 5)
    assert all(map(math.isfinite, found))
    assert found[0] == pytest.approx(full[0], rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in mixed.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_frozen_copy_gives_the_features_of_autocast(dtype):
    backbone = build_model(small_cfg(), train_vocabulary=WORDS).backbone.cuda()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        expected = backbone.eval()(images)
        found = backbone.train()(images)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


def test_the_split_of_time_adds_up_and_memory_is_counted():
    trainer = trainer_on("cuda")
    losses_of(trainer, 5)
    split = trainer.history.medians()
    parts = split["data_time"] + split["forward_time"] + split["backward_time"] + split["step_time"]
    assert 0.3 * split["time"] < parts < 1.5 * split["time"]
    assert dry_run(trainer).memory_mb > 1


def test_a_real_allocation_that_fails_ends_the_step_with_the_keys_to_turn():
    trainer = trainer_on("cuda")
    trainer.model.register_forward_hook(lambda *_: torch.empty(1 << 50, device="cuda"))
    with pytest.raises(torch.OutOfMemoryError, match="SOLVER.ACCUMULATE larger") as error:
        losses_of(trainer, 1)
    assert "allocated by torch" in str(error.value) and "at iteration 0" in str(error.value)


def test_a_resumed_training_goes_on_with_the_same_losses(tmp_path):
    """To rounding: sums of gradients by atomic additions have no fixed order on a GPU."""
    whole = losses_of(trainer_on("cuda"), 4)
    first = trainer_on("cuda")
    losses_of(first, 2)
    torch.save(first.state_dict(), tmp_path / "two.pth")
    second = trainer_on("cuda")
    second.resume(tmp_path / "two.pth")
    assert losses_of(second, 2)[-1] == pytest.approx(whole[-1], rel=1e-2)
