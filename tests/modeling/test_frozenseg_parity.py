"""The recorded outputs of the published FrozenSeg: same keys, same numbers (tests/data/parity/frozenseg).

The tolerances are those of the recordings: repeated with another number of threads, stages moved by 1e-5 standard
deviations, and one to five of 250 queries by up to 1e-2 where a mask logit near zero changed its sign.
"""

import gzip
import json
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fcclip.config import load_config
from fcclip.modeling import build_model
from fcclip.modeling.classifier import with_void
from fcclip.modeling.inputs import normalised_images
from fcclip.modeling.mask_decoder import MaskProposals
from fcclip.modeling.openseg import OpenSegEnsemble, unseen_shares
from fcclip.vocabulary import Vocabulary
from tests.modeling import test_parity
from tests.parity_weights import (
    seeded_image,
    seeded_mask_predictions,
    seeded_state_dict,
    seeded_tensor,
    without_initialisation,
)

DATA = test_parity.DATA / "frozenseg"
CONFIG = "coco/frozenseg/convnext_large_eval_ade20k.yaml"
RANDOM = ["MODEL.FROZEN_SEG.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.SAM_WEIGHTS", ""]
TRANSFORMER = "sem_seg_head.pixel_decoder.sam_transformer."


def on_meta(*options, config=CONFIG):
    with torch.device("meta"):
        return build_model(load_config(config, [*RANDOM, "MODEL.DEVICE", "meta", *options]))


def learning(model):
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("layout", ["clean", "reference"])
def test_state_dict_has_the_published_keys_shapes_and_kinds(layout):
    """Apart from SAM's prompt encoder and mask decoder, which nothing runs."""
    model = on_meta()
    model.sem_seg_head.pixel_decoder.sam_transformer.use_layout(layout)
    manifest = json.loads(gzip.decompress((DATA / f"manifest_{layout}.json.gz").read_bytes()))
    kinds = {name: "trainable" if weight.requires_grad else "frozen" for name, weight in model.named_parameters()}
    ours = {
        key: {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "kind": kinds.get(key, "buffer"),
        }
        for key, value in model.state_dict().items()
    }
    unused = ("sam.prompt_encoder.", "sam.mask_decoder.")
    assert ours == {key: value for key, value in manifest.items() if not key.startswith(unused)}
    assert learning(model) == {"clean": 26_200_577, "reference": 26_497_153}[layout]


def test_the_resnet_model_has_the_published_number_of_parameters():
    model = on_meta(config="coco/frozenseg/r50x64_eval_ade20k.yaml")
    model.sem_seg_head.pixel_decoder.sam_transformer.use_layout("reference")
    assert learning(model) == 27_792_001


def test_with_both_injectors_off_it_has_fcclips_number_of_parameters():
    former = "MODEL.MASK_FORMER.SAM_"
    assert learning(on_meta(f"{former}QUERY_FUSE_LAYER", 3, f"{former}FEATURE_FUSE_LAYER", 3)) == 20_721_601


@pytest.fixture(scope="module")
def model():
    with without_initialisation():
        model = build_model(load_config(CONFIG, [*RANDOM, "MODEL.DEVICE", "cpu"]))
    overrides = {key: torch.from_numpy(value) for key, value in np.load(DATA / "overrides.npz").items()}
    model.load_state_dict(seeded_state_dict(model) | overrides)
    return model


class Pass(NamedTuple):
    """The decoder's pass over one image, which several recordings share.

    Args:
        proposals: of every layer.
        stages: name in the recordings -> what a part gave.
        loss, gradients: of the recorded loss, where it was recorded; else 0 and none.
    """

    proposals: MaskProposals
    stages: dict
    loss: float
    gradients: dict


GRADIENTS = {("clean", 31, 2, 3): "clean_160x224_31", ("reference", 33, 2, 3): "reference_160x224_33"}


class Recording(test_parity.Deviations):
    """One recording, its image, and what the model makes of it."""

    seen: dict = {}  # noqa: RUF012  # by both encoders, of each image
    passes: dict = {}  # noqa: RUF012  # by layout, image, level of the queries and number of feature injectors

    def __init__(self, name, model):
        self.info = json.loads((DATA / f"{name}.json").read_text())
        arrays = np.load(DATA / f"{name}.npz")
        self.arrays = {key: value.flatten() if key in self.info else value for key, value in arrays.items()}
        self.worst, self.model, setup = {}, model, self.info["_setup"]
        model.train_vocabulary = Vocabulary.from_names(setup["train_classes"], things=setup["train_things"])
        model.seen_vocabulary = model.train_vocabulary
        model.test_vocabulary = Vocabulary.from_names(setup["test_classes"], things=setup["test_things"])
        object.__setattr__(model.output_settings, "overlap_threshold", setup["overlap"])
        transformer = model.sem_seg_head.pixel_decoder.sam_transformer
        transformer.use_layout(setup["layout"])
        weights = {
            key: seeded_tensor(TRANSFORMER + key, value.shape) for key, value in transformer.state_dict().items()
        }
        transformer.load_state_dict(weights)
        height, width = setup["output_size"]
        image = seeded_image(setup["height"], setup["width"], setup["seed"])
        self.sample = {"image": image, "height": height, "width": width}
        predictor = model.sem_seg_head.predictor
        injectors = len(predictor.transformer_cross_attention_layers_sam)
        self.key = (setup["layout"], setup["seed"], predictor.query_level, injectors)

    @torch.no_grad()
    def features(self):
        """What both encoders see."""
        seed = self.info["_setup"]["seed"]
        if seed not in self.seen:
            images, _ = self.model.preprocess([self.sample])
            self.seen[seed] = self.model.see(images, [self.sample])
        return self.seen[seed]

    def text(self):
        """The classes."""
        return self.model.text_encoder.encode(self.model.test_vocabulary)

    def passed(self):
        """The decoder's pass, which is made once."""
        if self.key not in self.passes:
            self.passes[self.key] = self.propose()
        return self.passes[self.key]

    def propose(self):
        head, stages, levels = self.model.sem_seg_head, {}, self.features().levels

        def keep(module, name, change=lambda out: out):
            return module.register_forward_hook(lambda _, __, out: stages.update({name: change(out)}))

        decoder = head.pixel_decoder
        hooks = [keep(decoder, "pixel_decoder"), keep(decoder.fpn3, "pixel_decoder.fpn3")]
        for index, layer in enumerate(decoder.sam_transformer.encoder.layers):
            hooks.append(keep(layer, f"pixel_decoder.sam_layer.{index}"))
        for index, layer in head.predictor.transformer_cross_attention_layers_sam.items():
            hooks.append(keep(layer, f"decoder.injector.{index}", lambda out: out.transpose(0, 1)))
        hooks.append(keep(decoder.sam_transformer, "pixel_decoder.sam", lambda out: out[0]))
        self.model.zero_grad()
        with torch.set_grad_enabled(self.key in GRADIENTS):
            found = head(levels, with_void(self.text(), self.model.void_embedding.weight), all_sets=True)
            sets = zip(found.class_logits, map(found.mask_logits, range(len(found.class_logits))))
            loss = sum(logits.square().mean() + masks.square().mean() for logits, masks in sets)
        if self.key in GRADIENTS:
            loss.backward()
        gradients = {name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None}
        self.model.zero_grad()
        for hook in hooks:
            hook.remove()
        stages["pixel_decoder.mask_features"], pyramid = stages.pop("pixel_decoder")
        stages |= {f"pixel_decoder.multi_scale.{index}": level for index, level in enumerate(pyramid)}
        proposals = MaskProposals(
            [logits.detach() for logits in found.class_logits],
            [embeddings.detach() for embeddings in found.mask_embeddings],
            found.mask_features.detach(),
            [embeddings.detach() for embeddings in found.class_embeddings],
        )
        return Pass(proposals, {name: value.detach() for name, value in stages.items()}, float(loss), gradients)

    def scored(self, monkeypatch):
        """What the model's one pass over the network says, from what was passed already."""
        features, proposals = self.features(), self.passed().proposals
        monkeypatch.setattr(type(self.model), "see", lambda *_: features)
        monkeypatch.setattr(type(self.model), "propose", lambda *_: proposals)
        [scored] = self.model.score([self.sample])
        return scored

    def agreeing(self, key, value):
        """Share of the queries, which are the second dimension, within 1e-3."""
        deviation = self.of(key, value)
        index = np.arange(deviation.size) * self.info[key]["step"] // (value.numel() // value.shape[1])
        return 1 - len(set(index[deviation.flatten() >= 1e-3])) / len(set(index))


RECORDINGS = ["clean_160x224_31", "reference_160x224_33", "reference_150x210_32", "clean_150x210_32"]


@pytest.fixture(params=RECORDINGS, scope="module")
def recording(request, model):
    recording = Recording(request.param, model)
    yield recording
    print(f"\n{request.param}")
    recording.report()


def test_sam_sees_what_was_recorded(recording):
    if "sam.embedding" not in recording.info:
        return  # the same image in the other layout
    model, blocks = recording.model, {}
    sam = model.sam.image_encoder
    hooks = [
        sam.blocks[index].register_forward_hook(lambda _, __, out, index=index: blocks.update({index: out}))
        for index in (0, 2, 11)
    ]
    embedding = recording.features().levels["sam"]
    for hook in hooks:
        hook.remove()
    assert len(blocks) == 3 and recording.of("sam.embedding", embedding).max() < 1e-4
    if "sam.input" not in recording.info:
        return
    statistics = {"mean": model.sam.pixel_mean, "std": model.sam.pixel_std}
    images, _ = normalised_images([recording.sample], divisibility=model.size_divisibility, **statistics)
    assert recording.of("sam.input", model.sam.squares(images)[0]).max() < 1e-4
    for index, block in blocks.items():
        assert recording.of(f"sam.block.{index}", block).max() < 1e-4


def test_stages_of_the_decoders_agree_within_1e_4(recording):
    stages = recording.passed().stages
    recorded = [key for key in recording.info if key.startswith(("pixel_decoder.", "decoder.injector."))]
    assert len(recorded) == 15
    for key in recorded:
        assert recording.of(key, stages[key]).max() < 1e-4, key


def test_text_embeddings_agree_within_1e_4(recording):
    assert recording.of("text_classifier", recording.text().vectors).max() < 1e-4


@torch.no_grad()
def assert_queries_agree(recording):
    """97 % of the queries; the others must be explained by a mask logit that lies within 1e-4 of zero before them."""
    found = recording.passed().proposals
    names = [f"decoder.aux.{index}.pred_logits" for index in range(9)]
    near_zero = False
    for index, (key, logits) in enumerate(zip([*names, "decoder.pred_logits"], found.class_logits, strict=True)):
        agree = recording.agreeing(key, logits)
        masks = found.mask_logits(index)
        near_zero = near_zero or bool((masks.abs() < 1e-4).any())
        assert agree >= 0.97 and (agree == 1 or near_zero), f"{key}: {agree:.1%}"
        if f"decoder.sam_vector.{index}" in recording.info:
            vectors = recording.model.sem_seg_head.predictor.sam_vectors(masks, recording.features().levels["sam"])
            assert recording.agreeing(f"decoder.sam_vector.{index}", vectors) >= 0.97
    assert recording.agreeing("decoder.pred_masks", found.mask_logits()) >= 0.97


def test_every_decoder_layer_agrees_for_97_percent_of_the_queries(recording):
    assert_queries_agree(recording)


def assert_outputs_agree(recording, output):
    semantic = recording.of("sem_seg", output["sem_seg"])
    assert float((semantic < 5e-4).mean()) >= 0.999 and semantic.max() < 5e-3
    panoptic, segments = output["panoptic_seg"]
    assert float((panoptic.numpy() == recording.arrays["panoptic_seg"]).mean()) >= 0.999
    assert [{key: one[key] for key in ("id", "isthing", "category_id")} for one in segments] == recording.info[
        "segments_info"
    ]
    scores = output["instances"].scores.sort(descending=True).values.numpy()
    recorded = recording.arrays["instances.scores"]
    assert len(scores) == len(recorded)
    np.testing.assert_allclose(scores, recorded, atol=5e-3 * recorded.max())


def test_outputs_agree_with_the_recording(recording, monkeypatch):
    assert_outputs_agree(recording, recording.model.outputs(recording.scored(monkeypatch)))


@pytest.mark.parametrize("variant", ["query1", "no_feature"])
def test_an_injector_at_another_level_or_turned_off_agrees_with_its_recording(model, variant, monkeypatch):
    predictor = model.sem_seg_head.predictor
    if variant == "query1":
        monkeypatch.setattr(predictor, "query_level", 1)
    else:
        monkeypatch.setitem(predictor._modules, "transformer_cross_attention_layers_sam", torch.nn.ModuleDict())
    recording = Recording(f"clean_160x224_31_{variant}", model)
    assert_queries_agree(recording)
    assert_outputs_agree(recording, model.outputs(recording.scored(monkeypatch)))


@pytest.mark.parametrize("variant", ["ensemble", "ensemble_semantic"])
def test_the_openseg_ensemble_inside_the_model_agrees_with_the_recording(model, variant, monkeypatch, tmp_path):
    """The second with semantic maps alone, which are made at the size of the input and resized."""
    recording = Recording(f"clean_160x224_31_{variant}", model)
    setup = recording.info["_setup"]["sam_masks"]
    logits = seeded_mask_predictions(setup["count"], 3, *setup["size"], setup["seed"])[1]
    monkeypatch.setattr("fcclip.modeling.frozenseg.read_sam_masks", lambda *_: logits)
    settings = replace(model.output_settings, masks_first=variant == "ensemble")
    scored = recording.scored(monkeypatch)
    named = model.name_masks(scored, logits)
    assert recording.of("openseg.sam_logits", named).max() < 1e-3
    kept = unseen_shares(named, scored.seen).any(-1).nonzero().flatten().tolist()
    assert kept == recording.info["openseg"]["kept"]
    for ensemble, key in ((OpenSegEnsemble(tmp_path, setup["alpha"]), "sem_seg"), (None, "openseg.without")):
        monkeypatch.setattr(model, "openseg", ensemble)
        found = model.outputs(scored, heads=("semantic",), settings=settings)["sem_seg"]
        deviation = recording.of(key, found)
        assert float((deviation < 5e-4).mean()) >= 0.999 and deviation.max() < 5e-3, key


def test_every_gradient_agrees_with_the_recording(recording):
    if recording.key not in GRADIENTS:
        return
    name = DATA / f"{GRADIENTS[recording.key]}_gradients"
    info, passed = json.loads(name.with_suffix(".json").read_text()), recording.passed()
    recorded_elements = np.load(name.with_suffix(".npz"))["elements"]
    assert passed.gradients.keys() == info["gradients"].keys()
    assert passed.loss == pytest.approx(info["loss"], rel=1e-5)
    for (key, (norm, step)), elements in zip(info["gradients"].items(), recorded_elements, strict=True):
        gradient, recorded = passed.gradients[key], elements[~np.isnan(elements)]
        assert gradient.norm().item() == pytest.approx(norm, rel=2e-3, abs=1e-12), key
        own = gradient.flatten()[::step][: len(recorded)].numpy()
        np.testing.assert_allclose(own, recorded, atol=3e-2 * norm / gradient.numel() ** 0.5 + 1e-12, err_msg=key)
