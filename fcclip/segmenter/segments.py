"""Segments that know their name and their place. h x w are pixels of the image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage

from fcclip.structures import Segment


@dataclass(frozen=True)
class NamedSegment(Segment):
    """A segment that knows what it is called and where it is.

    Args:
        name: canonical name of its class, the first synonym of the entry.
        rle: its mask as COCO's compressed run lengths, {"size": [h, w], "counts": str}.
        box: (left, top, right, bottom) in pixels, right and bottom exclusive; zeros without a pixel.
    """

    name: str
    rle: Mapping[str, Any] = field(repr=False)
    box: tuple[int, int, int, int]

    @property
    def mask(self) -> np.ndarray:
        """(h, w) bool."""
        return coco_mask.decode(dict(self.rle)).astype(bool)

    def record(self) -> dict[str, Any]:
        """The same as JSON values, with the names of COCO: `bbox` is (x, y, width, height)."""
        left, top, right, bottom = self.box
        return {
            "id": self.id,
            "name": self.name,
            "category_id": self.category_id,
            "isthing": self.isthing,
            "score": round(self.score, 4),
            "area": self.area,
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": dict(self.rle),
        }


def run_lengths(mask: np.ndarray, *, top: int = 0, left: int = 0, size: Sequence[int] = ()) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, at a cost that follows the mask and not the image.

    Args:
        mask: (n, m) bool, a part of the image.
        top, left: of the part, pixels.
        size: (h, w) of the image; (): the mask is whole.
    """
    height, width = map(int, size or mask.shape)
    rows = mask.shape[0]
    columns = np.zeros((mask.shape[1], rows + 2), np.int8)  # runs go down the columns; none leaves its own
    columns[:, 1:-1] = mask.T
    column, row = np.divmod(np.flatnonzero(columns[:, 1:] != columns[:, :-1]), rows + 1)
    ends = (left + column) * height + top + row  # start, stop, start, stop, …
    if len(ends) and rows == height:  # a run at the bottom may go on at the top of the next column
        touching = np.flatnonzero(ends[1:-1:2] == ends[2::2])
        ends = np.delete(ends, np.concatenate([2 * touching + 1, 2 * touching + 2]))
    counts = np.diff(np.concatenate([[0], ends, [height * width]]))
    counts = counts[:-1] if len(ends) and counts[-1] == 0 else counts
    code = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}


def named_segments(
    id_map: np.ndarray, records: Iterable[Mapping[str, Any]], class_names: Sequence[str]
) -> tuple[NamedSegment, ...]:
    """The segments of a panoptic map, largest score first.

    Args:
        id_map: (h, w) int32, segment id of each pixel, 0 for none.
        records: `id`, `isthing`, `category_id`, `score`, `area` of each segment.
        class_names: by `category_id`.
    """
    places = ndimage.find_objects(id_map)
    segments = []
    for record in records:
        rows, columns = places[record["id"] - 1]
        rle = run_lengths(id_map[rows, columns] == record["id"], top=rows.start, left=columns.start, size=id_map.shape)
        box = (columns.start, rows.start, columns.stop, rows.stop)
        segments.append(NamedSegment(**record, name=class_names[record["category_id"]], rle=rle, box=box))
    return tuple(sorted(segments, key=lambda segment: -segment.score))
