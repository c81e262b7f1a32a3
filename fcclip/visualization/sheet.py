"""Images next to each other: image, ground truth, prediction."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

from fcclip.errors import InputError
from fcclip.visualization.draw import label_font

GAP_PX = 8
PAPER = (255, 255, 255)


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], *, titles: Sequence[str] = ()) -> np.ndarray:
    """A table of images on white paper.

    Images are scaled to the width of the widest; a row is as high as its highest image.

    Args:
        rows: rows of the same length, each a list of (h, w, 3) uint8 RGB arrays.
        titles: one title per column, or none.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: no image, rows of different length, or a number of titles that is not the number of columns.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or 0 in lengths:
        raise InputError(f"rows of a sheet must have the same number of images, at least one, got {sorted(lengths)}")
    (columns,) = lengths
    if titles and len(titles) != columns:
        raise InputError(f"{len(titles)} titles for {columns} columns")
    width = max(image.shape[1] for row in rows for image in row)
    scaled = [[_to_width(image, width) for image in row] for row in rows]
    size_px = max(14, width // 32)
    head_px = round(1.8 * size_px) if titles else 0
    heights = [max(image.shape[0] for image in row) for row in scaled]
    sheet = Image.new(
        "RGB", (columns * (width + GAP_PX) + GAP_PX, head_px + sum(heights) + GAP_PX * (len(rows) + 1)), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        centre = GAP_PX + column * (width + GAP_PX) + width // 2
        pen.text((centre, GAP_PX + head_px // 2), title, font=label_font(size_px), fill=(0, 0, 0), anchor="mm")
    top = head_px + GAP_PX
    for row, height in zip(scaled, heights):
        for column, image in enumerate(row):
            sheet.paste(Image.fromarray(image), (GAP_PX + column * (width + GAP_PX), top))
        top += height + GAP_PX
    return np.asarray(sheet)


def _to_width(image: np.ndarray, width: int) -> np.ndarray:
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    if image.shape[1] == width:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
