"""Augmentation of Fusioner (Ma et al., BMVC 2022; the released recipe): a square crop, then at times colours, noise, a
flip and two warps.

The published elastic transform (alpha 1, sigma 50) moves a pixel of 224 x 224 by 0.003 of one on either axis, and none
of 200 drawn fields by more than 0.02; what is left of it is its random affine map, which is what is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as colors

from fcclip.data.transforms import RandomNumbers, draw_integer
from fcclip.errors import InputError

RATIOS = (3 / 4, 4 / 3)  # width to height of a random crop
NOISE_VARIANCE = (10.0, 50.0)
CORNER_PX = 20.0  # most that a corner of the triangle of the affine map moves
SHIFT, SCALE = 0.1, 0.1  # share of the side; most that the size changes
BORDERS = {"ignore": None, "background": 0}  # value of the border in a mask; None: the ignore label
_ADJUST = (colors.adjust_brightness, colors.adjust_contrast, colors.adjust_saturation, colors.adjust_hue)

Paint = Callable[[np.ndarray], np.ndarray]  # changes the colours of (H, W, 3) uint8


@dataclass(frozen=True)
class PairGeometry:
    """One drawn transform."""

    box: tuple[slice, slice]  # rows and columns of the image that become a square
    side: int  # of the square
    border: int | None  # value of what warps bring into a mask; None: the ignore label
    paints: Sequence[Paint] = ()  # what changes the colours
    warps: Sequence[np.ndarray] = ()  # affine maps (2, 3) of the square, one after the other

    def view(self, image: Image.Image) -> np.ndarray:
        """The image -> (side, side, 3) uint8; black where a warp has nothing."""
        square = self._cropped(np.asarray(image), cv2.INTER_LINEAR)
        for paint in self.paints:
            square = paint(square)
        return self._warped(square, cv2.INTER_LINEAR, 0)

    def pad_image(self, image: np.ndarray) -> np.ndarray:
        """The image: it has its size already."""
        return image

    def apply_label_map(self, labels: np.ndarray, *, padding: int) -> np.ndarray:
        """(height, width) -> (side, side) int32 by nearest neighbour; `padding` is the ignore label."""
        square = self._cropped(labels.astype(np.uint8), cv2.INTER_NEAREST)
        return self._warped(square, cv2.INTER_NEAREST, padding if self.border is None else self.border).astype(np.int32)

    def _cropped(self, array: np.ndarray, interpolation: int) -> np.ndarray:
        return cv2.resize(np.ascontiguousarray(array[self.box]), (self.side, self.side), interpolation=interpolation)

    def _warped(self, array: np.ndarray, interpolation: int, border: int) -> np.ndarray:
        for warp in self.warps:
            options = {"flags": interpolation, "borderMode": cv2.BORDER_CONSTANT, "borderValue": [border] * 3}
            array = cv2.warpAffine(array, warp, (self.side, self.side), **options)
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
    scales: Sequence[float] = (0.5, 1.0)
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
        h = w = min(height, width)
        if rng.uniform() < self.probability:
            h, w = self._random_size(height, width, rng)
        top, left = draw_integer(rng, height - h + 1), draw_integer(rng, width - w + 1)
        geometry = PairGeometry((slice(top, top + h), slice(left, left + w)), self.side, BORDERS[self.border])
        if rng.uniform() >= self.probability:
            return geometry
        steps = [[make(rng) for make in kind if rng.uniform() < 0.5]
                 for kind in ((self._colors, _noise), (self._flip, self._affine, self._turn))]  # fmt: skip
        return replace(geometry, paints=steps[0], warps=steps[1])

    def _random_size(self, height: int, width: int, rng: RandomNumbers) -> tuple[int, int]:
        for _ in range(10):
            area = height * width * rng.uniform(*self.scales)
            ratio = np.exp(rng.uniform(*np.log(RATIOS)))
            h, w = round(float(np.sqrt(area / ratio))), round(float(np.sqrt(area * ratio)))
            if 0 < h <= height and 0 < w <= width:
                return h, w
        return min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1]))

    def _colors(self, rng: RandomNumbers) -> Paint:
        factors = [*rng.uniform(1 - self.jitter, 1 + self.jitter, 3), rng.uniform(-self.jitter, self.jitter)]
        order = rng.permutation(len(_ADJUST))

        def change(image: np.ndarray) -> np.ndarray:
            tensor = torch.from_numpy(image).permute(2, 0, 1)
            for index in order:
                tensor = _ADJUST[index](tensor, float(factors[index]))
            return tensor.permute(1, 2, 0).contiguous().numpy()

        return change

    def _flip(self, rng: RandomNumbers) -> np.ndarray:
        return np.float64([[-1, 0, self.side - 1], [0, 1, 0]])

    def _affine(self, rng: RandomNumbers) -> np.ndarray:
        centre, reach = self.side / 2, self.side / 3
        before = np.float32([[centre + reach] * 2, [centre + reach, centre - reach], [centre - reach] * 2])
        return cv2.getAffineTransform(before, before + rng.uniform(-CORNER_PX, CORNER_PX, (3, 2)).astype(np.float32))

    def _turn(self, rng: RandomNumbers) -> np.ndarray:
        centre, angle = (self.side / 2, self.side / 2), rng.uniform(-self.rotate, self.rotate)
        warp = cv2.getRotationMatrix2D(centre, angle, rng.uniform(1 - SCALE, 1 + SCALE))
        warp[:, 2] += self.side * rng.uniform(-SHIFT, SHIFT, 2)
        return warp


def _noise(rng: RandomNumbers) -> Paint:
    deviation, seed = np.sqrt(rng.uniform(*NOISE_VARIANCE)), draw_integer(rng, 2**31)

    def add(image: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(0, deviation, image.shape)
        return np.clip(image + noise, 0, 255).astype(np.uint8)

    return add
