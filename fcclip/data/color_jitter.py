"""Colour augmentation of the Single Shot MultiBox Detector (Liu et al. 2016), as the `mask_former_*` mappers use it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from fcclip.data.transforms import RandomNumbers, draw_integer


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, each changed with probability 1/2.

    Brightness comes first; contrast comes next or, as likely, last. After each step values are cut to 0..255 and
    rounded down.

    Args:
        brightness: most that is added to or taken from each channel.
        contrast: range of the factor of each channel.
        saturation: range of the factor of the saturation (HSV).
        hue: most that the hue is turned, in OpenCV's units of 2 degrees.
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18

    def __call__(self, image: np.ndarray, rng: RandomNumbers) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> the same, changed; the argument is left alone."""
        if _coin(rng):
            image = _cut(image.astype(np.float32) + np.float32(rng.uniform(-self.brightness, self.brightness)))
        contrast_comes_next = _coin(rng)
        if contrast_comes_next:
            image = self._contrast(image, rng)
        if _coin(rng):
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = _cut(hsv[..., 1] * np.float32(rng.uniform(*self.saturation)))
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if _coin(rng):
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + draw_integer(rng, self.hue + 1, low=-self.hue)) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        return image if contrast_comes_next else self._contrast(image, rng)

    def _contrast(self, image: np.ndarray, rng: RandomNumbers) -> np.ndarray:
        return _cut(image * np.float32(rng.uniform(*self.contrast))) if _coin(rng) else image


def _coin(rng: RandomNumbers) -> bool:
    return rng.uniform(0.0, 1.0) < 0.5


def _cut(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)
