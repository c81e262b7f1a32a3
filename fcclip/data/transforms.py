"""Geometry of augmentation and of the test-time resize, pixel for pixel as published (Pillow and NumPy).

A transform is drawn once for a picture and applied to the picture and to its id map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = [
    "PADDING_ID",
    "PADDING_VALUE",
    "JitterGeometry",
    "LargeScaleJitter",
    "resize_image",
    "shortest_edge_size",
]

PADDING_VALUE = 128  # of a picture, in each channel
PADDING_ID = 0xFFFFFF  # of an id map: the published code pads the id PNG with 255 in each channel
FLIPS = ("none", "horizontal", "vertical")


@dataclass(frozen=True)
class JitterGeometry:
    """One drawn large-scale jitter: flip, then resize, then crop, then pad at the right and the bottom.

    Args:
        height, width: size of the picture it was drawn for, pixels.
        flip: "none", "horizontal" or "vertical".
        resized_height, resized_width: size after the resize, pixels.
        top, left: first row and column of the crop, in pixels of the resized picture.
        size: side of the square that comes out, pixels.
    """

    height: int
    width: int
    flip: str
    resized_height: int
    resized_width: int
    top: int
    left: int
    size: int

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """(height, width, 3) uint8 -> (size, size, 3) uint8: bilinear with antialiasing, padded with 128."""
        self._check(image)
        visible = self._resized_and_cropped(Image.fromarray(self._flipped(image)))
        canvas = np.full((3, self.size, self.size), PADDING_VALUE, np.uint8)  # channels first in memory, as torch wants
        canvas[:, : visible.shape[0], : visible.shape[1]] = visible.transpose(2, 0, 1)
        return canvas.transpose(1, 2, 0)

    def apply_id_map(self, id_map: np.ndarray) -> np.ndarray:
        """(height, width) integer -> (size, size) of the same type: nearest neighbour, padded with `PADDING_ID`."""
        self._check(id_map)
        rows = _nearest(self.height, self.resized_height)[self.top : self.top + self.size]
        columns = _nearest(self.width, self.resized_width)[self.left : self.left + self.size]
        canvas = np.full((self.size, self.size), PADDING_ID, id_map.dtype)
        canvas[: len(rows), : len(columns)] = self._flipped(id_map).take(rows, axis=0).take(columns, axis=1)
        return canvas

    def _resized_and_cropped(self, picture: Image.Image) -> np.ndarray:
        """The visible part of the resized picture.

        Pillow enlarges in two passes, first the width, then the height: cropping the columns between them changes no
        pixel (a test compares) and saves a quarter of the time at scale 2. When it reduces, Pillow chooses the order.
        """
        columns, rows = slice(self.left, self.left + self.size), slice(self.top, self.top + self.size)
        size = (self.resized_width, self.resized_height)
        if self.resized_height < self.height or self.resized_width <= self.size:
            return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))[rows, columns]
        picture = picture.resize((self.resized_width, self.height), Image.Resampling.BILINEAR)
        picture = picture.crop((columns.start, 0, columns.stop, self.height))
        return np.asarray(picture.resize((self.size, self.resized_height), Image.Resampling.BILINEAR))[rows]

    def _flipped(self, array: np.ndarray) -> np.ndarray:
        if self.flip == "none":
            return array
        return np.ascontiguousarray(array[:, ::-1] if self.flip == "horizontal" else array[::-1])

    def _check(self, array: np.ndarray) -> None:
        if array.shape[:2] != (self.height, self.width):
            raise ValueError(f"jitter drawn for {self.height} x {self.width} pixels, applied to {array.shape[:2]}")


@dataclass(frozen=True)
class LargeScaleJitter:
    """Draws the published training augmentation.

    Args:
        size: side of the square canvas, pixels.
        min_scale, max_scale: the picture is resized to fit into a square of `size` times a scale drawn from this range.
        flip: "horizontal" or "vertical": mirrored with probability 1/2; "none": never.
    """

    size: int
    min_scale: float
    max_scale: float
    flip: str = "horizontal"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"INPUT.IMAGE_SIZE must be at least 1 pixel, got {self.size}")
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(
                "INPUT.MIN_SCALE and INPUT.MAX_SCALE must be positive and in this order, "
                f"got {self.min_scale} and {self.max_scale}"
            )
        if self.flip not in FLIPS:
            raise ValueError(f"INPUT.RANDOM_FLIP must be one of {', '.join(FLIPS)}, got '{self.flip}'")

    def draw(self, height: int, width: int, rng: np.random.Generator | np.random.RandomState) -> JitterGeometry:
        """Draws, in the published order: whether to flip, the scale, one number for both crop offsets.

        The same number for both axes is the published behaviour: the crop lies on the diagonal of the possible ones.
        """
        flip = self.flip if self.flip != "none" and rng.uniform(0.0, 1.0) < 0.5 else "none"
        box = self.size * rng.uniform(self.min_scale, self.max_scale)
        ratio = min(box / height, box / width)
        resized_height, resized_width = (max(int(np.round(side * ratio)), 1) for side in (height, width))
        offset = rng.uniform(0.0, 1.0)
        top, left = (int(np.round(max(side - self.size, 0) * offset)) for side in (resized_height, resized_width))
        return JitterGeometry(height, width, flip, resized_height, resized_width, top, left, self.size)


def shortest_edge_size(height: int, width: int, *, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) after the test-time resize.

    Args:
        height, width: pixels.
        min_size: wanted length of the shorter side; 0 keeps the size.
        max_size: the longer side is not made longer than this; then the shorter one is below `min_size`.

    Example:
        >>> shortest_edge_size(480, 640, min_size=800, max_size=1333)
        (800, 1067)
        >>> shortest_edge_size(100, 400, min_size=800, max_size=1333)
        (333, 1333)
        >>> shortest_edge_size(1, 10_000, min_size=800, max_size=1333)
        (1, 1333)
    """
    if min_size == 0:
        return height, width
    scale = min_size / min(height, width)
    new_height, new_width = (min_size, scale * width) if height < width else (scale * height, min_size)
    if max(new_height, new_width) > max_size:
        scale = max_size / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8, bilinear with antialiasing."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _nearest(size: int, new_size: int) -> np.ndarray:
    """(new_size,) int32: the source pixel that Pillow's nearest resize takes for each new pixel of one axis."""
    line = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    return np.asarray(line.resize((new_size, 1), Image.Resampling.NEAREST))[0]
