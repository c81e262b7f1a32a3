"""Pairs of an image and one of its classes: mIoU and FB-IoU of PASCAL-5^i and COCO-20^i (HSNet's rules).

The model is told which class is there; the question is which pixels are of it. This is no segmentation among several
classes, and says nothing of images without the class.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fcclip.evaluation.averages import mean_of_defined
from fcclip.evaluation.ground_truth import ClassEvaluator, GroundTruth


class Areas(NamedTuple):
    """Pixels of a pair. [background, foreground] each; none where the class has no pixel."""

    category: int
    intersection: tuple[int, int]
    union: tuple[int, int]
    is_skipped: bool = False


class PairEvaluator(ClassEvaluator):
    """Sums intersections and unions of foreground and background over all pairs of a class, and only then divides.

    A pixel is foreground where the panoptic map has a segment. Ignored pixels are in no area. A pair whose class has no
    pixel is skipped, and counted.

    Args:
        class_names: as for `ClassEvaluator`.
        ignore_label: of the masks.
    """

    def __init__(self, *, class_names: Sequence[str], ignore_label: int = 255) -> None:
        super().__init__(class_names=class_names)
        self.ignore_label = ignore_label

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> Areas:
        record, mask = ground_truth.record, np.asarray(ground_truth.labels)
        return pair_areas(
            torch.as_tensor(output["panoptic_seg"][0]).cpu().numpy() > 0,
            mask == record["mask_value"],
            mask == self.ignore_label,
            category=record["category_id"],
        )

    @property
    def per_image(self) -> dict[Hashable, float]:
        """Image id -> IoU of the foreground."""
        return {key: _percent(areas.intersection[1], areas.union[1]) for key, areas in self.images.items()}

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Intersection and union (2, K) int64 by class; row 0 is the background, row 1 the foreground."""
        intersection, union = np.zeros((2, 2, len(self.class_names)), np.int64)
        for areas in self.images.values():
            intersection[:, areas.category] += areas.intersection
            union[:, areas.category] += areas.union
        return intersection, union

    def results(self) -> dict[str, dict[str, float]]:
        intersection, union = self.sums()
        ious = [_percent(*areas) for areas in zip(intersection[1].tolist(), union[1].tolist())]
        both = [_percent(int(hits), int(area)) for hits, area in zip(intersection.sum(1), union.sum(1))]
        skipped = sum(areas.is_skipped for areas in self.images.values())
        return {
            "pairs": {
                "mIoU": mean_of_defined(ious),
                "FB_IoU": sum(both) / 2,
                "pairs": float(len(self.images) - skipped),
                "skipped": float(skipped),
                **{f"IoU-{name}": iou for name, iou in zip(self.class_names, ious)},
            }
        }


def pair_areas(predicted: np.ndarray, truth: np.ndarray, ignored: np.ndarray, *, category: int) -> Areas:
    """What counts of a pair.

    Args:
        predicted, truth, ignored: (h, w) bool.
        category: of the class.
    """
    if not truth.any():
        return Areas(category, (0, 0), (0, 0), is_skipped=True)
    counted, right = ~ignored, predicted == truth
    hits = tuple(int((counted & right & (truth == side)).sum()) for side in (False, True))
    wrong = int((counted & ~right).sum())
    return Areas(category, hits, (hits[0] + wrong, hits[1] + wrong))


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else math.nan
