"""Large images: tiles that overlap, and their segments joined across the seams.

A tile is segmented as an image of its own. Segments of two tiles are one thing if both see about the same of it where
the tiles overlap; stuff of a class is one segment anyway. Every pixel is taken from the tile in whose middle part it
lies.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from fcclip.errors import InputError
from fcclip.segmenter.result import Computed, Outputs
from fcclip.segmenter.segments import NamedSegment, named_segments, run_lengths

SMALLEST = 32  # pixels of a tile's side
AGREEMENT = 0.5  # intersection over union, where tiles overlap, from which on two segments are one


@dataclass(frozen=True)
class Span:
    """One side of a tile: pixels start..stop, of which it decides core_start..core_stop."""

    start: int
    stop: int
    core_start: int
    core_stop: int


def spans(side: int, tile: int) -> list[Span]:
    """The tiles along a side of an image: equal in size, evenly spaced, overlapping by a quarter of a tile or more.

    Example:
        >>> [(span.start, span.stop, span.core_start, span.core_stop) for span in spans(100, 64)]
        [(0, 64, 0, 50), (36, 100, 50, 100)]
    """
    if side <= tile:
        return [Span(0, side, 0, side)]
    number = 1 + -(-(side - tile) // (tile - tile // 4))
    starts = [round(index * (side - tile) / (number - 1)) for index in range(number)]
    seams = [0, *((start + before + tile) // 2 for before, start in itertools.pairwise(starts)), side]
    return [Span(start, start + tile, *core) for start, core in zip(starts, itertools.pairwise(seams))]


@dataclass(frozen=True)
class Piece:
    """A segment of one tile; a thing is placed in the whole image."""

    tile: int
    segment: NamedSegment


def segment_tiles(image: np.ndarray, *, tile: int, look: Callable[[np.ndarray], Outputs]) -> Computed:
    """An image in tiles, one after the other, so that what is held beside its maps does not grow with it.

    Args:
        image: (h, w, 3) uint8 RGB.
        tile: side of a tile, pixels.
        look: gives the outputs of a tile.

    Raises:
        ValueError: a tile below `SMALLEST`.
    """
    if tile < SMALLEST:
        raise InputError(f"tile is the side of a tile in pixels, at least {SMALLEST}, got {tile}")
    height, width = size = image.shape[:2]
    panoptic, semantic = np.zeros(size, np.int32), np.zeros(size, np.int32)
    pieces: list[Piece] = []  # of the panoptic map, which has their positions here, counted from 1
    embeddings: list[np.ndarray] = []
    instances: list[Piece] = []
    windows = list(itertools.product(spans(height, tile), spans(width, tile)))
    for index, (rows, columns) in enumerate(windows):
        outputs = look(image[rows.start : rows.stop, columns.start : columns.stop])
        number = np.zeros(1 + max((segment.id for segment in outputs.segments), default=0), np.int32)
        for segment in outputs.segments:
            pieces.append(Piece(index, placed(segment, rows, columns, size)))
            number[segment.id] = len(pieces)
        embeddings.extend(outputs.embeddings)
        instances += [Piece(index, placed(segment, rows, columns, size)) for segment in outputs.instances]
        core = slice(rows.core_start, rows.core_stop), slice(columns.core_start, columns.core_stop)
        part = tuple(slice(s.start - span.start, s.stop - span.start) for s, span in zip(core, (rows, columns)))
        panoptic[core] = number[outputs.panoptic[part]]
        semantic[core] = outputs.semantic[part]

    names = outputs.vocabulary.class_names
    segments, means = joined_segments(panoptic, pieces, embeddings, join(pieces, windows, size), names)
    merged = [merged_instance([instances[i].segment for i in group]) for group in join(instances, windows, size)]
    merged.sort(key=lambda segment: -segment.score)
    numbered = tuple(replace(segment, id=number) for number, segment in enumerate(merged, start=1))
    return Computed(outputs.vocabulary, panoptic, segments, numbered, semantic, means)


def placed(segment: NamedSegment, rows: Span, columns: Span, size: tuple[int, int]) -> NamedSegment:
    """A segment of a tile as one of the whole image (h, w); of stuff the place is not asked for."""
    if not segment.isthing:
        return segment
    left, top, right, bottom = segment.box
    mask = segment.mask[top:bottom, left:right]
    top, left = top + rows.start, left + columns.start
    box = (left, top, left + mask.shape[1], top + mask.shape[0])
    return replace(segment, rle=run_lengths(mask, top=top, left=left, size=size), box=box)


def join(pieces: Sequence[Piece], windows: Sequence[tuple[Span, Span]], size: tuple[int, int]) -> list[list[int]]:
    """The positions of the pieces that are one segment, for each segment."""
    leader = list(range(len(pieces)))

    def lead(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    by_class: dict[int, list[int]] = {}
    for index, piece in enumerate(pieces):
        by_class.setdefault(piece.segment.category_id, []).append(index)
    view = functools.cache(lambda index, tile: seen_in(pieces[index], windows[pieces[index].tile], windows[tile], size))
    for indices in by_class.values():
        pairs = itertools.pairwise(indices)
        if pieces[indices[0]].segment.isthing:
            pairs = ((indices[i], indices[j]) for i, j in meeting([pieces[index] for index in indices]))
            pairs = [(i, j) for i, j in pairs if agree(view(i, pieces[j].tile), view(j, pieces[i].tile))]
        for first, second in pairs:
            leader[lead(second)] = lead(first)
    groups: dict[int, list[int]] = {}
    for index in range(len(pieces)):
        groups.setdefault(lead(index), []).append(index)
    return list(groups.values())


def meeting(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """The pairs of pieces of different tiles whose boxes overlap."""
    boxes = np.array([piece.segment.box for piece in pieces])
    tiles = np.array([piece.tile for piece in pieces])
    starts, stops = boxes[:, :2], boxes[:, 2:]
    overlap = (np.maximum(starts[:, None], starts) < np.minimum(stops[:, None], stops)).all(-1)
    return np.argwhere(np.triu(overlap & (tiles[:, None] != tiles))).tolist()


def seen_in(
    piece: Piece, own: tuple[Span, Span], other: tuple[Span, Span], size: tuple[int, int]
) -> tuple[dict[str, Any], int]:
    """The part of a piece that lies in another tile too: its run lengths, and its pixels."""
    (top, bottom), (left, right) = ((max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(own, other))
    band = run_lengths(np.ones((bottom - top, right - left), bool), top=top, left=left, size=size)
    part = coco_mask.merge([dict(piece.segment.rle), band], intersect=True)
    return part, int(coco_mask.area(part))


def agree(first: tuple[dict[str, Any], int], second: tuple[dict[str, Any], int]) -> bool:
    """Whether two tiles see about the same of a segment where they overlap."""
    smaller, larger = sorted((first[1], second[1]))
    if smaller < AGREEMENT * larger or smaller == 0:
        return False
    both = int(coco_mask.area(coco_mask.merge([first[0], second[0]], intersect=True)))
    return both >= AGREEMENT * (smaller + larger - both)


def joined_segments(
    panoptic: np.ndarray,
    pieces: Sequence[Piece],
    embeddings: Sequence[np.ndarray],
    groups: Sequence[Sequence[int]],
    class_names: Sequence[str],
) -> tuple[tuple[NamedSegment, ...], np.ndarray]:
    """The segments of the whole map, in which the numbers of pieces become segment ids; and what CLIP sees in each, the
    mean over its pieces by area."""
    ids = np.zeros(1 + len(pieces), np.int32)
    for number, group in enumerate(groups, start=1):
        ids[np.array(group) + 1] = number
    for row in panoptic:  # one at a time, so that no second map is made
        row[:] = ids[row]
    areas = np.bincount(panoptic.ravel(), minlength=len(groups) + 1).tolist()
    records, means = [], {}
    for number, group in enumerate(groups, start=1):
        best = max((pieces[index].segment for index in group), key=lambda segment: segment.score)
        if areas[number]:
            record = {"id": number, "category_id": best.category_id, "isthing": best.isthing}
            records.append({**record, "score": best.score, "area": areas[number]})
            mean = sum(embeddings[index] * pieces[index].segment.area for index in group)
            means[number] = mean / max(np.linalg.norm(mean), 1e-12)
    segments = named_segments(panoptic, records, class_names)
    return segments, np.array([means[segment.id] for segment in segments], np.float32)


def merged_instance(segments: Sequence[NamedSegment]) -> NamedSegment:
    """One thing of its pieces, with the score of the best."""
    best = max(segments, key=lambda segment: segment.score)
    if len(segments) == 1:
        return best
    rle = coco_mask.merge([dict(segment.rle) for segment in segments])
    boxes = np.array([segment.box for segment in segments])
    box = (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())
    counts = {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode("ascii")}
    return replace(best, rle=counts, box=box, area=int(coco_mask.area(rle)))
