"""Panoptic quality by the rules of panopticapi, from id maps in memory.

Every pixel belongs to one segment of the ground truth and one of the prediction; all that counts is the joint histogram
of those two ids, taken once per image. g and p are such ids, 0 is void.

    n      pixels with ground-truth id g and predicted id p
    union  pixels of p + JSON area of g - n - pixels of p on void

The area of a ground-truth segment is what its JSON says, not a count: data sets differ there (ADE20K measures stuff
before things are pasted over it), and the published numbers depend on it. Where the JSON does not say, or says less
than the pixels of the mask, which would make an IoU above 1, it is counted.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fcclip.errors import InputError
from fcclip.evaluation.averages import mean_of_defined, seen_and_unseen
from fcclip.evaluation.ground_truth import ClassEvaluator, GroundTruth, in_order
from fcclip.evaluation.histograms import as_array, joint_histogram
from fcclip.files import listed, read_json

logger = logging.getLogger(__name__)


class ClassCounts(NamedTuple):
    """Segments of one class: matched, wrongly predicted, missed; and the sum of the IoUs of the matched ones."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou: float = 0.0


class ClassQuality(NamedTuple):
    """Panoptic, segmentation and recognition quality of one class, 0..1; NaN when it has no segment at all."""

    pq: float
    sq: float
    rq: float


def compare_segments(
    truth_map: np.ndarray,
    truth_segments: Sequence[Mapping],
    predicted_map: np.ndarray,
    predicted_segments: Sequence[Mapping],
    *,
    categories: Collection[int],
    name: str = "the image",
) -> dict[int, ClassCounts]:
    """Matches the segments of one image.

    Args:
        truth_map: (h, w) int, segment ids; 0 is void.
        truth_segments: `id, category_id` and, optional, `area` and `iscrowd` of each segment. An id of the map that is
            not listed is background.
        predicted_map: (h, w) int, segment ids below 2**24; 0 is void.
        predicted_segments: `id, category_id` of each segment; exactly the ids in the map.
        categories: the category ids a prediction may have.
        name: what errors call the image.

    Returns:
        Counts of each category that has a segment in the image, in ascending order of the category id.

    Raises:
        ValueError: maps of different size, ids in the map and in the list that differ, an unknown category.
    """
    truth = {segment["id"]: segment for segment in truth_segments}  # a repeated id: the last entry counts
    predicted = {segment["id"]: segment for segment in predicted_segments}
    _check_sizes(truth_map, predicted_map, name)
    histogram = joint_histogram(truth_map, predicted_map, what=f"{name}: predicted ids")
    g_row, p_row = _rows(histogram.first, list(truth)), _rows(histogram.second, list(predicted))
    pixels = histogram.pixels

    def pixels_per_prediction(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(p_row[chosen], pixels[chosen], len(predicted)).astype(np.int64)  # exact: far below 2**53

    area = pixels_per_prediction(p_row >= 0)
    _check_prediction(predicted, area, histogram.second[p_row < 0], categories, name)
    on_void = pixels_per_prediction((p_row >= 0) & (histogram.first == 0))

    counted = np.bincount(g_row[g_row >= 0], pixels[g_row >= 0], len(truth)).astype(np.int64)
    stated = [segment.get("area") for segment in truth.values()]
    truth_area = np.array([n if area is None else max(area, n) for area, n in zip(stated, counted.tolist())])
    small = [number for number, area, n in zip(truth, stated, counted.tolist()) if area is not None and area < n]
    if small:
        logger.warning("%s: areas of segments %s are smaller than their masks; counted instead", name, listed(small))
    crowd = np.array([segment.get("iscrowd", 0) for segment in truth.values()]) == 1
    classes, class_of = np.unique(
        [segment["category_id"] for segment in (*truth.values(), *predicted.values())], return_inverse=True
    )
    truth_class, predicted_class = class_of[: len(truth)], class_of[len(truth) :]

    both = (g_row >= 0) & (p_row >= 0)
    g, p, n = g_row[both], p_row[both], pixels[both]
    union = area[p] + truth_area[g] - n - on_void[p]
    match = ~crowd[g] & (truth_class[g] == predicted_class[p]) & (union > 0) & (2 * n > union)
    iou = n[match] / union[match]
    assert (iou <= 1).all(), f"{name}: an IoU above 1, of segment {list(truth)[g[match][iou.argmax()]]}"

    missed = ~crowd
    missed[g[match]] = False

    # A prediction that lies mostly on void or on a crowd of its own class is not wrong. Of several crowds of one class
    # the protocol knows the last.
    crowd_of_class = np.full(len(classes), -1)
    crowd_of_class[truth_class[crowd]] = np.flatnonzero(crowd)
    on_crowd = g == crowd_of_class[predicted_class[p]]
    excused = on_void + np.bincount(p[on_crowd], n[on_crowd], len(predicted)).astype(np.int64)
    wrong = 2 * excused <= area
    wrong[p[match]] = False

    tp = np.bincount(truth_class[g[match]], minlength=len(classes))
    fp = np.bincount(predicted_class[wrong], minlength=len(classes))
    fn = np.bincount(truth_class[missed], minlength=len(classes))
    iou_sum = np.bincount(truth_class[g[match]], iou, len(classes))
    columns = (column.tolist() for column in (classes, tp, fp, fn, iou_sum))
    return {category: ClassCounts(*counts) for category, *counts in zip(*columns)}


def sum_counts(images: Mapping[Hashable, Mapping[int, ClassCounts]]) -> dict[int, ClassCounts]:
    """Counts per category over all images, added in the order of the image ids whatever the order they came in."""
    total: dict[int, ClassCounts] = {}
    for image_id in in_order(images):
        for category, counts in images[image_id].items():
            before = total.get(category, ClassCounts())
            total[category] = ClassCounts(*(sum(pair) for pair in zip(before, counts)))
    return total


def class_quality(counts: ClassCounts) -> ClassQuality:
    """The three qualities of one class.

    Example:
        >>> class_quality(ClassCounts(tp=2, fp=1, fn=1, iou=1.5))
        ClassQuality(pq=0.5, sq=0.75, rq=0.6666666666666666)
    """
    if counts.tp + counts.fp + counts.fn == 0:
        return ClassQuality(math.nan, math.nan, math.nan)
    segments = counts.tp + 0.5 * counts.fp + 0.5 * counts.fn
    return ClassQuality(
        pq=counts.iou / segments, sq=counts.iou / counts.tp if counts.tp else 0.0, rq=counts.tp / segments
    )


def read_panoptic_file(path: str | os.PathLike, folder: str | os.PathLike | None = None) -> tuple[dict, Path]:
    """The content of a COCO panoptic JSON, and the folder of its id PNGs: the path without `.json` if not given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no `annotations`, or one of them lacks an entry.
    """
    content = read_json(path, what="panoptic file")
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise InputError(f"panoptic file '{path}' has no 'annotations'; expected the COCO panoptic format")
    for number, annotation in enumerate(content["annotations"]):
        lacking = {"image_id", "file_name", "segments_info"} - annotation.keys()
        if lacking:
            raise InputError(f"panoptic file '{path}': annotation {number} has no {', '.join(sorted(lacking))}")
    return content, Path(path).with_suffix("") if folder is None else Path(folder)


class PanopticEvaluator(ClassEvaluator):
    """Panoptic quality of id maps.

    Keeps counts per image, so several processes merge to exactly what one would have found.

    Args:
        class_names, seen: as for `ClassEvaluator`.
        thing_classes: contiguous indices of the countable ones.
    """

    def __init__(
        self, *, class_names: Sequence[str], thing_classes: Iterable[int], seen: Sequence[bool] | None = None
    ) -> None:
        self.thing_classes = frozenset(thing_classes)
        super().__init__(class_names=class_names, classes=self.thing_classes, seen=seen)

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> dict[int, ClassCounts]:
        predicted_map, segments = output["panoptic_seg"]
        return compare_segments(
            ground_truth.id_map,
            ground_truth.segments,
            as_array(predicted_map),
            segments,
            categories=range(len(self.class_names)),
            name=f"image {ground_truth.image_id!r}",
        )

    @property
    def per_image(self) -> dict[Hashable, float]:
        """Image id -> PQ of the image alone: the mean over the classes in its ground truth or prediction."""
        return {
            image_id: 100 * mean_of_defined(class_quality(counts).pq for counts in classes.values())
            for image_id, classes in self.images.items()
        }

    def results(self) -> dict[str, dict[str, float]]:
        total = sum_counts(self.images)
        quality = [class_quality(total.get(index, ClassCounts())) for index in range(len(self.class_names))]
        is_thing = [index in self.thing_classes for index in range(len(quality))]
        groups = {
            "": _group(quality),
            "_th": _group(of_class for of_class, thing in zip(quality, is_thing) if thing),
            "_st": _group(of_class for of_class, thing in zip(quality, is_thing) if not thing),
        }
        keys = {"PQ": "pq", "SQ": "sq", "RQ": "rq"}
        metrics = {
            f"{name}{suffix}": 100 * group[key] for suffix, group in groups.items() for name, key in keys.items()
        }
        for name, key in keys.items():
            metrics |= seen_and_unseen(name, [100 * getattr(of_class, key) for of_class in quality], self.seen)
        metrics |= {f"PQ-{name}": 100 * of_class.pq for name, of_class in zip(self.class_names, quality)}
        return {"panoptic_seg": metrics}


def write_id_map(path: str | os.PathLike, ids: np.ndarray) -> None:
    """Writes (h, w) ids below 2**24 as a COCO panoptic PNG: id = R + 256 G + 65536 B."""
    planes = np.ascontiguousarray(ids, dtype="<u4").view(np.uint8).reshape(*ids.shape, 4)
    Image.fromarray(np.ascontiguousarray(planes[..., :3])).save(path)


def _rows(ids: np.ndarray, known: Sequence[int]) -> np.ndarray:
    """Position of each id in `known`, -1 where it is not there."""
    if not known:
        return np.full(len(ids), -1)
    known = np.asarray(known)
    order = np.argsort(known)
    row = order[np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[row] == ids, row, -1)


def _check_prediction(
    segments: Mapping[int, Mapping], area: np.ndarray, unlisted: np.ndarray, categories: Collection[int], name: str
) -> None:
    unlisted = sorted(set(unlisted.tolist()) - {0})
    if unlisted:
        raise InputError(f"{name}: ids {listed(unlisted)} are in the predicted map but not in its segments_info")
    absent = [identifier for identifier, pixels in zip(segments, area.tolist()) if pixels == 0]
    if absent:
        raise InputError(
            f"{name}: ids {listed(absent)} are in the prediction's segments_info but not in its map; remove them"
        )
    unknown = sorted({segment["category_id"] for segment in segments.values()} - set(categories))
    if unknown:
        raise InputError(f"{name}: predicted category ids {listed(unknown)} are not among the data set's categories")


def _group(quality: Iterable[ClassQuality]) -> dict[str, float]:
    averaged = [of_class for of_class in quality if not math.isnan(of_class.pq)]
    return {key: mean_of_defined(getattr(of_class, key) for of_class in averaged) for key in ClassQuality._fields}


def _check_sizes(truth_map: np.ndarray, predicted_map: np.ndarray, name: str) -> None:
    if truth_map.ndim != 2 or truth_map.shape != predicted_map.shape or not truth_map.size:
        raise InputError(
            f"{name}: the prediction is {_size(predicted_map)} (height x width), the ground truth {_size(truth_map)}; "
            "predict at the size of the ground truth"
        )


def _size(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape))
