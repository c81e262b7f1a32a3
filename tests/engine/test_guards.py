"""Losses and gradients that are not finite, and memory that is full."""

import json
import math

import pytest
import torch

import fcclip.engine.trainer as trainer_module
from fcclip.engine import NonFiniteError, OnNonFinite, guards, load_checkpoint
from fcclip.engine.guards import MAX_ROLLBACKS, explaining_full_memory
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


@pytest.mark.parametrize(
    ("text", "policy"),
    [("raise", ("raise", 0)), ("skip:1", ("skip", 1)), ("skip:25", ("skip", 25)), ("rollback", ("rollback", 0))],
)
def test_a_policy_is_read_from_its_text(text, policy):
    assert OnNonFinite.parse(text) == OnNonFinite(*policy)


@pytest.mark.parametrize("text", ["", "skip", "skip:", "skip:0", "skip:-1", "skip:1.5", "Raise", "rollback:2"])
def test_other_policies_are_refused(text):
    with pytest.raises(ValueError, match=f"SOLVER.NON_FINITE must be .* got '{text}'"):
        OnNonFinite.parse(text)


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
    trainer = toy_trainer(model, batches=batches, on_non_finite=OnNonFinite.parse("skip:1"))
    if kind == "gradient":
        model.void_embedding.weight.register_hook(
            lambda gradient: gradient * math.nan if trainer.iteration == 3 else gradient
        )
    trainer.train()
    train_plainly(plain, left_out={3})
    assert_trained_alike(model, plain)
    assert seen == list(range(6)) and trainer.scheduler.last_epoch == 6
    assert trainer.left_out == {3} and "iteration 3" in caplog.text and "left out (1 in a row)" in caplog.text
    # What is due after the step is due without it too.
    assert load_checkpoint(tmp_path / "model_0000003.pth")["left_out"] == [3]


def test_skipping_more_often_in_a_row_than_allowed_is_raised(toy, toy_trainer):
    trainer = toy_trainer(toy(), batches=poisoned(1, 2, 3), on_non_finite=OnNonFinite.parse("skip:2"))
    with pytest.raises(NonFiniteError, match=r"iteration 3: .* is skip:2, and this is number 3 in a row"):
        trainer.train()
    assert trainer.iteration == 3 and trainer.left_out == {1, 2}


def test_a_good_step_ends_the_row_of_those_left_out(toy, toy_trainer):
    model, plain = toy(), toy()
    toy_trainer(model, batches=poisoned(0, 1, 3, 4), on_non_finite=OnNonFinite.parse("skip:2")).train()
    train_plainly(plain, left_out={0, 1, 3, 4})
    assert_trained_alike(model, plain)


def test_a_training_whose_last_step_is_left_out_ends_with_its_final_checkpoint(toy, toy_trainer, tmp_path):
    trainer = toy_trainer(
        toy(),
        batches=poisoned(5),
        on_non_finite=OnNonFinite.parse("skip:1"),
        writers=lambda start: [JsonWriter(tmp_path / "metrics.json", start=start)],
    )
    assert trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert load_checkpoint(tmp_path / "model_final.pth")["iteration"] == 5
    assert json.loads((tmp_path / "metrics.json").read_text())["iteration"] == 5


def test_a_training_of_left_out_steps_alone_has_no_time_to_tell(toy, toy_trainer, tmp_path):
    writers = {"writers": lambda start: [JsonWriter(tmp_path / "metrics.json", start=start)]}
    trainer = toy_trainer(toy(), max_iter=1, batches=poisoned(0), on_non_finite=OnNonFinite("skip", 1), **writers)
    assert trainer.train()
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == {"iteration", "lr", "grad_norm"}


# ---- rollback ----

ROLLBACK = OnNonFinite.parse("rollback")


def test_rollback_goes_back_to_the_last_checkpoint_and_leaves_the_broken_step_out(
    toy, toy_trainer, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(trainer_module, "LOG_PERIOD", 1)
    model, plain, seen = toy(), toy(), []
    trainer = toy_trainer(
        model,
        max_iter=8,
        batches=poisoned(6, seen=seen),
        on_non_finite=ROLLBACK,
        checkpoint_period=4,
        writers=lambda start: [JsonWriter(tmp_path / "metrics.json", start=start)],
    )
    assert trainer.train()
    train_plainly(plain, max_iter=8, left_out={6})
    assert_trained_alike(model, plain)
    assert seen == [*range(7), *range(4, 8)]
    assert "going back to model_0000003.pth" in caplog.text and "iteration 6 is left out" in caplog.text
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(8))


def test_rollback_without_a_checkpoint_is_raised(toy, toy_trainer):
    for changes in ({}, {"checkpointer": None}):
        trainer = toy_trainer(toy(), batches=poisoned(1), on_non_finite=ROLLBACK, **changes)
        with pytest.raises(NonFiniteError, match=r"iteration 1: .*is rollback, but there is no checkpoint yet"):
            trainer.train()


def test_rollback_never_goes_to_a_checkpoint_of_an_earlier_training_in_the_folder(toy, toy_trainer):
    toy_trainer(toy()).train()
    with pytest.raises(NonFiniteError, match="there is no checkpoint yet"):
        toy_trainer(toy(), batches=poisoned(1), on_non_finite=ROLLBACK).train()


def test_a_resumed_training_goes_back_to_where_it_was_resumed_from(toy, toy_trainer, tmp_path):
    toy_trainer(toy(), max_iter=3, checkpoint_period=0).train()
    model, plain = toy(), toy()
    trainer = toy_trainer(model, batches=poisoned(4), on_non_finite=ROLLBACK, checkpoint_period=0)
    trainer.resume(tmp_path / "model_final.pth")
    trainer.train()
    train_plainly(plain, left_out={4})
    assert_trained_alike(model, plain)


def test_rollback_to_one_checkpoint_ends_some_time(toy, toy_trainer):
    positions = range(5, 5 + MAX_ROLLBACKS + 1)
    trainer = toy_trainer(toy(), max_iter=20, batches=poisoned(*positions), on_non_finite=ROLLBACK, checkpoint_period=5)
    with pytest.raises(
        NonFiniteError, match=rf"iteration {positions[-1]}: .*model_0000004.pth was gone back to 3 times"
    ):
        trainer.train()
    assert_finite(trainer.model)


def test_rollbacks_to_a_newer_checkpoint_count_afresh(toy, toy_trainer):
    model, plain, broken = toy(), toy(), {3, 5, 7, 9}
    trainer = toy_trainer(model, max_iter=10, batches=poisoned(*broken), on_non_finite=ROLLBACK)
    assert len(broken) > MAX_ROLLBACKS and trainer.train()
    train_plainly(plain, max_iter=10, left_out=broken)
    assert_trained_alike(model, plain)


def test_what_is_to_be_left_out_survives_a_checkpoint_and_a_resume(toy, toy_trainer, tmp_path):
    """Iteration 5 is broken once; a checkpoint lies between the rollback and its second time."""
    trainer = toy_trainer(toy(), batches=poisoned(5), on_non_finite=ROLLBACK, checkpoint_period=4)
    batches = trainer.batches(0)
    trainer.model.train()
    for _ in range(4):
        trainer.step(batches)
    trainer.save()
    trainer.step(batches)
    with pytest.raises(NonFiniteError) as error:
        trainer.step(batches)
    batches = trainer._go_back(error.value)
    trainer.step(batches)
    trainer.save()
    trainer.checkpointer.wait()

    model, plain = toy(seed=1), toy()
    for value, source in zip(model.backbone.parameters(), plain.backbone.parameters()):
        value.data.copy_(source)
    again = toy_trainer(model)
    again.resume(tmp_path / "model_0000004.pth")
    assert again.left_out == {5}
    again.train()
    train_plainly(plain, left_out={5})
    assert_trained_alike(model, plain)


def test_the_best_evaluation_survives_a_rollback(toy, toy_trainer, tmp_path):
    """The one at 2 is the best, and the checkpoint that is gone back to was written just before it."""
    values = {2: 30.0, 4: 20.0, 6: 10.0}
    trainer = toy_trainer(
        toy(),
        batches=poisoned(3),
        on_non_finite=ROLLBACK,
        evaluate=lambda model: {"PQ": values[trainer.iteration]},
        eval_period=2,
        best_metric="PQ",
    )
    trainer.train()
    assert trainer.evaluation.best == {"value": 30.0, "iteration": 1}
    assert load_checkpoint(tmp_path / "best.pth")["iteration"] == 1


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
    assert trainer.scaler.get_scale() == 256.0 and trainer.left_out == set()


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


def test_a_policy_goes_on_behind_overflows_without_end(toy, toy_trainer, monkeypatch):
    monkeypatch.setattr(guards, "MAX_SCALER_SKIPS", 2)
    model, plain = toy(), toy()
    trainer = toy_trainer(model, on_non_finite=OnNonFinite.parse("skip:1"))
    trainer.scaler = torch.amp.GradScaler("cpu")
    overflowing(model, trainer, {1, 2, 3})
    assert trainer.train()
    train_plainly(plain, left_out={1, 2, 3})
    assert_trained_alike(model, plain)
    assert trainer.left_out == {3}


def test_a_loss_that_is_not_finite_is_not_left_to_the_scaler(toy, toy_trainer):
    trainer = toy_trainer(toy(), batches=poisoned(2), checkpoint_period=0)
    trainer.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(NonFiniteError, match="loss is not finite at iteration 2"):
        trainer.train()


# ---- memory ----


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 20.00 GiB.\nMore", ""])
def test_full_memory_says_what_was_resident_and_which_keys_to_turn(toy, toy_trainer, toy_batch, words):
    def full(*_):
        if trainer.iteration == 2:
            raise torch.OutOfMemoryError(words)

    def batches(start):
        for batch in map(toy_batch, range(start, 9)):
            yield [sample | {"image": torch.zeros(3, 48, 64)} for sample in batch[:2]]

    trainer = toy_trainer(toy(), batches=batches, checkpoint_period=0)
    trainer.model.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    text = str(error.value)
    assert text.startswith(f"out of memory on cpu at iteration 2: {words.partition(chr(10))[0]}")
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
