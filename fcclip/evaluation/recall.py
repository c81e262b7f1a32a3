"""Recall of masks: whether some proposal covers a class of an image, whatever the proposal is called (FrozenSeg,
appendix).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fcclip.errors import InputError
from fcclip.evaluation.ground_truth import ClassEvaluator, GroundTruth
from fcclip.evaluation.semantic import percent
from fcclip.modeling.output_masks import OutputMasks

THRESHOLDS = (0.5, 0.75, 0.9)


class MaskRecallEvaluator(ClassEvaluator):
    """Counts (image, class) pairs whose region is covered by a mask with an IoU above a threshold.

    The region of a class is all of its pixels in the ground truth; a mask is where its logits are above 0, and its
    pixels on ignored ground truth count as outside. Of each image, the best IoU of each of its classes is kept.

    Args:
        class_names, seen: as for `ClassEvaluator`.
    """

    def measure(self, ground_truth: GroundTruth, output: Mapping[str, Any]) -> list[tuple[int, float]]:
        if "recall_seg" not in output:
            raise InputError(
                "MODEL.MASK_FORMER.TEST.RECALL_ON needs the proposals of the network, which saved predictions do not "
                "hold: evaluate without --resume"
            )
        labels = torch.as_tensor(ground_truth.labels.astype("int64"))
        return best_ious(labels, output["recall_seg"], num_classes=len(self.class_names))

    def results(self) -> dict[str, dict[str, float]]:
        pairs = [pair for image in self.images.values() for pair in image]
        groups = {"": pairs}
        if self.seen is not None:
            groups |= {
                name: [pair for pair in pairs if self.seen[pair[0]] == known] for name, known in (("S_", 1), ("U_", 0))
            }
        return {
            "recall": {
                f"{group}Recall@IoU={threshold:.2f}": percent(sum(iou > threshold for _, iou in chosen), len(chosen))
                for group, chosen in groups.items()
                for threshold in THRESHOLDS
            }
        }


def best_ious(labels: Tensor, proposals: Iterable[OutputMasks], *, num_classes: int) -> list[tuple[int, float]]:
    """The best IoU of any mask with the region of each class.

    Args:
        labels: (h, w) int64, the class of each pixel; other values than 0..num_classes - 1 are no class.
        proposals: masks at that size.

    Returns:
        (class, IoU) for each class that is there.
    """
    classes = [value for value in labels.unique().tolist() if 0 <= value < num_classes]
    compact = torch.full_like(labels, len(classes))  # what is no class comes last
    for index, value in enumerate(classes):
        compact[labels == value] = index
    best = torch.zeros(len(classes), dtype=torch.float64)
    for masks in proposals if classes else ():
        if masks.output_size != tuple(labels.shape):
            raise InputError(f"masks have the size {masks.output_size}, the ground truth {tuple(labels.shape)}")
        device = masks.mask_logits.device
        compact = compact.to(device).flatten()
        regions = compact.bincount(minlength=len(classes) + 1)[:-1]
        for logits in masks.of(torch.arange(len(masks.mask_logits), device=device)):
            inside = (logits > 0).flatten(1)
            offsets = torch.arange(len(inside), device=device)[:, None] * (len(classes) + 1)
            counts = (compact + offsets)[inside].bincount(minlength=len(inside) * (len(classes) + 1))
            hits = counts.unflatten(0, (len(inside), -1))
            union = hits.sum(1, keepdim=True) + regions - hits[:, :-1]
            best = best.maximum((hits[:, :-1].double() / union).amax(0).cpu())
    return list(zip(classes, best.tolist()))
