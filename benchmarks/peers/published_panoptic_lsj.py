"""The published training mapper `coco_panoptic_lsj`, step by step and in its order.

What `tools/benchmark.py mapper` measures ours against. Each step does what the published one does, on what it does it
on: the flip and the enlarged image are whole arrays, the id PNG goes through the same geometry as three channels and
is decoded to ids at the size of the canvas, and every segment gets a mask of its own and a tight box, which no loss
reads. Written from the published behaviour; imports nothing of fcclip, so that it can disagree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

PADDING = {"image": 128, "ids": 255}


def map_record(record: dict, rng: np.random.RandomState | np.random.Generator, *, size: int = 1024) -> dict[str, Any]:
    """One training sample of a panoptic record.

    Args:
        record: `file_name`, `pan_seg_file_name` and `segments_info` with contiguous classes.
        rng: draws flip, scale and crop offset, in this order.
        size: side of the canvas, pixels.

    Returns:
        `image` (3, size, size) uint8, `gt_classes` (n,) int64, `gt_masks` (n, size, size) bool, `gt_boxes` (n, 4)
        float32 XYXY, and the original `height` and `width`.
    """
    image = read_rgb(record["file_name"])
    height, width = image.shape[:2]
    flip = rng.uniform(0.0, 1.0) < 0.5
    target = size * rng.uniform(0.1, 2.0)
    ratio = min(target / height, target / width)
    new_height, new_width = int(np.round(height * ratio)), int(np.round(width * ratio))
    offset = rng.uniform(0.0, 1.0)
    top, left = (int(np.round(offset * max(side - size, 0))) for side in (new_height, new_width))

    def transformed(array: np.ndarray, resample: Image.Resampling, padding: int) -> np.ndarray:
        array = np.flip(array, axis=1) if flip else array
        array = np.asarray(Image.fromarray(array).resize((new_width, new_height), resample))
        array = array[top : top + size, left : left + size]
        missing = [(0, size - array.shape[0]), (0, size - array.shape[1]), (0, 0)]
        return np.pad(array, missing, mode="constant", constant_values=padding)

    image = transformed(image, Image.Resampling.BILINEAR, PADDING["image"])
    image = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))

    colours = transformed(read_rgb(record["pan_seg_file_name"]), Image.Resampling.NEAREST, PADDING["ids"])
    colours = colours.astype(np.int32)
    ids = colours[:, :, 0] + 256 * colours[:, :, 1] + 256 * 256 * colours[:, :, 2]
    classes, masks = [], []
    for segment in record["segments_info"]:
        if not segment["iscrowd"]:
            classes.append(segment["category_id"])
            masks.append(ids == segment["id"])
    if masks:
        gt_masks = torch.stack([torch.from_numpy(np.ascontiguousarray(mask)) for mask in masks])
        gt_boxes = tight_boxes(gt_masks)
    else:
        gt_masks, gt_boxes = torch.zeros((0, size, size)), torch.zeros((0, 4))
    return {
        "image": image,
        "gt_classes": torch.tensor(classes, dtype=torch.int64),
        "gt_masks": gt_masks,
        "gt_boxes": gt_boxes,
        "height": height,
        "width": width,
    }


def read_rgb(path: str) -> np.ndarray:
    """(H, W, 3) uint8, upright."""
    with open(path, "rb") as file, Image.open(file) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def tight_boxes(masks: torch.Tensor) -> torch.Tensor:
    """(n, 4) float32 XYXY of (n, H, W) bool, mask after mask; zeros for an empty one."""
    boxes = torch.zeros(len(masks), 4)
    columns, rows = masks.any(dim=1), masks.any(dim=2)
    for index in range(len(masks)):
        x, y = torch.where(columns[index])[0], torch.where(rows[index])[0]
        if len(x) and len(y):
            boxes[index] = torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1], dtype=torch.float32)
    return boxes
