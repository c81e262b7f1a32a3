"""Joint histograms of two maps: all that the panoptic and semantic protocols need to know of an image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcclip.data.segmentations import starts_of_runs
from fcclip.errors import InputError

_LIMIT = 1 << 24  # ids of the second map fit into three bytes


class JointHistogram(NamedTuple):
    """Pairs of values that share a pixel, in ascending (first, second) order; three int64 arrays of one length."""

    first: np.ndarray
    second: np.ndarray
    pixels: np.ndarray


def joint_histogram(first: np.ndarray, second: np.ndarray, *, what: str = "values of the second map") -> JointHistogram:
    """How many pixels have which pair of values.

    Args:
        first: (h, w) int, not empty.
        second: (h, w) int, 0..2**24 - 1.
        what: what an error calls the values of the second.

    Raises:
        ValueError: a value of the second that is out of range.

    Example:
        >>> joint_histogram(np.array([[4, 4, 9]]), np.array([[1, 1, 0]])).pixels.tolist()
        [2, 1]
    """
    g, p = first.ravel(), second.ravel()
    starts = starts_of_runs(g, p)
    g, p, size = g[starts], p[starts], g.size  # every value of a map stands at the start of a run
    if p.min() < 0 or p.max() >= _LIMIT:
        raise InputError(f"{what} must be 0..{_LIMIT - 1}, got {p.min()}..{p.max()}")
    return summed(g, p, np.diff(starts, append=size))


def summed(first: np.ndarray, second: np.ndarray, pixels: np.ndarray) -> JointHistogram:
    """Adds up the pixels of equal pairs; three (n,) int, the second below 2**24."""
    pair = first.astype(np.int64) << 24 | second.astype(np.int64)
    if not pair.size:
        return JointHistogram(pair, pair, pair)
    order = np.argsort(pair)
    pair = pair[order]
    new = np.flatnonzero(np.concatenate(([True], pair[1:] != pair[:-1])))
    pair = pair[new]
    return JointHistogram(pair >> 24, pair & (_LIMIT - 1), np.add.reduceat(pixels[order], new))


def compact(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values in ascending order, and the position of each pixel's among them, as `np.unique` gives them.

    Example:
        >>> compact(np.array([[70, 70, 3]]))
        (array([ 3, 70]), array([[1, 1, 0]]))
    """
    row = values.ravel()
    starts = starts_of_runs(row)
    distinct, position = np.unique(row[starts], return_inverse=True)
    return distinct, np.repeat(position, np.diff(starts, append=row.size)).reshape(values.shape)


def as_array(values: np.ndarray | Tensor) -> np.ndarray:
    """The same numbers as an array in main memory."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
