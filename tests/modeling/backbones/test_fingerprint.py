"""The fingerprint of a CLIP: what it is and what it computes."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from fcclip.modeling.backbones import fingerprint
from fcclip.modeling.backbones.clip import build_clip, has_quick_gelu, set_quick_gelu
from fcclip.modeling.backbones.fingerprint import (
    adopt_activation,
    check_fingerprint,
    clip_fingerprint,
    clip_weights_hash,
)
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
    found = json.loads(json.dumps(clip_fingerprint(backbone)))
    assert found["architecture"] == Path(backbone.architecture).name
    assert found["pretrained"] == ""
    assert found["quick_gelu"] is False
    assert set(found["libraries"]) == {"open_clip_torch", "timm", "torch"}
    assert len(found["text"]) == 2 * len(found["image"]) == 2 * fingerprint.NUM_VALUES
    assert str(DATA) not in json.dumps(found)


def test_the_same_weights_give_the_same_fingerprint_in_any_wrapper(tiny_model):
    model = tiny_model()
    found = clip_fingerprint(model)
    assert found == clip_fingerprint(model.backbone)
    check_fingerprint(found, model, source="weights.pth")
    assert clip_fingerprint(nn.Linear(2, 2)) == {} and clip_weights_hash(nn.Linear(2, 2)) == ""


def test_features_do_not_depend_on_autocast_or_the_default_precision(backbone):
    before = clip_fingerprint(backbone)
    fingerprint._computed.clear()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert clip_fingerprint(backbone) == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_features_follow_the_weights(backbone):
    before = clip_fingerprint(backbone)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.add_(0.1)
    after = clip_fingerprint(backbone)
    assert all(before[key] != after[key] for key in ("weights", "text", "image"))


def test_weights_stored_as_halves_are_the_same_clip(backbone, caplog):
    before = clip_fingerprint(backbone)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.copy_(weight.half().float())
    fingerprint._computed.clear()
    assert clip_weights_hash(backbone) == before["weights"]
    check_fingerprint(before, backbone, source="weights.pth")
    assert not caplog.records


@pytest.mark.parametrize("stored_as_text", [False, True])
def test_another_clip_is_refused_with_both_named(stored_as_text):
    stored = clip_fingerprint(seeded_clip())
    torch.manual_seed(5)
    other = build_clip(TINY["convnext"])
    other.pretrained = "laion2b"
    with pytest.raises(ValueError, match=r"trained on another CLIP(.|\n)*the model has: tiny_convnext.json, 'laion2b'"):
        check_fingerprint(stored["weights"] if stored_as_text else stored, other, source="weights.pth")
    check_fingerprint(stored, other, source="weights.pth", holds_clip=True)
    check_fingerprint(None, other, source="weights.pth")


@pytest.mark.parametrize("what", ["text", "image"])
def test_libraries_that_change_what_a_clip_computes_are_told_with_both_values(what, backbone, caplog):
    stored = json.loads(json.dumps(clip_fingerprint(backbone)))
    stored["libraries"]["open_clip_torch"] = "2.16.0"
    check_fingerprint(stored, backbone, source="weights.pth")
    assert not caplog.records  # another version alone is no difference
    stored[what][0] += 0.02
    with caplog.at_level(logging.WARNING):
        check_fingerprint(stored, backbone, source="weights.pth")
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"weights.pth: the same CLIP weights give other {what} features" in message
    assert "open_clip_torch 2.16.0" in message
    assert f"[{stored[what][0]:.4f}, " in message and f"[{clip_fingerprint(backbone)[what][0]:.4f}, " in message


def test_the_wrong_text_activation_is_far_outside_the_tolerance():
    for family in TINY:
        backbone = seeded_clip(family)
        before = clip_fingerprint(backbone)
        set_quick_gelu(backbone, True, source="test")
        after = clip_fingerprint(backbone)
        assert fingerprint._distance(before["text"], after["text"]) > 3 * fingerprint.TOLERANCE
        assert before["image"] == after["image"]


def test_equal_weights_with_another_activation_are_refused():
    stored = clip_fingerprint(seeded_clip(quick_gelu="on"))
    with pytest.raises(ValueError, match="QUICK_GELU 'on', but the model has it off"):
        check_fingerprint(stored, seeded_clip(), source="weights.pth")


def test_a_model_takes_the_activation_of_the_file_when_nobody_else_chose():
    backbone = seeded_clip("resnet")
    adopt_activation({"quick_gelu": True}, backbone, source="full.pth")
    assert backbone.quick_gelu and has_quick_gelu(backbone.clip_model)
    assert backbone.activation_source == "'full.pth' says so"
    adopt_activation({"quick_gelu": True}, backbone, source="full.pth")


def test_a_file_that_contradicts_the_config_is_refused():
    with pytest.raises(ValueError, match="trained with QuickGELU, but the model has none.*QUICK_GELU to 'on'"):
        adopt_activation({"quick_gelu": True}, seeded_clip("resnet", quick_gelu="off"), source="full.pth")


def test_a_resnet_tower_without_any_word_on_its_activation_is_refused():
    with pytest.raises(ValueError, match="nothing says whether .* QuickGELU.*set MODEL.FC_CLIP.QUICK_GELU to 'on'"):
        adopt_activation(None, seeded_clip("resnet"), source="full.pth")
    adopt_activation(None, seeded_clip("resnet", quick_gelu="on"), source="full.pth")
    adopt_activation(None, seeded_clip("convnext"), source="full.pth")
