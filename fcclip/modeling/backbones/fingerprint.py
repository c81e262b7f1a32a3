"""What a CLIP computes, small enough to be stored beside weights and compared when they are loaded.

A segmenter is worth nothing on another CLIP than the one it was trained on, and libraries have changed what one CLIP
computes (bytedance/fc-clip #36; open_clip 3 builds OpenAI's ResNets with another activation).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.modeling.text import encode_tokens

if TYPE_CHECKING:
    from fcclip.modeling.backbones.clip import CLIPBackbone

TEXTS = ("a photo of a red circle.", "There is a traffic light in the scene")
IMAGE_SIZE = 64  # pixels; a multiple of every backbone's stride
NUM_VALUES = 16  # kept of each unit-length feature, evenly spaced
# Length of the difference of two features against their own length. Weights stored as halves move them by 3e-4, a text
# tower with the wrong activation by 6e-3 to 1.3e-2 (shapes CLIP; seeded RN50 and ConvNeXt-L).
TOLERANCE = 1e-3
LIBRARIES = ("open_clip_torch", "timm", "torch")


@torch.no_grad()
def compute_features(backbone: CLIPBackbone) -> dict[str, list[float]]:
    """Some values of the unit-length features of fixed texts and a fixed image, in fp32: `text` and `image`."""
    clip_model = backbone.clip_model
    device = clip_model.text_projection.device
    with torch.autocast(device.type, enabled=False), _full_precision():
        tokens = open_clip.tokenize(list(TEXTS), context_length=int(clip_model.positional_embedding.shape[0]))
        texts = encode_tokens(clip_model, tokens.to(device))
        image = backbone.image_embeddings(_image().to(device))
    return {"text": [value for row in texts for value in _sample(row)], "image": _sample(image[0])}


def library_versions() -> dict[str, str]:
    """The versions of the libraries that decide what a CLIP computes."""
    return {name: _version(name) for name in LIBRARIES}


def differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """A sentence for each kind of features in which two fingerprints of the same weights differ."""
    return [
        f"the same CLIP weights give other {kind} features here than where these weights were trained: they differ by "
        f"{distance:.1e} of their length. There {_few(stored[kind])} with {_libraries(stored)}; here "
        f"{_few(own[kind])} with {_libraries(own)}. Results may differ from those of the training; install the "
        "libraries of the training to get them back."
        for kind in ("text", "image")
        if kind in stored and (distance := distance_of(stored[kind], own[kind])) > TOLERANCE
    ]


def distance_of(values: Sequence[float], others: Sequence[float]) -> float:
    """Length of the difference against the length of the first; infinite if they cannot be compared."""
    if len(values) != len(others):
        return float("inf")
    first, second = torch.tensor(values, dtype=torch.float64), torch.tensor(others, dtype=torch.float64)
    return float((first - second).norm() / first.norm().clamp(min=1e-12))


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


def _libraries(fingerprint: Mapping[str, Any]) -> str:
    versions = fingerprint.get("libraries", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown libraries"


def _few(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4f}' for value in values[:4])}, …]"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
