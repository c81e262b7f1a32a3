"""Boxes of masks."""

from __future__ import annotations

import torch
from torch import Tensor


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
    columns, rows = masks.any(dim=1), masks.any(dim=2)  # (n, w), (n, h)

    def span(hit: Tensor) -> tuple[Tensor, Tensor]:
        # argmax of a 0/1 row is its first 1
        first = hit.int().argmax(dim=1)
        last = hit.shape[1] - hit.flip(1).int().argmax(dim=1)
        return first, last

    if not masks.numel():
        return torch.zeros(len(masks), 4, device=masks.device)
    (left, right), (top, bottom) = span(columns), span(rows)
    boxes = torch.stack([left, top, right, bottom], dim=1).float()
    return boxes * columns.any(dim=1, keepdim=True)
