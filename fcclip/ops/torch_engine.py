"""Multi-scale deformable attention in plain PyTorch: any device, any float type, exportable. The truth.

Legend: B images, S cells of all levels, M heads, D channels of a head, N queries, L levels, P points.

`forward` and `forward_fused` are differentiable; `backward` and `backward_fused` are their gradients written out, for
the custom operator, below which autograd does not record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.ops.availability import Availability

DEVICES = ()  # any
Shapes = Sequence[tuple[int, int]]

_HALVES = (torch.float16, torch.bfloat16)
_FAR_OUTSIDE = -3.0  # of the grid, whose levels reach from -1 to 1


def available(device: torch.device) -> Availability:
    """Always."""
    return Availability()


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """One `grid_sample` per level; shapes as in `fcclip.ops.ms_deform_attn`."""
    if value.dtype in _HALVES:
        return forward(value.float(), shapes, locations.float(), weights.float()).to(value.dtype)
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    output = value.new_zeros(batch * heads, channels, queries)
    for maps, grid, weight in zip(_maps(value, shapes), _grids(locations), _per_level(weights)):
        output = output + (_sample(maps, grid) * weight[:, None]).sum(2)  # (B*M, D, P, N) -> (B*M, D, N)
    return output.view(batch, heads * channels, queries).transpose(1, 2)


def backward(
    grad_output: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by value, locations and weights; grad_output (B, N, M*D)."""
    if value.dtype in _HALVES:
        grads = backward(grad_output.float(), value.float(), shapes, locations.float(), weights.float())
        return tuple(grad.to(value.dtype) for grad in grads)
    batch, queries, heads, levels, points, _ = locations.shape
    grad_output = grad_output.view(batch, queries, heads, -1).permute(0, 2, 3, 1).flatten(0, 1)[:, :, None]
    per_level = []
    for maps, grid, weight in zip(_maps(value, shapes), _grids(locations), _per_level(weights)):
        grad_weight = (grad_output * _sample(maps, grid)).sum(1)  # (B*M, D, P, N) -> (B*M, P, N)
        grad_sampled = grad_output * weight[:, None]
        grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad_sampled, maps, grid, 0, 0, False, [True, True]
        )
        grad_value = grad_maps.view(batch, heads, -1, maps.shape[-2] * maps.shape[-1]).permute(0, 3, 1, 2)
        per_level.append((grad_value, 2 * grad_grid, grad_weight))
    grad_values, grad_grids, grad_weights = zip(*per_level)
    grad_locations = torch.stack(grad_grids).view(levels, batch, heads, points, queries, 2).permute(1, 4, 2, 0, 3, 5)
    grad_weights = torch.stack(grad_weights).view(levels, batch, heads, points, queries).permute(1, 4, 2, 0, 3)
    return torch.cat(grad_values, dim=1), grad_locations.contiguous(), grad_weights.contiguous()


def forward_fused(value: Tensor, shapes: Shapes, offsets: Tensor, logits: Tensor) -> Tensor:
    """`forward` at the cells' centres plus offsets; shapes as in `fcclip.ops.ms_deform_attn_fused`."""
    if value.dtype in _HALVES:
        return forward_fused(value.float(), shapes, offsets.float(), logits.float()).to(value.dtype)
    return forward(value, shapes, _locations(shapes, offsets), _softmax(logits))


def backward_fused(
    grad_output: Tensor, value: Tensor, shapes: Shapes, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward_fused` by value, offsets and logits; grad_output (B, N, M*D)."""
    if value.dtype in _HALVES:
        grads = backward_fused(grad_output.float(), value.float(), shapes, offsets.float(), logits.float())
        return tuple(grad.to(value.dtype) for grad in grads)
    weights = _softmax(logits)
    grad_value, grad_locations, grad_weights = backward(
        grad_output, value, shapes, _locations(shapes, offsets), weights
    )
    weighted = (weights * grad_weights).sum((-2, -1), keepdim=True)
    sizes = _constants(shapes, offsets)[1]
    return grad_value, grad_locations / sizes[:, None], weights * (grad_weights - weighted)


def agrees(
    forward_of: Callable[..., Tensor],
    backward_of: Callable[..., tuple[Tensor, ...]],
    grad_output: Tensor,
    *inputs: Tensor | Shapes,
    tolerance: float,
) -> bool:
    """Whether a compiled engine computes what this one does, in both forms.

    Args:
        forward_of, backward_of: its functions, called with `fused` and then as those above.
        grad_output, inputs: value, shapes, points and weights, as for both forms.
        tolerance: relative and absolute.
    """
    pairs = []
    for fused, truth, truth_backward in ((False, forward, backward), (True, forward_fused, backward_fused)):
        pairs.append((forward_of(fused, *inputs), truth(*inputs)))
        pairs += zip(backward_of(fused, grad_output, *inputs), truth_backward(grad_output, *inputs))
    return all(torch.allclose(ours, expected, rtol=tolerance, atol=tolerance) for ours, expected in pairs)


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    """(B*M, D, H, W) at (B*M, P, N, 2) -> (B*M, D, P, N)."""
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _maps(value: Tensor, shapes: Shapes) -> list[Tensor]:
    """(B, S, M, D) -> a (B*M, D, H, W) of each level."""
    batch, _, heads, channels = value.shape
    levels = value.split([height * width for height, width in shapes], dim=1)
    return [
        level.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        for level, (height, width) in zip(levels, shapes)
    ]


def _grids(locations: Tensor) -> Tensor:
    """(B, N, M, L, P, 2) -> (L, B*M, P, N, 2) as grid_sample wants it; queries last, so that the sum over points runs
    along contiguous memory. What is not finite looks far outside: grid_sample makes NaN of it on a CPU.
    """
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    return grids.nan_to_num(nan=_FAR_OUTSIDE, posinf=_FAR_OUTSIDE, neginf=_FAR_OUTSIDE)


def _per_level(weights: Tensor) -> Tensor:
    """(B, N, M, L, P) -> (L, B*M, P, N)."""
    return weights.permute(3, 0, 2, 4, 1).flatten(1, 2)


def _softmax(logits: Tensor) -> Tensor:
    """Over levels and points together."""
    return logits.flatten(-2).softmax(-1).view(logits.shape)


def _locations(shapes: Shapes, offsets: Tensor) -> Tensor:
    """Offsets in pixels of each level, from the centre of the query's own cell -> locations, 0..1."""
    centres, sizes = _constants(shapes, offsets)
    return centres[:, None, None, None] + offsets / sizes[:, None]


def _constants(shapes: Shapes, like: Tensor) -> tuple[Tensor, Tensor]:
    """(S, 2) centres of all cells, 0..1, and (L, 2) sizes of the levels, both x first; device and type of `like`."""
    plain = type(like) in (Tensor, torch.nn.Parameter)  # what a tracer makes must not stay behind
    make = _make_constants if torch.compiler.is_compiling() or not plain else _kept_constants
    return make(tuple(shapes), like.device, like.dtype)


def _make_constants(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    centres, sizes = [], []
    for height, width in shapes:
        y = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
        centres.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1))
        # filled on the device: a copy from the host would stop a GPU
        sizes += [torch.full((), size, dtype=dtype, device=device) for size in (width, height)]
    return torch.cat(centres), torch.stack(sizes).view(-1, 2)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # what is kept must serve training too
def _kept_constants(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _make_constants(shapes, device, dtype)
