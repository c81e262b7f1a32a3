import copy
import itertools
import json
import logging
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from fcclip.config import get_cfg
from fcclip.engine import (
    NonFiniteError,
    StopRequest,
    amp_dtype,
    build_trainer,
    check_training,
    dry_run,
    load_checkpoint,
)
from fcclip.engine.metrics import JsonWriter
from fcclip.structures import Targets
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_notes, load_weights
from tests.engine.toys import assert_trained_alike, make_batch, toy_batches, train_plainly


def weights_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_weights(one, other):
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def json_writer(folder):
    return lambda start: [JsonWriter(folder / "metrics.json", start=start)]


# ---- the loop ----


def test_an_iteration_is_a_clipped_step_at_the_rate_of_the_schedule(toy, toy_trainer):
    trainer, plain = toy_trainer(toy()), toy()
    frozen = weights_of(trainer.model.backbone)
    trainer.train()
    train_plainly(plain)
    assert_trained_alike(trainer.model, plain)
    assert_equal_weights(frozen, trainer.model.backbone.state_dict())


class SumModel(torch.nn.Module):
    """A loss that is divided by the size of the whole batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(6))

    def forward(self, batch):
        errors = [(sample["x"] @ self.weight - sample["y"]) ** 2 for sample in batch]
        return {"loss": sum(errors) / len(batch.segment_counts or batch)}


@pytest.mark.parametrize(("size", "accumulate"), [(8, 4), (5, 2)])
def test_losses_of_parts_add_up_to_those_of_the_whole_batch(toy_trainer, toy_batch, size, accumulate):
    def batches(start):
        return (toy_batch(position, size) for position in range(start, 9))

    whole = toy_trainer(SumModel(), batches=batches, checkpointer=None)
    parts = toy_trainer(SumModel(), batches=batches, checkpointer=None, accumulate=accumulate)
    for trainer in (whole, parts):
        trainer.train()
    assert parts.history.medians()["total_loss"] == pytest.approx(whole.history.medians()["total_loss"], rel=1e-6)
    torch.testing.assert_close(parts.model.weight, whole.model.weight, rtol=0, atol=1e-6)


def test_a_checkpoint_with_broken_weights_is_not_written(toy, toy_trainer, tmp_path):
    trainer = toy_trainer(toy())
    trainer.model.void_embedding.weight.data.fill_(math.nan)
    trainer.iteration = 2
    with pytest.raises(NonFiniteError, match=r"first: void_embedding.weight"):
        trainer.save()
    assert not list(tmp_path.glob("*.pth"))


def test_evaluation_runs_at_its_period_and_once_at_the_end(toy, toy_trainer, tmp_path):
    seen = []

    def evaluate(model):
        seen.append((trainer.iteration, model.training, torch.is_grad_enabled()))
        return {"panoptic_seg/PQ": 12.5, "panoptic_seg/PQ_unseen": math.nan}

    trainer = toy_trainer(toy(), evaluate=evaluate, eval_period=2, writers=json_writer(tmp_path))
    trainer.train()
    assert seen == [(2, False, False), (4, False, False), (6, False, False)]
    results = [line for line in records(tmp_path) if "panoptic_seg/PQ" in line]
    assert [line["iteration"] for line in results] == [1, 3, 5]
    assert results[0]["panoptic_seg/PQ"] == 12.5 and results[0]["panoptic_seg/PQ_unseen"] is None
    assert trainer.model.training


def test_metrics_are_written_every_twenty_iterations_and_at_the_end(toy, toy_trainer, tmp_path):
    trainer = toy_trainer(toy(), max_iter=45, checkpointer=None, writers=json_writer(tmp_path))
    trainer.train()
    lines = records(tmp_path)
    assert [line["iteration"] for line in lines] == [19, 39, 44]
    published = {"iteration", "total_loss", "loss_ce", "loss_mask", "lr", "time", "data_time", "eta_seconds"}
    assert all(published <= set(line) for line in lines)
    assert all(list(line) == sorted(line) for line in lines)
    assert lines[0]["lr"] == pytest.approx(0.001)  # after the step at 4
    assert lines[-1]["eta_seconds"] == 0


def test_written_losses_are_medians_of_the_window(toy, toy_trainer, toy_batch, tmp_path):
    trainer = toy_trainer(toy(), max_iter=20, checkpointer=None, writers=json_writer(tmp_path))
    losses = []
    trainer.model.register_forward_hook(lambda *stuff: losses.append(stuff[-1]["loss_mask"].item()))
    trainer.train()
    (line,) = records(tmp_path)
    assert line["loss_mask"] == pytest.approx((sorted(losses)[9] + sorted(losses)[10]) / 2)


# ---- checkpoints and resume ----


def test_checkpoints_have_the_published_names_and_leave_the_clip_out(toy, toy_trainer, tmp_path):
    trainer = toy_trainer(toy(), max_iter=5, notes={"config": "A: 1\n", "vocabulary": {"name": "x"}})
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {
        "model_0000001.pth",
        "model_0000003.pth",
        "model_final.pth",
        "last_checkpoint",
    }
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    content = load_checkpoint(tmp_path / "model_0000003.pth")
    assert content["iteration"] == 3 and content["config"] == "A: 1\n" and content["vocabulary"] == {"name": "x"}
    assert {"model", "optimizer", "scheduler", "scaler", "random"} <= set(content)
    assert not any(key.startswith("backbone") for key in content["model"])
    assert "criterion.empty_weight" in content["model"]


def noisy(start, batches):
    """The batches with noise from torch's global generator."""
    for batch in batches(start):
        yield [sample | {"x": sample["x"] + torch.randn(6)} for sample in batch]


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(toy, toy_trainer, toy_batch, tmp_path):
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()

    def batches(start):
        return noisy(start, lambda first: (toy_batch(position) for position in range(first, 100)))

    whole = toy_trainer(toy(), folder=folders[0], batches=batches)
    torch.manual_seed(5)
    whole.train()

    stopped = toy_trainer(toy(), folder=folders[1], batches=batches)
    torch.manual_seed(5)
    stream = batches(0)
    stopped.model.train()
    for _ in range(3):
        stopped.step(stream)
    stopped.save()
    stopped.checkpointer.wait()

    torch.manual_seed(99)
    resumed = toy_trainer(toy(seed=0), folder=folders[1], batches=batches)
    resumed.resume(folders[1] / "model_0000002.pth")
    assert resumed.iteration == 3
    resumed.train()
    assert_equal_weights(whole.model.state_dict(), resumed.model.state_dict())


def test_resuming_from_weights_alone_says_what_to_do(toy, toy_trainer, tmp_path):
    torch.save({"model": toy().state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"no state of a training \(missing: optimizer, .*MODEL.WEIGHTS"):
        toy_trainer(toy()).resume(tmp_path / "weights.pth")


def test_resuming_with_other_parameter_groups_is_refused(toy, toy_trainer, tmp_path):
    trainer = toy_trainer(toy(), max_iter=1)
    trainer.train()
    model = toy()
    model.void_embedding.requires_grad_(False)
    with pytest.raises(ValueError, match="belongs to other parameter groups"):
        toy_trainer(model).resume(tmp_path / "model_final.pth")


def test_resuming_with_another_clip_is_refused(toy, toy_trainer, tmp_path):
    model = toy(seed=0)
    toy_trainer(model, max_iter=1, notes=frozen_notes(model)).train()
    toy_trainer(toy(seed=0)).resume(tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match="trained on another CLIP"):
        toy_trainer(toy(seed=1)).resume(tmp_path / "model_final.pth")


def test_resuming_with_another_number_of_processes_keeps_the_position(toy, toy_trainer, tmp_path, caplog):
    trainer = toy_trainer(toy(), max_iter=3)
    trainer.train()
    content = load_checkpoint(tmp_path / "model_final.pth")
    content["random"] = content["random"] * 2
    torch.save(content, tmp_path / "two.pth")
    again = toy_trainer(toy(), max_iter=3)
    again.resume(tmp_path / "two.pth")
    assert again.iteration == 3 and "written by 2 processes, now there are 1" in caplog.text


def test_a_finished_run_that_is_resumed_only_evaluates(toy, toy_trainer, tmp_path):
    toy_trainer(toy(), max_iter=2).train()
    calls = []
    again = toy_trainer(toy(), max_iter=2, evaluate=lambda model: calls.append(1) or {}, batches=lambda start: iter(()))
    again.resume(tmp_path / "model_final.pth")
    again.train()
    assert calls == [1]


# ---- the write overlaps the training ----


@pytest.fixture
def slow_writes(monkeypatch):
    """Writing waits until the event `go` is set; (began, go)."""
    began, go, real = threading.Event(), threading.Event(), torch.save

    def slow(*args, **kwargs):
        began.set()
        assert go.wait(20), "nobody let the write go on"
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", slow)
    yield began, go
    go.set()


def test_the_training_goes_on_while_a_checkpoint_is_written(toy, toy_trainer, tmp_path, slow_writes):
    began, go = slow_writes
    trainer = toy_trainer(toy(), max_iter=5, checkpoint_period=2)
    batches = trainer.batches(0)
    for _ in range(2):
        trainer.step(batches)
    expected = weights_of(trainer.model)
    trainer.save()
    assert began.wait(20)
    for _ in range(2):
        trainer.step(batches)
    assert trainer.iteration == 4 and not list(tmp_path.glob("*.pth"))
    go.set()
    trainer.checkpointer.wait()
    content = load_checkpoint(tmp_path / "model_0000001.pth")
    assert content["iteration"] == 1
    assert_equal_weights(content["model"], expected)
    assert not torch.equal(trainer.model.void_embedding.weight, expected["void_embedding.weight"])
    assert all(state["step"] == 2 for state in content["optimizer"]["state"].values())
    assert content["scheduler"]["last_epoch"] == 2


def test_a_training_ends_only_when_its_last_checkpoint_is_written(toy, toy_trainer, tmp_path, slow_writes):
    _, go = slow_writes
    threading.Timer(0.3, go.set).start()
    assert toy_trainer(toy(), max_iter=1).train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def full_disk(monkeypatch, *, fits=lambda iteration: False):
    """No checkpoint can be written but those after iterations of which `fits` is true."""
    real = torch.save

    def save(content, file):
        if fits(content["iteration"]):
            return real(content, file)
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)


def test_a_training_that_cannot_save_twice_in_a_row_ends_at_once(toy, toy_trainer, tmp_path, monkeypatch):
    def slow_batch(position):
        time.sleep(0.002)
        return make_batch(position)

    slow = {"batches": lambda start: map(slow_batch, itertools.count(start)), "checkpoint_period": 50}
    trainer = toy_trainer(toy(), max_iter=1000, **slow)
    full_disk(monkeypatch, fits=lambda iteration: iteration == 49)
    with pytest.raises(OSError, match="cannot write .*model_0000149.pth.*No space left"):
        trainer.train()
    assert 150 <= trainer.iteration < 200  # long before the next checkpoint is due
    assert load_checkpoint(tmp_path / (tmp_path / "last_checkpoint").read_text())["iteration"] == 49
    assert not list(tmp_path.glob(".*.writing"))


def test_a_final_checkpoint_that_cannot_be_written_is_an_error_whatever_is_written_after_it(
    toy, toy_trainer, tmp_path, monkeypatch
):
    trainer = toy_trainer(toy(), evaluate=lambda model: {"PQ": 1.0})
    full_disk(monkeypatch, fits=lambda iteration: iteration < 5)
    with pytest.raises(OSError, match="cannot write .*model_final.pth"):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_disk(toy, toy_trainer, monkeypatch, caplog):
    def batches(start):
        yield from map(make_batch, range(start, 3))
        raise LookupError("no more images")

    full_disk(monkeypatch)
    with pytest.raises(LookupError, match="no more images"):
        toy_trainer(toy(), batches=batches).train()
    assert "No space left" in caplog.text


# ---- evaluation and the best weights ----


def scored(*values):
    """An evaluation that gives these values one after the other, and what it was called with."""
    values, seen = list(values), []

    def evaluate(model):
        seen.append(weights_of(model))
        return {"a/PQ": values[len(seen) - 1], "b/PQ": -values[len(seen) - 1]}

    return evaluate, seen


@pytest.mark.parametrize(("metric", "best"), [("a/PQ", 2), ("b/PQ", 1)])
def test_best_weights_are_those_with_the_highest_value_of_the_metric(toy, toy_trainer, tmp_path, caplog, metric, best):
    evaluate, seen = scored(20.0, math.nan if best == 2 else 10.0, 30.0, 30.0)
    caplog.set_level(logging.INFO)
    trainer = toy_trainer(
        toy(), max_iter=8, evaluate=evaluate, eval_period=2, best_metric=metric, notes={"config": "A: 1\n"}
    )
    trainer.train()
    content = load_checkpoint(tmp_path / "best.pth")
    value = {2: 30.0, 1: -10.0}[best]
    assert content["iteration"] == 2 * best + 1 and content["config"] == "A: 1\n"
    assert content["best"] == {"metric": metric, "value": value, "iteration": 2 * best + 1}
    assert_equal_weights(content["model"], seen[best])
    assert f"best so far: {metric} = {value:.4f} after iteration {2 * best + 1}" in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert load_weights(toy(), tmp_path / "best.pth")["iteration"] == 2 * best + 1


def test_without_a_metric_no_best_weights_are_kept(toy, toy_trainer, tmp_path):
    toy_trainer(toy(), evaluate=scored(1.0, 2.0, 3.0)[0], eval_period=2).train()
    assert not (tmp_path / "best.pth").exists()


def test_the_best_value_survives_a_resume(toy, toy_trainer, tmp_path):
    toy_trainer(toy(), max_iter=5, evaluate=scored(9.0, 5.0, 5.0)[0], eval_period=2, best_metric="a/PQ").train()
    again = toy_trainer(toy(), max_iter=8, evaluate=scored(7.0, 8.0)[0], eval_period=2, best_metric="a/PQ")
    again.resume(tmp_path / "model_final.pth")
    assert again.evaluation.best == {"value": 9.0, "iteration": 1}
    again.train()
    assert load_checkpoint(tmp_path / "best.pth")["iteration"] == 1
    again = toy_trainer(toy(), max_iter=9, evaluate=scored(9.5)[0], best_metric="a/PQ")
    again.resume(tmp_path / "model_final.pth")
    again.train()
    assert load_checkpoint(tmp_path / "best.pth")["iteration"] == 8


def test_best_weights_that_could_not_be_written_are_written_after_the_next_evaluation(
    toy, toy_trainer, tmp_path, monkeypatch
):
    evaluate, seen = scored(9.0, 5.0, 5.0)
    trainer = toy_trainer(toy(), evaluate=evaluate, eval_period=2, best_metric="a/PQ", checkpoint_period=0)
    full, real = [True], torch.save

    def save(content, file):
        if full and full.pop():
            raise OSError(28, "No space left on device")
        return real(content, file)

    monkeypatch.setattr(torch, "save", save)
    trainer.train()
    content = load_checkpoint(tmp_path / "best.pth")
    assert content["iteration"] == 1
    assert_equal_weights(content["model"], seen[0])


class Killed(BaseException):
    """Ends a training between two of its instructions, as a signal would."""


@pytest.mark.parametrize("number", [0, 1])
def test_an_evaluation_that_was_killed_is_done_again_and_recorded_once(toy, toy_trainer, tmp_path, caplog, number):
    values, iteration = [1.0, 3.0, 2.0], 2 * number + 1
    before, _ = scored(*values)

    def killed(model):
        if trainer.iteration == iteration + 1:
            raise Killed
        return before(model)

    parts = {"eval_period": 2, "best_metric": "a/PQ", "writers": json_writer(tmp_path)}
    trainer = toy_trainer(toy(), evaluate=killed, **parts)
    with pytest.raises(Killed):
        trainer.train()
    evaluate, seen = scored(*values[number:])
    again = toy_trainer(toy(), evaluate=evaluate, **parts)
    again.resume(tmp_path / f"model_{iteration:07d}.pth")
    caplog.set_level(logging.INFO)
    again.train()
    assert f"the evaluation after iteration {iteration} was not finished; doing it now" in caplog.text
    assert_equal_weights(load_checkpoint(tmp_path / f"model_{iteration:07d}.pth")["model"], seen[0])
    assert [one["iteration"] for one in records(tmp_path) if "a/PQ" in one] == [1, 3, 5]
    assert load_checkpoint(tmp_path / "best.pth")["iteration"] == 3


def test_an_evaluation_that_is_noted_is_not_done_again(toy, toy_trainer, tmp_path):
    def killed_after_two(start):
        yield from map(make_batch, range(start, 2))
        raise Killed

    parts = {"eval_period": 2, "best_metric": "a/PQ", "writers": json_writer(tmp_path)}
    with pytest.raises(Killed):
        toy_trainer(toy(), evaluate=scored(9.0)[0], batches=killed_after_two, **parts).train()
    again = toy_trainer(toy(), evaluate=scored(1.0, 2.0)[0], **parts)
    again.resume(tmp_path / "model_0000001.pth")
    again.train()
    assert [(one["iteration"], one["a/PQ"]) for one in records(tmp_path) if "a/PQ" in one] == [
        (1, 9.0),
        (3, 1.0),
        (5, 2.0),
    ]
    assert again.evaluation.best == {
        "value": 9.0,
        "iteration": 1,
    }  # which the checkpoint before the evaluation did not know


def test_a_new_training_does_not_believe_the_notes_of_an_older_one_in_the_folder(toy, toy_trainer, tmp_path):
    parts = {"eval_period": 2, "best_metric": "a/PQ"}
    toy_trainer(toy(), max_iter=2, evaluate=scored(9.0)[0], **parts).train()

    def killed(model):
        raise Killed

    with pytest.raises(Killed):
        toy_trainer(toy(), evaluate=killed, **parts).train()
    again = toy_trainer(toy(), evaluate=scored(1.0, 2.0, 3.0)[0], **parts)
    again.resume(tmp_path / "model_0000001.pth")
    again.train()
    assert again.evaluation.best == {"value": 3.0, "iteration": 5}


def test_an_evaluation_that_draws_random_numbers_changes_no_step(toy, toy_trainer, tmp_path):
    folders = [tmp_path / "with", tmp_path / "without"]
    for folder in folders:
        folder.mkdir()
    trainers = []
    for folder, period in zip(folders, (2, 0)):
        trainer = toy_trainer(
            toy(),
            folder=folder,
            batches=lambda start: noisy(start, toy_batches),
            evaluate=lambda model: {"PQ": torch.rand(3).sum().item() + np.random.rand()},
            eval_period=period,
        )
        torch.manual_seed(5)
        trainer.train()
        trainers.append(trainer)
    assert_equal_weights(*(trainer.model.state_dict() for trainer in trainers))


def test_images_of_an_evaluation_go_to_every_writer(toy, toy_trainer):
    told = []

    class Writer:
        def write(self, iteration, scalars):
            told.append((iteration, "scalars"))

        def images(self, iteration, images):
            told.append((iteration, list(images)))

        def close(self):
            told.append("closed")

    trainer = toy_trainer(
        toy(),
        max_iter=4,
        evaluate=lambda model: {"PQ": 1.0},
        eval_period=2,
        draw=lambda model: {"a.png": np.zeros((4, 4, 3), np.uint8)} if trainer.iteration == 2 else {},
        writers=lambda start: [Writer()],
    )
    trainer.train()
    assert told == [(1, "scalars"), (1, ["a.png"]), (3, "scalars"), (3, "scalars"), "closed"]


# ---- asked to stop ----


def send_to_myself(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of POSIX")


@needs_signals
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("when", [0, 2, 3])
def test_a_request_to_stop_is_followed_after_the_step_and_the_resumed_run_is_the_same(
    toy, toy_trainer, tmp_path, when, name
):
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()

    def batches(start):
        return noisy(start, toy_batches)

    def interrupted(start):
        for position, batch in enumerate(batches(start), start):
            if position == when:
                send_to_myself(getattr(signal, name))
            yield batch

    torch.manual_seed(5)
    whole = toy_trainer(toy(), folder=folders[0], batches=batches)
    assert whole.train()

    torch.manual_seed(5)
    with StopRequest() as stop:
        stopped = toy_trainer(toy(), folder=folders[1], batches=interrupted, stop=stop)
        assert not stopped.train()
    assert stop.signal_name == name and stopped.iteration == when + 1
    assert (folders[1] / "last_checkpoint").read_text() == f"model_{when:07d}.pth"

    torch.manual_seed(99)
    resumed = toy_trainer(toy(), folder=folders[1], batches=batches)
    resumed.resume(folders[1] / f"model_{when:07d}.pth")
    assert resumed.train()
    assert_equal_weights(whole.model.state_dict(), resumed.model.state_dict())


@needs_signals
def test_a_request_to_stop_breaks_an_evaluation_off_and_it_is_done_again(toy, toy_trainer, tmp_path):
    """Also without a checkpoint at that iteration; the random numbers are those from before the evaluation."""
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()
    parts = {"eval_period": 2, "checkpoint_period": 0, "batches": lambda start: noisy(start, toy_batches)}

    def evaluate(model):
        return {"PQ": torch.rand(()).item()}

    def interrupted(model):
        evaluate(model)
        send_to_myself()
        time.sleep(5)
        raise AssertionError("nobody broke the evaluation off")

    torch.manual_seed(5)
    whole = toy_trainer(toy(), folder=folders[0], evaluate=evaluate, writers=json_writer(folders[0]), **parts)
    assert whole.train()
    torch.manual_seed(5)
    with StopRequest() as stop:
        stopped = toy_trainer(
            toy(), folder=folders[1], evaluate=interrupted, writers=json_writer(folders[1]), stop=stop, **parts
        )
        assert not stopped.train()
    assert stopped.iteration == 2 and stopped.model.training
    assert (folders[1] / "last_checkpoint").read_text() == "model_0000001.pth"
    resumed = toy_trainer(toy(), folder=folders[1], evaluate=evaluate, writers=json_writer(folders[1]), **parts)
    resumed.resume(folders[1] / "model_0000001.pth")
    assert resumed.train()
    assert_equal_weights(whole.model.state_dict(), resumed.model.state_dict())
    evaluations = [[one for one in records(folder) if "PQ" in one] for folder in folders]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 3


@needs_signals
@pytest.mark.parametrize("in_evaluation", [False, True])
def test_a_request_at_the_end_leaves_the_final_evaluation_to_the_resumed_run(toy, toy_trainer, tmp_path, in_evaluation):
    def batches(start):
        for position, batch in enumerate(toy_batches(start), start):
            if position == 5 and not in_evaluation:
                send_to_myself()
            yield batch

    with StopRequest() as stop:
        trainer = toy_trainer(toy(), batches=batches, evaluate=lambda model: send_to_myself() or {}, stop=stop)
        assert not trainer.train()
    assert trainer.iteration == 6 and (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    evaluate, seen = scored(1.0)
    again = toy_trainer(toy(), evaluate=evaluate)
    again.resume(tmp_path / "model_final.pth")
    assert again.train() and len(seen) == 1


@needs_signals
def test_a_request_that_cannot_be_saved_is_an_error_and_no_polite_end(toy, toy_trainer, monkeypatch):
    full_disk(monkeypatch)
    with StopRequest() as stop:
        trainer = toy_trainer(toy(), checkpoint_period=0, stop=stop)
        send_to_myself()
        with pytest.raises(OSError, match="cannot write"):
            trainer.train()


# ---- trying out ----


def test_a_dry_run_changes_nothing(toy, toy_trainer, tmp_path):
    folders = [tmp_path / "tried", tmp_path / "not"]
    for folder in folders:
        folder.mkdir()
    trainers = [
        toy_trainer(toy(), folder=folder, batches=lambda start: noisy(start, toy_batches)) for folder in folders
    ]
    torch.manual_seed(5)
    tried = dry_run(trainers[0])
    assert not list(folders[0].iterdir()) and trainers[0].iteration == 0
    assert tried.samples == [f"0_{index}.jpg" for index in range(4)]
    assert tried.time > 0 and tried.data_time > 0 and tried.memory_mb > 1
    model = toy()
    torch.manual_seed(5)
    loss = sum(model(next(noisy(0, toy_batches))).values()).item()
    assert tried.total_loss == pytest.approx(loss)
    for trainer in trainers:
        torch.manual_seed(5)
        trainer.train()
    assert_equal_weights(*(trainer.model.state_dict() for trainer in trainers))


def test_a_dry_run_of_a_resumed_training_changes_nothing_either(toy, toy_trainer, tmp_path):
    parts = {"batches": lambda start: noisy(start, toy_batches)}
    toy_trainer(toy(), **parts).train()
    trainer = toy_trainer(toy(), **parts)
    trainer.resume(tmp_path / "model_0000003.pth")
    random, state = torch.get_rng_state(), copy.deepcopy(trainer.state_dict())
    tried = dry_run(trainer)
    assert tried.samples[0] == "4_0.jpg"
    assert same(trainer.state_dict(), state) and torch.equal(torch.get_rng_state(), random)


def same(one, other):
    """Whether nested containers of tensors are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_dry_run_tells_shapes_and_segments(toy, toy_trainer, toy_batch):
    targets = Targets(labels=torch.tensor([1, 2]), masks=torch.zeros(2, 24, 32, dtype=torch.bool))
    samples = [sample | {"image": torch.zeros(3, 48, 64), "targets": targets} for sample in toy_batch(0)[:1]]
    tried = dry_run(toy_trainer(toy(), batches=lambda start: iter([samples])))
    assert tried.samples == ["0_0.jpg, image 3x48x64, 2 segments on a grid of 24x32"]


def test_a_dry_run_tells_the_norm_of_unscaled_gradients(toy, toy_trainer):
    norms = []
    for enabled in (False, True):
        trainer = toy_trainer(toy())
        trainer.scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        norms.append(dry_run(trainer).grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_dry_run_raises_what_the_training_would(toy, toy_trainer, toy_batch):
    broken = [sample | {"y": torch.tensor(math.nan)} for sample in toy_batch(0)]
    with pytest.raises(NonFiniteError, match="loss is not finite at iteration 0"):
        dry_run(toy_trainer(toy(), batches=lambda start: iter([broken])))

    def full(*_):
        raise torch.OutOfMemoryError("full")

    trainer = toy_trainer(toy())
    trainer.model.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError, match="SOLVER.ACCUMULATE larger"):
        dry_run(trainer)


# ---- from a config ----


def shapes_cfg(**solver):
    cfg = get_cfg()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    for name, value in solver.items():
        cfg.SOLVER[name] = value
    return cfg


def test_a_class_list_of_another_length_is_refused():
    check_training(shapes_cfg(), Vocabulary.from_names("a; b; c"), world_size=1)
    with pytest.raises(ValueError, match=r"'pets' has 2 classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 3. Set it to 2"):
        check_training(shapes_cfg(), Vocabulary.from_names("a; b", name="pets"), world_size=1)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"IMS_PER_BATCH": 4, "ACCUMULATE": 3}, "4 cannot be split evenly over 2 .*ACCUMULATE 3"),
        ({"IMS_PER_BATCH": 0}, "IMS_PER_BATCH 0 cannot be split"),
        ({"ACCUMULATE": 0}, "SOLVER.ACCUMULATE must be at least 1, got 0"),
        ({"NON_FINITE": "skip"}, "SOLVER.NON_FINITE must be 'raise' or 'skip:N' .* got 'skip'"),
    ],
)
def test_solver_values_that_cannot_train_are_refused(solver, message):
    with pytest.raises(ValueError, match=message):
        check_training(shapes_cfg(**solver), Vocabulary.from_names("a; b; c"), world_size=2)


@pytest.mark.parametrize("pretrained", ["", "openai"])
def test_checkpoints_of_a_config_hold_config_words_seed_and_a_clip_that_no_file_holds(
    toy, toy_batch, tmp_path, pretrained
):
    cfg = shapes_cfg(MAX_ITER=2, STEPS=(), IMS_PER_BATCH=4)
    cfg.SEED = 11
    cfg.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS = pretrained
    trainer = build_trainer(
        cfg,
        toy(),
        batches=lambda start: (toy_batch(position) for position in range(start, 9)),
        device=torch.device("cpu"),
        vocabulary=Vocabulary.from_names("cat, kitten; dog; sand:stuff", name="pets"),
        output_dir=tmp_path,
    )
    trainer.train()
    content = load_checkpoint(tmp_path / "model_final.pth")
    assert content["seed"] == 11 and "MAX_ITER: 2" in content["config"] and len(content["clip"]["weights"]) == 64
    assert content["vocabulary"]["name"] == "pets" and content["vocabulary"]["classes"][0] == ["cat", "kitten"]
    assert any(key.startswith("backbone.clip_model.") for key in content["model"]) == (not pretrained)
    assert {"metrics.json", "last_checkpoint"} <= {path.name for path in tmp_path.iterdir()}
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_mixed_precision_has_no_effect_on_the_cpu():
    cfg = shapes_cfg()
    cfg.SOLVER.AMP.ENABLED = True
    assert amp_dtype(cfg, torch.device("cpu")) is None
    cfg.SOLVER.AMP.DTYPE = "float61"
    with pytest.raises(ValueError, match="Did you mean 'float16'"):
        amp_dtype(cfg, torch.device("cpu"))
