"""The operator of multi-scale deformable attention (Zhu et al., Deformable DETR, section 4.1), in two forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fcclip.errors import InputError
from fcclip.ops import library  # registers torch.ops.fcclip
from fcclip.ops.engines import ENGINES, PLAIN, automatic_engine


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    engine: str = "auto",
) -> Tensor:
    """Weighted sum of values sampled bilinearly around each query, over all levels.

    B batch, S = sum of H_l * W_l, M heads, D channels a head, N queries, L levels, P points.

    Args:
        value: (B, S, M, D) float, the levels one after the other, each row-major.
        spatial_shapes: L pairs (H_l, W_l), Python ints, in pixels.
        sampling_locations: (B, N, M, L, P, 2) float as `value`, (x, y), 0..1 inside a level, unbounded; pixel centres
            lie at (i + 0.5) / W_l and everything outside counts as 0, as does a location that is not finite.
        attention_weights: (B, N, M, L, P) float as `value`.
        engine: a key of `ENGINES`, or "auto".

    Returns:
        (B, N, M * D) float as `value`. Half types are computed in fp32 and rounded once; under autocast the inputs are
        turned into fp32, fp64 excepted.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown engine, or one that cannot run here.
    """
    return _run(False, value, spatial_shapes, sampling_locations, attention_weights, engine)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    engine: str = "auto",
) -> Tensor:
    """`ms_deform_attn` of every cell to all levels, from what the network predicts: query n is cell n of `value`, its
    samples lie at the cell's centre plus the offsets, weighted by the softmax over all points of all levels.

    Args:
        value: (B, S, M, D) float.
        spatial_shapes: L pairs (H_l, W_l), Python ints, in pixels.
        sampling_offsets: (B, S, M, L, P, 2) float as `value`, (x, y), in pixels of level l.
        attention_logits: (B, S, M, L, P) float as `value`.
        engine: a key of `ENGINES`, or "auto".

    Returns:
        (B, S, M * D) float as `value`.

    Raises:
        ValueError: as `ms_deform_attn`.
    """
    return _run(True, value, spatial_shapes, sampling_offsets, attention_logits, engine)


def _run(
    fused: bool,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    points: Tensor,
    weights: Tensor,
    engine: str,
) -> Tensor:
    if isinstance(spatial_shapes, Tensor):
        raise InputError("spatial_shapes must be pairs of Python ints; reading them from a tensor would stop a GPU")
    flat = [size for pair in spatial_shapes for size in pair]
    form = "ms_deform_attn_fused" if fused else "ms_deform_attn"
    if engine == "auto":
        engine = automatic_engine(value.device.type)
    if engine not in PLAIN:
        return getattr(torch.ops.fcclip, form)(value, flat, points, weights, engine)
    # Plain operations instead of the operator: exports show GridSample, compilers look inside, and autograd keeps what
    # the operator's backward would compute a second time.
    kind = value.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        tensors = (value, points, weights)
        value, points, weights = (tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors)
        with torch.autocast(kind, enabled=False):
            return _run(fused, value, spatial_shapes, points, weights, engine)
    library.check_tensors(form, value, flat, points, weights)
    return ENGINES[engine].forward(fused, value, library.pairs(flat), points, weights)
