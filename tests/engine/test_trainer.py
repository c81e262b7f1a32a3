import json
import logging
import math

import pytest
import torch

from fcclip.config import get_cfg
from fcclip.engine import (
    NonFiniteError,
    build_trainer,
    check_training,
    clip_fingerprint,
    load_checkpoint,
    load_weights,
    parameter_groups,
)
from fcclip.engine.metrics import JsonWriter, LineWriter
from fcclip.engine.trainer import amp_dtype
from fcclip.vocabulary import Vocabulary


def weights_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_weights(one, other):
    assert all(torch.equal(value, other[key]) for key, value in one.items())


# ---- the loop ----


def test_an_iteration_is_a_clipped_step_at_the_rate_of_the_schedule(toy, toy_trainer, toy_batch):
    trainer, plain = toy_trainer(toy()), toy()
    frozen = weights_of(trainer.model.backbone)
    rules = {"weight_decay": 1e-4, "weight_decay_norm": 0.0, "weight_decay_embed": 0.0, "backbone_multiplier": 0.1}
    optimizer = torch.optim.AdamW(parameter_groups(plain, lr=0.01, **rules))
    trainer.train()
    for position, factor in enumerate((0.001, 0.5005, 1, 1, 0.1, 0.1)):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.zero_grad()
        sum(plain(toy_batch(position)).values()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for (name, one), other in zip(trainer.model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(
            one, other, rtol=1e-5, atol=1e-6, msg=name
        )  # fused and plain kernels round differently
    assert_equal_weights(frozen, trainer.model.backbone.state_dict())


def test_accumulated_micro_batches_step_like_the_whole_batch(toy, toy_trainer):
    whole, parts = toy_trainer(toy()), toy_trainer(toy(), accumulate=2)
    whole.train()
    parts.train()
    for one, other in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # sums in another order


def test_a_batch_goes_through_the_model_in_equal_parts(toy, toy_trainer):
    sizes = []
    trainer = toy_trainer(toy(), accumulate=2, max_iter=1)
    trainer.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    trainer.train()
    assert sizes == [2, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_cause(toy, toy_trainer, toy_batch, value):
    def batches(start):
        for position in range(start, 10):
            batch = toy_batch(position)
            if position == 3:
                batch[1]["y"] = torch.tensor(value)
            yield batch

    trainer = toy_trainer(toy(), batches=batches, checkpoint_period=0)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    text = str(error.value)
    assert "not finite at iteration 3" in text and "loss_mask = " in text and "loss_ce" not in text
    assert "pictures: 3_0.jpg, 3_1.jpg" in text
    assert trainer.iteration == 3 and all(value.isfinite().all() for value in trainer.model.state_dict().values())


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

    trainer = toy_trainer(toy(), evaluate=evaluate, eval_period=2, writers=[JsonWriter(tmp_path / "metrics.json")])
    trainer.train()
    assert seen == [(2, False, False), (4, False, False), (6, False, False)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    results = [line for line in lines if "panoptic_seg/PQ" in line]
    assert [line["iteration"] for line in results] == [1, 3, 5]
    assert results[0]["panoptic_seg/PQ"] == 12.5 and results[0]["panoptic_seg/PQ_unseen"] is None
    assert trainer.model.training


def test_metrics_are_written_every_twenty_iterations_and_at_the_end(toy, toy_trainer, tmp_path):
    trainer = toy_trainer(toy(), max_iter=45, checkpointer=None, writers=[JsonWriter(tmp_path / "metrics.json")])
    trainer.train()
    text = (tmp_path / "metrics.json").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["iteration"] for line in lines] == [19, 39, 44]
    published = {"iteration", "total_loss", "loss_ce", "loss_mask", "lr", "time", "data_time", "eta_seconds"}
    assert all(published <= set(line) for line in lines)
    assert all(list(line) == sorted(line) for line in lines)
    assert lines[0]["lr"] == pytest.approx(0.001)  # after the step at 4
    assert lines[-1]["eta_seconds"] == 0


def test_written_losses_are_medians_of_the_window(toy, toy_trainer, toy_batch, tmp_path):
    trainer = toy_trainer(toy(), max_iter=20, checkpointer=None, writers=[JsonWriter(tmp_path / "metrics.json")])
    losses = []
    trainer.model.register_forward_hook(lambda *stuff: losses.append(stuff[-1]["loss_mask"].item()))
    trainer.train()
    (line,) = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    assert line["loss_mask"] == pytest.approx((sorted(losses)[9] + sorted(losses)[10]) / 2)


def test_the_log_line_shows_losses_rate_and_time_left(caplog):
    with caplog.at_level(logging.INFO):
        LineWriter(max_iter=100).write(
            19, {"total_loss": 3.25, "loss_ce": 1.5, "loss_ce_0": 9.0, "lr": 1e-4, "eta_seconds": 3725.0}
        )
    assert caplog.messages == ["eta: 1:02:05  iter: 20/100  total_loss: 3.25  loss_ce: 1.5  lr: 0.0001"]


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


def test_full_checkpoints_hold_the_clip_too(toy, toy_trainer, tmp_path):
    toy_trainer(toy(), max_iter=1, full_checkpoints=True).train()
    content = load_checkpoint(tmp_path / "model_final.pth")
    assert any(key.startswith("backbone.clip_model.") for key in content["model"])


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
    toy_trainer(model, max_iter=1, notes={"clip": clip_fingerprint(model)}).train()
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


def test_weights_of_a_checkpoint_load_into_a_model(toy, toy_trainer, tmp_path):
    trainer = toy_trainer(toy(), max_iter=2)
    trainer.train()
    model = toy(seed=0)
    assert load_weights(model, tmp_path / "model_final.pth")["iteration"] == 1
    assert_equal_weights(trainer.model.state_dict(), model.state_dict())


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
        ({"NON_FINITE": "skip"}, "unknown SOLVER.NON_FINITE 'skip'"),
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
