"""Images as people have them become pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fcclip.config import lookup
from fcclip.data import read_image
from fcclip.data.images import opened, upright_rgb
from fcclip.errors import InputError, MissingFileError

ImageInput = str | Path | bytes | Image.Image | np.ndarray | Tensor


def read_image_input(image: ImageInput, *, channel_order: str = "RGB") -> np.ndarray:
    """(h, w, 3) uint8 RGB, upright.

    Args:
        image: a path; the content of an image file; a PIL image; an array (h, w, 3) uint8; or a tensor (3, h, w),
            uint8, or float in 0..1.
        channel_order: "RGB" or "BGR" (OpenCV's), of arrays and tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is something else.
    """
    lookup("channel_order", channel_order, dict.fromkeys(("RGB", "BGR")))
    if isinstance(image, Image.Image):
        return np.array(upright_rgb(image))
    if isinstance(image, bytes):
        with opened(io.BytesIO(image)) as encoded:
            return np.array(upright_rgb(encoded))
    if isinstance(image, (str, Path)):
        path = Path(image).expanduser()
        if not path.is_file():
            raise MissingFileError(f"image '{image}' does not exist (looked at {path.absolute()})")
        return read_image(path)
    array = _channels_last(image) if isinstance(image, Tensor) else image
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape[2:] != (3,) or array.size == 0:
        got = f"{tuple(image.shape)} {image.dtype}" if hasattr(image, "dtype") else type(image).__name__
        raise InputError(
            "an image is a path, the bytes of an image file, a PIL image, an RGB array (h, w, 3) uint8 with pixels, or "
            f"a tensor (3, h, w) of uint8 or of floats in 0..1; got {got}"
        )
    return array if channel_order == "RGB" else np.ascontiguousarray(array[..., ::-1])


def _channels_last(image: Tensor) -> np.ndarray | None:
    """None for a tensor that is not an image."""
    if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        return None
    if image.is_floating_point():
        if not (image.min() >= 0 and image.max() <= 1):
            raise InputError(
                f"a tensor of floats has values in 0..1, this one in {image.min():.3g}..{image.max():.3g}; divide by "
                "255, or give uint8"
            )
        image = (image * 255).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().cpu().numpy()
