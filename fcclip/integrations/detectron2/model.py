"""Every architecture as detectron2 builds it, and FC-CLIP's parts by their registered names.

Each of these parts is fcclip's own, with a constructor that also takes `(cfg, input_shape)` and detectron2's inputs and
outputs at the edge. Another part can take its place under a name of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import Metadata
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from fcclip.config import lookup
from fcclip.errors import InputError
from fcclip.integrations.detectron2.catalog import catalog_vocabulary, metadata_vocabulary
from fcclip.integrations.detectron2.config import check_config
from fcclip.integrations.detectron2.records import output_to_detectron2, targets_from_instances
from fcclip.modeling import build, mask_decoder, pixel_decoder
from fcclip.modeling import head as whole_head
from fcclip.modeling.backbones import clip
from fcclip.structures import Features, TextEmbeddings, TrainingBatch
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_state, model_weights

logger = logging.getLogger(__name__)

# Decoders by MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME, called with `(cfg, in_channels, mask_classification)`.
TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_MODULE")


class DetectronModel:
    """What gives an architecture detectron2's inputs and outputs.

    `score`, `outputs` and `losses` speak fcclip's records; a call of the model speaks detectron2's.

    Args:
        input_format: channel order of the images, "RGB" or "BGR" (INPUT.FORMAT).
        vocabularies: folder of published vocabulary files for the data sets of fcclip; "" looks for one.
        parts: as of the architecture.

    Attributes:
        read_parts: from a config to the parts.
    """

    read_parts: Callable[[CfgNode], dict[str, Any]]

    @configurable
    def __init__(self, *, input_format: str, vocabularies: str = "", **parts: Any) -> None:
        super().__init__(**parts)
        self.input_format = input_format
        self.vocabularies = vocabularies

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The parts that a config names; the vocabularies are those of DATASETS.TRAIN[0] and DATASETS.TEST[0]."""
        check_config(cfg)
        return {
            **cls.read_parts(cfg),
            **_vocabularies(cfg),
            "input_format": cfg.INPUT.FORMAT,
            "vocabularies": cfg.MODEL.FC_CLIP.VOCABULARIES,
        }

    def forward(
        self, batched_inputs: Sequence[Mapping[str, Any]], *, vocabulary: Vocabulary | None = None
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses while training, else predictions.

        Args:
            batched_inputs: a mapping an image: `image` (3, H, W), optionally `height` and `width` of the outputs; in
                training `instances` (see `targets_from_instances`).
            vocabulary: classes for this call; default: those of `set_metadata`.

        Returns:
            As the architecture, with detectron2's `Instances`.

        Raises:
            ValueError: no ground truth in training, no vocabulary, images of another form.
        """
        if self.training:
            samples = [_with_targets(index, sample) for index, sample in enumerate(batched_inputs)]
            return self.losses(TrainingBatch(samples, getattr(batched_inputs, "segment_counts", None)))
        return [output_to_detectron2(output) for output in super().forward(batched_inputs, vocabulary=vocabulary)]

    def set_metadata(self, metadata: Metadata) -> None:
        """Looks for the classes of a data set of detectron2's catalog from now on.

        Raises:
            ValueError: see `metadata_vocabulary`.
        """
        self.test_vocabulary = metadata_vocabulary(
            metadata, folder=self.vocabularies, need_things=_need_things(self.heads)
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Loads all weights or none; detectron2's checkpointer would only warn about those that do not fit.

        A state dict may hold any part of the frozen encoders. `strict=False` is treated like `strict=True`.

        Raises:
            ValueError: missing, unknown or wrong-shape keys; names them and the likely cause.
        """
        try:
            load_state(self, state_dict, source="the state dict")
        except ValueError as error:
            if strict or model_weights(self).keys() <= state_dict.keys():
                raise
            raise InputError(
                f"{error}\n  (detectron2's own checkpointer leaves keys of another shape out before the model sees "
                "them, so a missing key may be one of another shape; fcclip.integrations.detectron2.Checkpointer "
                "names both shapes.)"
            ) from error
        return _IncompatibleKeys([], [])


def fcclip_parts(cfg: CfgNode) -> dict[str, Any]:
    """What FC-CLIP is made of, by names of detectron2's registries, where others can take their places."""
    backbone = build_backbone(cfg)
    if not isinstance(backbone, clip.CLIPBackbone):
        raise InputError(
            f"MODEL.BACKBONE.NAME '{cfg.MODEL.BACKBONE.NAME}' is a {type(backbone).__name__}; FCCLIP needs a "
            "fcclip.modeling.CLIPBackbone, because the backbone classifies too. Use 'CLIP'."
        )
    build.check_embed_dim(cfg, backbone)
    head = build_sem_seg_head(cfg, backbone.output_shape())
    return {"backbone": backbone, "sem_seg_head": head, **build.fcclip_arguments(cfg, backbone)}


def _architectures() -> dict[str, type]:
    """The architectures of fcclip by name; parts of FC-CLIP alone can be replaced."""
    replaceable = {"FCCLIP": fcclip_parts}
    return {
        name: type(
            name,
            (DetectronModel, architecture),
            {"read_parts": staticmethod(replaceable.get(name, parts)), "__module__": __name__},
        )
        for name, (architecture, parts) in build.META_ARCHITECTURES.items()
    }


ARCHITECTURES = _architectures()
FCCLIP = ARCHITECTURES["FCCLIP"]


class NamedFeatures(Features):
    """Features that detectron2's own heads can read by name; `clip_vis_dense` are the dense ones."""

    def __getitem__(self, name: str) -> Tensor:
        return self.dense if name == "clip_vis_dense" else self.levels[name]


class DetectronBackbone(clip.CLIPBackbone, Backbone):
    """A `CLIPBackbone` that says what detectron2 asks of a backbone."""

    def forward(self, images: Tensor) -> NamedFeatures:
        """Normalised images (B, 3, H, W) -> features."""
        features = super().forward(images)
        return NamedFeatures(features.levels, features.dense)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level; `clip_embedding` is the joint space, which has no stride."""
        levels = {name: ShapeSpec(channels=self.channels[name], stride=self.strides[name]) for name in self.channels}
        return {**levels, "clip_embedding": ShapeSpec(channels=self.embed_dim, stride=-1)}

    @property
    def size_divisibility(self) -> int:
        """No rounding of its own; MODEL.MASK_FORMER.SIZE_DIVISIBILITY pads."""
        return -1


class ConvNeXtCLIP(DetectronBackbone, clip.ConvNeXtCLIP):
    """The ConvNeXt family as a detectron2 backbone."""


class ResNetCLIP(DetectronBackbone, clip.ResNetCLIP):
    """The ResNet family as a detectron2 backbone."""


FAMILIES = (ConvNeXtCLIP, ResNetCLIP)


def CLIP(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The frozen CLIP that MODEL.FC_CLIP names.

    Raises:
        ValueError: as `fcclip.modeling.build_clip`.
    """
    check_config(cfg)
    return build.build_clip_backbone(cfg, FAMILIES)


class FCCLIPHead(whole_head.FCCLIPHead):
    """Pixel decoder and masked decoder, each by its registered name.

    Args:
        pixel_decoder: with `forward_features(features)` -> mask features, map at stride 32, [maps at 32, 16, 8].
        predictor: called like `MultiScaleMaskedTransformerDecoder`.
    """

    @configurable
    def __init__(self, *, pixel_decoder: nn.Module, predictor: nn.Module) -> None:
        super().__init__(pixel_decoder=pixel_decoder, predictor=predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The two decoders that a config names."""
        check_config(cfg)
        build.check_decoder_input(cfg)
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        pixel_decoder = lookup(
            "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", head.PIXEL_DECODER_NAME, dict(SEM_SEG_HEADS_REGISTRY)
        )
        predictor = lookup(
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
            former.TRANSFORMER_DECODER_NAME,
            dict(TRANSFORMER_DECODER_REGISTRY),
        )
        return {
            "pixel_decoder": pixel_decoder(cfg, input_shape),
            "predictor": predictor(cfg, head.CONVS_DIM, mask_classification=True),
        }

    def forward(
        self, levels: Mapping[str, Tensor], text: TextEmbeddings, *, all_sets: bool
    ) -> mask_decoder.MaskProposals:
        """As fcclip's head, through `forward_features`."""
        mask_features, _, pyramid = self.pixel_decoder.forward_features(levels)
        return self.predictor(pyramid, mask_features, text, all_sets=all_sets)


class MSDeformAttnPixelDecoder(pixel_decoder.MSDeformAttnPixelDecoder):
    """The deformable pixel decoder, from values or from `(cfg, input_shape)`."""

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The values of a config."""
        check_config(cfg)
        levels = {name: shape for name, shape in input_shape.items() if shape.stride is not None and shape.stride > 0}
        channels = {name: shape.channels for name, shape in levels.items()}
        strides = {name: shape.stride for name, shape in levels.items()}
        return build.pixel_decoder_arguments(cfg, SimpleNamespace(channels=channels, strides=strides))

    def forward_features(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Backbone levels -> mask features (B, mask_dim, H/4, W/4), the map at stride 32, the maps at strides 32, 16
        and 8."""
        mask_features, pyramid = self(features)
        return mask_features, pyramid[0], pyramid


class MultiScaleMaskedTransformerDecoder(mask_decoder.MultiScaleMaskedTransformerDecoder):
    """The masked decoder, from values or from `(cfg, in_channels, mask_classification)`."""

    @configurable
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> dict[str, Any]:
        """The values of a config."""
        check_config(cfg)
        if not mask_classification:
            raise InputError("FC-CLIP classifies masks: mask_classification must be True")
        arguments = build.mask_decoder_arguments(cfg, embed_dim=cfg.MODEL.FC_CLIP.EMBED_DIM)
        return {**arguments, "in_channels": in_channels}


def _need_things(heads: Sequence[str]) -> bool:
    return bool({"panoptic", "instances"} & set(heads))


def _vocabularies(cfg: CfgNode) -> dict[str, Vocabulary]:
    """The vocabularies of the first training set and of the first test set, as far as the config names one."""
    folder, names = cfg.MODEL.FC_CLIP.VOCABULARIES, cfg.DATASETS.TEST
    vocabularies = {}
    if cfg.DATASETS.TRAIN:
        vocabularies["train_vocabulary"] = catalog_vocabulary(cfg.DATASETS.TRAIN[0], folder=folder)
    if names:
        need_things = _need_things(build.enabled_heads(cfg))
        vocabularies["test_vocabulary"] = catalog_vocabulary(names[0], folder=folder, need_things=need_things)
    if len(names) > 1:
        logger.warning(
            "DATASETS.TEST names %d data sets; the model looks for the classes of the first, '%s', until set_metadata "
            "is called. Trainer.test of fcclip.integrations.detectron2 calls it for each data set, detectron2's "
            "DefaultTrainer.test does not.",
            *(len(names), names[0]),
        )
    return vocabularies


def _with_targets(index: int, sample: Mapping[str, Any]) -> Mapping[str, Any]:
    if "targets" in sample:
        return sample
    if "instances" not in sample:
        raise InputError(
            f"training needs 'instances' with gt_classes and gt_masks in every image; image {index} of this batch "
            f"has {', '.join(sample)}. Build the loader with fcclip's mapper: build_detection_train_loader(cfg, "
            "mapper=DatasetMapper(cfg)) from fcclip.integrations.detectron2, or use its Trainer."
        )
    return {**sample, "targets": targets_from_instances(sample["instances"])}
