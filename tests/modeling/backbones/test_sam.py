"""SAM's frozen encoder: what it sees, how its weights are loaded, what is refused."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from fcclip.modeling.backbones.sam import build_sam
from fcclip.weights import frozen_notes, frozen_parts
from tests.conftest import DATA
from tests.modeling.test_fcclip import sample_image

TINY = str(DATA / "tiny_sam.json")


@pytest.fixture
def sam():
    torch.manual_seed(0)
    sam = build_sam(TINY)
    torch.nn.init.normal_(sam.image_encoder.pos_embed)
    return sam


def metas_file(sam, path, **more):
    """A file as Meta's, with the parts that nothing runs."""
    unused = {"prompt_encoder.no_mask_embed.weight": torch.zeros(1, 32), "mask_decoder.iou_token.weight": torch.ones(2)}
    torch.save({**sam.state_dict(), **unused, **more}, path)
    return str(path)


def test_a_batch_is_seen_on_the_grid_of_its_padded_canvas_whatever_its_size(sam):
    features = sam([sample_image(64, 96), sample_image(50, 70)], divisibility=32)
    assert features.shape == (2, 32, 8, 8) and not features.requires_grad
    image = sample_image(64, 96)["image"]
    square = F.interpolate((image.float() - sam.pixel_mean)[None] / sam.pixel_std, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(features[:1], sam.image_encoder.forward_features(square))


def test_padding_keeps_the_aspect_ratio_and_gives_the_cells_of_the_image_alone(sam):
    sam.resize = "pad"
    images = torch.randn(1, 3, 64, 96)
    squares, cells = sam.squares(images)
    assert squares.shape == (1, 3, 64, 64) and cells == (5, 8)
    assert squares[..., :40, :].abs().min() > 0 and not squares[..., 40:, :].any()
    assert sam.encode(images).shape == (1, 32, 5, 8)


def test_it_is_frozen_and_stays_in_evaluation_mode(sam):
    sam.train()
    assert sam.training and not any(module.training for module in sam.image_encoder.modules())
    assert not any(weight.requires_grad for weight in sam.parameters())
    assert not sam([sample_image()], divisibility=32).requires_grad


def test_in_training_under_autocast_a_low_precision_copy_gives_the_numbers_of_autocast(sam):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = sam([sample_image()], divisibility=32), sam.train()([sample_image()], divisibility=32)
    assert torch.equal(found, expected) and sam._cast.module.neck[0].weight.dtype == torch.bfloat16


def test_what_it_sees_of_an_evaluated_image_is_kept_and_found_again_by_all_that_decides_it(sam, tmp_path):
    sam.eval().cache_dir = tmp_path / "features"
    with torch.no_grad():
        seen = sam([sample_image(seed=1)], divisibility=32)
    assert len(list(sam.cache_dir.iterdir())) == 1
    encode, sam.encode = sam.encode, None  # not called again
    assert torch.equal(sam([sample_image(seed=1)], divisibility=32), seen)
    sam.encode = encode
    for changes in ({"seed": 2}, {"height": 32}):
        sam([sample_image(**{"seed": 1, **changes})], divisibility=32)
    sam.resize = "pad"
    sam([sample_image(seed=1)], divisibility=32)
    torch.nn.init.zeros_(sam.image_encoder.pos_embed)
    sam([sample_image(seed=1)], divisibility=32)
    sam.train()([sample_image(seed=3)], divisibility=32)
    assert len(list(sam.cache_dir.iterdir())) == 5


def test_metas_file_is_loaded_whole_and_a_file_of_a_whole_model_too(sam, tmp_path):
    path = metas_file(sam, tmp_path / "sam.pth")
    torch.save(
        {f"sam.{key}": value for key, value in sam.state_dict().items()} | {"x.y": torch.ones(1)}, tmp_path / "m"
    )
    for source in (path, str(tmp_path / "m")):
        loaded = build_sam(TINY, source)
        assert all(torch.equal(value, sam.state_dict()[key]) for key, value in loaded.state_dict().items())
        assert not loaded.has_random_weights and loaded.fingerprint()["weights"] == sam.fingerprint()["weights"]
    assert frozen_parts(torch.nn.ModuleDict({"sam": sam})).keys() == {"sam."}
    assert frozen_notes(sam)["sam"]["architecture"] == "tiny_sam.json"


def test_the_folder_with_metas_file_will_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MODEL.SAM_WEIGHTS.*sam_vit_b_01ec64.pth"), torch.device("meta"):
        build_sam("vit_b", str(tmp_path))


def test_weights_of_another_encoder_are_refused(sam, tmp_path):
    other = copy.deepcopy(sam)
    other.image_encoder.neck[0] = torch.nn.Conv2d(8, 32, 1, bias=False)
    with pytest.raises(
        ValueError, match=r"do not fit SAM .*MODEL.SAM_NAME.*size mismatch for image_encoder.neck.0.weight"
    ):
        build_sam(TINY, metas_file(other, tmp_path / "other.pth"))
    with pytest.raises(ValueError, match=r"Unexpected key.*image_encoder.extra"):
        build_sam(TINY, metas_file(sam, tmp_path / "more.pth", **{"image_encoder.extra": torch.ones(1)}))


def test_unknown_encoders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"MODEL.SAM_NAME 'vit_t'.*vit_b"):
        build_sam("vit_t")
    (tmp_path / "own.json").write_text(json.dumps({"embed_dim": 8, "width": 3}))
    with pytest.raises(ValueError, match=r"must hold depth, embed_dim.*it has embed_dim, width"):
        build_sam(str(tmp_path / "own.json"))
    with pytest.raises(ValueError, match=r"MODEL.SAM_RESIZE 'crop'"):
        build_sam(TINY, resize="crop")


@pytest.mark.parametrize(("name", "count"), [("vit_b", 89_670_912), ("vit_l", 308_278_272), ("vit_h", 637_026_048)])
def test_published_encoders_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(weight.numel() for weight in build_sam(name).parameters()) == count
