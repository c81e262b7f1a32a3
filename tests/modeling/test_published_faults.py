"""Faults of the published code that must not come back, each where it would be noticed first."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fcclip import ops
from fcclip.modeling import text
from fcclip.modeling.backbones.clip import build_clip
from fcclip.modeling.classifier import text_logits
from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.outputs import semantic_labels
from fcclip.modeling.text import TextEncoder
from fcclip.ops import ms_deform_attn
from fcclip.structures import TextEmbeddings
from fcclip.vocabulary import Vocabulary
from tests.losses.test_criterion import batch, criterion, run
from tests.modeling.test_fcclip import sample_image, training_sample

DATA = Path(__file__).parents[1] / "data"
TINY = {"convnext": str(DATA / "tiny_convnext.json"), "resnet": str(DATA / "tiny_resnet.json")}


def test_losses_do_not_depend_on_autocast():
    expected = run(criterion(), batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(criterion(), batch())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_words_do_not_depend_on_autocast():
    torch.manual_seed(0)
    clip_model = build_clip(TINY["convnext"]).clip_model
    expected = TextEncoder(clip_model).encode(Vocabulary.from_names("cat; dog")).vectors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = TextEncoder(clip_model).encode(Vocabulary.from_names("cat; dog")).vectors
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_similarities_do_not_depend_on_autocast():
    generator = torch.Generator().manual_seed(0)
    words = TextEmbeddings(F.normalize(torch.randn(3, 8, generator=generator), dim=-1), torch.tensor([0, 1, 1]), 2)
    x = torch.randn(2, 4, 8, generator=generator)
    expected = text_logits(x, words, torch.tensor(4.6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = text_logits(x, words, torch.tensor(4.6))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_other_templates_never_get_the_features_of_these(tmp_path):
    clip_model = build_clip(TINY["convnext"]).clip_model
    TextEncoder(clip_model, cache_dir=tmp_path).encode(Vocabulary.from_names("cat"))
    other = TextEncoder(clip_model, cache_dir=tmp_path, templates=("a {}",))
    assert other._cache_path(["cat"]) not in list(tmp_path.iterdir())


def test_only_the_newest_vocabularies_are_held_in_memory():
    encoder = TextEncoder(build_clip(TINY["convnext"]).clip_model)
    for index in range(text._KEEP + 3):
        encoder.encode(Vocabulary.from_names(f"word {index}"))
    assert len(encoder._memory) == text._KEEP


@pytest.mark.parametrize(("training", "deep", "sets"), [(False, True, 1), (True, True, 3), (True, False, 1)])
def test_only_prediction_sets_that_are_used_are_scored(tiny_cfg, tiny_model, training, deep, sets):
    tiny_cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION = deep
    model, calls = tiny_model(cfg=tiny_cfg).train(training), []
    decoder = model.sem_seg_head.predictor
    decoder.class_embed.register_forward_hook(lambda _, inputs, scored: calls.append(scored.shape[1]))
    model([training_sample()])
    assert sum(calls) == sets * decoder.query_feat.num_embeddings


def test_instances_do_not_depend_on_the_panoptic_output(tiny_cfg, tiny_model):
    both = tiny_model(cfg=tiny_cfg, words="sky:stuff; cat; grass:stuff; dog")
    tiny_cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    alone = tiny_model(cfg=tiny_cfg, words="sky:stuff; cat; grass:stuff; dog")
    alone.load_state_dict(both.state_dict())
    one, other = (model([sample_image()])[0]["instances"] for model in (both, alone))
    assert len(one) and set(one.pred_classes.tolist()) <= {1, 3}
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


def test_labels_hold_no_more_scores_than_their_budget(monkeypatch):
    monkeypatch.setattr("fcclip.modeling.output_masks._BLOCK_CPU", 9 * 13 * 3)
    largest, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: largest.append((x := matmul(a, b)).numel()) or x)
    semantic_labels(torch.randn(9, 9), OutputMasks.whole(torch.randn(9, 12, 13)))
    assert len(largest) == 4 and max(largest) <= 9 * 13 * 3


def test_an_error_of_an_engine_is_not_hidden_by_another_engine(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(ops.ENGINES, "full", SimpleNamespace(DEVICES=(), forward=full))
    value = torch.zeros(1, 4, 1, 2)
    with pytest.raises(torch.OutOfMemoryError):
        ms_deform_attn(value, [(2, 2)], torch.zeros(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1), engine="full")


def test_words_are_read_from_any_folder_and_in_any_locale(tmp_path):
    (tmp_path / "words.txt").write_bytes("0:café\n".encode())
    program = (
        "from fcclip.vocabulary import Vocabulary, builtin_names\n"
        "for name in builtin_names(): Vocabulary.builtin(name)\n"
        "assert Vocabulary.from_file('words.txt').class_names == ('caf\\u00e9',)"
    )
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, check=True)


@pytest.mark.parametrize(
    "name",
    [*(f"RN{size}-quickgelu" for size in ("50", "101", "50x4", "50x16", "50x64")), "convnext_base", "convnext_xxlarge"],
)
def test_every_convolutional_name_builds_with_channels_of_its_own(name):
    with torch.device("meta"):
        backbone = build_clip(name).eval()
        maps = backbone(torch.randn(1, 3, 64, 64)).levels
    assert {level: maps[level].shape[1] for level in backbone.channels} == backbone.channels
    assert backbone.quick_gelu == name.endswith("quickgelu")
