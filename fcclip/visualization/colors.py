"""Colours of classes and of their instances: the same on every run and every machine."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

import cv2
import numpy as np

PALETTE_SIZE = 256  # classes before colours repeat


@functools.lru_cache(maxsize=1)
def _palette() -> np.ndarray:
    """(PALETTE_SIZE, 3) uint8 RGB; each colour is the one farthest from all before it, in CIE Lab."""
    levels = np.linspace(0, 255, 14).astype(np.uint8)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = cv2.cvtColor(rgb[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (lab[:, 0] > 40) & (lab[:, 0] < 85) & (chroma > 35)  # greys, near-black and near-white drown in images
    rgb, lab = rgb[vivid], lab[vivid]
    chosen = [int(np.argmax(lab[:, 1]))]
    distance = np.full(len(lab), np.inf, np.float32)
    while len(chosen) < PALETTE_SIZE:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(distance)))
    return rgb[chosen]


def class_colors(names: Sequence[str]) -> list[tuple[int, int, int]]:
    """RGB colours of the classes of an image, 0..255.

    A class has the colour of its name in every vocabulary; only where two names of one ask for the same does the later
    take the next that is free. Colours repeat after `PALETTE_SIZE` classes.
    """
    owners: dict[int, str] = {}
    colors = []
    for name in names:
        if len(owners) == PALETTE_SIZE:
            owners.clear()
        index = zlib.crc32(name.encode()) % PALETTE_SIZE
        while index in owners:
            index = (index + 1) % PALETTE_SIZE
        owners[index] = name
        red, green, blue = _palette()[index]
        colors.append((int(red), int(green), int(blue)))
    return colors


def identity_color(identity: int) -> tuple[int, int, int]:
    """RGB colour of a thing in a video, 0..255: the next identity has one as far from it as can be."""
    red, green, blue = _palette()[identity % PALETTE_SIZE]
    return int(red), int(green), int(blue)


def shade(color: tuple[int, int, int], instance: int) -> tuple[int, int, int]:
    """The colour of one instance of a thing class: the class colour, a little lighter or darker.

    Args:
        color: RGB of the class, 0..255.
        instance: 0 for the first instance of the class in the image (exactly the class colour), 1 for the second, ...
    """
    shift = (0.0, 0.3, -0.25, 0.5, -0.4)[instance % 5]  # towards white above 0, towards black below
    target = 255 if shift > 0 else 0
    red, green, blue = (round(part + abs(shift) * (target - part)) for part in color)
    return red, green, blue
