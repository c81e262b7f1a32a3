"""Multi-scale deformable attention in plain PyTorch without `grid_sample`: bilinear by four gathers.

For exports to runtimes that have no GridSample or a wrong one; elsewhere the engine `torch` is faster.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from fcclip.ops import torch_engine
from fcclip.ops.torch_engine import DEVICES, available, backward

__all__ = ["DEVICES", "available", "backward", "forward", "sample"]


def sample(maps: Tensor, grid: Tensor) -> Tensor:
    """(B*M, D, H, W) at (B*M, P, N, 2) -> (B*M, D, P, N), as `torch_engine.sample`."""
    height, width = maps.shape[-2:]
    x, y = ((grid[..., 0] + 1) * width - 1) / 2, ((grid[..., 1] + 1) * height - 1) / 2  # (B*M, P, N), pixels
    left, top = x.floor(), y.floor()
    cells, result = maps.flatten(2), 0
    for right, below in itertools.product((0, 1), repeat=2):
        column, row = left + right, top + below
        share = (x - left if right else 1 - (x - left)) * (y - top if below else 1 - (y - top))
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        index = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
        corner = cells.gather(2, index.flatten(1)[:, None].expand(-1, maps.shape[1], -1))
        corner = torch.where(inside[:, None], corner.unflatten(-1, index.shape[1:]), 0.0)
        result = result + corner * share[:, None]
    return result


forward = functools.partial(torch_engine.forward, sample=sample)
