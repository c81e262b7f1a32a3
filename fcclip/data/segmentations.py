"""From annotations to pixels: polygons and run-length codes to masks, segments to classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask

from fcclip.errors import InputError

_BLOCK = 1 << 16  # pixels


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
    except (KeyError, TypeError, IndexError, OverflowError) as error:
        raise InputError(f"a run-length code needs 'size' [height, width] and 'counts': {error}") from error


def read_run_lengths(codes: Iterable[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """n run-length codes -> (n, height, width) bool.

    Raises:
        ValueError: a code of another size than the image, one that does not fill it, or none at all.
    """
    codes = [compressed(code) for code in codes]
    strange = [code["size"] for code in codes if tuple(code["size"]) != tuple(size)]
    if strange:
        height, width = strange[0]
        raise InputError(
            f"a run-length code is {height} x {width} pixels (height x width), its image {size[0]} x {size[1]}"
        )
    if not codes:
        return np.zeros((0, *size), bool)
    for code in codes:
        check_code(code)
    return np.ascontiguousarray(pycocotools.mask.decode(codes).transpose(2, 0, 1)).view(bool)


def check_code(code: dict[str, Any]) -> None:
    """Refuses a compressed run-length code whose runs do not fill its size: pycocotools would give unset memory for the
    rest.

    Raises:
        ValueError: they do not, or it is not a code.
    """
    height, width = code["size"]
    lengths = run_lengths(code["counts"])
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise InputError(
            f"a run-length code has runs of {lengths.sum()} pixels in all, its size {height} x {width} has "
            f"{height * width}"
        )


def run_lengths(counts: str | bytes) -> np.ndarray:
    """(n,) int64, the runs in a compressed run-length code.

    A run is stored as the difference to the last but one before it, in digits of 5 bits, the lowest first: character
    48 + digit, plus 32 if more digits follow; bit 4 of the last digit is the sign.

    Raises:
        ValueError: other characters, or one after which more should follow at the end.
    """
    digits = (
        np.frombuffer(counts.encode("latin-1") if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    )
    last = (digits & 32) == 0
    if not len(digits) or not last[-1] or digits.min() < 0 or digits.max() > 63:
        raise InputError("the 'counts' are not a run-length code")
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    places = np.arange(len(digits)) - np.repeat(starts, np.diff(starts, append=len(digits)))
    if places.max() > 6:
        raise InputError("the 'counts' are not a run-length code")
    runs = np.add.reduceat((digits & 31) << 5 * places, starts)
    sign = (digits[last] & 16) > 0
    runs -= np.where(sign, np.int64(1) << 5 * (places[last] + 1), 0)
    runs[1::2] = np.cumsum(runs[1::2])  # differences begin at the fourth run
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def fill_polygons(polygons: Sequence[np.ndarray], canvas: np.ndarray) -> None:
    """Sets the pixels inside any of the polygons (k, 2), by the rule of the COCO tools.

    Args:
        polygons: corners (x, y) in pixels.
        canvas: (H, W) bool, changed in place.
    """
    if not polygons:
        return
    codes = pycocotools.mask.frPyObjects([corners.ravel().tolist() for corners in polygons], *canvas.shape)
    mask = pycocotools.mask.decode(pycocotools.mask.merge(codes))
    corners = np.concatenate(polygons)  # the tools store columns, so only the part that can be set is turned
    left, top = np.maximum(np.floor(corners.min(axis=0)).astype(int) - 1, 0)
    right, bottom = np.ceil(corners.max(axis=0)).astype(int) + 1
    canvas[top:bottom, left:right] |= mask[top:bottom, left:right].view(bool)


def starts_of_runs(*rows: np.ndarray) -> np.ndarray:
    """Positions where a value differs from its left neighbour in any of the rows, and 0.

    Neighbours in a map mostly have the same value, so that a sort needs to look at few of them.
    """
    size, starts = rows[0].size, [np.zeros(1, np.int64)]
    for begin in range(1, size, _BLOCK):  # blocks that stay in the cache, and whose memory is not new every time
        end = min(begin + _BLOCK, size)
        changed = rows[0][begin:end] != rows[0][begin - 1 : end - 1]
        for row in rows[1:]:
            changed |= row[begin:end] != row[begin - 1 : end - 1]
        starts.append(np.flatnonzero(changed) + begin)
    return np.concatenate(starts)


def distinct_values(numbers: np.ndarray) -> list[int]:
    """The values of a map with pixels, ascending."""
    row = numbers.ravel()
    return np.unique(row[starts_of_runs(row)]).tolist()


def paint_classes(id_map: np.ndarray, segments: Iterable[Mapping[str, Any]], ignore_label: int) -> np.ndarray:
    """(h, w) int segment ids, not empty -> (h, w) int32 classes; `ignore_label` where no segment has the id.

    Example:
        >>> paint_classes(np.array([[0, 7, 9]]), [{"id": 7, "category_id": 2}], 255).tolist()
        [[255, 2, 255]]
    """
    class_of = {segment["id"]: segment["category_id"] for segment in segments}
    row = id_map.ravel()
    starts = starts_of_runs(row)
    ids, which = np.unique(row[starts], return_inverse=True)
    classes = np.array([class_of.get(segment_id, ignore_label) for segment_id in ids.tolist()], np.int32)
    return np.repeat(classes[which], np.diff(starts, append=row.size)).reshape(id_map.shape)
