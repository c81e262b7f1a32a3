"""PASCAL-5^i and COCO-20^i: pairs of an image and one of its classes, mIoU and FB-IoU (HSNet's rules); and beside it
all novel classes of a fold at once.

Of a pair the model is told which class is there; the question is which pixels are of it. That is no segmentation among
several classes, and says nothing of images without the class.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fcclip.evaluation.averages import mean_of_defined
from fcclip.evaluation.ground_truth import ClassEvaluator, GroundTruth
from fcclip.evaluation.histograms import JointHistogram
from fcclip.evaluation.semantic import SemanticEvaluator, percent


class Areas(NamedTuple):
    """Pixels of a pair, [background, foreground] each; none where the class has no pixel, and the pair is skipped."""

    category: int
    intersection: tuple[int, int] = (0, 0)
    union: tuple[int, int] = (0, 0)


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
        predicted = torch.as_tensor(output["panoptic_seg"][0]).cpu().numpy() > 0
        truth, ignored = mask == record["mask_value"], mask == self.ignore_label
        return pair_areas(predicted, truth, ignored, category=record["category_id"])

    @property
    def per_image(self) -> dict[Hashable, float]:
        """Image id -> IoU of the foreground."""
        return {key: percent(areas.intersection[1], areas.union[1]) for key, areas in self.images.items()}

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Intersection and union (2, K) int64 by class; row 0 is the background, row 1 the foreground."""
        intersection, union = np.zeros((2, 2, len(self.class_names)), np.int64)
        for areas in self.images.values():
            intersection[:, areas.category] += areas.intersection
            union[:, areas.category] += areas.union
        return intersection, union

    def results(self) -> dict[str, dict[str, float]]:
        intersection, union = self.sums()
        ious = [percent(*areas) for areas in zip(intersection[1].tolist(), union[1].tolist())]
        both = [percent(*areas) for areas in zip(intersection.sum(1).tolist(), union.sum(1).tolist())]
        skipped = sum(areas.union == (0, 0) for areas in self.images.values())
        scores = {"mIoU": mean_of_defined(ious), "FB_IoU": sum(both) / 2}
        counts = {"pairs": float(len(self.images) - skipped), "skipped": float(skipped)}
        return {"pairs": {**scores, **counts, **{f"IoU-{name}": iou for name, iou in zip(self.class_names, ious)}}}


def pair_areas(predicted: np.ndarray, truth: np.ndarray, ignored: np.ndarray, *, category: int) -> Areas:
    """What counts of a pair.

    Args:
        predicted, truth, ignored: (h, w) bool.
        category: of the class.
    """
    if not truth.any():
        return Areas(category)
    counted, right = ~ignored, predicted == truth
    hits = tuple(int((counted & right & (truth == side)).sum()) for side in (False, True))
    wrong = int((counted & ~right).sum())
    return Areas(category, hits, (hits[0] + wrong, hits[1] + wrong))


class NovelClassesEvaluator(SemanticEvaluator):
    """All novel classes of a fold prompted for every image at once, which training with pairs never shows; a pixel
    belongs to the segment of the panoptic map, and without one to the background, as pixels of base classes do.

    Args:
        class_names: of the novel classes.
        ignore_label: of the masks.
    """

    def __init__(self, *, class_names: Sequence[str], ignore_label: int = 255) -> None:
        super().__init__(class_names=["background", *class_names], ignore_label=ignore_label)

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> JointHistogram:
        ids, segments = output["panoptic_seg"]
        predicted = np.zeros(1 + max((segment["id"] for segment in segments), default=0), np.int64)
        for segment in segments:
            predicted[segment["id"]] = segment["category_id"] + 1
        true = np.zeros(256, np.int64)
        true[self.ignore_label] = self.ignore_label
        true[ground_truth.record["mask_values"]] = range(1, len(self.class_names))
        labels = true[np.asarray(ground_truth.labels)]
        return self.count(labels, predicted[torch.as_tensor(ids).cpu().numpy()], name=ground_truth.label_source)

    def results(self) -> dict[str, dict[str, float]]:
        metrics = super().results()["sem_seg"]
        ious = {f"IoU-{name}": metrics[f"IoU-{name}"] for name in self.class_names}
        novel = list(ious.values())[1:]
        return {"novel_classes": {"mIoU": mean_of_defined(novel), "mIoU_background": metrics["mIoU"], **ious}}
