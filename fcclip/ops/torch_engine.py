"""Multi-scale deformable attention in plain PyTorch: any device, any float type, differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_torch(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """One `grid_sample` per level; shapes as in `fcclip.ops.ms_deform_attn`."""
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    grids = (2 * sampling_locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B*M, N, P, 2)
    weights = attention_weights.permute(3, 0, 2, 1, 4).flatten(1, 2)  # (L, B*M, N, P)
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    output = value.new_zeros(batch * heads, channels, queries)
    for level, (height, width), grid, weight in zip(levels, spatial_shapes, grids, weights):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        sampled = F.grid_sample(
            maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (B*M, D, N, P)
        output = output + torch.einsum("bdnp,bnp->bdn", sampled, weight)
    return output.view(batch, heads * channels, queries).transpose(1, 2)
