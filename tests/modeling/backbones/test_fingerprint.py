"""The fingerprint of a CLIP: what it is and what it computes."""

import json
import logging
from pathlib import Path

import pytest
import torch

from fcclip.errors import InputError
from fcclip.modeling.backbones import fingerprint
from fcclip.modeling.backbones.clip import build_clip, has_quick_gelu, set_quick_gelu
from fcclip.weights import frozen_notes, sampled_hash
from tests.parity_weights import seeded_state_dict

DATA = Path(__file__).parents[2] / "data"
TINY = {"convnext": str(DATA / "tiny_convnext.json"), "resnet": str(DATA / "tiny_resnet.json")}


def seeded_clip(family: str = "convnext", **options):
    backbone = build_clip(TINY[family], **options)
    backbone.load_state_dict(seeded_state_dict(backbone))
    return backbone


@pytest.fixture(params=TINY)
def backbone(request):
    return seeded_clip(request.param)


def test_it_is_json_without_paths_and_says_what_the_clip_is(backbone):
    found = json.loads(json.dumps(backbone.fingerprint()))
    assert found["architecture"] == Path(backbone.architecture).name
    assert found["pretrained"] == ""
    assert found["quick_gelu"] is False
    assert set(found["libraries"]) == {"open_clip_torch", "timm", "torch"}
    assert len(found["text"]) == 2 * len(found["image"]) == 2 * fingerprint.NUM_VALUES
    assert str(DATA) not in json.dumps(found)


def take(backbone, notes, held=None, complete=False):
    """What loading a file with these notes asks of a CLIP."""
    backbone.check(notes, held or {}, source="weights.pth", complete=complete)
    backbone.loaded(notes, source="weights.pth", complete=complete)


def test_the_same_weights_give_the_same_fingerprint_alone_and_in_a_model(tiny_model):
    model = tiny_model()
    assert frozen_notes(model) == {"clip": model.backbone.fingerprint()}
    take(model.backbone, model.backbone.fingerprint())


def test_the_hash_is_the_one_of_files_written_before():
    """The names in it are those of a whole model; the number was computed before the hash moved here."""
    backbone = seeded_clip()
    assert backbone.weights_hash() == sampled_hash(
        {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    )
    assert backbone.weights_hash() == "07dd947239bb1ec009ea0e48ac02ee10dd657705a876747f1085e8b14847f0c0"


def test_features_do_not_depend_on_autocast_or_the_default_precision(backbone):
    before = backbone.fingerprint()
    backbone._features = None
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert backbone.fingerprint() == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_features_follow_the_weights(backbone):
    before = backbone.fingerprint()
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.add_(0.1)
    after = backbone.fingerprint()
    assert all(before[key] != after[key] for key in ("weights", "text", "image"))


def test_weights_stored_as_halves_are_the_same_clip(backbone, caplog):
    before = backbone.fingerprint()
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.copy_(weight.half().float())
    backbone._features = None
    assert backbone.weights_hash() == before["weights"]
    take(backbone, before)
    assert not caplog.records


@pytest.mark.parametrize("stored_as_text", [False, True])
def test_another_clip_is_refused_with_both_named(stored_as_text):
    stored = seeded_clip().fingerprint()
    torch.manual_seed(5)
    other = build_clip(TINY["convnext"])
    other.pretrained = "laion2b"
    with pytest.raises(ValueError, match=r"trained on another CLIP(.|\n)*the model has: tiny_convnext.json, 'laion2b'"):
        take(other, stored["weights"] if stored_as_text else stored)
    take(other, stored, complete=True)
    take(other, {})


@pytest.mark.parametrize("what", ["text", "image"])
def test_libraries_that_change_what_a_clip_computes_are_told_with_both_values(what, backbone, caplog):
    stored = json.loads(json.dumps(backbone.fingerprint()))
    stored["libraries"]["open_clip_torch"] = "2.16.0"
    take(backbone, stored)
    assert not caplog.records  # another version alone is no difference
    stored[what][0] += 0.02
    with caplog.at_level(logging.WARNING):
        take(backbone, stored)
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"weights.pth: the same CLIP weights give other {what} features" in message
    assert "open_clip_torch 2.16.0" in message
    assert f"[{stored[what][0]:.4f}, " in message and f"[{backbone.fingerprint()[what][0]:.4f}, " in message


def test_the_wrong_text_activation_is_far_outside_the_tolerance():
    for family in TINY:
        backbone = seeded_clip(family)
        before = backbone.fingerprint()
        set_quick_gelu(backbone, True, source="test")
        after = backbone.fingerprint()
        assert fingerprint.distance_of(before["text"], after["text"]) > 3 * fingerprint.TOLERANCE
        assert before["image"] == after["image"]


TEXT = {"clip_model.ln_final.bias": torch.zeros(1)}  # a file holds some of the text tower


def test_equal_weights_with_another_activation_are_refused():
    stored = seeded_clip(quick_gelu="on").fingerprint()
    with pytest.raises(InputError, match="weights.pth.*QUICK_GELU to 'on'"):
        take(seeded_clip(), stored)


def test_a_model_takes_the_activation_of_the_file_when_nobody_else_chose():
    backbone = seeded_clip("resnet")
    for _ in range(2):
        take(backbone, {"quick_gelu": True}, TEXT)
        assert backbone.quick_gelu and has_quick_gelu(backbone.clip_model)
        assert backbone.activation_source == "'weights.pth' says so"


def test_a_file_that_contradicts_the_config_is_refused():
    with pytest.raises(InputError, match="QUICK_GELU is 'off'.*QUICK_GELU to 'on'"):
        take(seeded_clip("resnet", quick_gelu="off"), {"quick_gelu": True}, TEXT)


def test_a_resnet_tower_without_any_word_on_its_activation_is_refused():
    with pytest.raises(InputError, match="set MODEL.FC_CLIP.QUICK_GELU to 'on'"):
        take(seeded_clip("resnet"), {}, TEXT)
    take(seeded_clip("resnet", quick_gelu="on"), {}, TEXT)
    take(seeded_clip("convnext"), {}, TEXT)
