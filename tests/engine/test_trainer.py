import itertools
import json
import logging
import math
import signal
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
from fcclip.errors import InputError
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_notes, load_weights
from tests.engine.toys import assert_trained_alike, make_batch, toy_batches, train_plainly


def weights_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_weights(one, other):
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture
def folders(tmp_path):
    """Of two runs that are compared."""
    folders = [tmp_path / "whole", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    return folders


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


def broken_after(number):
    """Batches of which the one after `number` cannot be read."""

    def batches(start):
        yield from itertools.islice(toy_batches(start), number - start)
        raise InputError("150.jpg: cannot be read as an image")

    return batches


def test_what_was_trained_before_a_broken_image_is_saved_and_resumed(toy, toy_trainer, folders, caplog):
    whole = toy_trainer(toy(), folder=folders[0])
    whole.train()
    broken = toy_trainer(toy(), folder=folders[1], batches=broken_after(3))
    with pytest.raises(InputError, match=r"150\.jpg"), caplog.at_level(logging.INFO, logger="fcclip"):
        broken.train()
    assert (folders[1] / "last_checkpoint").read_text() == "model_0000002.pth" and "--resume" in caplog.text
    repaired = toy_trainer(toy(), folder=folders[1])
    repaired.resume(folders[1] / "model_0000002.pth")
    repaired.train()
    assert_equal_weights(weights_of(whole.model), weights_of(repaired.model))


def test_without_a_step_nothing_is_saved_after_an_error(toy, toy_trainer, tmp_path):
    with pytest.raises(InputError):
        toy_trainer(toy(), folder=tmp_path, batches=broken_after(0)).train()
    assert not list(tmp_path.glob("*.pth"))


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


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(toy, toy_trainer, toy_batch, folders):

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


# ---- checkpoints that cannot be written ----


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


# ---- evaluation and the best weights ----


def scored(*values):
    """An evaluation that gives these values one after the other, and what it was called with."""
    values, seen = list(values), []

    def evaluate(model):
        seen.append(weights_of(model))
        return {"a/PQ": values[len(seen) - 1]}

    return evaluate, seen


def test_best_weights_are_those_with_the_highest_value_of_the_metric(toy, toy_trainer, tmp_path, caplog):
    evaluate, seen = scored(20.0, math.nan, 30.0, 30.0)
    caplog.set_level(logging.INFO)
    trainer = toy_trainer(
        toy(), max_iter=8, evaluate=evaluate, eval_period=2, best_metric="a/PQ", notes={"config": "A: 1\n"}
    )
    trainer.train()
    content = load_checkpoint(tmp_path / "best.pth")
    assert content["iteration"] == 5 and content["config"] == "A: 1\n"
    assert content["best"] == {"metric": "a/PQ", "value": 30.0, "iteration": 5}
    assert_equal_weights(content["model"], seen[2])
    assert "best so far: a/PQ = 30.0000 after iteration 5" in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert load_weights(toy(), tmp_path / "best.pth")["iteration"] == 5


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
    assert [record["iteration"] for record in records(tmp_path) if "a/PQ" in record] == [1, 3, 5]
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
    evaluations = [(record["iteration"], record["a/PQ"]) for record in records(tmp_path) if "a/PQ" in record]
    assert evaluations == [(1, 9.0), (3, 1.0), (5, 2.0)]
    best = {"value": 9.0, "iteration": 1}  # which the checkpoint before the evaluation did not know
    assert again.evaluation.best == best


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


def test_an_evaluation_that_draws_random_numbers_changes_no_step(toy, toy_trainer, folders):
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


needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of POSIX")


@needs_signals
@pytest.mark.parametrize("when", [0, 3])
def test_a_request_to_stop_is_followed_after_the_step_and_the_resumed_run_is_the_same(toy, toy_trainer, folders, when):
    def batches(start):
        return noisy(start, toy_batches)

    def interrupted(start):
        for position, batch in enumerate(batches(start), start):
            if position == when:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    torch.manual_seed(5)
    whole = toy_trainer(toy(), folder=folders[0], batches=batches)
    assert whole.train()

    torch.manual_seed(5)
    with StopRequest() as stop:
        stopped = toy_trainer(toy(), folder=folders[1], batches=interrupted, stop=stop)
        assert not stopped.train()
    assert stop.signal_name == "SIGTERM" and stopped.iteration == when + 1
    assert (folders[1] / "last_checkpoint").read_text() == f"model_{when:07d}.pth"

    torch.manual_seed(99)
    resumed = toy_trainer(toy(), folder=folders[1], batches=batches)
    resumed.resume(folders[1] / f"model_{when:07d}.pth")
    assert resumed.train()
    assert_equal_weights(whole.model.state_dict(), resumed.model.state_dict())


@needs_signals
def test_a_request_to_stop_breaks_an_evaluation_off_and_it_is_done_again(toy, toy_trainer, folders):
    """Also without a checkpoint at that iteration; the random numbers are those from before the evaluation."""
    parts = {"eval_period": 2, "checkpoint_period": 0, "batches": lambda start: noisy(start, toy_batches)}

    def evaluate(model):
        return {"PQ": torch.rand(()).item()}

    def interrupted(model):
        evaluate(model)
        signal.raise_signal(signal.SIGTERM)
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
    evaluations = [[record for record in records(folder) if "PQ" in record] for folder in folders]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 3


@needs_signals
@pytest.mark.parametrize("in_evaluation", [False, True])
def test_a_request_at_the_end_leaves_the_final_evaluation_to_the_resumed_run(toy, toy_trainer, tmp_path, in_evaluation):
    def batches(start):
        for position, batch in enumerate(toy_batches(start), start):
            if position == 5 and not in_evaluation:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with StopRequest() as stop:
        trainer = toy_trainer(
            toy(), batches=batches, evaluate=lambda model: signal.raise_signal(signal.SIGTERM) or {}, stop=stop
        )
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
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(OSError, match="cannot write"):
            trainer.train()


# ---- trying out ----


def test_a_dry_run_changes_nothing(toy, toy_trainer, folders):
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


def test_mixed_precision_has_no_effect_on_the_cpu(monkeypatch):
    cfg = shapes_cfg()
    cfg.SOLVER.AMP.ENABLED = True
    assert amp_dtype(cfg, torch.device("cpu")) is None
    cfg.SOLVER.AMP.DTYPE = "float61"
    with pytest.raises(ValueError, match="Did you mean 'float16'"):
        amp_dtype(cfg, torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    cfg.SOLVER.AMP.DTYPE = "bfloat16"
    assert amp_dtype(cfg, torch.device("cpu")) is None
