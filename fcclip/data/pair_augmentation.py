"""Augmentation of Fusioner (Ma et al., BMVC 2022; the released recipe): a square crop, then at times colours, noise, a
flip and two warps.

The published elastic transform moves pixels by less than a hundredth of one; what is left of it is its random affine
map, which is what is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as colors

from fcclip.data.transforms import RandomNumbers, draw_integer, shortest_edge_size
from fcclip.errors import InputError

RATIOS = (3 / 4, 4 / 3)  # width to height of a random crop
NOISE_VARIANCE = (10.0, 50.0)
CORNER_PX = 20.0  # most that a corner of the triangle of the affine map moves
SHIFT, SCALE = 0.1, 0.1  # share of the side; most that the size changes
BORDERS = {"ignore": None, "background": 0}  # value of the border in a mask; None: the ignore label


@dataclass(frozen=True)
class PairGeometry:
    """One drawn transform.

    Args:
        box: rows and columns of the image that are resized.
        resized: (height, width) after the resize.
        corner: first row and column that are kept.
        side: of the square that comes out.
        paint: what changes the colours.
        is_flipped: left to right.
        warps: affine maps (2, 3), one after the other.
        border: value of what warps bring into a mask; None: the ignore label.
    """

    box: tuple[slice, slice]
    resized: tuple[int, int]
    corner: tuple[int, int]
    side: int
    border: int | None
    paint: Callable[[np.ndarray], np.ndarray] = field(default=lambda image: image)
    is_flipped: bool = False
    warps: Sequence[np.ndarray] = ()

    def view(self, image: Image.Image) -> np.ndarray:
        """The image -> (side, side, 3) uint8; black where a warp has nothing."""
        return self._applied(self.paint(self._cropped(np.asarray(image), cv2.INTER_LINEAR)), cv2.INTER_LINEAR, 0)

    def pad_image(self, image: np.ndarray) -> np.ndarray:
        """The image: it has its size already."""
        return image

    def apply_label_map(self, labels: np.ndarray, *, padding: int) -> np.ndarray:
        """(height, width) -> (side, side) int32 by nearest neighbour; `padding` is the ignore label."""
        labels = self._cropped(labels.astype(np.uint8), cv2.INTER_NEAREST)
        border = padding if self.border is None else self.border
        return self._applied(labels, cv2.INTER_NEAREST, border).astype(np.int32)

    def _cropped(self, array: np.ndarray, interpolation: int) -> np.ndarray:
        array = cv2.resize(np.ascontiguousarray(array[self.box]), self.resized[::-1], interpolation=interpolation)
        top, left = self.corner
        return array[top : top + self.side, left : left + self.side]

    def _applied(self, array: np.ndarray, interpolation: int, border: int) -> np.ndarray:
        array = array[:, ::-1] if self.is_flipped else array
        for warp in self.warps:
            options = {"flags": interpolation, "borderMode": cv2.BORDER_CONSTANT, "borderValue": [border] * 3}
            array = cv2.warpAffine(np.ascontiguousarray(array), warp, (self.side, self.side), **options)
        return array


@dataclass(frozen=True)
class PairAugmentation:
    """Draws the transform of a pair of an image and a class.

    Args:
        side: of the square that comes out, pixels.
        probability: of a crop of random size instead of one of the whole shorter side, and of everything that follows.
        scales: smallest and largest share of the image that a crop of random size has.
        jitter: most that brightness, contrast and saturation change, and the hue, whose circle is 1.
        rotate: most that the image turns, degrees.
        border: "ignore", or "background" (published), of the pixels that a warp brings in.
    """

    side: int
    probability: float = 0.5
    scales: tuple[float, float] = (0.5, 1.0)
    jitter: float = 0.5
    rotate: float = 20.0
    border: str = "ignore"
    reads_labels = False

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 0 < self.scales[0] <= self.scales[1] <= 1 and self.border in BORDERS):
            raise InputError(
                "INPUT.PAIRS: AUG_PROB and SCALE_RANGE must lie in 0..1, ascending, and BORDER be one of "
                f"{', '.join(BORDERS)}; got {self.probability}, {tuple(self.scales)} and '{self.border}'"
            )
        if not 0 <= self.jitter <= 0.5:
            raise InputError(f"INPUT.PAIRS.JITTER must lie in 0..0.5, got {self.jitter}")

    def draw(self, height: int, width: int, rng: RandomNumbers, labels: np.ndarray | None = None) -> PairGeometry:
        """A transform for an image of this size."""
        side, border = self.side, BORDERS[self.border]
        if rng.uniform() < self.probability:
            window = {"box": self._random_box(height, width, rng), "resized": (side, side), "corner": (0, 0)}
        else:
            resized = shortest_edge_size(height, width, min_size=side, max_size=10**9)
            corner = tuple(draw_integer(rng, length - side + 1) for length in resized)
            window = {"box": (slice(0, height), slice(0, width)), "resized": resized, "corner": corner}
        if rng.uniform() >= self.probability:
            return PairGeometry(**window, side=side, border=border)
        steps = [self._colors(rng)] if _coin(rng) else []
        steps += [_noise(rng)] if _coin(rng) else []
        flips = _coin(rng)
        warps = [self._affine(rng)] if _coin(rng) else []
        warps += [self._shift_scale_rotate(rng)] if _coin(rng) else []

        def paint(image: np.ndarray) -> np.ndarray:
            for step in steps:
                image = step(image)
            return image

        return PairGeometry(**window, side=side, border=border, paint=paint, is_flipped=flips, warps=warps)

    def _random_box(self, height: int, width: int, rng: RandomNumbers) -> tuple[slice, slice]:
        for _ in range(10):
            area = height * width * rng.uniform(*self.scales)
            ratio = np.exp(rng.uniform(*np.log(RATIOS)))
            h, w = round(float(np.sqrt(area / ratio))), round(float(np.sqrt(area * ratio)))
            if 0 < h <= height and 0 < w <= width:
                break
        else:
            h, w = min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1]))
        top, left = draw_integer(rng, height - h + 1), draw_integer(rng, width - w + 1)
        return slice(top, top + h), slice(left, left + w)

    def _colors(self, rng: RandomNumbers) -> Callable[[np.ndarray], np.ndarray]:
        factors = rng.uniform(1 - self.jitter, 1 + self.jitter, 3)
        changes = [
            (colors.adjust_brightness, factors[0]),
            (colors.adjust_contrast, factors[1]),
            (colors.adjust_saturation, factors[2]),
            (colors.adjust_hue, rng.uniform(-self.jitter, self.jitter)),
        ]
        order = rng.permutation(len(changes))

        def change(image: np.ndarray) -> np.ndarray:
            tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            for index in order:
                adjust, factor = changes[index]
                tensor = adjust(tensor, float(factor))
            return tensor.numpy().transpose(1, 2, 0)

        return change

    def _affine(self, rng: RandomNumbers) -> np.ndarray:
        centre, reach = self.side / 2, self.side / 3
        before = np.float32([[centre + reach] * 2, [centre + reach, centre - reach], [centre - reach] * 2])
        return cv2.getAffineTransform(before, before + rng.uniform(-CORNER_PX, CORNER_PX, (3, 2)).astype(np.float32))

    def _shift_scale_rotate(self, rng: RandomNumbers) -> np.ndarray:
        centre, angle = (self.side / 2, self.side / 2), rng.uniform(-self.rotate, self.rotate)
        warp = cv2.getRotationMatrix2D(centre, angle, rng.uniform(1 - SCALE, 1 + SCALE))
        warp[:, 2] += self.side * rng.uniform(-SHIFT, SHIFT, 2)
        return warp


def _coin(rng: RandomNumbers) -> bool:
    return rng.uniform() < 0.5


def _noise(rng: RandomNumbers) -> Callable[[np.ndarray], np.ndarray]:
    deviation, seed = np.sqrt(rng.uniform(*NOISE_VARIANCE)), draw_integer(rng, 2**31)

    def add(image: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(0, deviation, image.shape)
        return np.clip(image + noise, 0, 255).astype(np.uint8)

    return add
