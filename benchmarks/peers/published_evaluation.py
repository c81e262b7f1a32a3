"""The published evaluation of panoptic maps, semantic maps and instances, step by step and in its order.

What `tools/benchmark.py evaluation` measures ours against. Each function does what the published one does, on what it
does it on: panoptic predictions become PNGs and are read back, segments are matched in loops over pairs of ids; classes
are chosen from the scores of all of them at every pixel, and each class found is also stored as a run-length code;
every instance mask is encoded on its own. Written from the published behaviour; imports nothing of fcclip, so that it
can disagree.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pycocotools.mask
import torch
from PIL import Image

_PAIR = 256**3  # above every segment id


# ---- panoptic quality ----


class PanopticCounts:
    """Per category: matched, wrongly predicted and missed segments, and the sum of the IoUs of the matched ones."""

    def __init__(self) -> None:
        self.iou: dict[int, float] = defaultdict(float)
        self.tp: dict[int, int] = defaultdict(int)
        self.fp: dict[int, int] = defaultdict(int)
        self.fn: dict[int, int] = defaultdict(int)


def encode_panoptic(id_map: torch.Tensor) -> bytes:
    """The PNG of a predicted id map, as it is kept until all images are done."""
    ids = id_map.cpu().numpy().copy()
    colours = np.zeros((*ids.shape, 3), dtype=np.uint8)
    for channel in range(3):
        colours[..., channel] = ids % 256
        ids //= 256
    with io.BytesIO() as out:
        Image.fromarray(colours).save(out, format="PNG")
        return out.getvalue()


def decode_panoptic(file: str | io.BytesIO) -> np.ndarray:
    """(h, w) uint32 ids of a panoptic PNG."""
    colours = np.array(Image.open(file), dtype=np.uint32)
    return colours[:, :, 0] + 256 * colours[:, :, 1] + 256 * 256 * colours[:, :, 2]


def compare_panoptic(
    truth_file: str,
    truth_segments: Sequence[Mapping],
    predicted_png: bytes,
    predicted_segments: Sequence[Mapping],
    counts: PanopticCounts,
) -> None:
    """Adds one image to the counts."""
    truth_map, predicted_map = decode_panoptic(truth_file), decode_panoptic(io.BytesIO(predicted_png))
    truth = {segment["id"]: segment for segment in truth_segments}
    predicted = {segment["id"]: dict(segment) for segment in predicted_segments}
    missing = set(predicted)
    for segment_id, area in zip(*np.unique(predicted_map, return_counts=True)):
        if segment_id not in predicted:
            if segment_id == 0:
                continue
            raise KeyError(f"segment {segment_id} is in the PNG and not in the JSON")
        predicted[segment_id]["area"] = area
        missing.remove(segment_id)
    if missing:
        raise KeyError(f"segments {missing} are in the JSON and not in the PNG")

    pairs = truth_map.astype(np.uint64) * _PAIR + predicted_map.astype(np.uint64)
    pixels = {}
    for pair, count in zip(*np.unique(pairs, return_counts=True)):
        pixels[int(pair) // _PAIR, int(pair) % _PAIR] = int(count)

    matched_truth, matched_predicted = set(), set()
    for (g, p), common in pixels.items():
        if g not in truth or p not in predicted or truth[g]["iscrowd"] == 1:
            continue
        if truth[g]["category_id"] != predicted[p]["category_id"]:
            continue
        union = predicted[p]["area"] + truth[g]["area"] - common - pixels.get((0, p), 0)
        iou = common / union
        if iou > 0.5:
            counts.tp[truth[g]["category_id"]] += 1
            counts.iou[truth[g]["category_id"]] += iou
            matched_truth.add(g)
            matched_predicted.add(p)

    crowd_of_category = {}
    for g, segment in truth.items():
        if g in matched_truth:
            continue
        if segment["iscrowd"] == 1:
            crowd_of_category[segment["category_id"]] = g
            continue
        counts.fn[segment["category_id"]] += 1
    for p, segment in predicted.items():
        if p in matched_predicted:
            continue
        excused = pixels.get((0, p), 0)
        if segment["category_id"] in crowd_of_category:
            excused += pixels.get((crowd_of_category[segment["category_id"]], p), 0)
        if excused / segment["area"] > 0.5:
            continue
        counts.fp[segment["category_id"]] += 1


# ---- semantic ----


class SemanticCounts:
    """Pixels by (predicted class, true class), the last of each being "ignored"; and the stored predictions."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
        self.predictions: list[dict] = []


def compare_semantic(scores: torch.Tensor, truth_file: str, ignore_label: int, counts: SemanticCounts) -> None:
    """Adds one image to the counts; scores are (classes, h, w)."""
    predicted = np.array(scores.argmax(dim=0).to("cpu"), dtype=int)
    truth = np.array(Image.open(truth_file), dtype=int)
    truth[truth == ignore_label] = counts.num_classes
    side = counts.num_classes + 1
    counts.confusion += np.bincount(
        side * predicted.reshape(-1) + truth.reshape(-1), minlength=counts.confusion.size
    ).reshape(side, side)
    for label in np.unique(predicted):
        mask = (predicted == label).astype(np.uint8)
        code = pycocotools.mask.encode(np.array(mask[:, :, None], order="F"))[0]
        code["counts"] = code["counts"].decode("utf-8")
        counts.predictions.append({"file_name": truth_file, "category_id": int(label), "segmentation": code})


# ---- instances ----


def encode_instances(masks: torch.Tensor) -> list[dict]:
    """Run-length codes of (n, h, w) masks, one after the other."""
    codes = [pycocotools.mask.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0] for mask in masks.cpu()]
    for code in codes:
        code["counts"] = code["counts"].decode("utf-8")
    return codes
