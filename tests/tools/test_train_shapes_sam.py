"""The program that trains the SAM of the shapes world, and the encoder that is shipped."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fcclip.config import assets_dir, load_config
from fcclip.errors import InputError
from fcclip.modeling.backbones.sam import build_sam
from fcclip.modeling.openseg import read_sam_masks
from tests.tools.conftest import REPOSITORY, load_program

tool = load_program(REPOSITORY / "tools" / "train_shapes_sam.py")
TINY = {"img_size": 256, "patch_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "window_size": 4}


@pytest.fixture(scope="module")
def pool():
    return tool.render_pool(seed=11, rule_name="clip", num_images=3, workers=1)


@pytest.fixture(scope="module")
def shipped():
    cfg = load_config("shapes/frozenseg_shapes.yaml")
    return build_sam(cfg.MODEL.SAM_NAME, cfg.MODEL.SAM_WEIGHTS)


def test_the_shipped_encoder_is_small_and_frozen_and_seen_by_the_config(shipped):
    path = assets_dir() / "shapes_sam.safetensors"
    assert path.stat().st_size < 4 * 2**20
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
        assert json.loads(file.metadata()["training"])["seed"] != tool.GATE_SEED
    assert shipped.pretrained == "shapes_sam.safetensors" and shipped.channels == 64 and shipped.image_size == 256
    assert not any(parameter.requires_grad for parameter in shipped.train().parameters())
    assert not shipped.image_encoder.training


def test_points_of_the_shipped_encoder_find_their_shapes(shipped):
    tune = tool.render_pool(seed=tool.GATE_SEED, rule_name="tune", num_images=6, workers=1)
    figures = tool.gate(shipped, tune)
    assert figures["things"][0] > 50 and figures["grounds"][0] > 75  # percent


def test_a_mask_is_where_features_are_like_those_at_its_point():
    features = torch.zeros(1, 2, 4, 4)
    features[0, 0, :, :2] = features[0, 1, :, 2:] = 1.0
    masks = tool.mask_logits(features, torch.tensor([[[-0.75, 0.0], [0.75, 0.0]]]), tool.grid_places(4)[None])
    assert (masks.unflatten(-1, (4, 4)) > 0).int().tolist() == [[[[1, 1, 0, 0]] * 4, [[0, 0, 1, 1]] * 4]]


def test_places_of_a_batch_are_the_same_piece_where_they_say_so(pool, monkeypatch):
    monkeypatch.setattr(tool, "BATCH", 4)
    numbered = tool.Pool(np.repeat(pool.piece_maps[..., None], 3, -1), pool.piece_maps, *[[]] * 3)
    images, points, pixels, same = tool.sample_batch(np.random.default_rng(0), numbered)
    assert images.shape == (4, 3, 256, 256) and same.shape == (4, tool.POINTS, tool.PIXELS)
    at = [((places + 1) * 128 - 0.5).round().long() for places in (points, pixels)]
    for image, (asking, answering), truth in zip(images[:, 0], zip(*at), same):
        asked, answered = (image[places[:, 1], places[:, 0]] for places in (asking, answering))
        assert torch.equal(asked[:, None] == answered[None], truth)


def test_a_training_writes_weights_that_the_model_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "BATCH", 2)
    monkeypatch.setattr(tool, "GATE_IMAGES", 2)
    architecture, output = tmp_path / "tiny.json", tmp_path / "sam.safetensors"
    architecture.write_text(json.dumps({**TINY, "global_attn_indexes": [0], "neck_chans": 16}))
    words = ["--images", "2", "--iterations", "3", "--workers", "1"]
    assert tool.main([*words, "--architecture", str(architecture), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "things" in text and "grounds" in text
    assert build_sam(str(architecture), str(output)).channels == 16


def test_the_gates_own_world_is_refused(tmp_path):
    with pytest.raises(InputError, match="seed of the gate"):
        tool.main(["--seed", str(tool.GATE_SEED), "--output", str(tmp_path / "sam.safetensors")])


def test_masks_of_a_data_set_are_those_the_ensemble_reads(root, tmp_path):
    assert tool.main(["--masks", str(tmp_path / "masks"), "--dataset", "shapes_val", "--workers", "1"]) == 0
    files = sorted((tmp_path / "masks").iterdir())
    assert len(files) == 2
    logits = read_sam_masks(tmp_path / "masks", f"{files[0].stem}.jpg", (256, 256))
    areas = (logits > 0).flatten(1).sum(1)
    assert 2 < len(logits) <= 256 and torch.equal(areas, areas.sort(descending=True).values)
