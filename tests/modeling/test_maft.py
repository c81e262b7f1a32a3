"""MAFT+: the text transfer, and the files that it comes in."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fcclip.config import load_config
from fcclip.modeling import build_model
from fcclip.modeling.build import build_ensemble
from fcclip.modeling.maft import TextTransfer
from fcclip.modeling.position import sine_positions
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights
from tests.modeling.test_fcclip import sample_image
from tests.weight_files import save_weights

# as published, for a CLIP of width 768
KEYS = {
    "cross_atten.multihead_attn.in_proj_weight": (2304, 768),
    "cross_atten.multihead_attn.in_proj_bias": (2304,),
    "cross_atten.multihead_attn.out_proj.weight": (768, 768),
    "cross_atten.multihead_attn.out_proj.bias": (768,),
    "cross_atten.norm.weight": (768,),
    "cross_atten.norm.bias": (768,),
    "cross_atten.MLP.weight": (768, 768),
    "cross_atten.MLP.bias": (768,),
}


@pytest.fixture
def maft_cfg(tiny_cfg):
    tiny_cfg.MODEL.META_ARCHITECTURE = "MAFT_Plus"
    return tiny_cfg


@pytest.fixture
def model(tiny_model, maft_cfg):
    model = tiny_model(cfg=maft_cfg)
    torch.manual_seed(1)
    for weight in model.cdt.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def test_the_transfer_has_the_published_parameters():
    transfer = TextTransfer(dim=768, form="panoptic")
    assert {key: tuple(value.shape) for key, value in transfer.state_dict().items()} == KEYS
    assert sum(weight.numel() for weight in transfer.parameters()) == 2_954_496


@pytest.mark.parametrize("form", ["panoptic", "semantic"])
def test_either_form_is_that_of_the_paper(model, form):
    transfer, text, cells = model.cdt, torch.randn(3, 16), torch.randn(2, 16, 2, 3)
    transfer.form = form
    part = transfer.cross_atten
    values = cells.flatten(2).transpose(1, 2)
    keys = values + sine_positions(2, 3, 16, cells.device).flatten(1).T
    weights, biases = part["multihead_attn"].in_proj_weight.split(16), part["multihead_attn"].in_proj_bias.split(16)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (8, 2)).transpose(1, 2)
        for x, w, b in zip((text.expand(2, -1, -1), keys, values), weights, biases)
    )
    mixed = ((q @ k.mT / 2**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    seen = part["MLP"](part["multihead_attn"].out_proj(mixed))
    expected = text + part["norm"](seen) if form == "panoptic" else part["norm"](text + seen)
    torch.testing.assert_close(transfer(text, cells), expected, atol=1e-5, rtol=1e-5)


def test_cells_are_read_in_the_order_of_the_published_code(model):
    channels = list(model.backbone.channels.values())[-1]
    dense, visual = torch.randn(2, channels, 2, 3), model.backbone.clip_model.visual
    cells = model.cells(dense)
    numbers = dense[1].flatten()[4 * channels : 5 * channels]  # of the fifth token of the second image
    expected = visual.head(visual.trunk.head(numbers[None, :, None, None]))[0]
    torch.testing.assert_close(cells[1, :, 1, 1], expected)


def test_each_image_moves_the_texts_its_own_way_and_naming_anew_is_scoring(model):
    images = [sample_image(seed=seed) for seed in range(2)]
    both = model.score(images)
    [alone] = model.score(images[1:])
    torch.testing.assert_close(both[1].out_logits, alone.out_logits, atol=1e-4, rtol=1e-4)
    other = Vocabulary.from_names("dog; sea:stuff; cup, mug")
    [fresh] = model.score(images[1:], other)
    torch.testing.assert_close(model.rescore(alone, other).out_logits, fresh.out_logits, atol=1e-5, rtol=1e-5)
    moved = model.rescore(replace(alone, dense=both[0].dense), other)
    assert not torch.allclose(moved.out_logits, fresh.out_logits)


def test_its_config_takes_clip_alone_and_the_form_of_the_heads(maft_cfg):
    cfg = load_config("coco/panoptic-segmentation/maft_plus/maft_plus_convnext_large_eval_ade20k.yaml")
    assert (build_ensemble(cfg).alpha, cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES) == (1.0, 100)
    maft_cfg.MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_ALPHA = maft_cfg.MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_BETA = -1.0
    assert (build_ensemble(maft_cfg).alpha, build_ensemble(maft_cfg).beta) == (1.0, 1.0)
    assert build_model(maft_cfg).cdt.form == "panoptic"
    maft_cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    assert build_model(maft_cfg).cdt.form == "semantic"
    maft_cfg.MODEL.FC_CLIP.CDT_FORM = "instance"
    with pytest.raises(ValueError, match="unknown MODEL.FC_CLIP.CDT_FORM 'instance'"):
        build_model(maft_cfg)


def test_a_mask_adapter_is_refused(maft_cfg):
    maft_cfg.MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER = "mask_adapter"
    with pytest.raises(ValueError, match=r"MAFT\+ has no Mask-Adapter here.*OUT_OF_VOCABULARY_CLASSIFIER"):
        build_model(maft_cfg)


def test_its_file_is_loaded_without_the_teacher_and_only_in_the_form_it_was_trained_in(model, tmp_path, caplog):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = {key.replace("backbone.", "backbone_t.", 1): value for key, value in state.items() if "clip_model" in key}
    file = {**state, **teacher, "criterion.empty_weight": torch.ones(134)}
    torch.save(file, tmp_path / "maft.pth")
    torch.nn.init.zeros_(model.cdt.cross_atten["MLP"].weight)
    with caplog.at_level("INFO"):
        load_weights(model, tmp_path / "maft.pth")
    assert torch.equal(model.cdt.cross_atten["MLP"].weight, state["cdt.cross_atten.MLP.weight"])
    assert f"{len(teacher)} tensors of a CLIP that only taught are left out" in caplog.text
    torch.save({**file, "criterion.empty_weight": torch.ones(172)}, tmp_path / "semantic.pth")
    with pytest.raises(ValueError, match="trained for semantic segmentation.* set MODEL.FC_CLIP.CDT_FORM semantic"):
        load_weights(model, tmp_path / "semantic.pth")


def test_files_of_fcclip_and_of_maft_are_not_taken_for_each_other(model, tiny_model, tiny_cfg, tmp_path):
    save_weights(model, tmp_path / "maft.safetensors")
    tiny_cfg.MODEL.META_ARCHITECTURE = "FCCLIP"
    plain = tiny_model(cfg=tiny_cfg)
    with pytest.raises(ValueError, match=r"weights of MAFT\+: use its YAML"):
        load_weights(plain, tmp_path / "maft.safetensors")
    save_weights(plain, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="lacks the text transfer"):
        load_weights(model, tmp_path / "plain.safetensors")
