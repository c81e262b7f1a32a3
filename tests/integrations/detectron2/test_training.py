"""detectron2's trainer: fcclip's step, bit for bit, inside detectron2's loop."""

import copy
import json
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.solver import build_lr_scheduler as build_detectron2s_schedule
from detectron2.utils.events import EventStorage

from fcclip.engine import StepSettings, build_gradient_clipping, build_lr_scheduler, build_optimizer
from fcclip.engine import Trainer as OwnTrainer
from fcclip.engine.optimizer import trainable_parameters
from fcclip.integrations.detectron2 import Trainer, targets_from_instances
from fcclip.vocabulary import Vocabulary
from fcclip.weights import model_weights, trained_vocabulary, vocabulary_note
from tests.integrations.detectron2.conftest import ADE20K, FROZENSEG, SMALL_SAM

pytestmark = pytest.mark.usefixtures("detectron2_knows_fcclip")
TRAINING = {
    "DATASETS__TRAIN": ("shapes_train",),
    "DATASETS__TEST": ("shapes_val",),
    "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 40,
    "SOLVER__MAX_ITER": 2,
    "SOLVER__STEPS": (),
}


@pytest.fixture
def cfg(shapes, detectron2_cfg, tmp_path):
    """The published ADE20K file made tiny, training on four images of the shapes world."""
    return detectron2_cfg(ADE20K, **TRAINING, OUTPUT_DIR=str(tmp_path))


@pytest.fixture
def quiet(monkeypatch):
    """Without evaluation after training."""
    monkeypatch.setattr(Trainer, "test", lambda *_: {})


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_a_step_on_four_images_is_fcclips_own_bit_for_bit(cfg):
    trainer = Trainer(cfg)
    twin, before = copy.deepcopy(trainer.model), weights(trainer.model)
    batch = next(iter(trainer.build_train_loader(cfg)))
    assert len(batch) == 4
    optimizer = build_optimizer(cfg, twin)
    own = OwnTrainer(
        model=twin.train(),
        optimizer=optimizer,
        scheduler=build_lr_scheduler(cfg, optimizer),
        batches=lambda start: iter(()),
        max_iter=2,
        device=twin.device,
        step=StepSettings(gradient_clipping=build_gradient_clipping(cfg)),
    )
    own.step(iter([[{**sample, "targets": targets_from_instances(sample["instances"])} for sample in batch]]))
    trainer._trainer._data_loader_iter_obj = iter([batch])
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        trainer.model.train()
        trainer.run_step()
        losses = {name: value for name, (value, _) in trainer.storage.latest().items() if name.startswith("loss_")}
    assert len(losses) == 9 and losses.items() <= own.history.medians().items()
    after, expected = weights(trainer.model), weights(twin)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) > 0.9 * len(after)


def test_a_run_trains_evaluates_and_writes_detectron2s_files(cfg, tmp_path):
    pytest.importorskip("panopticapi", reason="panopticapi is not installed")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert set(trainer._last_eval_results) == {"panoptic_seg", "bbox", "segm", "sem_seg"}
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"model_final.pth", "last_checkpoint", "metrics.json", "inference"}
    assert {path.name for path in (tmp_path / "inference/shapes_val").iterdir()} >= {
        "predictions.json", "coco_instances_results.json", "sem_seg_evaluation.pth"
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert "total_loss" in lines[0] and "panoptic_seg/PQ" in lines[-1]


def test_frozenseg_trains_is_evaluated_and_is_saved_without_its_encoders(shapes, detectron2_cfg, tmp_path):
    cfg = detectron2_cfg(
        FROZENSEG, **TRAINING, **SMALL_SAM, OUTPUT_DIR=str(tmp_path), MODEL__MASK_FORMER__TEST__PANOPTIC_ON=False
    )
    trainer = Trainer(cfg)
    before = weights(trainer.model)
    trainer.train()
    assert trainer._last_eval_results["sem_seg"]["mIoU"] >= 0
    after = weights(trainer.model)
    assert not any(torch.equal(after[name], before[name]) for name in after if "_attention_layers_sam" in name)
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert {"clip", "sam"} <= content.keys()
    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    assert all(torch.equal(value, weights(again.model)[name]) for name, value in after.items())
    del content["model"]["sem_seg_head.pixel_decoder.fpn3.0.bias"]
    with pytest.raises(ValueError, match=r"missing from the file \(1\): sem_seg_head.pixel_decoder.fpn3.0.bias"):
        again.model.load_state_dict(content["model"], strict=False)


def test_a_run_is_resumed_with_its_optimiser_and_schedule(cfg, quiet, tmp_path):
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.SOLVER.CHECKPOINT_KEEP = 1
    trainer = Trainer(cfg)
    trainer.train()
    assert {path.name for path in tmp_path.glob("*.pth")} == {"model_0000001.pth", "model_final.pth"}
    cfg.SOLVER.MAX_ITER = 3
    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2 and again.scheduler.last_epoch == trainer.scheduler.last_epoch
    first, second = (run.optimizer.state_dict()["state"][0] for run in (trainer, again))
    assert torch.equal(first["exp_avg"], second["exp_avg"]) and second["step"] == 2
    assert all(torch.equal(value, weights(again.model)[name]) for name, value in weights(trainer.model).items())
    again.train()
    assert again.optimizer.state_dict()["state"][0]["step"] == 3


def test_checkpoints_leave_the_frozen_clip_out_unless_it_is_in_no_other_file(shapes, detectron2_cfg, tmp_path, quiet):
    changes = {**TRAINING, "OUTPUT_DIR": str(tmp_path), "SOLVER__MAX_ITER": 1, "SOLVER__IMS_PER_BATCH": 1}
    for random_clip in (True, False):
        cfg = detectron2_cfg(tiny=random_clip, **changes)
        Trainer(cfg).train()
        content = torch.load(tmp_path / "model_final.pth", weights_only=True)
        assert any(key.startswith("backbone.") for key in content["model"]) == random_clip
        assert content["clip"]["weights"] and "META_ARCHITECTURE: FCCLIP" in content["config"]


# ---- optimiser and schedule ----


def test_a_training_knows_its_own_classes_alone_and_its_checkpoints_name_them(cfg, quiet, tmp_path):
    own = Vocabulary.from_names("zebra; red circle", name="own")
    start = Trainer(cfg)
    content = {"model": model_weights(start.model), "former_vocabulary": vocabulary_note(own)}
    torch.save({**content, "vocabulary": vocabulary_note(own)}, tmp_path / "tuned.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "tuned.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.model.seen_vocabulary == Vocabulary.builtin("shapes_seen")
    trainer.checkpointer.save("held")
    vocabulary = trained_vocabulary(torch.load(tmp_path / "held.pth", weights_only=True))
    assert vocabulary.synonyms == Vocabulary.builtin("shapes_seen").synonyms


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "loss scaler"])
def test_a_step_of_the_optimiser_clips_true_gradients(cfg, scaled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    twin = copy.deepcopy(model)
    inputs = 100 * torch.randn(5, 4)
    optimizer = Trainer.build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=64.0)
    scaler.scale(model(inputs).square().sum() + 50 * model[0].weight.sum()).backward()
    scaler.step(optimizer)
    norm = sum(parameter.grad.square().sum() for parameter in model.parameters()).sqrt()
    assert norm == pytest.approx(cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, rel=1e-4)

    reference = build_optimizer(cfg, twin)
    (twin(inputs).square().sum() + 50 * twin[0].weight.sum()).backward()
    build_gradient_clipping(cfg)(trainable_parameters(reference))
    reference.step()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-8)


def test_the_schedule_is_detectron2s(cfg):
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = 12, (6, 9), 4, 0.1
    rates = []
    for build in (Trainer.build_lr_scheduler, build_detectron2s_schedule):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        schedule = build(cfg, optimizer)
        rates.append([])
        for _ in range(12):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def test_mixed_precision_is_off_where_detectron2_has_none(cfg, caplog):
    assert cfg.SOLVER.AMP.ENABLED  # in the published file
    with caplog.at_level(logging.INFO, logger="fcclip"):
        trainer = Trainer(cfg)
    assert type(trainer._trainer) is SimpleTrainer and not isinstance(trainer._trainer, AMPTrainer)
    assert "SOLVER.AMP.ENABLED has no effect on cpu" in caplog.text
    assert cfg.SOLVER.AMP.ENABLED


# ---- what cannot work ----


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.ACCUMULATE", 2, "'SOLVER.ACCUMULATE' is 2, but detectron2's training loop does not know it"),
        ("FINETUNE.METHOD", "replay", r"'FINETUNE.METHOD' is 'replay', .* \(fcclip's train_net.py does\)"),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 133, "'shapes_seen' has 40 classes, but .*NUM_CLASSES is 133"),
        ("DATASETS.TRAIN", (), "DATASETS.TRAIN is empty"),
        ("DATASETS.TRAIN", ("shapes_train", "shapes_val"), "have different classes.*'shapes_train': 40, 'shapes_val'"),
        ("DATASETS.TRAIN", ("shapes_trian",), "unknown data set .* Did you mean 'shapes_train'"),
    ],
)
def test_a_config_that_cannot_train_is_refused(cfg, key, value, message):
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        Trainer(cfg)
