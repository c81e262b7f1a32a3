"""Every architecture trains, is saved, loaded, evaluated and used by the same code."""

from __future__ import annotations

import itertools

import pytest
import torch

from fcclip import Segmenter
from fcclip.checks.issue import ERROR
from fcclip.checks.run import check_run
from fcclip.engine import PeriodicEvaluation, build_trainer, dry_run
from fcclip.evaluation import evaluate
from fcclip.modeling import build, build_model, options_of, test_modes
from fcclip.modeling.build import META_ARCHITECTURES
from fcclip.structures import TrainingBatch
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_prefixes, load_weights, model_weights
from tests.conftest import tiny_config, tiny_frozenseg, tiny_fusioner
from tests.evaluation import tiny_world
from tests.modeling.test_fcclip import sample_image, training_sample
from tests.tools.conftest import REPOSITORY, load_program
from tests.weight_files import save_weights

# name -> the config of a model that trains in a moment
SMALLEST = {
    "FCCLIP": tiny_config,
    "FrozenSeg": tiny_frozenseg,
    "MAFT_Plus": tiny_config,
    "Fusioner": tiny_fusioner,
}
TRAINING = Vocabulary.from_names("cup; sea:stuff; dog", name="train")


@pytest.fixture(params=META_ARCHITECTURES)
def cfg(request):
    cfg = SMALLEST[request.param]()
    cfg.MODEL.META_ARCHITECTURE = request.param
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(TRAINING)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 2, ()
    return cfg


@pytest.fixture
def model(cfg):
    torch.manual_seed(0)
    return build_model(cfg, train_vocabulary=TRAINING, test_vocabulary=tiny_world.VOCABULARY)


def batch():
    return [{**training_sample(seed), "point_seed": seed} for seed in range(2)]


def test_it_trains_for_two_steps_is_evaluated_and_its_checkpoint_is_loaded(cfg, model, tmp_path):
    tiny_world.write(tmp_path / "world", sizes=[(40, 60), (60, 40)])
    dataset, before = tiny_world.dataset(tmp_path / "world"), model_weights(model)
    before = {key: value.clone() for key, value in before.items()}
    results = {}

    def evaluate_and_keep(bare):
        results.update(evaluate(bare, cfg, dataset, modes=test_modes(cfg), vocabulary=tiny_world.VOCABULARY))
        return {"panoptic_seg/PQ": results["ensemble"]["panoptic_seg"]["PQ"]}

    trainer = build_trainer(
        cfg,
        model,
        batches=lambda start: itertools.repeat(batch()),
        device=model.device,
        vocabulary=TRAINING,
        evaluation=PeriodicEvaluation(evaluate=evaluate_and_keep),
        output_dir=tmp_path,
    )
    assert trainer.train()
    for tasks in results.values():
        assert all(0 <= tasks[task][metric] <= 100 for task, metric in (("panoptic_seg", "PQ"), ("sem_seg", "mIoU")))
    after = model_weights(model)
    assert not any(key.startswith(frozen_prefixes(model)) for key in after)
    assert any(not torch.equal(before[key], value) for key, value in after.items())

    torch.manual_seed(1)
    other = build_model(cfg, train_vocabulary=TRAINING, test_vocabulary=tiny_world.VOCABULARY)
    other.load_state_dict(model.state_dict())
    load_weights(other, tmp_path / "model_final.pth")
    assert all(torch.equal(value, model_weights(other)[key]) for key, value in after.items())
    assert other.seen_vocabulary is TRAINING


def trainer_of(cfg, model, folder):
    return build_trainer(
        cfg,
        model,
        batches=lambda start: itertools.repeat(batch()),
        device=model.device,
        vocabulary=TRAINING,
        output_dir=folder,
    )


def test_a_dry_run_and_a_resumed_training_change_nothing(cfg, model, tmp_path):
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    trainer = trainer_of(cfg, model, tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert dry_run(trainer, steps=1).iterations == 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert trainer.train()
    torch.manual_seed(1)
    other = build_model(cfg, train_vocabulary=TRAINING, test_vocabulary=tiny_world.VOCABULARY)
    resumed = trainer_of(cfg, other, tmp_path)
    resumed.resume(tmp_path / "model_0000000.pth")
    assert resumed.iteration == 1 and resumed.train()
    for key, value in model_weights(model).items():
        torch.testing.assert_close(model_weights(other)[key], value, rtol=0, atol=0, msg=key)


def test_the_checker_and_the_analyser_know_its_parts(cfg, model, tmp_path):
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("shapes_train",)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    save_weights(model, tmp_path / "weights.safetensors", full=True)
    issues = check_run(str(tmp_path / "config.yaml"), weights=str(tmp_path / "weights.safetensors"), training=False)
    errors = [issue.text for issue in issues if issue.level == ERROR and issue.section != "test data"]
    assert not errors
    report = load_program(REPOSITORY / "tools" / "analyze_model.py").analyse(cfg, height=64, width=96, segments=2)
    assert sum(part["parameters"] for part in report["parameters"].values()) == sum(
        weight.numel() for weight in model.parameters()
    )
    for parts in (report["inference"]["parts"], report["training"]["parts"]):
        assert all(parts[part]["flops"] for part, counts in report["parameters"].items() if part in parts and counts)


def test_the_losses_of_the_parts_of_a_batch_add_up(model):
    model.train()
    whole = model(TrainingBatch(batch()))
    parts = [model(part) for part in TrainingBatch(batch()).split(2)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-4, atol=1e-5, msg=name)


def test_extra_losses_are_told_what_a_batch_was_seen_as_and_are_added(model):
    seen = []

    class Watching:
        vocabularies = (Vocabulary.from_names("star; moon"),)

        def __call__(self, features, proposals, text, classes, batch):
            seen.append((proposals, text, classes))
            return {"loss_watching": features.dense.sum() * 0 + 3}

    model.train()
    plain = model(batch())
    model.extra_losses = [Watching()]
    losses = model(batch())
    assert losses.pop("loss_watching") == 3
    assert all(torch.allclose(value, plain[name]) for name, value in losses.items())
    [(proposals, text, classes)] = seen
    assert classes == {TRAINING: slice(0, 3), Watching.vocabularies[0]: slice(3, 5)}
    assert text.num_classes == 5 and proposals.class_logits[-1].shape[-1] == 6


def test_what_is_scored_once_gives_every_head_with_any_ensemble(model):
    [scored] = model.score([sample_image()])
    for head, key in (("semantic", "sem_seg"), ("panoptic", "panoptic_seg"), ("instances", "instances")):
        assert model.outputs(scored, heads=(head,), ensemble=(0.5, 0.5)).keys() == {key}
    assert scored.seen.tolist() == tiny_world.VOCABULARY.seen_by(TRAINING).tolist()


def test_the_segmenter_finds_class_names_with_it(cfg):
    pixels = sample_image()["image"].permute(1, 2, 0).numpy()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    result = Segmenter(cfg, weights="random")(pixels, "red circle; sand:stuff")
    assert result.panoptic.shape == pixels.shape[:2]
    assert {segment.name for segment in result.segments} <= {"red circle", "sand"}
    assert result.relabel("blue star").panoptic.shape == pixels.shape[:2]


def test_what_is_scored_once_is_named_anew_as_if_it_were_looked_at_again(model):
    other = Vocabulary.from_names("red circle; cup; sand:stuff; dog")
    [scored], [expected] = model.score([sample_image()]), model.score([sample_image()], other)
    found = model.rescore(scored, other)
    assert torch.equal(found.in_logits, expected.in_logits) and torch.equal(found.out_logits, expected.out_logits)
    assert found.seen.tolist() == expected.seen.tolist() and found.vocabulary is other
    assert torch.equal(found.masks.mask_logits, expected.masks.mask_logits)


def test_mixed_precision_is_opt_in_and_reaches_the_network_pass_alone(model, cfg, monkeypatch, caplog):
    """To a few of bfloat16's steps of 2 ** -8, where no mask changes its cells; what leaves the pass is fp32 again."""
    cfg.TEST.AMP.ENABLED = True
    monkeypatch.setattr(build, "cpu_multiplies_bfloat16", lambda: False)
    with caplog.at_level("INFO"):
        assert build_model(cfg).amp_dtype is None
    assert "TEST.AMP.ENABLED has no effect on cpu: evaluation in float32" in caplog.text
    monkeypatch.setattr(build, "cpu_multiplies_bfloat16", lambda: True)
    mixed = build_model(cfg, train_vocabulary=TRAINING, test_vocabulary=tiny_world.VOCABULARY)
    mixed.load_state_dict(model.state_dict())
    assert options_of(cfg) == ("autocast bfloat16",) or cfg.MODEL.META_ARCHITECTURE == "MAFT_Plus"
    [rough], [exact] = mixed.score([sample_image()]), model.score([sample_image()])
    renamed = mixed.rescore(rough, tiny_world.VOCABULARY)
    torch.testing.assert_close(renamed.out_logits, rough.out_logits)
    torch.testing.assert_close(renamed.masks.mask_logits, rough.masks.mask_logits)
    pairs = [(rough.masks.mask_logits, exact.masks.mask_logits), (rough.dense, exact.dense)]
    assert any(not torch.equal(*pair) for pair in pairs)
    for found, wanted in (*pairs, (rough.in_logits, exact.in_logits), (rough.out_logits, exact.out_logits)):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().median() <= 0.05 * wanted.abs().mean()
    mixed.outputs(rough)


def test_every_architecture_has_a_smallest_config():
    assert set(SMALLEST) == set(META_ARCHITECTURES)
