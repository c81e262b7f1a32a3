"""Multi-scale deformable attention in plain PyTorch: any device, any float type, differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_torch(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """One `grid_sample` per level; shapes as in `fcclip.ops.ms_deform_attn`."""
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    # queries last, so that the sum over points runs along contiguous memory
    grids = (2 * sampling_locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # (L, B*M, P, N, 2)
    weights = attention_weights.permute(3, 0, 2, 4, 1).flatten(1, 2)  # (L, B*M, P, N)
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    output = value.new_zeros(batch * heads, channels, queries)
    for level, (height, width), grid, weight in zip(levels, spatial_shapes, grids, weights):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (sampled * weight[:, None]).sum(2)  # (B*M, D, P, N) -> (B*M, D, N)
    return output.view(batch, heads * channels, queries).transpose(1, 2)
