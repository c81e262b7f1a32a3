"""The frozen image encoder of SAM, a second pair of eyes beside CLIP (Kirillov et al. 2023; FrozenSeg, section 3.2)."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from fcclip.config import lookup, resolve_file
from fcclip.errors import InputError
from fcclip.files import write_atomically
from fcclip.modeling.backbones.casting import CastCopy
from fcclip.modeling.backbones.clip import RealRates
from fcclip.modeling.inputs import Samples, normalised_images
from fcclip.weights.files import read_weight_file
from fcclip.weights.frozen import FrozenPart, load_frozen

logger = logging.getLogger(__name__)

_KEY = "MODEL.SAM_WEIGHTS"
_PIXEL_MEAN, _PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of Meta's training, RGB, 0..255
_COMMON = {"img_size": 1024, "patch_size": 16, "window_size": 14, "mlp_ratio": 4.0, "neck_chans": 256}
SAM_ENCODERS: dict[str, dict[str, Any]] = {  # names of MODEL.SAM_NAME
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
}
_META_FILES = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}
_UNUSED = ("prompt_encoder.", "mask_decoder.")  # parts of SAM that files hold and nothing here runs


class SamImageEncoder(FrozenPart):
    """The frozen image encoder of SAM with its neck; always in evaluation mode, never with gradients.

    Args:
        image_encoder: timm's, with Meta's names.
        resize: how an image becomes the square that SAM sees: "squash", as published, or "pad", which keeps the aspect
            ratio to within half a cell and fills up with the mean colour, as SAM was trained.
        cache_dir: keeps what is seen in evaluation there, rounded to half precision; None keeps nothing.

    Attributes:
        channels: of the features; image_size: side of the square, pixels; cell: side of a cell, pixels.
        architecture, pretrained: what the config called them; pretrained "" means random weights.
    """

    notes_key = "sam"
    config_keys = ("MODEL.SAM_NAME", _KEY)
    constants = _UNUSED

    def __init__(
        self, image_encoder: VisionTransformerSAM, *, resize: str = "squash", cache_dir: Path | None = None
    ) -> None:
        super().__init__()
        lookup("MODEL.SAM_RESIZE", resize, dict.fromkeys(("squash", "pad")))
        self.image_encoder = image_encoder.requires_grad_(False).eval()
        self.register_buffer("pixel_mean", torch.tensor(_PIXEL_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(_PIXEL_STD).view(-1, 1, 1), persistent=False)
        self.channels = image_encoder.neck[0].out_channels
        self.image_size, self.cell = image_encoder.patch_embed.img_size[0], image_encoder.patch_embed.patch_size[0]
        self.resize, self.cache_dir = resize, cache_dir
        self.architecture, self.pretrained = "", ""
        self._cast = CastCopy()

    def train(self, mode: bool = True) -> SamImageEncoder:
        """Marks the module as training; the encoder inside stays in evaluation mode."""
        super().train(mode)
        self.image_encoder.eval()
        return self

    @torch.no_grad()
    def forward(self, inputs: Samples, *, divisibility: int) -> Tensor:
        """What SAM sees of a batch, on the grid of the padded batch, so that it lies on CLIP's features.

        Args:
            inputs: mappings with `image` (3, H, W), RGB, 0..255.
            divisibility: see `padded_size`; padding has the mean colour.

        Returns:
            (B, channels, h, w); h = w = image_size / cell, with "pad" as many cells as the batch fills.
        """
        images, _ = normalised_images(inputs, mean=self.pixel_mean, std=self.pixel_std, divisibility=divisibility)
        if self.training or self.cache_dir is None:
            return self.encode(images)
        return torch.cat([self._kept(image[None], self.cache_dir) for image in images])

    def encode(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) of any size -> (B, channels, h, w)."""
        squares, (height, width) = self.squares(images)
        encoder, kind = self.image_encoder, images.device.type
        if self.training and torch.is_autocast_enabled(kind):
            encoder = self._cast.of(encoder, torch.get_autocast_dtype(kind))
        return encoder.forward_features(squares)[..., :height, :width].contiguous()

    def squares(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised images of any size -> (B, 3, image_size, image_size), and the (height, width) of what shows the
        image, in cells."""
        height, width = images.shape[-2:]
        cells = [self.image_size // self.cell] * 2
        if self.resize == "pad":
            cells = [max(1, round(side / max(height, width) * cells[0])) for side in (height, width)]
        size = [count * self.cell for count in cells]
        resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return F.pad(resized, (0, self.image_size - size[1], 0, self.image_size - size[0])), tuple(cells)

    def _kept(self, images: Tensor, folder: Path) -> Tensor:
        """`encode`, looked up by all that decides its result."""
        known = (self.weights_hash(), self.resize, self.image_size, tuple(images.shape))
        digest = hashlib.sha256(repr(known).encode() + images.cpu().numpy().tobytes())
        path = folder / f"{digest.hexdigest()}.npy"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with torch.autocast(images.device.type, enabled=False):  # kept for evaluations in any precision
                seen = self.encode(images).half().cpu().numpy()
            write_atomically(path, lambda file: np.save(file, seen))
        return torch.from_numpy(np.load(path)).to(images.device).float()

    def load_named(self, name: str, weights: str) -> None:
        """As `FrozenPart.load_named`: a file of Meta's or of a whole model, or the folder with Meta's file."""
        given, file_name = Path(weights).expanduser(), _META_FILES.get(name, "")
        what = f"{_KEY} ({f'a file, or the folder with {file_name}' if file_name else 'a file'})"
        path = resolve_file(given / file_name if given.is_dir() else weights, what=what)
        load_frozen(self, _sam_weights(path), source=str(path), what=f"SAM '{name}' ({' and '.join(self.config_keys)})")
        self.pretrained = weights

    @property
    def has_random_weights(self) -> bool:
        """Whether no weights were loaded."""
        return self.pretrained == ""

    def fingerprint(self) -> dict[str, Any]:
        """What it is, as JSON values: `architecture`, `pretrained` and a hash of its `weights`."""
        names = {"architecture": PurePath(self.architecture).name, "pretrained": PurePath(self.pretrained).name}
        return {**names, **super().fingerprint()}

    def loaded(self, notes: Any, *, source: str, complete: bool) -> None:
        """After weights were loaded: names where they are from."""
        if complete and self.has_random_weights:
            self.pretrained = Path(source).name


class _Mlp(nn.Module):
    """The network of a block, its layers named as Meta's."""

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__()
        self.lin1 = nn.Linear(in_features, hidden_features)
        self.lin2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


def build_sam(
    name: str, weights: str = "", *, resize: str = "squash", cache_dir: Path | None = None
) -> SamImageEncoder:
    """A frozen SAM encoder.

    Args:
        name: of `SAM_ENCODERS`, or the path of a JSON with an encoder of one's own: `embed_dim`, `depth`, `num_heads`,
            `global_attn_indexes`, and as far as they differ from Meta's `img_size`, `patch_size`, `window_size`,
            `mlp_ratio`, `neck_chans`.
        weights: a file of Meta's or of a whole model; the folder with Meta's file; or "" for random weights.
        resize, cache_dir: of `SamImageEncoder`.

    Raises:
        ValueError: an unknown encoder, weights of another one.
        FileNotFoundError: a path that does not exist.
    """
    with RealRates():
        image_encoder = VisionTransformerSAM(
            **_architecture(name),
            num_classes=0,
            use_rel_pos=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            mlp_layer=_Mlp,
        )
    sam = SamImageEncoder(image_encoder, resize=resize, cache_dir=cache_dir)
    sam.architecture = name
    if weights:
        sam.load_named(name, weights)
    logger.info("SAM '%s': %s", name, f"weights from '{weights}'" if weights else f"random weights ({_KEY} is empty)")
    return sam


def _architecture(name: str) -> dict[str, Any]:
    if not name.endswith(".json"):
        return _COMMON | lookup("MODEL.SAM_NAME", name, SAM_ENCODERS)
    path = resolve_file(name, what="MODEL.SAM_NAME")
    own, needed = json.loads(path.read_text(encoding="utf-8")), set(SAM_ENCODERS["vit_b"])
    if not isinstance(own, dict) or not needed <= set(own) <= needed | set(_COMMON):
        raise InputError(
            f"MODEL.SAM_NAME: '{path}' must hold {', '.join(sorted(needed))} and may hold {', '.join(_COMMON)}; it has "
            f"{', '.join(own) if isinstance(own, dict) else 'no mapping'}"
        )
    return _COMMON | own


def _sam_weights(path: Path) -> dict[str, Tensor]:
    """The image encoder in a file: of Meta's, or inside a whole model."""
    tensors = read_weight_file(path, what=_KEY).tensors
    if any(key.startswith("sam.image_encoder.") for key in tensors):
        tensors = {key.removeprefix("sam."): value for key, value in tensors.items() if key.startswith("sam.")}
    return {key: value for key, value in tensors.items() if not key.startswith((*_UNUSED, "pixel_"))}
