"""Masks, outlines, names and scores over an image.

h x w are pixels of the map, H x W pixels of the drawing (the same unless a small image is enlarged).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import supervision as sv
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from fcclip.errors import InputError
from fcclip.structures import Segment
from fcclip.visualization.colors import class_colors, identity_color, shade

READABLE_SIDE_PX = 768  # an image whose longer side is smaller is enlarged by a whole factor to at least this
MASK_OPACITY = 0.4  # of stuff; a thing, which has a bold outline, gets half of it, so that its own colours stay visible
STUFF_OUTLINE = (255, 255, 240)  # off-white, as published
MAX_LABEL_LENGTH = 32  # characters of a name before it is cut
PLACEMENT_CELLS = 256  # label positions are searched on a grid with this many cells along the longer side
SMALLEST_LETTERS_PX = 11
LABELLED_SHARE = 0.15  # of the drawing that names cover at most, by smaller letters


@dataclass(frozen=True)
class _Piece:
    """A segment to be drawn: where it is on the canvas, and in which colour."""

    segment: Segment
    mask: np.ndarray  # (n, m) bool, its bounding box
    top: int
    left: int
    color: tuple[int, int, int]  # RGB


def draw_panoptic(
    image: np.ndarray,
    id_map: np.ndarray,
    segments: Sequence[Segment],
    class_names: Sequence[str],
    *,
    scores: bool = True,
    legend: bool = False,
    identities: bool = False,
) -> np.ndarray:
    """Draws a panoptic map over its image.

    Every segment is tinted in the colour of its class and carries its name; things have an outline in a shade of that
    colour that differs between instances, stuff a thin off-white one. Names never overlap, hide as little as they can
    and touch their segment; those that find no place are left out. An image smaller than `READABLE_SIDE_PX` is enlarged
    first, so that names are readable.

    Args:
        image: (h, w, 3) uint8 RGB; not changed.
        id_map: (h, w) int, segment id of each pixel; 0 and ids without a segment stay untouched.
        segments: the segments to draw; one without a pixel is left out.
        class_names: K names, by contiguous class index.
        scores: write the score after the name.
        legend: a list of the classes below the image, each with its colour and its number of segments.
        identities: ids of things are identities in a video: they give the colour, and stand after the name; the legend
            is of stuff.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: arrays of the wrong shape or type, or a segment whose class has no name.
    """
    _check(image, segments, class_names)
    if id_map.shape != image.shape[:2]:
        raise InputError(f"the map is {id_map.shape} (height, width), its image {image.shape[:2]}")
    if not segments:
        return _draw(image, [], class_names, scores=scores, legend=legend)
    ordered = sorted(segments, key=lambda segment: segment.id)
    known = np.array([segment.id for segment in ordered])
    position = np.searchsorted(known, id_map).clip(max=len(known) - 1)  # ids of files may be large numbers
    ids = _enlarged_ids(np.where(known[position] == id_map, position + 1, 0).astype(np.int32))
    places = enumerate(ndimage.find_objects(ids))
    masks = [(ordered[index], ids[place] == index + 1, place) for index, place in places if place is not None]
    masks.sort(key=lambda mask: (mask[0].isthing, -np.count_nonzero(mask[1])))
    return _draw(image, masks, class_names, scores=scores, legend=legend, identities=identities)


def draw_instances(
    image: np.ndarray,
    masks: Sequence[np.ndarray],
    segments: Sequence[Segment],
    class_names: Sequence[str],
    *,
    scores: bool = True,
    legend: bool = False,
) -> np.ndarray:
    """Draws masks (h, w) bool that may overlap, one a segment, the larger ones first; else as `draw_panoptic`."""
    _check(image, segments, class_names)
    factor, pieces = _factor(image.shape), []
    for segment, mask in sorted(zip(segments, masks), key=lambda pair: -pair[0].area):
        for place in ndimage.find_objects(mask.astype(np.int8)):
            share = cv2.resize(mask[place].astype(np.float32), None, fx=factor, fy=factor)
            share = cv2.GaussianBlur(share, (0, 0), factor / 2) if factor > 1 else share
            larger = tuple(slice(side.start * factor, side.stop * factor) for side in place)
            pieces.append((segment, share >= 0.5, larger))
    return _draw(image, pieces, class_names, scores=scores, legend=legend)


def _draw(
    image: np.ndarray,
    masks: Sequence[tuple[Segment, np.ndarray, tuple[slice, slice]]],
    class_names: Sequence[str],
    *,
    scores: bool,
    legend: bool,
    identities: bool = False,
) -> np.ndarray:
    """Segments, each with its mask in the bounding box `place` of the enlarged image, in the order of drawing."""
    canvas = _enlarged(image)
    thickness = max(2, round(max(canvas.shape) / 400))
    colors, pieces = class_colors(class_names), []
    numbers: dict[int, int] = {}  # of the segments of each class so far
    for segment, mask, (rows, columns) in masks:
        number = numbers[segment.category_id] = numbers.get(segment.category_id, -1) + 1
        color = shade(colors[segment.category_id], number if segment.isthing else 0)
        color = identity_color(segment.id) if identities and segment.isthing else color
        pieces.append(_Piece(segment, mask, rows.start, columns.start, color))
        tint = sv.MaskAnnotator(
            color=sv.Color(*color),
            opacity=MASK_OPACITY / 2 if segment.isthing else MASK_OPACITY,
            color_lookup=sv.ColorLookup.INDEX,
        )
        _annotate(canvas, pieces[-1], tint, margin=0)
    for piece in pieces:  # after all tints, so that no tint covers half of a neighbour's outline
        color, width = (piece.color, thickness) if piece.segment.isthing else (STUFF_OUTLINE, 1)
        outline = sv.PolygonAnnotator(color=sv.Color(*color), thickness=width, color_lookup=sv.ColorLookup.INDEX)
        _annotate(canvas, piece, outline, margin=width)
    drawing = _write_labels(canvas, pieces, class_names, scores=scores, identities=identities)
    if not legend:
        return drawing
    own = {segment.category_id for segment, *_ in masks if identities and segment.isthing}  # colours of their own
    counts = {class_names[i]: (colors[i], number + 1) for i, number in numbers.items() if i not in own}
    return np.concatenate([drawing, _legend(counts, drawing.shape[1])])


def _annotate(canvas: np.ndarray, piece: _Piece, annotator: sv.annotators.base.BaseAnnotator, *, margin: int) -> None:
    """Draws on the part of the canvas around a piece alone: what a segment costs follows its size."""
    height, width = canvas.shape[:2]
    top, left = max(piece.top - margin, 0), max(piece.left - margin, 0)
    bottom = min(piece.top + piece.mask.shape[0] + margin, height)
    right = min(piece.left + piece.mask.shape[1] + margin, width)
    mask = np.zeros((1, bottom - top, right - left), bool)
    inner = mask[0, piece.top - top :, piece.left - left :][: piece.mask.shape[0], : piece.mask.shape[1]]
    inner[:] = piece.mask
    part = canvas[top:bottom, left:right]
    detection = sv.Detections(xyxy=sv.mask_to_xyxy(mask).astype(float), mask=mask)
    part[:] = annotator.annotate(part.copy(), detection)


def draw_labels(
    image: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    ignore_label: int = 255,
    legend: bool = False,
) -> np.ndarray:
    """Draws a semantic label map over its image: one segment per class.

    Args:
        image: (h, w, 3) uint8 RGB; not changed.
        labels: (h, w) int, contiguous class index of each pixel.
        class_names: K names.
        ignore_label: pixels with this value stay untouched.
        legend: as for `draw_panoptic`.

    Returns:
        (H, W, 3) uint8 RGB, enlarged like `draw_panoptic`'s.

    Raises:
        ValueError: arrays of the wrong shape or type, or a label without a name.
    """
    classes, areas = np.unique(labels[labels != ignore_label], return_counts=True)
    segments = [
        Segment(id=int(c) + 1, category_id=int(c), isthing=False, score=1.0, area=int(area))
        for c, area in zip(classes, areas)
    ]
    ids = np.where(labels == ignore_label, 0, labels.astype(np.int32) + 1)
    return draw_panoptic(image, ids, segments, class_names, scores=False, legend=legend)


def _check(image: np.ndarray, segments: Sequence[Segment], class_names: Sequence[str]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"image must be (h, w, 3) uint8 RGB, got {image.shape} {image.dtype}")
    for segment in segments:
        if not 0 <= segment.category_id < len(class_names):
            raise InputError(
                f"segment {segment.id} has class {segment.category_id}, "
                f"but there are names for 0..{len(class_names) - 1}"
            )


def _enlarged(image: np.ndarray) -> np.ndarray:
    """-> BGR canvas (H, W, 3) uint8, enlarged by a whole factor if small."""
    canvas, factor = cv2.cvtColor(image, cv2.COLOR_RGB2BGR), _factor(image.shape)
    return canvas if factor == 1 else cv2.resize(canvas, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


def _factor(shape: Sequence[int]) -> int:
    return max(1, -(-READABLE_SIDE_PX // max(shape[:2])))


def _enlarged_ids(ids: np.ndarray) -> np.ndarray:
    """(h, w) int32 -> (H, W), as the image is."""
    factor = _factor(ids.shape)
    if factor == 1:
        return ids
    height, width = (side * factor for side in ids.shape)
    smooth = np.zeros((height, width), np.int32)
    best = np.zeros((height, width), np.float32)
    for value in np.unique(ids):  # the id with the largest share of a pixel's surroundings: edges without stairs
        share = cv2.resize((ids == value).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        share = cv2.GaussianBlur(share, (0, 0), factor / 2)
        smooth[share > best] = value
        best = np.maximum(best, share)
    return smooth


# ---- names ----


def _write_labels(
    canvas: np.ndarray, pieces: Sequence[_Piece], class_names: Sequence[str], *, scores: bool, identities: bool
) -> np.ndarray:
    """canvas (H, W, 3) uint8 BGR -> RGB with names."""
    image = Image.fromarray(cv2.cvtColor(canvas, cv2.COLOR_BGR2RGB))
    texts = [
        _shorten(class_names[piece.segment.category_id])
        + (f" #{piece.segment.id}" if identities and piece.segment.isthing else "")
        + (f" {piece.segment.score:.2f}" if scores else "")
        for piece in pieces
    ]
    height, width = canvas.shape[:2]
    letters = max(1, sum(map(len, texts)))  # a letter is about 0.6 x 1.5 of the font's size with its box
    size_px = min((LABELLED_SHARE * height * width / (0.9 * letters)) ** 0.5, 0.6 * max(height, width) ** 0.5)
    size_px = max(SMALLEST_LETTERS_PX, round(size_px))
    font, padding = label_font(size_px), max(2, size_px // 5)
    line_px = sum(font.getmetrics()) + padding
    cell_px = max(1, max(height, width) // PLACEMENT_CELLS)
    masks = [_coarse(piece, (height, width), cell_px) for piece in pieces]
    cost = np.zeros((len(range(cell_px // 2, height, cell_px)), len(range(cell_px // 2, width, cell_px))), np.float32)
    for mask in masks:
        cost += mask / max(1, np.count_nonzero(mask))  # the share of a segment that a name hides with a cell
    taken, pen = np.zeros(cost.shape, bool), ImageDraw.Draw(image, "RGBA")
    for index in sorted(range(len(pieces)), key=lambda index: np.count_nonzero(masks[index])):
        box = round(font.getlength(texts[index])) + 2 * padding, line_px  # small segments have the least choice
        corner = _place(masks[index], taken, cost, tuple(-(-side // cell_px) for side in box))
        if corner is None:
            continue
        row, column = corner
        taken[row : row + -(-box[1] // cell_px), column : column + -(-box[0] // cell_px)] = True
        left, top = column * cell_px, row * cell_px
        pen.rounded_rectangle((left, top, left + box[0], top + box[1]), radius=padding, fill=(0, 0, 0, 170))
        place = (left + padding, top + padding / 2)
        pen.text(place, texts[index], font=font, fill=_lighter(pieces[index].color))
    return np.asarray(image)


def _coarse(piece: _Piece, size: tuple[int, int], cell_px: int) -> np.ndarray:
    """A piece on the placement grid, (rows, columns) bool."""
    centres = [np.arange(cell_px // 2, side, cell_px) for side in size]
    starts, sides = (piece.top, piece.left), piece.mask.shape
    grid = np.zeros([len(line) for line in centres], bool)
    hits = [
        np.flatnonzero((line >= start) & (line < start + side)) for line, start, side in zip(centres, starts, sides)
    ]
    inner = [line[hit] - start for line, hit, start in zip(centres, hits, starts)]
    grid[np.ix_(*hits)] = piece.mask[np.ix_(*inner)]
    return grid


def _place(mask: np.ndarray, taken: np.ndarray, cost: np.ndarray, box: tuple[int, int]) -> tuple[int, int] | None:
    """Where a name stands best: touching its segment, hiding little of any, inside its own and central where it can.

    Args:
        mask: (rows, columns) bool, the segment.
        taken: (rows, columns) bool, cells under other names.
        cost: (rows, columns) float, what it costs to hide a cell; 1 is a whole segment.
        box: (columns, rows) of the name.

    Returns:
        (row, column) of the upper left cell; None if every place is off the segment or touches another name.
    """
    columns, rows = box
    if rows > taken.shape[0] or columns > taken.shape[1] or not mask.any():
        return None
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    reach = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
    inside = _box_sums(mask, rows, columns) / (rows * columns)
    centre = depth[rows // 2 :, columns // 2 :][: inside.shape[0], : inside.shape[1]] / depth.max()
    hidden = _box_sums(cost, rows, columns)
    possible = (_box_sums(taken, rows, columns) == 0) & (_box_sums(reach, rows, columns) > 0)
    worth = np.where(possible, 0.5 * inside + 0.3 * centre - hidden, -np.inf)
    row, column = np.unravel_index(np.argmax(worth), worth.shape)
    return (int(row), int(column)) if possible[row, column] else None


def _box_sums(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Sum of the cells under a (rows, columns) box at every position where the box lies inside the grid."""
    total = cv2.integral(grid if grid.dtype == np.float32 else grid.astype(np.uint8))
    return total[rows:, columns:] - total[:-rows, columns:] - total[rows:, :-columns] + total[:-rows, :-columns]


def _legend(classes: dict[str, tuple[tuple[int, int, int], int]], width: int) -> np.ndarray:
    """(height, width, 3) uint8: class -> its colour and number of segments, in the order of the names."""
    size_px = max(13, width // 60)
    font, line_px, gap_px = label_font(size_px), round(1.7 * size_px), size_px
    lines: list[list[tuple[int, str, tuple[int, int, int]]]] = [[]]
    left = gap_px
    for name, (color, number) in sorted(classes.items()):
        text = _shorten(name) + (f" × {number}" if number > 1 else "")
        needed = 2 * size_px + round(font.getlength(text)) + gap_px
        if left + needed > width and lines[-1]:
            lines.append([])
            left = gap_px
        lines[-1].append((left, text, color))
        left += needed
    paper = Image.new("RGB", (width, line_px * len(lines) + gap_px), (255, 255, 255))
    pen = ImageDraw.Draw(paper)
    for row, line in enumerate(lines):
        middle = gap_px // 2 + row * line_px + line_px // 2
        for left, text, color in line:
            swatch = (left, middle - size_px // 2, left + round(1.5 * size_px), middle + size_px // 2)
            pen.rectangle(swatch, fill=color, outline=(0, 0, 0))
            pen.text((left + 2 * size_px, middle), text, font=font, fill=(0, 0, 0), anchor="lm")
    return np.asarray(paper)


@functools.lru_cache(maxsize=16)
def label_font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size_px)


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_LABEL_LENGTH else name[: MAX_LABEL_LENGTH - 1].rstrip() + "…"


def _lighter(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Light enough to be read on black, still recognisably the colour."""
    red, green, blue = (round(c + 0.6 * (255 - c)) for c in color)
    return red, green, blue
