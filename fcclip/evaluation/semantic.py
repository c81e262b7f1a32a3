"""Semantic segmentation: one confusion matrix, and the scores of both mIoU rules in use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fcclip.evaluation.averages import mean_of_defined, seen_and_unseen
from fcclip.evaluation.pictures import Evaluator, Picture


class SemanticEvaluator(Evaluator):
    """Counts pixels by true and predicted class, on the device of the predictions.

    `mIoU` is the mean over the classes with ground truth, `mIoU_union` over the classes with ground truth or
    predictions, where a class without ground truth counts as 0. Published tables use the first since 2022 and the
    second before; they differ where a data set has classes that none of its pictures show. Predictions on ignored
    pixels never count.

    Args:
        class_names: name of each of the K classes, by index.
        ignore_label: value of ground-truth pixels that do not count.
        seen: (K,) whether training knew the class; None when unknown.
    """

    def __init__(
        self, *, class_names: Sequence[str], ignore_label: int = 255, seen: Sequence[bool] | None = None
    ) -> None:
        self.class_names = tuple(class_names)
        self.ignore_label = ignore_label
        self.seen = None if seen is None else tuple(seen)
        num_classes = len(self.class_names)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # [true class, predicted class]

    def add(self, truth: Tensor | np.ndarray, predicted: Tensor, *, name: str = "the picture") -> None:
        """Counts one picture.

        Args:
            truth: (h, w) int, class of each pixel or `ignore_label`.
            predicted: (h, w) int, class of each pixel.
            name: what errors call the ground truth.

        Raises:
            ValueError: sizes that differ, a value that is no class.
        """
        num_classes = len(self.class_names)
        if truth.shape != predicted.shape or predicted.ndim != 2:
            raise ValueError(
                f"{name}: the prediction has shape {tuple(predicted.shape)}, the ground truth {tuple(truth.shape)}; "
                "expected the same (height, width)"
            )
        # NumPy's unsigned 16 bit is not a torch type that can be compared.
        truth = torch.as_tensor(truth.astype(np.int64) if isinstance(truth, np.ndarray) else truth)
        truth = truth.to(predicted.device, torch.int64)
        ignored = truth == self.ignore_label
        for labels, what in ((truth.masked_fill(ignored, 0), "ground-truth class"), (predicted, "predicted class")):
            lowest, highest = labels.aminmax()
            if lowest < 0 or highest >= num_classes:
                wrong = lowest if lowest < 0 else highest
                advice = (
                    f" If {wrong} means unlabelled, set ignore_label: {wrong}." if what.startswith("ground") else ""
                )
                raise ValueError(
                    f"{name}: {what} {wrong} is not one of the {num_classes} classes (0..{num_classes - 1}, ignore "
                    f"{self.ignore_label}).{advice}"
                )
        cell = truth.masked_fill(ignored, num_classes) * num_classes + predicted
        counts = torch.bincount(cell.flatten(), minlength=(num_classes + 1) * num_classes)
        self.confusion = self.confusion.to(predicted.device)
        self.confusion += counts[: num_classes * num_classes].view(num_classes, num_classes)

    def process(self, picture: Picture, output: Mapping) -> None:
        self.add(picture.labels, output["sem_seg"], name=picture.record["sem_seg_file_name"])

    def state(self) -> Tensor:
        return self.confusion.cpu()

    def merge(self, state: Tensor) -> None:
        self.confusion = self.confusion.cpu() + state

    def results(self) -> dict[str, dict[str, float]]:
        confusion = self.confusion.cpu().numpy()
        hits, true, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        union = true + predicted - hits
        iou = _percent(hits, np.where(true > 0, union, 0))  # NaN for a class without ground truth
        iou_union = _percent(hits, union)  # 0 for one that is only predicted
        accuracy = _percent(hits, true)
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


def _percent(part: np.ndarray, whole: np.ndarray) -> list[float]:
    return [100 * some / every if every else math.nan for some, every in zip(part.tolist(), whole.tolist())]
