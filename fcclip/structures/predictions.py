"""What a model found in one image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Instances:
    """n detected things, highest scores not necessarily first.

    Args:
        scores: (n,) float, class probability times mean mask probability, 0..1.
        pred_classes: (n,) int64, contiguous class index.
        pred_masks: (n, h, w) bool.
        pred_boxes: (n, 4) float, XYXY in pixels, exclusive at the right and bottom; zeros for an empty mask.
    """

    scores: Tensor
    pred_classes: Tensor
    pred_masks: Tensor
    pred_boxes: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def to(self, device: torch.device | str) -> Instances:
        """The same record with every tensor on `device`."""
        return Instances(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Segment:
    """One segment of a panoptic map.

    Args:
        id: value of its pixels in the map, from 1.
        category_id: contiguous class index.
        isthing: whether the class is countable.
        score: class probability of the query that made it, 0..1.
        area: number of pixels.
    """

    id: int
    category_id: int
    isthing: bool
    score: float
    area: int
