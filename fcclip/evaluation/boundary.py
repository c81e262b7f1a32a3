"""Boundary IoU of semantic maps, for each class alone (Cheng et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from fcclip.evaluation.averages import mean_of_defined
from fcclip.evaluation.ground_truth import ClassEvaluator, GroundTruth
from fcclip.evaluation.histograms import as_array

_SHARE = 0.02  # width of a boundary as a share of the diagonal of its image


class BoundaryEvaluator(ClassEvaluator):
    """IoU of the pixels of a class that lie near its edge or the edge of the image, and the lower of it and the IoU.

    Results have detectron2's names, `BoundaryIoU-<class>` and `min(IoU, B-Iou)-<class>`, but other numbers: detectron2
    erodes label values, which means something for two classes only. A boundary is here what an erosion by 3 x 3, as
    many times as 2 % of the diagonal has pixels, takes off the mask of a class. Predictions on ignored pixels never
    count.

    Args:
        class_names: as for `ClassEvaluator`.
        ignore_label: value of ground-truth pixels that do not count.
    """

    def __init__(self, *, class_names: Sequence[str], ignore_label: int = 255) -> None:
        super().__init__(class_names=class_names)
        self.ignore_label = ignore_label

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> dict[int, np.ndarray]:
        """Class -> pixels in both masks, in either, in both boundaries, in either; of the classes that are there."""
        truth, predicted = as_array(ground_truth.labels), as_array(output["sem_seg"])
        counted = truth != self.ignore_label
        present = np.union1d(truth[counted], predicted[counted])
        measured = {}
        for index in present[present < len(self.class_names)].tolist():
            masks = [labels == index for labels in (truth, predicted)]
            pairs = [masks, [_boundary(mask) for mask in masks]]
            sums = [((a & b & counted).sum(), ((a | b) & counted).sum()) for a, b in pairs]
            measured[index] = np.array(sums, np.int64).ravel()
        return measured

    def results(self) -> dict[str, dict[str, float]]:
        sums = np.zeros((len(self.class_names), 4), np.int64)
        for measured in self.images.values():
            for index, counts in measured.items():
                sums[index] += counts
        with np.errstate(invalid="ignore"):
            iou, boundary_iou = 100 * sums[:, 0] / sums[:, 1], 100 * sums[:, 2] / sums[:, 3]
        metrics = {"mBoundaryIoU": mean_of_defined(boundary_iou.tolist())}
        for name, of_mask, of_boundary in zip(self.class_names, iou.tolist(), boundary_iou.tolist()):
            metrics[f"BoundaryIoU-{name}"] = of_boundary
            metrics[f"min(IoU, B-Iou)-{name}"] = min(of_mask, of_boundary)
        return {"boundary": metrics}


def _boundary(mask: np.ndarray) -> np.ndarray:
    """(h, w) bool -> the pixels of the mask near its edge."""
    times = max(1, round(_SHARE * float(np.hypot(*mask.shape))))
    padded = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return mask & ~cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=times)[1:-1, 1:-1].view(bool)
