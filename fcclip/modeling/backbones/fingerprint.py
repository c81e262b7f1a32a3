"""What a CLIP is and what it computes, small enough to be stored beside weights and compared when they are loaded.

A segmenter is worth nothing on another CLIP than the one it was trained on, and libraries have changed what one CLIP
computes (bytedance/fc-clip #36; open_clip 3 builds OpenAI's ResNets with another activation). Both are told here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any
from weakref import WeakKeyDictionary

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcclip.errors import InputError
from fcclip.modeling.backbones.clip import FROZEN_PREFIX, CLIPBackbone, set_quick_gelu
from fcclip.modeling.out_of_vocabulary import OUT_OF_VOCABULARY_CLASSIFIERS
from fcclip.modeling.text import encode_tokens

__all__ = ["adopt_activation", "check_fingerprint", "clip_fingerprint", "clip_weights_hash"]

logger = logging.getLogger(__name__)

TEXTS = ("a photo of a red circle.", "There is a traffic light in the scene")
IMAGE_SIZE = 64  # pixels; a multiple of every backbone's stride
NUM_VALUES = 16  # kept of each unit-length feature, evenly spaced
# Length of the difference of two features against their own length. Weights stored as halves move them by 3e-4, a text
# tower with the wrong activation by 6e-3 to 1.3e-2 (shapes CLIP; seeded RN50 and ConvNeXt-L).
TOLERANCE = 1e-3
_computed: WeakKeyDictionary[CLIPBackbone, tuple[dict, dict]] = WeakKeyDictionary()  # features are computed once
_LIBRARIES = ("open_clip_torch", "timm", "torch")


def clip_fingerprint(model: nn.Module) -> dict[str, Any]:
    """What the CLIP of a model is and computes, as JSON values; {} for a model without a CLIP.

    Args:
        model: a `CLIPBackbone`, or a model (also in a DistributedDataParallel wrapper) with one called `backbone`.

    Returns:
        `architecture` and `pretrained` as the config named them (of paths the last part), `quick_gelu`; `weights`, the
        hash of `clip_weights_hash`; `text` and `image`, some values of the unit-length features of fixed inputs, in
        fp32; `libraries`, versions by name.
    """
    weights, backbone = clip_weights_hash(model), _backbone(model)
    if backbone is None:
        return {"weights": weights} if weights else {}
    computed_by = {"weights": weights, "quick_gelu": backbone.quick_gelu}
    if _computed.get(backbone, ({},))[0] != computed_by:
        _computed[backbone] = (computed_by, _features(backbone))
    return {
        "architecture": _last_part(backbone.architecture),
        "pretrained": _last_part(backbone.pretrained),
        **computed_by,
        **_computed[backbone][1],
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }


def clip_weights_hash(model: nn.Module) -> str:
    """A hash that tells one set of CLIP weights from another ("" for a model without a CLIP).

    Reads names, shapes and at most 64 values of each tensor, so it costs milliseconds; halving the precision keeps it.
    """
    model = _unwrapped(model)
    prefix = "backbone." if isinstance(model, CLIPBackbone) else ""
    state = {prefix + key: value for key, value in model.state_dict().items()}
    frozen = {key: value for key, value in state.items() if key.startswith(FROZEN_PREFIX)}
    digest = hashlib.sha256()
    for key, value in sorted(frozen.items()):
        flat = value.detach().flatten()
        sample = flat[:: max(flat.numel() // 64, 1)][:64].to("cpu", torch.float16)
        digest.update(f"{key}{tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest() if frozen else ""


def adopt_activation(stored: Mapping[str, Any] | str | None, model: nn.Module, *, source: str) -> None:
    """Before the text tower of a file is loaded: gives the model the activation that the file's tower was trained with.

    Args:
        stored: the file's fingerprint, if it has one.
        model: as for `clip_fingerprint`.
        source: name of the file, for messages.

    Raises:
        ValueError: the file says another activation than the config; or nothing says which one a ResNet's tower has.
    """
    backbone = _backbone(model)
    if backbone is None:
        return
    said = stored.get("quick_gelu") if isinstance(stored, Mapping) else None
    if said is None:
        if backbone.activation_source == "default" and backbone.needs_activation:
            raise InputError(
                f"'{source}' holds the text tower of a ResNet CLIP, and nothing says whether it was trained with "
                "QuickGELU, as OpenAI's were: set MODEL.FC_CLIP.QUICK_GELU to 'on' (OpenAI's weights) or 'off' (all "
                "others). The wrong one would give wrong classes without any error."
            )
        return
    if said == backbone.quick_gelu:
        return
    if backbone.activation_source != "default":
        raise InputError(
            f"the text tower in '{source}' was trained {'with' if said else 'without'} QuickGELU, but the model has "
            f"{'it' if backbone.quick_gelu else 'none'} ({backbone.activation_source}): set MODEL.FC_CLIP.QUICK_GELU "
            f"to '{'on' if said else 'off'}'"
        )
    set_quick_gelu(backbone, said, source=f"'{source}' says so")


def check_fingerprint(
    stored: Mapping[str, Any] | str | None, model: nn.Module, *, source: str, holds_clip: bool = False
) -> None:
    """Compares the CLIP that weights were trained on with the model's, and what both compute.

    Args:
        stored: the fingerprint in the file; a string is the weights' hash alone, as earlier files had it; None or
            nothing: not checked.
        model: as for `clip_fingerprint`.
        source: name of the file, for messages.
        holds_clip: the CLIP's weights came from the file itself, so that they need not be compared.

    Raises:
        ValueError: another CLIP, or the same weights with another activation.
    """
    if not stored:
        return
    here = clip_fingerprint(model)
    if not here:
        return
    stored = {"weights": stored} if isinstance(stored, str) else stored
    if stored.get("weights") != here["weights"]:
        if holds_clip:
            return  # a part of the CLIP in the file: there is no number to compare with
        raise InputError(
            f"'{source}' was trained on another CLIP than the one this model has.\n"
            f"  trained on: {_described(stored)}\n  the model has: {_described(here)}\n"
            "  Set MODEL.FC_CLIP.CLIP_MODEL_NAME and MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS to the CLIP of training; "
            "on any other one the segmenter would find nothing right."
        )
    if stored.get("quick_gelu", here.get("quick_gelu")) != here.get("quick_gelu"):
        raise InputError(
            f"'{source}' was trained on the same CLIP weights with MODEL.FC_CLIP.QUICK_GELU "
            f"'{'on' if stored['quick_gelu'] else 'off'}', but the model has it "
            f"{'on' if here['quick_gelu'] else 'off'}: set the key to that of the training"
        )
    for what in ("text", "image"):
        if what in stored and what in here and (distance := _distance(stored[what], here[what])) > TOLERANCE:
            logger.warning(
                "%s: the same CLIP weights give other %s features here than where these weights were trained: they "
                "differ by %.1e of their length. There %s with %s; here %s with %s. Results may differ from those of "
                "the training; install the libraries of the training to get them back.",
                source,
                what,
                distance,
                _few(stored[what]),
                _libraries(stored),
                _few(here[what]),
                _libraries(here),
            )


@torch.no_grad()
def _features(backbone: CLIPBackbone) -> dict[str, list[float]]:
    clip_model = backbone.clip_model
    device = clip_model.text_projection.device
    with torch.autocast(device.type, enabled=False), _full_precision():
        tokens = open_clip.tokenize(list(TEXTS), context_length=int(clip_model.positional_embedding.shape[0]))
        texts = encode_tokens(clip_model, tokens.to(device))
        dense = backbone(_image().to(device)).dense
        classifier = OUT_OF_VOCABULARY_CLASSIFIERS[backbone.region_classifier](backbone)
        image = classifier(dense, torch.ones_like(dense[:, :1]))[:, 0]
    return {"text": [value for row in texts for value in _sample(row)], "image": _sample(image[0])}


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Convolutions and products in fp32, whatever the run allows."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _image() -> Tensor:
    """(1, 3, 64, 64) float: waves of three colours, normalised as images are."""
    rows = torch.linspace(0, 1, IMAGE_SIZE)
    ys, xs = torch.meshgrid(rows, rows, indexing="ij")
    waves = [torch.sin(7 * ys + 3 * xs), torch.sin(5 * xs - 2 * ys + 1), torch.cos(9 * ys * xs)]
    return torch.stack(waves)[None]


def _sample(feature: Tensor) -> list[float]:
    unit = F.normalize(feature.double(), dim=-1).cpu()
    return [round(float(value), 6) for value in unit[:: max(len(unit) // NUM_VALUES, 1)][:NUM_VALUES]]


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Length of the difference against the length of the first; infinite if they cannot be compared."""
    if len(one) != len(other):
        return float("inf")
    first, second = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return float((first - second).norm() / first.norm().clamp(min=1e-12))


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _backbone(model: nn.Module) -> CLIPBackbone | None:
    model = _unwrapped(model)
    found = model if isinstance(model, CLIPBackbone) else getattr(model, "backbone", None)
    return found if isinstance(found, CLIPBackbone) else None


def _described(fingerprint: Mapping[str, Any]) -> str:
    if "architecture" not in fingerprint:
        return f"weights {fingerprint['weights'][:12]}"
    pretrained = f"'{fingerprint['pretrained']}'" if fingerprint["pretrained"] else "random weights"
    return f"{fingerprint['architecture']}, {pretrained} (weights {fingerprint['weights'][:12]})"


def _libraries(fingerprint: Mapping[str, Any]) -> str:
    versions = fingerprint.get("libraries", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown libraries"


def _few(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4f}' for value in values[:4])}, …]"


def _last_part(name: str) -> str:
    return PurePath(name).name if "/" in name or "\\" in name else name


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
