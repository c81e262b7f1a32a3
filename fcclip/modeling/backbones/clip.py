"""The frozen CLIP that is both backbone and classifier (FC-CLIP, section 3.2).

A family is a subclass of `CLIPBackbone`, listed in `FAMILIES`: which image towers it fits, how features are tapped.
"""

from __future__ import annotations

import abc
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, ClassVar, NamedTuple

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fcclip.config import resolve_file
from fcclip.errors import InputError, NotReachableError
from fcclip.modeling.backbones.casting import CastCopy
from fcclip.modeling.backbones.fingerprint import compute_features, differences, library_versions
from fcclip.modeling.out_of_vocabulary import OUT_OF_VOCABULARY_CLASSIFIERS
from fcclip.structures import Features
from fcclip.weights.files import read_weight_file
from fcclip.weights.frozen import FrozenPart, load_frozen

logger = logging.getLogger(__name__)

LEVELS = ("stem", "res2", "res3", "res4", "res5")
FROZEN_PREFIX = "backbone.clip_model."  # of CLIP's weights in a file of a whole model, as published
# Tags of supported architectures whose weights were trained with QuickGELU; newer versions of open_clip say so.
_QUICK_GELU_TAGS = ("openai", "yfcc15m", "cc12m")
CONSTANTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")  # in some files; no weights


class CLIPBackbone(FrozenPart, abc.ABC):
    """A frozen CLIP; always in evaluation mode, never with gradients.

    Attributes:
        channels: channels of each level; strides: pixels between its cells.
        embed_dim: D, the width of the joint space.
        region_classifier: name of the out-of-vocabulary classifier that was published for this family.
        architecture, pretrained: what the config called them; pretrained "" means random weights.
        quick_gelu: whether the text tower has QuickGELU; activation_source: who said so, "default" for nobody.
        needs_activation: whether weights of this family exist with either activation.
    """

    notes_key = "clip"
    config_keys = ("MODEL.FC_CLIP.CLIP_MODEL_NAME", "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS")
    constants = tuple(f"clip_model.{name}" for name in CONSTANTS)
    hash_prefix = "backbone."
    region_classifier: ClassVar[str]
    needs_activation: ClassVar[bool]
    strides: ClassVar[dict[str, int]]

    def __init__(self, clip_model: nn.Module, *, channels: dict[str, int]) -> None:
        super().__init__()
        self.clip_model = clip_model.requires_grad_(False).eval()
        self.channels = channels
        self.embed_dim = int(clip_model.text_projection.shape[-1])
        self.architecture, self.pretrained = "", ""
        self.quick_gelu = has_quick_gelu(clip_model)
        self.activation_source = "default"
        self._cast = CastCopy()
        self._features: tuple[dict, dict] | None = None  # of the fingerprint: what they depend on, and values

    def train(self, mode: bool = True) -> CLIPBackbone:
        """Marks the module as training; the CLIP inside stays in evaluation mode."""
        super().train(mode)
        self.clip_model.eval()
        return self

    @property
    def logit_scale(self) -> Tensor:
        """CLIP's own logit scale, a logarithm."""
        return self.clip_model.logit_scale

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Normalised images (B, 3, H, W) -> the levels, and the dense features that region classifiers pool."""
        visual = self.clip_model.visual
        if self.training and torch.is_autocast_enabled(images.device.type):
            visual = self._cast.of(visual, torch.get_autocast_dtype(images.device.type))
        return self.tap(visual, images)

    @staticmethod
    @abc.abstractmethod
    def fits(visual: nn.Module) -> bool:
        """Whether an image tower of open_clip is of this family."""

    @abc.abstractmethod
    def tap(self, visual: nn.Module, images: Tensor) -> Features:
        """The features of one family from its image tower."""

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> (B, D): the embedding of a region that is the whole image."""
        dense = self(images).dense
        return OUT_OF_VOCABULARY_CLASSIFIERS[self.region_classifier](self)(dense, torch.ones_like(dense[:, :1]))[:, 0]

    # ---- as a frozen part, whose weights files leave out ----

    @property
    def has_random_weights(self) -> bool:
        """Whether no weights were loaded."""
        return self.pretrained == ""

    def fingerprint(self) -> dict[str, Any]:
        """What it is and computes, as JSON values.

        Returns:
            `architecture` and `pretrained` as the config named them (of paths the last part), `quick_gelu`; `weights`,
            a hash; `text` and `image` of `compute_features`; `libraries`, versions by name.
        """
        computed_by = {"weights": self.weights_hash(), "quick_gelu": self.quick_gelu}
        if self._features is None or self._features[0] != computed_by:
            self._features = computed_by, compute_features(self)
        return {
            "architecture": PurePath(self.architecture).name,
            "pretrained": PurePath(self.pretrained).name,
            **computed_by,
            **self._features[1],
            "libraries": library_versions(),
        }

    def check(
        self, notes: Mapping[str, Any] | str, held: Mapping[str, Tensor], *, source: str, complete: bool = False
    ) -> None:
        """See `FrozenPart.check`; a text tower in the file brings the activation that it was trained with.

        Raises:
            InputError: another CLIP; another activation than the config says; or nothing says which one a ResNet's text
                tower has.
        """
        super().check(notes, held, source=source, complete=complete)
        quick = notes.get("quick_gelu") if isinstance(notes, Mapping) else None
        undecided = self.activation_source == "default"
        has_text = any(not name.startswith(("clip_model.visual.", "clip_model.logit_scale")) for name in held)
        if has_text and quick is None and undecided and self.needs_activation:
            raise InputError(
                f"'{source}' holds the text tower of a ResNet CLIP, and nothing says whether it was trained with "
                "QuickGELU, as OpenAI's were: set MODEL.FC_CLIP.QUICK_GELU to 'on' (OpenAI's weights) or 'off' (all "
                "others). The wrong one would give wrong classes without any error."
            )
        if quick in (None, self.quick_gelu):
            return
        if not has_text or not undecided:
            raise InputError(
                f"'{source}' was trained {'with' if quick else 'without'} QuickGELU in the CLIP's text tower, but the "
                f"model has {'it' if self.quick_gelu else 'none'} ({self.activation_source}): set "
                f"MODEL.FC_CLIP.QUICK_GELU to '{'on' if quick else 'off'}'"
            )
        set_quick_gelu(self, quick, source=f"'{source}' says so")

    def loaded(self, notes: Mapping[str, Any] | str, *, source: str, complete: bool) -> None:
        """After weights were loaded: names where they are from, and warns if libraries compute something else."""
        if complete and self.has_random_weights:
            self.pretrained = Path(source).name
        if isinstance(notes, Mapping) and notes.get("weights") == self.weights_hash():
            for sentence in differences(notes, self.fingerprint()):
                logger.warning("%s: %s", source, sentence)


class ConvNeXtCLIP(CLIPBackbone):
    """CLIP with a timm ConvNeXt of any size."""

    region_classifier = "mask_pool"
    needs_activation = False
    strides: ClassVar[dict[str, int]] = {"stem": 4, "res2": 4, "res3": 8, "res4": 16, "res5": 32}

    def __init__(self, clip_model: nn.Module) -> None:
        trunk = clip_model.visual.trunk
        widths = [trunk.stem[0].out_channels, *(info["num_chs"] for info in trunk.feature_info)]
        super().__init__(clip_model, channels=dict(zip(LEVELS, widths, strict=True)))

    @staticmethod
    def fits(visual: nn.Module) -> bool:
        """See `CLIPBackbone`."""
        return type(getattr(visual, "trunk", None)).__name__ == "ConvNeXt"

    def tap(self, visual: nn.Module, images: Tensor) -> Features:
        """Stem and the four stages."""
        trunk = visual.trunk
        x = trunk.stem(images)
        maps = {"stem": x.contiguous()}
        for name, stage in zip(LEVELS[1:], trunk.stages):
            x = stage(x)
            maps[name] = x.contiguous()
        return Features(maps, dense=trunk.norm_pre(x).contiguous())


class ResNetCLIP(CLIPBackbone):
    """CLIP with OpenAI's modified ResNet."""

    region_classifier = "masked_attention_pool"
    needs_activation = True  # OpenAI's towers, and those trained like them, have QuickGELU; others have not
    strides: ClassVar[dict[str, int]] = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}

    def __init__(self, clip_model: nn.Module) -> None:
        visual = clip_model.visual
        layers = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        widths = [visual.conv3.out_channels, *(layer[-1].conv3.out_channels for layer in layers)]
        super().__init__(clip_model, channels=dict(zip(LEVELS, widths, strict=True)))

    @staticmethod
    def fits(visual: nn.Module) -> bool:
        """See `CLIPBackbone`."""
        return isinstance(visual, ModifiedResNet)

    def tap(self, visual: nn.Module, images: Tensor) -> Features:
        """The stem before its average pool, and the four layers."""
        x = visual.act1(visual.bn1(visual.conv1(images)))
        x = visual.act2(visual.bn2(visual.conv2(x)))
        x = visual.act3(visual.bn3(visual.conv3(x)))
        maps = {"stem": x}
        x = visual.avgpool(x)
        for name, layer in zip(LEVELS[1:], (visual.layer1, visual.layer2, visual.layer3, visual.layer4)):
            x = layer(x)
            maps[name] = x
        return Features(maps, dense=x)


FAMILIES: tuple[type[CLIPBackbone], ...] = (ConvNeXtCLIP, ResNetCLIP)


def build_clip(
    name: str,
    pretrained: str = "",
    *,
    quick_gelu: str = "auto",
    families: Sequence[type[CLIPBackbone]] = FAMILIES,
) -> CLIPBackbone:
    """A frozen CLIP of any supported family.

    Args:
        name: an open_clip architecture ("convnext_large_d_320", "RN50"), or the path of an open_clip model JSON.
        pretrained: an open_clip tag; the path of a weights file: a state dict (.pt, .pth, .bin, .safetensors), OpenAI's
            TorchScript archive, or a checkpoint of a whole model with its CLIP inside; or "" for random weights.
        quick_gelu: "auto", "on" or "off" (MODEL.FC_CLIP.QUICK_GELU). "auto" asks, in this order: the architecture's
            name or JSON, the tag, the file. OpenAI's ResNets have QuickGELU whatever open_clip builds by itself.
        families: as of `as_backbone`.

    Raises:
        ValueError: unknown architecture or tag, a family that is not supported, weights of another architecture, or a
            ResNet file of which nothing says what activation it was trained with.
        FileNotFoundError: a path that does not exist.
        ConnectionError: a tag whose weights are not on this machine and cannot be downloaded.
    """
    architecture = _architecture(name)
    named_quick = bool(architecture.pop("quick_gelu", False))
    if quick_gelu not in ("auto", "on", "off"):
        raise InputError(f"MODEL.FC_CLIP.QUICK_GELU must be 'auto', 'on' or 'off', got '{quick_gelu}'")
    weights = _pretrained_weights(name, pretrained) if pretrained else None
    if quick_gelu != "auto":
        quick, source = quick_gelu == "on", f"MODEL.FC_CLIP.QUICK_GELU is '{quick_gelu}'"
    elif named_quick:
        quick, source = True, f"the architecture '{name}' says so"
    elif weights is not None and weights.quick_gelu is not None:
        quick, source = weights.quick_gelu, f"'{pretrained}' says so"
    else:
        quick, source = False, "default"
    with RealRates():
        clip_model = open_clip.model.CLIP(**architecture, quick_gelu=quick)
    backbone = as_backbone(clip_model, name=name, families=families)
    if backbone.quick_gelu != quick:
        raise RuntimeError(
            f"open_clip {version('open_clip_torch')} built the text tower of '{name}' "
            f"{'with' if backbone.quick_gelu else 'without'} QuickGELU although it was asked for the other"
        )
    if weights is not None and source == "default" and backbone.needs_activation:
        raise InputError(
            f"nothing says whether the ResNet weights in '{pretrained}' are OpenAI's, whose text tower has QuickGELU: "
            "set MODEL.FC_CLIP.QUICK_GELU to 'on' (OpenAI's weights) or 'off' (all others)"
        )
    backbone.architecture, backbone.pretrained, backbone.activation_source = name, pretrained, source
    if weights is None:
        logger.info("CLIP '%s': random weights (MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS is empty)", name)
    else:
        tensors = {key: value for key, value in weights.tensors.items() if key not in CONSTANTS}
        load_frozen(backbone.clip_model, tensors, source=pretrained, what=f"CLIP '{name}'")
        logger.info("CLIP '%s': weights from '%s', %s (%s)", name, pretrained, "QuickGELU" if quick else "GELU", source)
    return backbone


class RealRates(TorchFunctionMode):
    """Early 1.0 versions of timm read drop rates out of `torch.linspace` while they build; on the meta device there
    would be none to read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {}, **({"device": "cpu"} if func is torch.linspace else {}))
        return func(*args, **kwargs)


def as_backbone(
    clip_model: nn.Module, *, name: str = "CLIP", families: Sequence[type[CLIPBackbone]] = FAMILIES
) -> CLIPBackbone:
    """An open_clip model as a backbone of the first of these families that fits its image tower.

    Raises:
        ValueError: a tower of another kind.
    """
    visual = clip_model.visual
    for family in families:
        if family.fits(visual):
            return family(clip_model)
    kind = type(getattr(visual, "trunk", visual)).__name__
    raise InputError(
        f"CLIP '{name}' has the image tower {kind}; supported are timm's ConvNeXt (convnext_*) and OpenAI's ResNets "
        "(RN50, RN101, RN50x4, RN50x16, RN50x64). FC-CLIP needs a convolutional tower."
    )


def _architecture(name: str) -> dict:
    if name.endswith(".json"):
        path = resolve_file(name, what="MODEL.FC_CLIP.CLIP_MODEL_NAME")
        config = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = open_clip.get_model_config(name)
        if config is None:
            convolutional = sorted(model for model in open_clip.list_models() if model.startswith(("convnext", "RN")))
            raise InputError(
                f"MODEL.FC_CLIP.CLIP_MODEL_NAME: open_clip {version('open_clip_torch')} knows no architecture "
                f"'{name}'. Known convolutional ones: {', '.join(convolutional)}; or give the path of an open_clip "
                "model JSON."
            )
    config = dict(config)
    if config.pop("custom_text", False) or "hf_model_name" in config.get("text_cfg", {}):
        raise InputError(f"CLIP '{name}' has a custom text tower; only CLIP's own text transformer is supported")
    return config


def has_quick_gelu(clip_model: nn.Module) -> bool:
    """Whether the text tower of an open_clip model has QuickGELU, x * sigmoid(1.702 x), instead of the exact GELU.

    Raises:
        ValueError: any other activation, or different ones in different blocks.
    """
    kinds = {type(block.mlp.gelu) for block in clip_model.transformer.resblocks}
    if len(kinds) != 1 or not kinds <= {nn.GELU, QuickGELU}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise InputError(f"the text tower of CLIP must have GELU or QuickGELU in every block, got {names}")
    return kinds == {QuickGELU}


def set_quick_gelu(backbone: CLIPBackbone, quick: bool, *, source: str) -> None:
    """Gives the transformers the activation their weights were trained with; `source` says who knows."""
    towers = (backbone.clip_model.transformer, getattr(backbone.clip_model.visual, "transformer", None))
    for block in (block for tower in towers if tower is not None for block in tower.resblocks):
        block.mlp.gelu = QuickGELU() if quick else nn.GELU()
    backbone.quick_gelu, backbone.activation_source = quick, source
    logger.info("CLIP '%s': %s (%s)", backbone.architecture, "QuickGELU" if quick else "GELU", source)


class _Weights(NamedTuple):
    """Tensors of a CLIP, and whether its text tower has QuickGELU; None: nothing says so."""

    tensors: dict[str, Tensor]
    quick_gelu: bool | None


def _pretrained_weights(name: str, pretrained: str) -> _Weights:
    if Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors", ".pkl") or "/" in pretrained:
        return _clip_weights(resolve_file(pretrained, what="MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"))
    known = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in known:
        raise InputError(
            f"MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS: '{pretrained}' is no open_clip tag of '{name}' (its tags: "
            f"{', '.join(known) or 'none'}) and no weights file (.pt, .pth, .bin, .safetensors)"
        )
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    try:
        path = open_clip.download_pretrained(tag)
    except Exception as error:  # every downloader behind open_clip has errors of its own
        raise NotReachableError(
            f"the weights '{pretrained}' of CLIP '{name}' are not on this machine and could not be downloaded "
            f"({type(error).__name__}: {error}). Download them where there is a network and give as "
            "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS the path of that file or of weights in the full layout, which hold "
            "the CLIP; or '' for random weights."
        ) from error
    return _Weights(_clip_weights(Path(path)).tensors, tag_has_quick_gelu(name, pretrained))


def tag_has_quick_gelu(name: str, tag: str) -> bool:
    """Whether the weights behind an open_clip tag were trained with QuickGELU; open_clip before 2.27 does not say."""
    return bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")) or tag in _QUICK_GELU_TAGS


def _clip_weights(path: Path) -> _Weights:
    """The CLIP in a file: bare, or inside a whole model."""
    file = read_weight_file(path, what="CLIP weights")
    tensors, notes = file.tensors, file.rest.get("clip")
    if any(key.startswith(FROZEN_PREFIX) for key in tensors):
        tensors = {
            key.removeprefix(FROZEN_PREFIX): value for key, value in tensors.items() if key.startswith(FROZEN_PREFIX)
        }
    elif any(key.startswith("sem_seg_head.") for key in tensors):
        raise InputError(
            f"'{path}' holds a segmenter without its CLIP: it belongs in MODEL.WEIGHTS, not in "
            "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"
        )
    said = notes.get("quick_gelu") if isinstance(notes, dict) else None
    return _Weights(tensors, True if file.kind == "torchscript" else said)  # OpenAI alone publishes TorchScript
