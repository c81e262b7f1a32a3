"""Vision transformers as frozen encoders."""

import pytest
import timm
import torch

from fcclip.modeling import build_model
from fcclip.modeling.backbones.clip import FAMILIES, build_clip
from fcclip.modeling.backbones.vit import TimmViT, ViTCLIP, resized_positions
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_parts
from tests.conftest import DATA, tiny_fusioner
from tests.modeling.test_fcclip import sample_image

TINY = str(DATA / "tiny_vit.json")
TIMM = "test_vit"


def tiny_clip(**options):
    torch.manual_seed(0)
    return build_clip(TINY, families=(ViTCLIP, *FAMILIES), **options)


def test_dense_features_are_the_normalised_and_projected_tokens_of_open_clip():
    backbone, images = tiny_clip(), torch.randn(2, 3, 32, 32)
    visual = backbone.clip_model.visual
    visual.output_tokens = True
    _, tokens = visual(images)
    expected = (tokens @ visual.proj).transpose(1, 2).unflatten(-1, (4, 4))
    torch.testing.assert_close(backbone(images).dense, expected)
    assert backbone.channels == {"tokens": 16} and backbone.strides == {"tokens": 8}


def test_any_multiple_of_the_patch_is_taken_and_other_sizes_are_refused():
    backbone = tiny_clip()
    assert backbone(torch.randn(1, 3, 40, 64)).dense.shape == (1, 16, 5, 8)
    with pytest.raises(ValueError, match="patches of 8 x 8 pixels, which a network input of 40 x 60"):
        backbone(torch.randn(1, 3, 40, 60))


def test_positions_of_the_own_grid_stay_and_others_keep_constants():
    positions = torch.randn(17, 6)
    assert resized_positions(positions, (4, 4)) is positions
    resized = resized_positions(torch.full((17, 6), 3.0), (5, 7))
    assert resized.shape == (36, 6)
    torch.testing.assert_close(resized, torch.full((36, 6), 3.0))


@pytest.mark.parametrize("quick_gelu", ["on", "off"])
def test_both_towers_have_the_activation_that_is_asked_for(quick_gelu):
    backbone = tiny_clip(quick_gelu=quick_gelu)
    for tower in (backbone.clip_model.transformer, backbone.clip_model.visual.transformer):
        kinds = {type(block.mlp.gelu).__name__ for block in tower.resblocks}
        assert kinds == {"QuickGELU" if quick_gelu == "on" else "GELU"}


@pytest.fixture
def vit_file(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model(TIMM, pretrained=False)
    torch.save({f"module.base_encoder.{key}": value for key, value in vit.state_dict().items()}, tmp_path / "vit.pth")
    return vit.eval(), str(tmp_path / "vit.pth")


def test_weights_of_the_authors_are_read_by_their_names(vit_file):
    vit, path = vit_file
    backbone, images = TimmViT(TIMM, path), torch.randn(1, 3, 160, 160)
    tokens = vit.forward_features(images)[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(backbone(images).dense.flatten(2).transpose(1, 2), tokens.detach())
    assert backbone(torch.randn(1, 3, 64, 96)).dense.shape[-2:] == (4, 6)
    assert not backbone.has_random_weights and backbone.fingerprint()["pretrained"] == "vit.pth"


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet50", "", "'resnet50' is not a vision transformer of timm"),
        ("vit_nothing", "", "'vit_nothing' is not a vision transformer"),
        (TIMM, "missing.pth", "missing.pth"),
    ],
)
def test_what_is_no_vision_transformer_is_refused(name, weights, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TimmViT(name, weights)


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save({"cls_token": torch.zeros(1, 1, 7)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not fit the vision transformer 'test_vit'"):
        TimmViT(TIMM, str(tmp_path / "other.pth"))


def test_fusioner_looks_with_a_vit_of_timm_and_reads_with_clip(vit_file):
    cfg = tiny_fusioner()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = "timm", 16
    cfg.MODEL.FUSIONER.TIMM_MODEL, cfg.MODEL.FUSIONER.TIMM_WEIGHTS = TIMM, vit_file[1]
    model = build_model(cfg, test_vocabulary=Vocabulary.from_names("cat; dog"))
    assert model([sample_image()])[0]["sem_seg"].shape == (2, 64, 96)
    assert set(frozen_parts(model)) == {"backbone.", "text_backbone."}
    assert {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad} == {
        "fusion",
        "decoder",
    }


@pytest.mark.parametrize("name", ["tiny_convnext.json", "tiny_resnet.json"])
def test_convolutional_towers_give_tokens_too(name):
    cfg = tiny_fusioner()
    cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME = str(DATA / name)
    model = build_model(cfg, test_vocabulary=Vocabulary.from_names("cat; dog"))
    assert model([sample_image()])[0]["sem_seg"].shape == (2, 64, 96)
