"""Losses and gradients that are not finite, and memory that is full."""

import json
import math

import pytest
import torch

from fcclip.engine import NonFiniteError, guards
from fcclip.engine.guards import explaining_full_memory, max_skips
from fcclip.engine.metrics import JsonWriter
from tests.engine.toys import assert_trained_alike, make_batch, train_plainly


def poisoned(*positions, value=math.nan, seen=None):
    """Batches of which some hold an image whose target is not a number; `seen` collects the positions."""

    def batches(start):
        position = start
        while True:
            if seen is not None:
                seen.append(position)
            batch = make_batch(position)
            if position in positions:
                batch[1]["y"] = torch.tensor(value)
            yield batch
            position += 1

    return batches


def assert_finite(model):
    assert all(value.isfinite().all() for value in model.state_dict().values())


# ---- the policy ----


def test_a_policy_is_read_from_its_text():
    assert [max_skips(policy) for policy in ("raise", "skip:1", "skip:25")] == [0, 1, 25]


@pytest.mark.parametrize("policy", ["", "skip", "skip:0", "skip:1.5", "Raise"])
def test_other_policies_are_refused(policy):
    with pytest.raises(ValueError, match=f"SOLVER.NON_FINITE must be .* got '{policy}'"):
        max_skips(policy)


# ---- raise ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_cause(toy, toy_trainer, value):
    trainer = toy_trainer(toy(), batches=poisoned(3, value=value), checkpoint_period=0)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    text = str(error.value)
    assert "not finite at iteration 3: process 0: loss_mask = " in text and "loss_ce" not in text
    assert "(images: 3_0.jpg, 3_1.jpg, 3_2.jpg, 3_3.jpg)" in text and "SOLVER.BASE_LR" in text
    assert trainer.iteration == 3
    assert_finite(trainer.model)


def test_a_gradient_that_is_not_finite_stops_before_the_step_and_names_parameter_and_images(toy, toy_trainer):
    model = toy()
    trainer = toy_trainer(model, checkpoint_period=0)
    model.void_embedding.weight.register_hook(
        lambda gradient: gradient * math.inf if trainer.iteration == 3 else gradient
    )
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    text = str(error.value)
    assert "gradient is not finite at iteration 3 although the losses are: norm " in text
    assert "first in void_embedding.weight (images: 3_0.jpg, " in text
    assert_finite(model)


# ---- skip ----


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skip_leaves_out_exactly_the_broken_step(toy, toy_trainer, tmp_path, caplog, kind):
    model, plain, seen = toy(), toy(), []
    batches = poisoned(*([3] if kind == "loss" else []), seen=seen)
    trainer = toy_trainer(model, batches=batches, max_skips=1)
    if kind == "gradient":
        model.void_embedding.weight.register_hook(
            lambda gradient: gradient * math.nan if trainer.iteration == 3 else gradient
        )
    trainer.train()
    train_plainly(plain, left_out={3})
    assert_trained_alike(model, plain)
    assert seen == list(range(6)) and trainer.scheduler.last_epoch == 6
    assert "iteration 3" in caplog.text and "(1 in a row)" in caplog.text
    assert (tmp_path / "model_0000003.pth").is_file()  # what is due after the step is due without it too


def test_skipping_more_often_in_a_row_than_allowed_is_raised(toy, toy_trainer):
    trainer = toy_trainer(toy(), batches=poisoned(1, 2, 3), max_skips=2)
    with pytest.raises(NonFiniteError, match=r"iteration 3: .* is skip:2, and this is number 3 in a row"):
        trainer.train()
    assert trainer.iteration == 3


def test_a_good_step_ends_the_row_of_those_left_out(toy, toy_trainer):
    model, plain = toy(), toy()
    toy_trainer(model, batches=poisoned(0, 1, 3, 4), max_skips=2).train()
    train_plainly(plain, left_out={0, 1, 3, 4})
    assert_trained_alike(model, plain)


def test_a_training_of_left_out_steps_alone_ends_with_its_final_checkpoint(toy, toy_trainer, tmp_path):
    writers = {"writers": lambda start: [JsonWriter(tmp_path / "metrics.json", start=start)]}
    trainer = toy_trainer(toy(), max_iter=1, batches=poisoned(0), max_skips=1, **writers)
    assert trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == {"iteration", "lr", "grad_norm"}


# ---- the float16 loss scaler ----


def overflowing(model, trainer, iterations):
    """Gradients of these iterations overflow, as they do when the scale is too large."""
    model.void_embedding.weight.register_hook(
        lambda gradient: gradient * math.inf if trainer.iteration in iterations else gradient
    )


def test_an_overflow_in_float16_is_the_scalers_work_and_no_error(toy, toy_trainer):
    model, plain = toy(), toy()
    trainer = toy_trainer(model)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    overflowing(model, trainer, {2, 3})
    assert trainer.train()
    train_plainly(plain, left_out={2, 3})
    assert_trained_alike(model, plain)
    assert trainer.scaler.get_scale() == 256.0


def test_the_scale_survives_a_resume(toy, toy_trainer, tmp_path):
    trainer, again = toy_trainer(toy()), toy_trainer(toy())
    for one in (trainer, again):
        one.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    overflowing(trainer.model, trainer, {1})
    trainer.train()
    again.resume(tmp_path / "model_final.pth")
    assert again.scaler.state_dict() == trainer.scaler.state_dict() and again.scaler.get_scale() == 512.0


def test_overflows_without_end_are_raised(toy, toy_trainer, monkeypatch):
    monkeypatch.setattr(guards, "MAX_SCALER_SKIPS", 2)
    trainer = toy_trainer(toy(), checkpoint_period=0)
    trainer.scaler = torch.amp.GradScaler("cpu")
    overflowing(trainer.model, trainer, range(1, 6))
    with pytest.raises(NonFiniteError, match="gradient is not finite at iteration 3"):
        trainer.train()
    assert_finite(trainer.model)


def test_a_loss_that_is_not_finite_is_not_left_to_the_scaler(toy, toy_trainer):
    trainer = toy_trainer(toy(), batches=poisoned(2), checkpoint_period=0)
    trainer.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(NonFiniteError, match="loss is not finite at iteration 2"):
        trainer.train()


# ---- memory ----


def test_full_memory_says_what_was_resident_and_which_keys_to_turn(toy, toy_trainer, toy_batch):
    def full(*_):
        if trainer.iteration == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")

    def batches(start):
        for batch in map(toy_batch, range(start, 9)):
            yield [sample | {"image": torch.zeros(3, 48, 64)} for sample in batch[:2]]

    trainer = toy_trainer(toy(), batches=batches, checkpoint_period=0)
    trainer.model.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    text = str(error.value)
    assert text.startswith("out of memory on cpu at iteration 2: CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert "resident: parameters " in text and "of which frozen " in text and "More" not in text
    assert "images of this step: 3x48x64, 3x48x64" in text and "SOLVER.ACCUMULATE larger" in text


def test_resident_memory_is_counted_by_hand(toy):
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False), torch.nn.Linear(1024, 512, bias=False))
    model[0].requires_grad_(False)
    model[1].weight.grad = torch.zeros_like(model[1].weight)
    device = torch.device("cpu")
    with (
        pytest.raises(torch.OutOfMemoryError, match="parameters 6 MiB, of which frozen 4 MiB, gradients 2 MiB"),
        explaining_full_memory([], model, device=device, iteration=0),
    ):
        raise torch.OutOfMemoryError("x")
