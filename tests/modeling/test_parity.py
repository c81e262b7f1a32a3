"""The recorded outputs of the published implementation: same keys, same numbers (tests/data/parity, weights by
rule).
"""

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fcclip.config import load_config
from fcclip.modeling import build_model
from fcclip.modeling.build import compile_parts
from fcclip.modeling.classifier import with_void
from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.outputs import instance_inference, panoptic_inference, semantic_inference
from fcclip.modeling.pixel_decoder import MSDeformAttn
from fcclip.vocabulary import Vocabulary
from tests.msda_engines import built, engine  # noqa: F401
from tests.parity_weights import seeded_image, seeded_mask_predictions, seeded_state_dict, without_initialisation

DATA = Path(__file__).parents[1] / "data" / "parity"
CONFIG = "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k{}.yaml"
BACKBONES = ("convnext_large", "r50", "r101", "r50x4", "r50x16", "r50x64")


def published_config(backbone: str, device: str):
    suffix = "" if backbone == "convnext_large" else f"_{backbone}"
    overrides = ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.DEVICE", device]
    return load_config(CONFIG.format(suffix), overrides)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_state_dict_has_the_published_keys_shapes_and_kinds(backbone):
    with torch.device("meta"):
        model = build_model(published_config(backbone, "meta"))
    manifest = json.loads(gzip.decompress((DATA / "state_dicts" / f"manifest_{backbone}.json.gz").read_bytes()))
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    ours = {
        key: {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "kind": "trainable" if key in trainable else "frozen" if key in frozen else "buffer",
        }
        for key, value in model.state_dict().items()
    }
    assert ours == manifest


class Deviations:
    """Worst deviations in units of the recorded standard deviation, printed at the end of a comparison."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(DATA / f"{name}.npz")
        self.info = json.loads((DATA / f"{name}.json").read_text())
        self.worst: dict[str, float] = {}

    def of(self, key: str, value: torch.Tensor) -> np.ndarray:
        """Deviation of each recorded element."""
        assert list(value.shape) == self.info[key]["shape"], key
        recorded = self.arrays[key].reshape(-1)
        flat = value.detach().flatten()[:: self.info[key]["step"]][: len(recorded)].double().numpy()
        deviation = np.abs(flat - recorded) / self.info[key]["std"]
        self.worst[key] = float(deviation.max())
        return deviation

    def report(self) -> None:
        """Shown with `pytest -s`."""
        for key, worst in self.worst.items():
            print(f"  {key}: worst {worst:.2e} standard deviations")


@pytest.fixture(scope="module", params=["r50_192x256_0", "convnext_large_160x224_1"])
def recording(request):
    deviations = Deviations(request.param)
    setup = deviations.info["_setup"]
    train = Vocabulary.from_names(setup["train_classes"], things=setup["train_things"])
    test = Vocabulary.from_names(setup["test_classes"], things=setup["test_things"])
    with without_initialisation():
        model = build_model(published_config(setup["arch"], "cpu"), train_vocabulary=train, test_vocabulary=test)
    model.load_state_dict(seeded_state_dict(model))
    image = seeded_image(setup["height"], setup["width"], setup["seed"])
    yield model, image, setup, deviations
    print(f"\n{request.param}")
    deviations.report()


def test_backbone_pixel_decoder_and_text_agree_within_1e_4(recording):
    model, image, _, deviations = recording
    with torch.no_grad():
        images, _ = model.preprocess([{"image": image}])
        features = model.backbone(images)
        mask_features, pyramid = model.sem_seg_head.pixel_decoder(features.levels)
        text = model.text_encoder.encode(model.test_vocabulary)
    for name, value in {**features.levels, "clip_vis_dense": features.dense}.items():
        assert deviations.of(f"backbone.{name}", value).max() < 1e-4, name
    assert deviations.of("pixel_decoder.mask_features", mask_features).max() < 1e-4
    for index, level in enumerate(pyramid):
        assert deviations.of(f"pixel_decoder.multi_scale.{index}", level).max() < 1e-4
    assert deviations.of("text_classifier", text.vectors).max() < 1e-4


def test_every_decoder_layer_agrees_for_98_percent_of_the_queries(recording):
    """The others must be explained by an attention bit that flips, so a mask logit lies within 1e-4 of zero in an
    earlier layer.
    """
    model, image, _, deviations = recording
    with torch.no_grad():
        images, _ = model.preprocess([{"image": image}])
        features = model.backbone(images)
        text = with_void(model.text_encoder.encode(model.test_vocabulary), model.void_embedding.weight)
        found = model.sem_seg_head(features.levels, text, all_sets=True)
    names = [f"decoder.aux.{index}.pred_logits" for index in range(len(found.class_logits) - 1)]
    near_zero = False
    for index, (name, logits) in enumerate(zip([*names, "decoder.pred_logits"], found.class_logits)):
        deviation = deviations.of(name, logits).reshape(logits.shape[1], -1).max(1)
        agree = float((deviation < 1e-3).mean())
        assert agree >= 0.98, f"{name}: {agree:.1%} of the queries agree"
        flipped = np.flatnonzero(deviation >= 1e-3).tolist()
        assert not flipped or near_zero, f"{name}: queries {flipped} deviate and no mask logit is near zero"
        near_zero = near_zero or bool((found.mask_logits(index).abs() < 1e-4).any())
    masks = deviations.of("decoder.pred_masks", found.mask_logits())
    assert float((masks < 1e-3).mean()) >= 0.98


def test_outputs_agree_with_the_recording(recording):
    model, image, setup, deviations = recording
    height, width = setup["output_size"]
    output = model([{"image": image, "height": height, "width": width}])[0]
    semantic = deviations.of("sem_seg", output["sem_seg"])
    assert float((semantic < 2e-4).mean()) >= 0.999
    assert semantic.max() < 5e-3
    panoptic, segments = output["panoptic_seg"]
    assert panoptic.dtype == torch.int32
    equal = float((panoptic.numpy() == deviations.arrays["panoptic_seg"]).mean())
    assert equal >= 0.999
    recorded = [{key: segment[key] for key in ("id", "isthing", "category_id")} for segment in segments]
    assert recorded == deviations.info["segments_info"]
    assert [segment["area"] for segment in segments] == [int((panoptic == segment["id"]).sum()) for segment in segments]
    assert_instances_agree(output["instances"], deviations.arrays, score_tolerance=1e-4, area_tolerance=1e-3)


def test_every_engine_of_deformable_attention_agrees_with_the_recording(recording, engine, monkeypatch):  # noqa: F811
    """The pixel decoder on the device of the engine; on a CPU the final outputs, made by its functions, too."""
    monkeypatch.setenv("FCCLIP_MSDA", engine.name)
    model, image, _, deviations = recording
    decoder = model.sem_seg_head.pixel_decoder
    attentions = [module for module in decoder.modules() if isinstance(module, MSDeformAttn)]
    before = [module.engine for module in attentions]
    try:
        for module in attentions:
            module.engine = engine.name
        with torch.no_grad():
            features = model.backbone(model.preprocess([{"image": image}])[0])
            decoder.to(engine.device)
            mask_features, pyramid = decoder({name: level.to(engine.device) for name, level in features.levels.items()})
        assert deviations.of("pixel_decoder.mask_features", mask_features.cpu()).max() < 1e-4
        for index, level in enumerate(pyramid):
            assert deviations.of(f"pixel_decoder.multi_scale.{index}", level.cpu()).max() < 1e-4
        if engine.device == "cpu":
            test_every_decoder_layer_agrees_for_98_percent_of_the_queries(recording)
            test_outputs_agree_with_the_recording(recording)
    finally:
        decoder.to("cpu")
        for module, name in zip(attentions, before):
            module.engine = name


@pytest.mark.slow
@pytest.mark.parametrize("recording", ["r50_192x256_0"], indirect=True)
def test_every_engine_agrees_with_the_recording_in_compiled_parts(recording, engine, monkeypatch):  # noqa: F811
    """As graphs, which run as they are; generated code is tested in test_build.py."""
    model = recording[0]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compile_parts(model, "all")
    try:
        test_every_engine_of_deformable_attention_agrees_with_the_recording(recording, engine, monkeypatch)
    finally:
        vars(model).pop("pool")
        for module in model.modules():
            module._compiled_call_impl = None


def assert_instances_agree(instances, arrays, *, score_tolerance: float, area_tolerance: float) -> None:
    """Instances in the recorded order: descending score, stable."""
    order = torch.argsort(instances.scores, descending=True, stable=True)
    assert len(order) == len(arrays["instances.scores" if "instances.scores" in arrays else "scores"])
    prefix = "instances." if "instances.scores" in arrays else ""
    scores = arrays[f"{prefix}scores"]
    np.testing.assert_allclose(instances.scores[order].numpy(), scores, atol=score_tolerance)
    # scores that tie within the tolerance may come in another order: compare as multisets of (class, area)
    ours = sorted(zip(instances.pred_classes[order].tolist(), instances.pred_masks[order].flatten(1).sum(1).tolist()))
    theirs = sorted(zip(arrays[f"{prefix}classes"].tolist(), arrays[f"{prefix}areas"].tolist()))
    assert [label for label, _ in ours] == [label for label, _ in theirs]
    pixels = instances.pred_masks[0].numel()
    for (_, mine), (_, recorded) in zip(ours, theirs):
        assert abs(mine - recorded) <= area_tolerance * pixels


@pytest.mark.parametrize("seed", [11, 12])
def test_post_processing_agrees_with_the_recording(seed):
    arrays = np.load(DATA / f"postprocess_{seed}.npz")
    setup = json.loads((DATA / f"postprocess_{seed}.json").read_text())
    sizes = (setup["num_queries"], setup["num_classes"], setup["height"], setup["width"])
    class_logits, mask_logits = seeded_mask_predictions(*sizes, setup["seed"])
    masks = OutputMasks.whole(mask_logits)
    things = setup["thing_classes"]

    scores = semantic_inference(class_logits, masks).flatten()[:: setup["sem_seg_step"]].numpy()
    panoptic, segments = panoptic_inference(
        class_logits,
        masks,
        thing_classes=things,
        object_mask_threshold=setup["object_mask_threshold"],
        overlap_threshold=setup["overlap_threshold"],
    )
    instances = instance_inference(class_logits, masks, thing_classes=things, topk=setup["topk"])
    print(f"\npostprocess_{seed}: sem_seg worst {np.abs(scores - arrays['sem_seg']).max():.1e}")
    np.testing.assert_allclose(scores, arrays["sem_seg"], atol=1e-6)
    np.testing.assert_array_equal(panoptic.numpy(), arrays["panoptic_seg"])
    assert [{key: one[key] for key in ("id", "isthing", "category_id")} for one in segments] == setup["segments_info"]
    assert_instances_agree(instances, arrays, score_tolerance=1e-6, area_tolerance=0)
