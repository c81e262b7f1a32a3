"""Colours of classes and of their instances: the same on every run and every machine."""

from __future__ import annotations

import functools

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


def class_color(index: int) -> tuple[int, int, int]:
    """RGB colour of a class, 0..255.

    Any first n classes are well separated; colours repeat after `PALETTE_SIZE` classes.

    Args:
        index: contiguous class index, from 0.
    """
    red, green, blue = _palette()[index % PALETTE_SIZE]
    return int(red), int(green), int(blue)


def instance_color(index: int, instance: int) -> tuple[int, int, int]:
    """RGB colour of one instance of a thing class: the class colour, a little lighter or darker.

    Args:
        index: contiguous class index, from 0.
        instance: 0 for the first instance of the class in the image (exactly the class colour), 1 for the second, ...
    """
    shift = (0.0, 0.3, -0.25, 0.5, -0.4)[instance % 5]  # towards white above 0, towards black below
    target = 255 if shift > 0 else 0
    red, green, blue = (round(c + abs(shift) * (target - c)) for c in class_color(index))
    return red, green, blue
