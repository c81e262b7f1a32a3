"""Geometry of augmentation and of the test-time resize, pixel for pixel as published (Pillow and NumPy).

A transform is drawn once for an image and applied to the image and to its ground truth. Two augmentations draw:
`LargeScaleJitter` flips, resizes, crops and pads to a square; `ShortestEdgeJitter` resizes, crops, flips and pads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image

from fcclip.errors import InputError

PADDING_VALUE = 128  # of an image, in each channel
PADDING_ID = 0xFFFFFF  # of an id map after large-scale jitter: the published code pads the id PNG with 255
FLIPS = ("none", "horizontal", "vertical")
CROP_TYPES = ("absolute", "absolute_range", "relative", "relative_range")
CROP_ATTEMPTS = 10  # windows tried before one is taken that a single category fills
RandomNumbers = np.random.Generator | np.random.RandomState


@dataclass(frozen=True)
class Geometry:
    """One drawn transform: resize, crop and pad at the right and the bottom, with a flip before or after.

    Args:
        height, width: size of the image it was drawn for, pixels.
        resized_height, resized_width: size after the resize, pixels.
        top, left: first row and column of the crop, in pixels of the resized image.
        visible: (height, width) of the part of the resized image that is kept.
        canvas: (height, width) of what comes out.
        flip: "none", "horizontal" or "vertical".
        flips_first: before the resize, else after the crop.
        id_padding: of id maps.
    """

    height: int
    width: int
    resized_height: int
    resized_width: int
    top: int
    left: int
    visible: tuple[int, int]
    canvas: tuple[int, int]
    flip: str
    flips_first: bool
    id_padding: int

    def view(self, image: Image.Image) -> np.ndarray:
        """The image -> (*visible, 3) uint8: flipped, resized (bilinear with antialiasing) and cropped, not padded."""
        self._check((image.height, image.width))
        if self.flips_first:
            image = self._flipped(image)
        image = self._resized_and_cropped(image)
        return np.asarray(image if self.flips_first else self._flipped(image))

    def pad_image(self, image: np.ndarray) -> np.ndarray:
        """(*visible, 3) uint8 -> (*canvas, 3) uint8, padded with 128, in memory with the channels first for torch."""
        rows, columns = image.shape[:2]
        canvas = np.empty((3, *self.canvas), np.uint8)
        cv2.split(image, [plane[:rows, :columns] for plane in canvas])
        canvas[:, rows:] = PADDING_VALUE
        canvas[:, :rows, columns:] = PADDING_VALUE
        return canvas.transpose(1, 2, 0)

    def apply_id_map(self, id_map: np.ndarray, *, padding: int | None = None) -> np.ndarray:
        """(height, width) integer -> canvas of the same type: Pillow's nearest neighbour, padded with `padding`
        (default: with an id that no segment has)."""
        return self._gathered(id_map, _nearest, self.id_padding if padding is None else padding)

    def apply_label_map(self, labels: np.ndarray, *, padding: int) -> np.ndarray:
        """The same for a semantic label map, which the published code resizes by torch's nearest neighbour instead."""
        return self._gathered(labels, _torch_nearest, padding)

    def apply_masks(self, masks: np.ndarray) -> np.ndarray:
        """(n, height, width) -> (n, *canvas) of the same type: Pillow's nearest neighbour, padded with 0."""
        return self._gathered(masks, _nearest, 0)

    def apply_polygon(self, points: np.ndarray) -> np.ndarray:
        """(k, 2) float, (x, y) corners in pixels -> (m, 2) corners on the canvas, clipped by the crop; m is 0 for a
        polygon that the crop does not show."""
        points = np.array(points, np.float64)
        if self.flips_first:
            self._flip_points(points, self.height, self.width)
        points *= (self.resized_width / self.width, self.resized_height / self.height)
        window = self.canvas if self.flips_first else self.visible  # large-scale jitter crops beyond the resized image
        points = _clipped(points - (self.left, self.top), *window)
        if not self.flips_first:
            self._flip_points(points, *self.visible)
        return points

    def _gathered(self, array: np.ndarray, nearest: Callable[[int, int], np.ndarray], padding: int) -> np.ndarray:
        """(..., height, width) -> (..., *canvas); each source pixel is read once, whatever the flip."""
        self._check(array.shape[-2:])
        rows = self._sources(nearest(self.height, self.resized_height), self.top, self.visible[0], "vertical")
        columns = self._sources(nearest(self.width, self.resized_width), self.left, self.visible[1], "horizontal")
        if len(rows) < array.shape[-2]:
            view = array.take(rows, axis=-2).take(columns, axis=-1)
        else:
            view = array.take(columns, axis=-1).take(rows, axis=-2)
        if self.visible == self.canvas:
            return view
        height, width = self.visible
        canvas = np.empty((*array.shape[:-2], *self.canvas), array.dtype)
        canvas[..., :height, :width] = view
        canvas[..., height:, :] = padding
        canvas[..., :height, width:] = padding
        return canvas

    def _sources(self, pixels: np.ndarray, start: int, length: int, flip: str) -> np.ndarray:
        """Source pixel of each pixel of a resized axis -> that of each pixel in the crop."""
        flips = self.flip == flip
        if flips and self.flips_first:
            pixels = (self.height if flip == "vertical" else self.width) - 1 - pixels
        pixels = pixels[start : start + length]
        return pixels[::-1] if flips and not self.flips_first else pixels

    def _resized_and_cropped(self, image: Image.Image) -> Image.Image:
        """The visible part of the resized image.

        Pillow enlarges in two passes, first the width, then the height: cropping the columns between them changes no
        pixel (a test compares) and saves a quarter of the time at scale 2. When it reduces, Pillow chooses the order.
        """
        rows, columns = self.visible
        if self.resized_height < self.height or self.resized_width <= columns:
            resized = image.resize((self.resized_width, self.resized_height), Image.Resampling.BILINEAR)
            box = (self.left, self.top, self.left + columns, self.top + rows)
            return resized if resized.size == (columns, rows) else resized.crop(box)
        image = image.resize((self.resized_width, self.height), Image.Resampling.BILINEAR)
        image = image.crop((self.left, 0, self.left + columns, self.height))
        image = image.resize((columns, self.resized_height), Image.Resampling.BILINEAR)
        return image if image.height == rows else image.crop((0, self.top, columns, self.top + rows))

    def _flipped(self, image: Image.Image) -> Image.Image:
        if self.flip == "none":
            return image
        kinds = {"horizontal": Image.Transpose.FLIP_LEFT_RIGHT, "vertical": Image.Transpose.FLIP_TOP_BOTTOM}
        return image.transpose(kinds[self.flip])

    def _flip_points(self, points: np.ndarray, height: int, width: int) -> None:
        if self.flip == "horizontal":
            points[:, 0] = width - points[:, 0]
        elif self.flip == "vertical":
            points[:, 1] = height - points[:, 1]

    def _check(self, size: tuple[int, ...]) -> None:
        if tuple(size) != (self.height, self.width):
            raise InputError(f"jitter drawn for {self.height} x {self.width} pixels, applied to {tuple(size)}")


@dataclass(frozen=True)
class LargeScaleJitter:
    """Draws the published training augmentation.

    Args:
        size: side of the square canvas, pixels.
        min_scale, max_scale: the image is resized to fit into a square of `size` times a scale drawn from this range.
        flip: "horizontal" or "vertical": mirrored with probability 1/2; "none": never.
    """

    size: int
    min_scale: float
    max_scale: float
    flip: str = "horizontal"

    reads_labels = False  # to draw, it needs no label map

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"INPUT.IMAGE_SIZE must be at least 1 pixel, got {self.size}")
        if not 0 < self.min_scale <= self.max_scale:
            raise InputError(
                "INPUT.MIN_SCALE and INPUT.MAX_SCALE must be positive and in this order, "
                f"got {self.min_scale} and {self.max_scale}"
            )
        if self.flip not in FLIPS:
            raise InputError(f"INPUT.RANDOM_FLIP must be one of {', '.join(FLIPS)}, got '{self.flip}'")

    def draw(self, height: int, width: int, rng: RandomNumbers, labels: np.ndarray | None = None) -> Geometry:
        """Draws, in the published order: whether to flip, the scale, one number for both crop offsets.

        The same number for both axes is the published behaviour: the crop lies on the diagonal of the possible ones.
        """
        flip = self.flip if self.flip != "none" and rng.uniform(0.0, 1.0) < 0.5 else "none"
        box = self.size * rng.uniform(self.min_scale, self.max_scale)
        ratio = min(box / height, box / width)
        resized_height, resized_width = (max(int(np.round(side * ratio)), 1) for side in (height, width))
        offset = rng.uniform(0.0, 1.0)
        top, left = (int(np.round(max(side - self.size, 0) * offset)) for side in (resized_height, resized_width))
        return Geometry(
            *(height, width, resized_height, resized_width, top, left),
            visible=(min(resized_height - top, self.size), min(resized_width - left, self.size)),
            canvas=(self.size, self.size),
            flip=flip,
            flips_first=True,
            id_padding=PADDING_ID,
        )


@dataclass(frozen=True)
class RandomCrop:
    """Draws a window of an image, if need be one that no single category fills.

    Args:
        kind: one of `CROP_TYPES`. absolute: `size` pixels, at most the image; absolute_range: each side between the
            two numbers of `size`; relative: these shares of the image; relative_range: shares between these and 1.
        size: (height, width) in pixels or shares; for absolute_range (smallest, largest).
        max_category_share: a window is drawn again, `CROP_ATTEMPTS` times in all, while only one category is in it or
            the largest has this share of its pixels; 1 and more: any window will do.
        ignored_label: pixels that count as no category, 0 or more; None: every label is a category.
    """

    kind: str
    size: tuple[float, float]
    max_category_share: float = 1.0
    ignored_label: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in CROP_TYPES:
            raise InputError(f"INPUT.CROP.TYPE must be one of {', '.join(CROP_TYPES)}, got '{self.kind}'")
        relative = self.kind.startswith("relative")
        if len(self.size) != 2 or min(self.size) <= 0 or (relative and max(self.size) > 1):
            wanted = "two shares of the image above 0 and up to 1" if relative else "two numbers of pixels above 0"
            raise InputError(f"INPUT.CROP.SIZE must be {wanted} for type '{self.kind}', got {list(self.size)}")
        if self.kind == "absolute_range" and self.size[0] > self.size[1]:
            raise InputError(f"INPUT.CROP.SIZE must be smallest and largest side, got {list(self.size)}")

    @property
    def reads_labels(self) -> bool:
        """Whether windows are judged by the label map."""
        return self.max_category_share < 1.0

    def draw(
        self, height: int, width: int, rng: RandomNumbers, window: Callable[..., np.ndarray] | None = None
    ) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a window; `window(top, left, height, width)` gives the labels in it,
        which are not negative."""
        for _ in range(CROP_ATTEMPTS if self.reads_labels else 1):
            crop_height, crop_width = self._draw_size(height, width, rng)
            place = (draw_integer(rng, height - crop_height + 1), draw_integer(rng, width - crop_width + 1))
            if not self.reads_labels or self._is_mixed(window(*place, crop_height, crop_width)):
                break
        return *place, crop_height, crop_width

    def _draw_size(self, height: int, width: int, rng: RandomNumbers) -> tuple[int, int]:
        if self.kind == "absolute":
            return min(int(self.size[0]), height), min(int(self.size[1]), width)
        if self.kind == "absolute_range":
            low, high = (int(side) for side in self.size)
            return tuple(draw_integer(rng, min(side, high) + 1, low=min(side, low)) for side in (height, width))
        shares = np.asarray(self.size, np.float32)  # single precision, as published
        if self.kind == "relative_range":
            shares = shares + rng.uniform(0.0, 1.0, 2) * (1 - shares)
        return tuple(max(int(side * share + 0.5), 1) for side, share in zip((height, width), shares.tolist()))

    def _is_mixed(self, labels: np.ndarray) -> bool:
        counts = np.bincount(labels.ravel())
        if self.ignored_label is not None:
            counts[self.ignored_label : self.ignored_label + 1] = 0
        return np.count_nonzero(counts) > 1 and counts.max() < counts.sum() * self.max_category_share


@dataclass(frozen=True)
class ShortestEdgeJitter:
    """Draws the published augmentation of the `mask_former_*` mappers; the flip is horizontal, with probability 1/2.

    Args:
        min_sizes: lengths of the shorter side after the resize, pixels; 0 keeps the size.
        max_size: limit of the longer side, pixels.
        sampling: "choice": one of `min_sizes`; "range": between the two of them.
        crop: after the resize; None: none.
        target_size: side of the square that the result is padded to, pixels; below 1: no padding.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    sampling: str = "choice"
    crop: RandomCrop | None = None
    target_size: int = -1

    def __post_init__(self) -> None:
        if self.sampling not in ("choice", "range"):
            raise InputError(f"INPUT.MIN_SIZE_TRAIN_SAMPLING must be choice or range, got '{self.sampling}'")
        if not self.min_sizes or min(self.min_sizes) < 0 or self.max_size < 1:
            raise InputError(
                "INPUT.MIN_SIZE_TRAIN must be lengths of 0 (keep the size) or more and INPUT.MAX_SIZE_TRAIN at least "
                f"1, got {list(self.min_sizes)} and {self.max_size}"
            )
        if self.sampling == "range" and (len(self.min_sizes) != 2 or self.min_sizes[0] > self.min_sizes[1]):
            raise InputError(
                "INPUT.MIN_SIZE_TRAIN must be smallest and largest length for INPUT.MIN_SIZE_TRAIN_SAMPLING 'range', "
                f"got {list(self.min_sizes)}"
            )
        largest = self.max_size
        if self.crop is not None and self.crop.kind.startswith("absolute"):
            largest = min(largest, int(max(self.crop.size)))
        if 0 < self.target_size < largest:
            raise InputError(
                f"INPUT.SIZE_DIVISIBILITY is {self.target_size}: the side of the square that images are padded to, "
                f"not a divisor. Images can have sides of {largest} pixels. Set it to {largest} or more, crop to "
                f"{self.target_size} (INPUT.CROP), or set it to -1 for no padding."
            )

    @property
    def reads_labels(self) -> bool:
        """Whether `draw` needs the label map."""
        return self.crop is not None and self.crop.reads_labels

    def draw(self, height: int, width: int, rng: RandomNumbers, labels: np.ndarray | None = None) -> Geometry:
        """Draws, in the published order: the shorter side, the crop, whether to flip.

        Args:
            height, width: of the image, pixels.
            rng: source of the numbers.
            labels: (height, width) integers, its label map; needed if `reads_labels`.
        """
        resized = self._draw_size(height, width, rng)
        place = (0, 0, *resized)
        if self.crop is not None:

            def window(top: int, left: int, crop_height: int, crop_width: int) -> np.ndarray:
                rows = _torch_nearest(height, resized[0])[top : top + crop_height]
                columns = _torch_nearest(width, resized[1])[left : left + crop_width]
                return labels.take(rows, axis=0).take(columns, axis=1)

            place = self.crop.draw(*resized, rng, window)
        flip = "horizontal" if rng.uniform(0.0, 1.0) < 0.5 else "none"
        top, left, *visible = place
        canvas = tuple(visible) if self.target_size < 1 else (self.target_size, self.target_size)
        if max(visible) > max(canvas):
            raise InputError(
                f"INPUT.SIZE_DIVISIBILITY is {self.target_size}, the side of the square that images are padded to, but "
                f"after resize and crop this one is {visible[0]} x {visible[1]} (height x width)"
            )
        return Geometry(
            *(height, width, *resized, top, left),
            visible=tuple(visible),
            canvas=canvas,
            flip=flip,
            flips_first=False,
            id_padding=0,
        )

    def _draw_size(self, height: int, width: int, rng: RandomNumbers) -> tuple[int, int]:
        if self.sampling == "range":
            side = draw_integer(rng, self.min_sizes[1] + 1, low=self.min_sizes[0])
        else:
            side = int(rng.choice(self.min_sizes))
        return shortest_edge_size(height, width, min_size=side, max_size=self.max_size)


def shortest_edge_size(height: int, width: int, *, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) after a resize of the shorter side.

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


def draw_integer(rng: RandomNumbers, high: int, *, low: int = 0) -> int:
    """One of low, ..., high - 1; NumPy's two kinds of generators spell it differently."""
    return int((rng.integers if hasattr(rng, "integers") else rng.randint)(low, high))


def _nearest(size: int, new_size: int) -> np.ndarray:
    """(new_size,) int32: the source pixel that Pillow's nearest resize takes for each new pixel of one axis."""
    line = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    return np.asarray(line.resize((new_size, 1), Image.Resampling.NEAREST))[0]


def _torch_nearest(size: int, new_size: int) -> np.ndarray:
    """(new_size,) int64: the source pixel that torch's nearest resize takes for each new pixel of one axis."""
    line = torch.arange(size, dtype=torch.float64)[None, None, :, None]
    return torch.nn.functional.interpolate(line, (new_size, 1), mode="nearest")[0, 0, :, 0].long().numpy()


def _clipped(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Corners (k, 2) of a polygon -> those of its part inside (0, 0)..(width, height), side after side of the window
    (Sutherland and Hodgman 1974); none if that part has no area. What leaves the window and comes back stays one
    polygon, joined along the border, where it covers no pixel.

    A polygon that crosses itself keeps all its parts, as evaluation counts them by the rule of the COCO tools; the
    published mapper repairs it before a crop, which drops some of them, and fills all of them without one."""
    if len(points) == 0 or (points.min() >= 0 and (points <= (width, height)).all()):
        return points
    sides: Sequence[tuple[int, float, float]] = ((0, 0.0, 1.0), (0, width, -1.0), (1, 0.0, 1.0), (1, height, -1.0))
    for axis, bound, sign in sides:
        depth = (points[:, axis] - bound) * sign  # inside the side where it is not negative
        following = np.roll(depth, -1)
        inside, crosses = depth >= 0, (depth >= 0) != (following >= 0)
        share = np.divide(depth, depth - following, out=np.zeros_like(depth), where=crosses)
        cuts = points + share[:, None] * (np.roll(points, -1, axis=0) - points)
        cuts[:, axis] = bound
        points = np.stack([points, cuts], axis=1)[np.stack([inside, crosses], axis=1)]
        if len(points) == 0:
            return points
    x, y = points.T
    twice_area = x @ np.roll(y, -1) - y @ np.roll(x, -1)
    return points if twice_area != 0 else points[:0]
