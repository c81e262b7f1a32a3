"""From the `segmentation` of COCO annotations - polygons or run-length codes - to masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask

__all__ = ["compressed", "fill_polygons", "has_area", "read_run_lengths"]


def has_area(polygon: Sequence[float]) -> bool:
    """Whether a list x0, y0, x1, y1, ... is a polygon at all: three corners or more, and none without its y."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def compressed(segmentation: dict[str, Any]) -> dict[str, Any]:
    """A run-length code with its counts as a string: those given as a list are converted.

    Raises:
        ValueError: no size or no counts in it.
    """
    try:
        if isinstance(segmentation["counts"], list):
            return pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
        return {"size": list(segmentation["size"]), "counts": segmentation["counts"]}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"a run-length code needs 'size' [height, width] and 'counts': {error}") from error


def read_run_lengths(codes: Iterable[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """n run-length codes -> (n, height, width) bool.

    Raises:
        ValueError: a code of another size than the picture, or none at all.
    """
    codes = [compressed(code) for code in codes]
    strange = [code["size"] for code in codes if tuple(code["size"]) != tuple(size)]
    if strange:
        height, width = strange[0]
        raise ValueError(
            f"a run-length code is {height} x {width} pixels (height x width), its picture {size[0]} x {size[1]}"
        )
    if not codes:
        return np.zeros((0, *size), bool)
    return np.ascontiguousarray(pycocotools.mask.decode(codes).transpose(2, 0, 1)).view(bool)


def fill_polygons(polygons: Sequence[np.ndarray], canvas: np.ndarray) -> None:
    """Sets the pixels inside any of the polygons (k, 2), by the rule of the COCO tools.

    Args:
        polygons: corners (x, y) in pixels.
        canvas: (H, W) bool, changed in place.
    """
    if not polygons:
        return
    codes = pycocotools.mask.frPyObjects([one.ravel().tolist() for one in polygons], *canvas.shape)
    mask = pycocotools.mask.decode(pycocotools.mask.merge(codes))
    corners = np.concatenate(polygons)  # the tools store columns, so only the part that can be set is turned
    left, top = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 1, 0)
    right, bottom = np.ceil(corners.max(axis=0)).astype(int) + 1
    canvas[top:bottom, left:right] |= mask[top:bottom, left:right].view(bool)
