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

from fcclip.errors import InputError
from fcclip.structures import Segment
from fcclip.visualization.colors import class_color, instance_color

READABLE_SIDE_PX = 768  # an image whose longer side is smaller is enlarged by a whole factor to at least this
MASK_OPACITY = 0.4  # of stuff; a thing, which has a bold outline, gets half of it, so that its own colours stay visible
STUFF_OUTLINE = (255, 255, 240)  # off-white, as published
MAX_LABEL_LENGTH = 32  # characters of a name before it is cut
PLACEMENT_CELLS = 256  # label positions are searched on a grid with this many cells along the longer side


@dataclass(frozen=True)
class _Label:
    """A name to be written on a segment."""

    text: str
    color: tuple[int, int, int]  # RGB of the segment
    mask: np.ndarray  # (rows, columns) bool, the segment on the placement grid
    area: int  # pixels of the drawing


def draw_panoptic(
    image: np.ndarray,
    id_map: np.ndarray,
    segments: Sequence[Segment],
    class_names: Sequence[str],
    *,
    scores: bool = True,
) -> np.ndarray:
    """Draws a panoptic map over its image.

    Every segment is tinted in the colour of its class and carries its name; things have an outline in a shade of that
    colour that differs between instances, stuff a thin off-white one. Names never overlap; those that find no place
    are left out. An image smaller than `READABLE_SIDE_PX` is enlarged first, so that names are readable.

    Args:
        image: (h, w, 3) uint8 RGB; not changed.
        id_map: (h, w) int, segment id of each pixel; 0 and ids without a segment stay untouched.
        segments: the segments to draw; one without a pixel is left out.
        class_names: K names, by contiguous class index.
        scores: write the score after the name.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: arrays of the wrong shape or type, or a segment whose class has no name.
    """
    _check(image, id_map, segments, class_names)
    canvas, ids = _enlarge(image, id_map)
    cell_px = max(1, max(ids.shape) // PLACEMENT_CELLS)
    coarse_ids = ids[cell_px // 2 :: cell_px, cell_px // 2 :: cell_px]
    thickness = max(2, round(max(ids.shape) / 250))
    labels, outlines = [], []
    instances_of: dict[int, int] = {}
    for segment in sorted(segments, key=lambda s: (s.isthing, -s.area)):
        mask = ids == segment.id
        area = int(np.count_nonzero(mask))
        if area == 0:
            continue
        color = class_color(segment.category_id)
        if segment.isthing:
            color = instance_color(segment.category_id, instances_of.get(segment.category_id, 0))
            instances_of[segment.category_id] = instances_of.get(segment.category_id, 0) + 1
        detection = sv.Detections(xyxy=sv.mask_to_xyxy(mask[None]).astype(float), mask=mask[None])
        strength = MASK_OPACITY / 2 if segment.isthing else MASK_OPACITY
        tint = sv.MaskAnnotator(color=sv.Color(*color), opacity=strength, color_lookup=sv.ColorLookup.INDEX)
        canvas = tint.annotate(canvas, detection)
        outlines.append((detection, color if segment.isthing else STUFF_OUTLINE, thickness if segment.isthing else 1))
        name = _shorten(class_names[segment.category_id])
        text = f"{name} {segment.score:.2f}" if scores else name
        labels.append(_Label(text, color, coarse_ids == segment.id, area))
    for detection, color, width in outlines:  # after all tints, so that no tint covers half of a neighbour's outline
        outline = sv.PolygonAnnotator(color=sv.Color(*color), thickness=width, color_lookup=sv.ColorLookup.INDEX)
        canvas = outline.annotate(canvas, detection)
    return _write_labels(canvas, labels, cell_px)


def draw_labels(
    image: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, ignore_label: int = 255
) -> np.ndarray:
    """Draws a semantic label map over its image: one segment per class.

    Args:
        image: (h, w, 3) uint8 RGB; not changed.
        labels: (h, w) int, contiguous class index of each pixel.
        class_names: K names.
        ignore_label: pixels with this value stay untouched.

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
    return draw_panoptic(image, ids, segments, class_names, scores=False)


def _check(image: np.ndarray, id_map: np.ndarray, segments: Sequence[Segment], class_names: Sequence[str]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"image must be (h, w, 3) uint8 RGB, got {image.shape} {image.dtype}")
    if id_map.shape != image.shape[:2]:
        raise InputError(f"the map is {id_map.shape} (height, width), its image {image.shape[:2]}")
    for segment in segments:
        if not 0 <= segment.category_id < len(class_names):
            raise InputError(
                f"segment {segment.id} has class {segment.category_id}, "
                f"but there are names for 0..{len(class_names) - 1}"
            )


def _enlarge(image: np.ndarray, id_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> BGR canvas (H, W, 3) uint8 and ids (H, W) int32, both enlarged by the same whole factor if small."""
    canvas = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    ids = id_map.astype(np.int32)
    factor = -(-READABLE_SIDE_PX // max(ids.shape))
    if factor <= 1:
        return canvas, ids
    height, width = (side * factor for side in ids.shape)
    canvas = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_CUBIC)
    smooth = np.zeros((height, width), np.int32)
    best = np.zeros((height, width), np.float32)
    for value in np.unique(ids):  # the id with the largest share of a pixel's surroundings: edges without stairs
        share = cv2.resize((ids == value).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        share = cv2.GaussianBlur(share, (0, 0), factor / 2)
        smooth[share > best] = value
        best = np.maximum(best, share)
    return canvas, smooth


def _write_labels(canvas: np.ndarray, labels: Sequence[_Label], cell_px: int) -> np.ndarray:
    """canvas (H, W, 3) uint8 BGR -> RGB with names."""
    height, width = canvas.shape[:2]
    size_px = max(13, round(0.7 * max(height, width) ** 0.5))
    font, padding = label_font(size_px), max(2, size_px // 5)
    image = Image.fromarray(cv2.cvtColor(canvas, cv2.COLOR_BGR2RGB))
    pen = ImageDraw.Draw(image, "RGBA")
    line_px = sum(font.getmetrics()) + padding
    taken = np.zeros_like(labels[0].mask) if labels else None
    for label in sorted(labels, key=lambda label: label.area):  # small segments have the least choice
        box = round(font.getlength(label.text)) + 2 * padding, line_px
        corner = _place(label.mask, taken, tuple(-(-side // cell_px) for side in box))
        if corner is None:
            continue
        row, column = corner
        taken[row : row + -(-box[1] // cell_px), column : column + -(-box[0] // cell_px)] = True
        left, top = column * cell_px, row * cell_px
        pen.rounded_rectangle((left, top, left + box[0], top + box[1]), radius=padding, fill=(0, 0, 0, 190))
        pen.text((left + padding, top + padding / 2), label.text, font=font, fill=_lighter(label.color))
    return np.asarray(image)


def _place(mask: np.ndarray, taken: np.ndarray, box: tuple[int, int]) -> tuple[int, int] | None:
    """Where a name stands best: as much of it inside its segment as possible, then as central as possible.

    Args:
        mask: (rows, columns) bool, the segment.
        taken: (rows, columns) bool, cells under other names.
        box: (columns, rows) of the name.

    Returns:
        (row, column) of the upper left cell; None if every place has its centre off the segment or touches another
        name.
    """
    columns, rows = box
    if rows > taken.shape[0] or columns > taken.shape[1]:
        return None
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    if depth.max() == 0:  # thinner than a cell of the grid
        return None
    inside = _box_sums(mask, rows, columns) / (rows * columns)
    free = _box_sums(taken, rows, columns) == 0
    centre = depth[rows // 2 :, columns // 2 :][: inside.shape[0], : inside.shape[1]]
    worth = np.where(free & (centre > 0), inside + 0.5 * centre / depth.max(), 0)
    row, column = np.unravel_index(np.argmax(worth), worth.shape)
    return (int(row), int(column)) if worth[row, column] > 0 else None


def _box_sums(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Number of true cells under a (rows, columns) box at every position where the box lies inside the grid."""
    total = cv2.integral(grid.astype(np.uint8))
    return total[rows:, columns:] - total[:-rows, columns:] - total[rows:, :-columns] + total[:-rows, :-columns]


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
