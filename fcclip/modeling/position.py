"""Sine position embedding of a grid (DETR, appendix A.4; normalised, temperature 10000, scale 2 pi)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """The embedding of every cell of a grid; computed once per size and device, so do not write into it.

    Args:
        height, width: cells.
        channels: even; the first half encodes y, the second x.
        device: where the result lives.

    Returns:
        (channels, height, width) float32.
    """
    make = _computed if torch.compiler.is_exporting() else _kept  # sizes of an export may be symbols
    return make(height, width, channels, device)


def _computed(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=device)
    period = 10000 ** (2 * (index // 2) / half)

    def encode(count: int) -> Tensor:  # (count, half)
        steps = torch.arange(1, count + 1, dtype=torch.float32, device=device)
        angle = (steps / (count + 1e-6) * (2 * math.pi))[:, None] / period
        return torch.where(index % 2 == 0, angle.sin(), angle.cos())

    rows, columns = encode(height), encode(width)
    grid = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
    return grid.permute(2, 0, 1).contiguous()


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # what is kept must serve training too
def _kept(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    return _computed(height, width, channels, device)
