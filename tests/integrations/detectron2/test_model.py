"""detectron2's build_model and DefaultPredictor with the published files: fcclip's numbers, bit for bit."""

import gzip
import json

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.data import Metadata, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
    build_backbone,
    build_model,
    build_sem_seg_head,
)
from detectron2.structures import BitMasks, Instances

from fcclip import Segmenter
from fcclip.data import resize_image, shortest_edge_size
from fcclip.integrations.detectron2 import TRANSFORMER_DECODER_REGISTRY
from fcclip.integrations.detectron2.model import ARCHITECTURES, FAMILIES
from fcclip.modeling import CLIPBackbone
from fcclip.modeling import build_model as build_own_model
from fcclip.modeling.backbones import clip
from fcclip.modeling.build import META_ARCHITECTURES
from fcclip.structures import Targets
from fcclip.vocabulary import Vocabulary
from tests.integrations.detectron2.conftest import ADE20K, FROZENSEG, SMALL_SAM
from tests.tools.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("detectron2_knows_fcclip")
RESNET = {
    "MODEL__FC_CLIP__CLIP_MODEL_NAME": str(REPOSITORY / "tests/data/tiny_resnet.json"),
    "MODEL__FC_CLIP__ENSEMBLE_ON_VALID_MASK": True,
}


def sample_image(size=(64, 96), seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    return {"image": image, **extra}


def training_image(seed=0):
    masks = torch.zeros(3, 64, 96, dtype=torch.bool)
    masks[0, :32], masks[1, 20:, :40], masks[2, 40:60, 50:] = True, True, True
    return sample_image(seed=seed), torch.tensor([0, 5, 2]), masks


@pytest.fixture
def both_models(both_cfgs):
    """Function (…) as `both_cfgs` -> the model that detectron2 builds, and fcclip's, from the same seed."""

    def build(*args, **changes):
        cfg, ours = both_cfgs(*args, **changes)
        torch.manual_seed(7)
        model = build_model(cfg)
        torch.manual_seed(7)
        return model, build_own_model(ours)

    return build


# ---- published names ----


@pytest.mark.parametrize("backbone", ["", "_r50"])
def test_the_published_file_builds_the_published_state_dict(both_cfgs, backbone):
    cfg, _ = both_cfgs(
        ADE20K.replace(".yaml", f"{backbone}.yaml"), tiny=False, MODEL__FC_CLIP__CLIP_PRETRAINED_WEIGHTS=""
    )
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    name = f"manifest{backbone or '_convnext_large'}.json.gz"
    manifest = json.loads(gzip.decompress((REPOSITORY / "tests/data/parity/state_dicts" / name).read_bytes()))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == {
        key: value["shape"] for key, value in manifest.items()
    }
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        key for key, value in manifest.items() if value["kind"] == "trainable"
    }


def test_parts_are_registered_under_their_published_names(detectron2_cfg):
    cfg = detectron2_cfg(ADE20K)
    backbone = build_backbone(cfg)
    assert isinstance(backbone, Backbone) and isinstance(backbone, CLIPBackbone)
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {
        "stem": 4, "res2": 4, "res3": 8, "res4": 16, "res5": 32, "clip_embedding": -1
    }  # fmt: skip
    assert shapes["clip_embedding"].channels == 16 and backbone.size_divisibility == -1
    features = backbone(torch.zeros(1, 3, 64, 64))
    assert all(features[name].shape[1] == shapes[name].channels for name in features.levels)
    assert features["clip_vis_dense"] is features.dense

    pixel_decoder = SEM_SEG_HEADS_REGISTRY.get("MSDeformAttnPixelDecoder")(cfg, shapes).eval()
    mask_features, coarsest, pyramid = pixel_decoder.forward_features(features.levels)
    assert mask_features.shape == (1, 32, 16, 16) and coarsest is pyramid[0]
    assert [tuple(level.shape[-2:]) for level in pyramid] == [(2, 2), (4, 4), (8, 8)]
    decoder = TRANSFORMER_DECODER_REGISTRY.get("MultiScaleMaskedTransformerDecoder")
    assert decoder(cfg, 32, mask_classification=True).query_feat.weight.shape == (8, 32)
    assert type(build_sem_seg_head(cfg, shapes)).__name__ == "FCCLIPHead"


def test_every_family_of_clip_is_a_detectron2_backbone():
    for family, own in zip(FAMILIES, clip.FAMILIES, strict=True):
        assert issubclass(family, own) and issubclass(family, Backbone)


def test_a_part_of_ones_own_takes_its_place_by_name(detectron2_cfg, monkeypatch):
    class HalvedPixelDecoder(SEM_SEG_HEADS_REGISTRY.get("MSDeformAttnPixelDecoder")):
        def forward_features(self, features):
            mask_features, coarsest, pyramid = super().forward_features(features)
            return mask_features / 2, coarsest, pyramid

    monkeypatch.setitem(SEM_SEG_HEADS_REGISTRY._obj_map, "HalvedPixelDecoder", HalvedPixelDecoder)
    cfg = detectron2_cfg(ADE20K, MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME="HalvedPixelDecoder")
    own = build_model(cfg)
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    usual = build_model(cfg)
    usual.load_state_dict(own.state_dict())
    features = usual.backbone(torch.rand(1, 3, 64, 64)).levels
    (halved, _, _), (whole, _, _) = (
        model.eval().sem_seg_head.pixel_decoder.forward_features(features) for model in (own, usual)
    )
    assert torch.equal(halved * 2, whole)


def test_every_architecture_is_registered():
    assert {META_ARCH_REGISTRY.get(name) for name in META_ARCHITECTURES} == set(ARCHITECTURES.values())
    for name, (architecture, _) in META_ARCHITECTURES.items():
        assert issubclass(ARCHITECTURES[name], architecture) and ARCHITECTURES[name].__name__ == name


# ---- parity ----


@pytest.mark.parametrize(
    ("config", "changes"),
    [(ADE20K, {}), (ADE20K, RESNET), (FROZENSEG, SMALL_SAM)],
    ids=["convnext", "resnet", "frozenseg"],
)
def test_outputs_of_the_published_file_are_fcclips_bit_for_bit(both_models, config, changes):
    model, ours = both_models(config, **changes)
    assert model.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in model.state_dict().items())
    inputs = [sample_image((64, 96), height=50, width=75), sample_image((90, 60), seed=1)]
    for output, expected in zip(model.eval()(inputs), ours(inputs), strict=True):
        assert torch.equal(output["sem_seg"], expected["sem_seg"])
        assert torch.equal(output["panoptic_seg"][0], expected["panoptic_seg"][0])
        assert output["panoptic_seg"][1] == expected["panoptic_seg"][1]
        instances, own_instances = output["instances"], expected["instances"]
        assert len(instances) and instances.image_size == tuple(output["sem_seg"].shape[-2:])
        assert torch.equal(instances.pred_masks, own_instances.pred_masks.float())
        assert torch.equal(instances.pred_boxes.tensor, own_instances.pred_boxes)
        assert torch.equal(instances.scores, own_instances.scores)
        assert torch.equal(instances.pred_classes, own_instances.pred_classes)


@pytest.mark.parametrize(("config", "changes"), [(ADE20K, {}), (FROZENSEG, SMALL_SAM)], ids=["fcclip", "frozenseg"])
def test_losses_are_fcclips_bit_for_bit(both_models, config, changes):
    model, ours = both_models(config, **changes)
    sample, labels, masks = training_image()
    targets = Targets(labels, masks)
    expected = ours.train()([{**sample, "targets": targets, "point_seed": 3}])
    for form in (masks, BitMasks(masks)):
        instances = Instances((64, 96), gt_classes=labels, gt_masks=form)
        losses = model.train()([{**sample, "instances": instances, "point_seed": 3}])
        assert losses.keys() == expected.keys()
        assert all(torch.equal(losses[name], expected[name]) for name in expected)


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_the_predictor_gives_what_the_segmenter_gives(shapes, both_models, both_cfgs, tmp_path, channels):
    settings = {"INPUT__FORMAT": channels, "INPUT__MIN_SIZE_TEST": 80, "INPUT__MAX_SIZE_TEST": 100}
    model, ours = both_models(**settings)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    cfg, own_cfg = both_cfgs(MODEL__WEIGHTS=str(tmp_path / "model.pth"), **settings)
    rgb = np.ascontiguousarray(sample_image((60, 90))["image"].permute(1, 2, 0).numpy())

    predictor = DefaultPredictor(cfg)
    assert predictor.metadata.stuff_classes == list(ours.test_vocabulary.class_names)
    assert predictor.model.input_format == channels
    output = predictor(rgb[:, :, ::-1])
    expected = Segmenter(own_cfg, weights=str(tmp_path / "model.pth"))(rgb)
    ids, segments = output["panoptic_seg"]
    assert np.array_equal(ids.numpy(), expected.panoptic)
    assert sorted(segment["score"] for segment in segments) == sorted(segment.score for segment in expected.segments)
    (direct,) = ours([predictor_input(rgb, channels)])
    assert torch.equal(output["sem_seg"], direct["sem_seg"])


def predictor_input(rgb, channels):
    size = shortest_edge_size(*rgb.shape[:2], min_size=80, max_size=100)
    image = torch.from_numpy(resize_image(rgb, *size).transpose(2, 0, 1).copy())
    image = image.flip(0) if channels == "BGR" else image
    return {"image": image, "height": rgb.shape[0], "width": rgb.shape[1]}


# ---- vocabularies ----


def test_a_users_own_data_set_brings_its_classes(detectron2_cfg, monkeypatch):
    classes = {"stuff_classes": ["tree, trees", "road", "car,cars"], "thing_dataset_id_to_contiguous_id": {3: 2}}
    own = Metadata(name="streets", **classes)
    monkeypatch.setitem(MetadataCatalog.data, own.name, own)
    model = build_model(detectron2_cfg(ADE20K, DATASETS__TRAIN=(own.name,), DATASETS__TEST=(own.name,))).eval()
    assert model.train_vocabulary == model.test_vocabulary
    assert model.test_vocabulary.synonyms[0] == ("tree", "trees")
    (output,) = model([sample_image()])
    assert output["sem_seg"].shape == (3, 64, 96)
    assert set(output["instances"].pred_classes.tolist()) == {2}


def test_metadata_and_calls_change_the_classes(detectron2_cfg):
    model = build_model(detectron2_cfg(ADE20K)).eval()
    model.set_metadata(MetadataCatalog.get("shapes_val"))
    assert model([sample_image()])[0]["sem_seg"].shape[0] == 60
    assert model([sample_image()], vocabulary=Vocabulary.from_names("cat; grass:stuff"))[0]["sem_seg"].shape[0] == 2
    with pytest.raises(ValueError, match="do not say which of the stuff_classes are things"):
        model.set_metadata(Metadata(name="mine", stuff_classes=["sky"]))
    assert model([sample_image()])[0]["sem_seg"].shape[0] == 60


def test_several_test_sets_are_warned_about(detectron2_cfg, caplog):
    build_model(detectron2_cfg())
    assert "the model looks for the classes of the first, 'shapes_val', until set_metadata is called" in caplog.text


# ---- what cannot work ----


def test_a_config_without_fcclips_keys_is_refused(detectron2_cfg):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "FCCLIP", "CLIP", "cpu"
    with pytest.raises(ValueError, match=r"add_fcclip_config\(cfg\) before cfg.merge_from_file"):
        build_model(cfg)
    with pytest.raises(ValueError, match=r"add_fcclip_config\(cfg\) before cfg.merge_from_file"):
        build_backbone(cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL__DEVICE": "auto"}, "MODEL.DEVICE is 'auto', which detectron2 does not know"),
        ({"MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "MSDeformAtt"}, "Did you mean 'MSDeformAttnPixelDecoder'"),
        ({"MODEL__MASK_FORMER__TRANSFORMER_DECODER_NAME": "MultiScale"}, "unknown .*TRANSFORMER_DECODER_NAME"),
        (
            {"MODEL__BACKBONE__NAME": "build_resnet_backbone"},
            "is a ResNet; FCCLIP needs a fcclip.modeling.CLIPBackbone",
        ),
        ({"DATASETS__TEST": ("openvocab_ade20k_panoptic",)}, "Did you mean 'openvocab_ade20k_panoptic_val'"),
    ],
)
def test_values_that_cannot_work_are_refused(detectron2_cfg, changes, message):
    cfg = detectron2_cfg(ADE20K)
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.COMPILE", "backbone", "'MODEL.COMPILE' is 'backbone', but nothing reads it inside detectron2"),
        ("TEST.AMP.ENABLED", True, "'TEST.AMP.ENABLED' is True, but nothing reads it inside detectron2"),
        ("MODEL.MASK_FORMER.TEST.RECALL_ON", True, "RECALL_ON' is True, but detectron2 has no such evaluator"),
    ],
)
def test_a_key_that_nothing_would_read_is_refused(detectron2_cfg, key, value, message):
    cfg = detectron2_cfg(ADE20K)
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_training_without_ground_truth_is_refused(detectron2_cfg):
    model = build_model(detectron2_cfg(ADE20K)).train()
    with pytest.raises(ValueError, match=r"needs 'instances' .* image 0 .* has image, height. .*DatasetMapper\(cfg\)"):
        model([sample_image(height=3)])
    sample, labels, masks = training_image()
    with pytest.raises(ValueError, match=r"its targets are \(32, 96\) \(height, width\), but the image is \(64, 96\)"):
        model([{**sample, "instances": Instances((32, 96), gt_classes=labels, gt_masks=masks[:, :32])}])


def test_a_mask_classification_of_another_kind_is_refused(detectron2_cfg):
    with pytest.raises(ValueError, match="mask_classification must be True"):
        TRANSFORMER_DECODER_REGISTRY.get("MultiScaleMaskedTransformerDecoder")(detectron2_cfg(), 32, False)
