"""Panoptic maps, instances and semantic maps of scored masks in NumPy, by the rules of `fcclip.modeling.outputs`.

Legend: Q queries, K classes, h x w pixels of the result. Probabilities are (Q, K + 1), void last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

_BLOCK = 2**22  # floats of mask logits at the size of the result that are held at once


@dataclass(frozen=True)
class Segment:
    """A segment of a panoptic map, or a detected thing.

    Args:
        id: value of its pixels in the map, from 1; of a thing its rank.
        category_id: index of its class; name: what that is called; isthing: whether it is countable.
        score: 0..1.
        area: number of pixels.
        query: the row of the embeddings that it comes from; of a segment of several queries that of the best.
        mask: (h, w) bool.
    """

    id: int
    category_id: int
    name: str
    isthing: bool
    score: float
    area: int
    query: int
    mask: np.ndarray = field(repr=False, compare=False)


class Masks:
    """Masks at the size of the result, some rows at a time.

    They are resized bilinearly to the padded input, cut to the image and resized to the result. All of this is linear,
    so that each axis has one matrix.

    Args:
        logits: (Q, ·, ·) float32, over the padded input.
        padded_size, image_size, output_size: (height, width) of the input with and without padding, of the result.
    """

    def __init__(
        self,
        logits: np.ndarray,
        *,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> None:
        self.logits, self.image_size, self.output_size = logits, image_size, output_size
        sizes = zip(logits.shape[1:], padded_size, image_size)
        self.to_image = [interpolation(cells, padded)[:side] for cells, padded, side in sizes]
        self.to_output = [interpolation(side, result) for side, result in zip(image_size, output_size)]

    def rows(self, queries: np.ndarray, *, maps: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of the result, and the logits (n, number of rows, w) of queries (n,) there; `maps`: how many maps the
        caller makes of them."""
        height, width = self.output_size
        matrices = [output @ image for output, image in zip(self.to_output, self.to_image)]
        step = max(1, _BLOCK // (max(len(queries), maps, 1) * width))
        for rows in (slice(start, min(start + step, height)) for start in range(0, height, step)):
            yield rows, _product(self.logits[queries], matrices[0][rows], matrices[1])

    def image_rows(self, *, maps: int) -> Iterator[tuple[slice, list[np.ndarray], np.ndarray]]:
        """The same before the last resize, of all queries: rows of the result, the matrices of that resize, and the
        logits (Q, ·, ·) of the rows of the image that are needed."""
        height, width = self.output_size
        step = max(1, _BLOCK // (max(len(self.logits), maps) * max(self.image_size[1], width)))
        for rows in (slice(start, min(start + step, height)) for start in range(0, height, step)):
            matrix = self.to_output[0][rows]
            needed = _span(matrix)
            matrices = [matrix[:, needed].astype(np.float32), self.to_output[1].astype(np.float32)]
            yield rows, matrices, _product(self.logits, self.to_image[0][needed], self.to_image[1])


def interpolation(size: int, resized: int) -> np.ndarray:
    """(resized, size) float64: a bilinear resize of one axis, half-pixel centres, no antialiasing, as torch's
    `interpolate` (align_corners=False), whose weights have single precision."""
    if size == resized:
        return np.eye(size)
    # torch multiplies and subtracts with one rounding to single precision
    centre = ((np.arange(resized) + 0.5) * float(np.float32(size / resized)) - 0.5).astype(np.float32)
    centre = np.maximum(centre, np.float32(0))
    low = np.minimum(centre.astype(np.int64), size - 1)
    share, place, matrix = centre - low, np.arange(resized), np.zeros((resized, size))
    np.add.at(matrix, (place, low), 1 - share)
    np.add.at(matrix, (place, np.minimum(low + 1, size - 1)), share)
    return matrix


def _span(matrix: np.ndarray) -> slice:
    """The columns of a matrix from the first to the last that is not 0."""
    used = np.flatnonzero(matrix.any(0))
    return slice(used[0], used[-1] + 1)


def _product(maps: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(n, h, w) resized by a matrix an axis, (h', h) and (w', w) -> (n, h', w') float32."""
    needed = _span(rows)
    return rows[:, needed].astype(np.float32) @ maps[:, needed] @ columns.T.astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def panoptic(
    probabilities: np.ndarray,
    masks: Masks,
    things: np.ndarray,
    names: Sequence[str],
    *,
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[np.ndarray, tuple[Segment, ...]]:
    """See `fcclip.modeling.outputs.panoptic_inference`: (h, w) int32, 0 where nothing is; segments, best first."""
    scores, labels = probabilities.max(-1), probabilities.argmax(-1)
    queries = np.flatnonzero((labels != len(names)) & (scores > object_mask_threshold))
    owner, inside_own = np.zeros(masks.output_size, np.int64), np.zeros(masks.output_size, bool)
    if not len(queries):
        return owner.astype(np.int32), ()
    scores, labels, areas = scores[queries], labels[queries], np.zeros(len(queries), np.int64)
    for rows, logits in masks.rows(queries):
        shares = sigmoid(logits)
        inside = shares >= 0.5
        owner[rows] = (scores[:, None, None] * shares).argmax(0)
        inside_own[rows] = np.take_along_axis(inside, owner[None, rows], 0)[0]
        areas += inside.sum((1, 2))
    owned = np.bincount(owner.ravel(), minlength=len(queries))
    region = np.bincount(owner[inside_own], minlength=len(queries))
    accepted = (areas > 0) & (region > 0) & (owned / np.maximum(areas, 1) >= overlap_threshold)
    id_of_query, stuff_ids, members = np.zeros(len(queries), np.int32), {}, []  # members: queries of each segment
    for query in np.flatnonzero(accepted):
        label = int(labels[query])
        if label not in stuff_ids:
            members.append([])
        id_of_query[query] = stuff_ids.get(label, len(members))
        members[id_of_query[query] - 1].append(query)
        if not things[label]:
            stuff_ids[label] = id_of_query[query]
    ids = id_of_query[owner] * inside_own
    segments = []
    for number, own in enumerate(members, start=1):
        best = own[scores[own].argmax()]
        label, area, query = int(labels[best]), int(region[own].sum()), int(queries[best])
        place = {"name": str(names[label]), "isthing": bool(things[label]), "mask": ids == number, "query": query}
        segments.append(Segment(id=number, category_id=label, score=float(scores[best]), area=area, **place))
    return ids, tuple(sorted(segments, key=lambda segment: -segment.score))


def instances(
    probabilities: np.ndarray, masks: Masks, things: np.ndarray, names: Sequence[str], *, topk: int
) -> tuple[Segment, ...]:
    """See `fcclip.modeling.outputs.instance_inference`; best first, none without a pixel."""
    shares = probabilities[:, :-1]
    index = np.argsort(-shares, axis=None, kind="stable")[:topk]
    index = index[things[index % shares.shape[1]]]
    scores, labels = shares.ravel()[index], index % shares.shape[1]
    queries, position = np.unique(index // shares.shape[1], return_inverse=True)
    inside = np.zeros((len(queries), *masks.output_size), bool)
    sums = np.zeros(len(queries), np.float32)  # of the mask probability inside
    for rows, logits in masks.rows(queries) if len(queries) else ():
        inside[:, rows] = logits > 0
        sums += (sigmoid(logits) * inside[:, rows]).sum((1, 2))
    areas = inside.sum((1, 2))
    scores = scores * (sums / (areas + np.float32(1e-6)))[position]
    found = []
    for number in np.argsort(-scores, kind="stable"):
        query, label = position[number], int(labels[number])
        if areas[query]:
            place = {"name": str(names[label]), "isthing": True, "mask": inside[query], "query": int(queries[query])}
            found.append(Segment(len(found) + 1, label, score=float(scores[number]), area=int(areas[query]), **place))
    return tuple(found)


def semantic(probabilities: np.ndarray, masks: Masks, *, masks_first: bool) -> np.ndarray:
    """See `fcclip.modeling.outputs.semantic_labels`: (h, w) int32, the class with the highest score."""
    shares, labels = probabilities[:, :-1].T, np.zeros(masks.output_size, np.int32)
    if masks_first or masks.image_size == masks.output_size:
        for rows, logits in masks.rows(np.arange(len(probabilities)), maps=len(shares)):
            labels[rows] = np.tensordot(shares, sigmoid(logits), 1).argmax(0)
        return labels
    for rows, matrices, logits in masks.image_rows(maps=len(shares)):
        labels[rows] = _product(np.tensordot(shares, sigmoid(logits), 1), *matrices).argmax(0)
    return labels
