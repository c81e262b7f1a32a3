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


def boxes_of_masks(masks: Tensor) -> Tensor:
    """The tight box of each mask.

    Args:
        masks: (n, h, w) bool.

    Returns:
        (n, 4) float32, XYXY in pixels, right and bottom exclusive; zeros for an empty mask.

    Example:
        >>> boxes_of_masks(torch.tensor([[[False, True], [False, True]]]))
        tensor([[1., 0., 2., 2.]])
    """

    def span(hit: Tensor) -> tuple[Tensor, Tensor]:
        # argmax of a 0/1 row is its first 1
        first = hit.int().argmax(dim=1)
        last = hit.shape[1] - hit.flip(1).int().argmax(dim=1)
        return first, last

    if not masks.numel():
        return torch.zeros(len(masks), 4, device=masks.device)
    numbers = masks.view(torch.uint8)  # whose maximum takes a CPU a tenth of the time of `any`
    columns, rows = numbers.amax(1), numbers.amax(2)  # (n, w), (n, h)
    (left, right), (top, bottom) = span(columns), span(rows)
    boxes = torch.stack([left, top, right, bottom], dim=1).float()
    return boxes * columns.amax(1, keepdim=True)
