"""Reading pictures and id PNGs from the disk; every failure names the file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["image_size", "read_id_map", "read_image"]

_ORIENTATION_TAG = 0x0112
_TO_UPRIGHT = {  # value of the EXIF orientation tag: what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright as its EXIF orientation says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, or is cut off.
    """
    with _opened(path) as picture:
        upright = _TO_UPRIGHT.get(_orientation(picture))
        if upright is not None:
            picture = picture.transpose(upright)
        return np.array(picture.convert("RGB"))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the upright picture in pixels, from its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture.
    """
    with _opened(path) as picture:
        width, height = picture.size
        return (width, height) if _orientation(picture) in _SIDEWAYS else (height, width)


def read_id_map(path: str | Path) -> np.ndarray:
    """(H, W) int32, the segment id of each pixel of a panoptic PNG: R + 256 G + 65536 B.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, or is cut off.
    """
    with _opened(path) as picture:
        rgbx = np.array(picture.convert("RGB").convert("RGBX"))  # 4 bytes a pixel are one little-endian integer
    return (rgbx.view("<i4")[..., 0] & 0xFFFFFF).astype(np.int32, copy=False)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    path = Path(path)
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such picture, though the data set lists it. Restore the file, or check that the root folder "
            "($DETECTRON2_DATASETS) is the one you mean."
        ) from error
    except PermissionError:
        raise
    except _UNREADABLE as error:
        empty = path.is_file() and path.stat().st_size == 0
        found = "the file is empty (0 bytes)" if empty else str(error)
        raise ValueError(f"{path}: cannot be read as a picture: {found}. Copy or prepare the file again.") from error


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(_ORIENTATION_TAG, 1)
    except _UNREADABLE:  # a broken EXIF block says nothing about the pixels
        return 1
