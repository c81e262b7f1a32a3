"""Reading images, id PNGs and label maps from the disk; every failure names the file."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from fcclip.errors import InputError, MissingFileError

_ORIENTATION_TAG = 0x0112
_TO_UPRIGHT = {  # value of the EXIF orientation tag: what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error)


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright as its EXIF orientation says; otherwise as `read_pil_image`."""
    return np.array(read_pil_image(path))


def read_pil_image(path: str | Path) -> Image.Image:
    """The same as Pillow holds it, as `upright_rgb` makes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is cut off, or has pixels without a fixed black and white.
    """
    with opened(path) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of Pillow's with mode "RGB", in memory, turned upright as its EXIF orientation says.

    Grey and palette images get three channels, CMYK is converted, an alpha channel is dropped without blending, and
    of 16 bits a channel the higher 8 are taken.

    Raises:
        ValueError: it has no pixels, or pixels without a fixed black and white.
    """
    if 0 in image.size:
        raise InputError(f"an image of {image.height} x {image.width} pixels (height x width) has nothing to look at")
    upright = _TO_UPRIGHT.get(_orientation(image))
    image = _three_channels(image)
    return image if upright is None else image.transpose(upright)


@dataclass(frozen=True)
class Header:
    """What an image file says of itself before its pixels are decoded.

    Args:
        format: Pillow's name of the format, e.g. "JPEG".
        mode: Pillow's name of what a pixel is, e.g. "RGB".
        stored: (height, width) as stored, pixels.
        orientation: EXIF's number, 1..8; 1: it is upright.
        is_deep: more than 8 bits a channel.
    """

    format: str
    mode: str
    stored: tuple[int, int]
    orientation: int
    is_deep: bool

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) after the turn that the orientation asks for, as `read_image` gives it."""
        return self.stored[::-1] if self.orientation in _SIDEWAYS else self.stored


def read_header(path: str | Path) -> Header:
    """The header of an image; its pixels may still turn out to be broken. Fails as `opened`."""
    with opened(path) as image:
        is_deep = _is_deep(image)  # before anything may decode pixels
        orientation = _orientation(image)
        turned = orientation if orientation in _TO_UPRIGHT else 1
        return Header(image.format or "", image.mode, (image.height, image.width), turned, is_deep)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the upright image in pixels, from its header. Fails as `opened`."""
    return read_header(path).upright


def read_id_map(path: str | Path) -> np.ndarray:
    """(H, W) int32, the segment id of each pixel of a panoptic PNG: R + 256 G + 65536 B.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is cut off, or has more than 8 bits a channel.
    """
    with opened(path) as image:
        if _is_deep(image):
            raise InputError("an id PNG has 8 bits a channel, this one 16 or more, of which half would be lost")
        colours, order = None, cv2.COLOR_BGR2RGBA
        if (image.format, image.mode) == ("PNG", "RGB"):  # OpenCV is a fifth faster; of a broken file it makes None
            colours = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if colours is None:
            colours, order = np.asarray(_three_channels(image)), cv2.COLOR_RGB2RGBA
    ids = cv2.cvtColor(colours, order).view("<i4")[..., 0]  # 4 bytes a pixel are one little-endian integer
    ids &= 0xFFFFFF
    return ids.astype(np.int32, copy=False)


def read_label_map(path: str | Path) -> np.ndarray:
    """(H, W) int32, the stored number of each pixel: grey of 8, 16 or 32 bit, or palette indices.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is cut off, or does not have one whole number a pixel.
    """
    with opened(path) as image:
        if image.mode not in ("L", "P", "I") and not image.mode.startswith("I;16"):
            raise InputError(
                f"a label map has one whole number a pixel (grey of 8 or 16 bit, or palette indices), this file has "
                f"Pillow's mode '{image.mode}', {_described(image.mode)}"
            )
        return np.asarray(image).astype(np.int32)


@contextmanager
def opened(
    source: str | Path | BinaryIO,
    *,
    if_missing: str = "though the data set lists it. Restore the file, or check that the folder of the data set "
    "($DETECTRON2_DATASETS, or a path in your YAML) is the one you mean.",
    if_broken: str = "Copy or prepare the file again.",
) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet; what goes wrong in the block is told of the file too.

    Args:
        source: the file, or its content.
        if_missing, if_broken: ends of messages, what to do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, or is broken.
    """
    in_memory = isinstance(source, io.IOBase)
    path = Path("the encoded image" if in_memory else source)
    try:
        with Image.open(source if in_memory else path) as image:
            yield image
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: no such image, {if_missing}") from error
    except PermissionError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path}: {error}. Make the image smaller or cut it into tiles; Pillow takes images of up to "
            f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels (PIL.Image.MAX_IMAGE_PIXELS)."
        ) from error
    except _UNREADABLE as error:
        problem = "it has no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        if path.is_file() and path.stat().st_size == 0:
            problem = "the file is empty (0 bytes)"
        raise InputError(f"{path}: cannot be read as an image: {problem}. {if_broken}") from error


def _orientation(image: Image.Image) -> int:
    try:
        if image.format == "PNG" and image.filename and not _has_notes_behind_pixels(image.filename):
            return Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)  # that of a PNG would decode all pixels first
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except _UNREADABLE:  # a broken EXIF block says nothing about the pixels
        return 1


def _has_notes_behind_pixels(path: str) -> bool:
    """Whether something that may hold EXIF stands behind the pixels of a PNG, where its header does not show it."""
    with open(path, "rb") as file:
        file.seek(8)  # the signature
        behind = False
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            behind = behind or name == b"IDAT"
            if behind and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(length + 4, 1)  # content and checksum
    return False


def _three_channels(image: Image.Image) -> Image.Image:
    """8 bits a channel, RGB; Pillow alone would turn every grey above 255 into white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # "I" before Pillow 11
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(
            f"its pixels are {_described(image.mode)}, and nothing says what is black and what is white; store it with "
            "8 or 16 bits a channel"
        )
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Whether a channel has more than 8 bits in the file; to be asked before the pixels are decoded."""
    stored = " ".join(str(tile[3]) for tile in image.tile)  # 16 bits a channel, e.g. "RGB;16B", are read as "RGB"
    return image.mode[0] in "IF" or ";16" in stored


def _described(mode: str) -> str:
    kinds = {"1": "one bit a pixel, which may mean 0 and 1 or 0 and 255", "F": "floating-point numbers"}
    kinds |= {"I": "32-bit numbers", "LA": "grey with alpha", "PA": "a palette with alpha"}
    return kinds.get(mode, "several channels")
