"""Semantic segmentation: one confusion matrix, and the scores of both mIoU rules in use."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fcclip.errors import InputError
from fcclip.evaluation.averages import mean_of_defined, seen_and_unseen
from fcclip.evaluation.ground_truth import ClassEvaluator, GroundTruth
from fcclip.evaluation.histograms import JointHistogram, as_array, joint_histogram


class SemanticEvaluator(ClassEvaluator):
    """Counts pixels by true and predicted class, on the device of the predictions; only the counts leave it.

    `mIoU` is the mean over the classes with ground truth, `mIoU_union` over the classes with ground truth or
    predictions, where a class without ground truth counts as 0. Published tables use the first since 2022 and the
    second before; they differ where a data set has classes that none of its images show. Predictions on ignored
    pixels never count. Where nothing is predicted (class K) the true class is missed, and no other is blamed.

    Args:
        class_names, seen: as for `ClassEvaluator`.
        ignore_label: value of ground-truth pixels that do not count.
    """

    def __init__(
        self, *, class_names: Sequence[str], ignore_label: int = 255, seen: Sequence[bool] | None = None
    ) -> None:
        super().__init__(class_names=class_names, seen=seen)  # which keeps the mIoU of each image alone
        self.ignore_label = ignore_label
        num_classes = len(self.class_names)
        self.confusion = np.zeros((num_classes, num_classes), np.int64)  # [true class, predicted class]
        self.gap_pixels = np.zeros(num_classes, np.int64)  # [true class], where nothing is predicted

    def count(self, truth: Tensor | np.ndarray, predicted: Tensor | np.ndarray, *, name: str) -> JointHistogram:
        """Pixels of an image by (true class, predicted class), without the ignored ones.

        Args:
            truth: (h, w) int, class of each pixel or `ignore_label`.
            predicted: (h, w) int, class of each pixel; K where nothing is predicted.
            name: what errors call the ground truth.

        Raises:
            ValueError: sizes that differ, a value that is not a class.
        """
        self.check(truth, predicted, name=name)
        if isinstance(predicted, Tensor) and predicted.is_cuda:
            histogram = _histogram_on_device(truth, predicted)
        else:
            histogram = joint_histogram(as_array(truth), as_array(predicted))
        counted = histogram.first != self.ignore_label
        histogram = JointHistogram(*(column[counted] for column in histogram))
        strange = histogram.first[(histogram.first < 0) | (histogram.first >= len(self.class_names))]
        if strange.size:
            advice = f". If {strange[-1]} means unlabelled, set ignore_label: {strange[-1]}."
            self._refuse(f"{name}: ground-truth class {strange[-1]}", advice)
        return histogram

    def check(self, truth: Tensor | np.ndarray, predicted: Tensor | np.ndarray, *, name: str) -> None:
        """Refuses a prediction of another size than the ground truth, or with a value that is not a class."""
        if truth.shape != predicted.shape or predicted.ndim != 2 or 0 in predicted.shape:
            raise InputError(
                f"{name}: the prediction has shape {tuple(predicted.shape)}, the ground truth {tuple(truth.shape)}; "
                "expected the same (height, width)"
            )
        lowest, highest = int(predicted.min()), int(predicted.max())
        if lowest < 0 or highest > len(self.class_names):
            self._refuse(f"{name}: predicted class {lowest if lowest < 0 else highest}")

    def _refuse(self, what: str, advice: str = "") -> NoReturn:
        num_classes = len(self.class_names)
        raise InputError(
            f"{what} is not one of the {num_classes} classes (0..{num_classes - 1}, ignore {self.ignore_label}){advice}"
        )

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> JointHistogram:
        return self.count(ground_truth.labels, output["sem_seg"], name=ground_truth.label_source)

    def keep(self, image_id: int | str, measured: JointHistogram) -> None:
        super().keep(image_id, _mean_iou(measured))
        gap = measured.second == len(self.class_names)
        self.gap_pixels[measured.first[gap]] += measured.pixels[gap]  # every pair stands once in a histogram
        self.confusion[measured.first[~gap], measured.second[~gap]] += measured.pixels[~gap]

    @property
    def per_image(self) -> dict[Hashable, float]:
        """Image id -> mIoU of the image alone, over the classes in its ground truth."""
        return self.images

    def state(self) -> tuple[dict[Hashable, float], np.ndarray, np.ndarray]:
        return self.images, self.confusion, self.gap_pixels

    def merge(self, state: tuple[Mapping[Hashable, float], np.ndarray, np.ndarray]) -> None:
        mean_ious, confusion, gap_pixels = state
        super().merge(mean_ious)
        self.confusion += confusion
        self.gap_pixels += gap_pixels

    def results(self) -> dict[str, dict[str, float]]:
        confusion = self.confusion
        hits, predicted = confusion.diagonal(), confusion.sum(axis=0)
        true = confusion.sum(axis=1) + self.gap_pixels
        union = true + predicted - hits
        iou = _percents(hits, np.where(true > 0, union, 0))  # NaN for a class without ground truth
        iou_union = _percents(hits, union)  # 0 for one that is only predicted
        accuracy = _percents(hits, true)
        total = int(true.sum())
        weighted = [value * count / total for value, count in zip(iou, true.tolist()) if count]
        metrics = {
            "mIoU": mean_of_defined(iou),
            "mIoU_union": mean_of_defined(iou_union),
            "fwIoU": math.fsum(weighted) if total else math.nan,
            "mACC": mean_of_defined(accuracy),
            "pACC": 100 * int(hits.sum()) / total if total else math.nan,
        }
        metrics |= seen_and_unseen("mIoU", iou, self.seen)
        metrics |= seen_and_unseen("mIoU_union", iou_union, self.seen)
        metrics |= {f"IoU-{name}": value for name, value in zip(self.class_names, iou)}
        metrics |= {f"ACC-{name}": value for name, value in zip(self.class_names, accuracy)}
        return {"sem_seg": metrics}


def percent(part: int, whole: int) -> float:
    """NaN of nothing."""
    return 100 * part / whole if whole else math.nan


def _percents(part: np.ndarray, whole: np.ndarray) -> list[float]:
    return [percent(*both) for both in zip(part.tolist(), whole.tolist())]


def _histogram_on_device(truth: Tensor | np.ndarray, predicted: Tensor) -> JointHistogram:
    """`joint_histogram` of a prediction on a GPU."""
    truth = torch.as_tensor(truth.astype(np.int64) if isinstance(truth, np.ndarray) else truth)
    pair = truth.to(predicted.device, torch.int64) << 24 | predicted.to(torch.int64)
    pair, pixels = pair.unique(return_counts=True)
    pair = pair.cpu().numpy()
    return JointHistogram(pair >> 24, pair & ((1 << 24) - 1), pixels.cpu().numpy())


def _mean_iou(histogram: JointHistogram) -> float:
    true, predicted, hits = ({} for _ in range(3))
    for g, p, pixels in zip(*(column.tolist() for column in histogram)):
        true[g] = true.get(g, 0) + pixels
        predicted[p] = predicted.get(p, 0) + pixels
        if g == p:
            hits[g] = pixels
    return mean_of_defined(
        100 * hits.get(g, 0) / (count + predicted.get(g, 0) - hits.get(g, 0)) for g, count in true.items()
    )
