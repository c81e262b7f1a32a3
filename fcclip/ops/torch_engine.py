"""Multi-scale deformable attention in plain PyTorch: any device, any float type, exportable. The truth.

Legend: B images, S cells of all levels, M heads, D channels of a head, N queries, L levels, P points.

`forward` is differentiable; `backward` is its gradient written out, for the custom operator, below which autograd does
not record.
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


def sample(maps: Tensor, grid: Tensor) -> Tensor:
    """(B*M, D, H, W) at (B*M, P, N, 2) -> (B*M, D, P, N)."""
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def forward(
    fused: bool,
    value: Tensor,
    shapes: Shapes,
    points: Tensor,
    weights: Tensor,
    *,
    sample: Callable[[Tensor, Tensor], Tensor] = sample,
) -> Tensor:
    """One `grid_sample` per level.

    Args:
        fused: `points` are offsets from the cells' centres and `weights` logits, as in
            `fcclip.ops.ms_deform_attn_fused`; else locations and weights, as in `fcclip.ops.ms_deform_attn`.
        value, shapes, points, weights: as there.
        sample: what takes the place of `grid_sample`.
    """
    if value.dtype in _HALVES:
        floats = value.float(), shapes, points.float(), weights.float()
        return forward(fused, *floats, sample=sample).to(value.dtype)
    if fused:
        points, weights = _locations(shapes, points), _softmax(weights)
    batch, _, heads, channels = value.shape
    queries = points.shape[1]
    output = value.new_zeros(batch * heads, channels, queries)
    for maps, grid, weight in zip(_maps(value, shapes), _grids(points), _per_level(weights)):
        output = output + (sample(maps, grid) * weight[:, None]).sum(2)  # (B*M, D, P, N) -> (B*M, D, N)
    return output.view(batch, heads * channels, queries).transpose(1, 2)


def backward(
    fused: bool, grad_output: Tensor, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by value, points and weights; grad_output (B, N, M*D)."""
    if value.dtype in _HALVES:
        grads = backward(fused, grad_output.float(), value.float(), shapes, points.float(), weights.float())
        return tuple(grad.to(value.dtype) for grad in grads)
    if not fused:
        return _backward(grad_output, value, shapes, points, weights)
    shares = _softmax(weights)
    grad_value, grad_locations, grad_shares = _backward(grad_output, value, shapes, _locations(shapes, points), shares)
    weighted = (shares * grad_shares).sum((-2, -1), keepdim=True)
    sizes = _constants(shapes, points)[1]
    return grad_value, grad_locations / sizes[:, None], shares * (grad_shares - weighted)


def _backward(
    grad_output: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, levels, points, _ = locations.shape
    grad_output = grad_output.view(batch, queries, heads, -1).permute(0, 2, 3, 1).flatten(0, 1)[:, :, None]
    per_level = []
    for maps, grid, weight in zip(_maps(value, shapes), _grids(locations), _per_level(weights)):
        grad_weight = (grad_output * sample(maps, grid)).sum(1)  # (B*M, D, P, N) -> (B*M, P, N)
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


def agrees(
    engine_forward: Callable[..., Tensor],
    engine_backward: Callable[..., tuple[Tensor, ...]],
    device: torch.device | str,
    *,
    channels: int,
    tolerance: float,
) -> bool:
    """Whether the functions of a compiled engine compute what those of this one do, on a small problem in both forms.

    Args:
        engine_forward, engine_backward: called like `forward` and `backward`.
        device: of the tensors.
        channels: of a head.
        tolerance: relative and absolute.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    shapes = [(4, 5), (2, 3), (3, 1)]
    samples = (2, sum(height * width for height, width in shapes), 2, len(shapes), 4)  # (B, N, M, L, P)
    grad_output = random(*samples[:2], 2 * channels)
    inputs = random(*samples[:3], channels), shapes, random(*samples, 2), random(*samples)
    pairs = []
    for fused in (False, True):
        pairs.append((engine_forward(fused, *inputs), forward(fused, *inputs)))
        pairs += zip(engine_backward(fused, grad_output, *inputs), backward(fused, grad_output, *inputs))
    return all(torch.allclose(ours, expected, rtol=tolerance, atol=tolerance) for ours, expected in pairs)


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
