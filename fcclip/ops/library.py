"""The operator as torch knows it: torch.ops.fcclip.ms_deform_attn and ms_deform_attn_fused, with their backwards.

Every engine runs behind these, so that `torch.compile`, `torch.export`, CUDA graphs and autograd see one opaque
operator with shapes, gradients and a rule for autocast (fp32, as the published model computes it). Shapes of levels
travel as a flat list of Python ints: nothing waits for a GPU. All checks are made here; engines make none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fcclip.config import lookup
from fcclip.errors import InputError
from fcclip.ops.engines import ENGINES, KIND

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
AUTOCAST_DEVICES = ("cpu", "cuda")

_POINTS = {"ms_deform_attn": "sampling_locations", "ms_deform_attn_fused": "sampling_offsets"}
_WEIGHTS = {"ms_deform_attn": "attention_weights", "ms_deform_attn_fused": "attention_logits"}


def pairs(spatial_shapes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """[H_0, W_0, H_1, W_1, …] -> ((H_0, W_0), (H_1, W_1), …)."""
    return tuple(zip(spatial_shapes[::2], spatial_shapes[1::2]))


def check_tensors(form: str, value: Tensor, spatial_shapes: Sequence[int], points: Tensor, weights: Tensor) -> None:
    """Refuses what the operator cannot work on.

    Raises:
        ValueError: shapes that do not fit together, mixed or unknown dtypes, tensors on different devices.
    """
    levels = list(pairs(spatial_shapes))
    if len(spatial_shapes) % 2 or not levels or any(size < 1 for size in spatial_shapes):
        raise InputError(f"spatial_shapes must be pairs (H, W) of positive ints, got {list(spatial_shapes)}")
    total = sum(height * width for height, width in levels)
    if value.dim() != 4 or value.shape[1] != total:
        raise InputError(
            f"value must be (B, S, M, D) with S = {total} for the levels {levels}, got {tuple(value.shape)}"
        )
    if total >= 2**31:
        raise InputError(f"{form} takes at most {2**31 - 1} cells, got {total} for the levels {levels}")
    if points.dim() != 6 or weights.dim() != 5:
        raise InputError(
            f"{_POINTS[form]} must be (B, N, M, L, P, 2) and {_WEIGHTS[form]} (B, N, M, L, P), got "
            f"{tuple(points.shape)} and {tuple(weights.shape)}"
        )
    queries = total if form == "ms_deform_attn_fused" else points.shape[1]
    expected = (value.shape[0], queries, value.shape[2], len(levels), weights.shape[4])
    if tuple(weights.shape) != expected or tuple(points.shape) != (*expected, 2):
        raise InputError(
            f"expected {_WEIGHTS[form]} {expected} and {_POINTS[form]} {(*expected, 2)}, got "
            f"{tuple(weights.shape)} and {tuple(points.shape)}"
        )
    tensors = {"value": value, _POINTS[form]: points, _WEIGHTS[form]: weights}
    if value.dtype not in DTYPES or len({tensor.dtype for tensor in tensors.values()}) > 1:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InputError(f"{form} computes in one dtype of {known}, got {got}; convert them to one")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise InputError(f"{form} computes on one device, got {got}")


def _engine(name: str, device: torch.device):
    engine = lookup(KIND, name, ENGINES)
    if engine.DEVICES and device.type not in engine.DEVICES:
        raise InputError(
            f"the engine '{name}' of multi-scale deformable attention computes on {' and '.join(engine.DEVICES)}, but "
            f"its tensors lie on {device}; move them, or choose another engine (MODEL.MSDA_ENGINE, FCCLIP_MSDA; "
            f"'auto' follows the tensors)"
        )
    return engine


def _define(form: str, *, fused: bool) -> None:
    """Registers one form of the operator."""
    points_name, weights_name = _POINTS[form], _WEIGHTS[form]
    inputs = f"Tensor value, SymInt[] spatial_shapes, Tensor {points_name}, Tensor {weights_name}, str engine"

    @torch.library.custom_op(f"fcclip::{form}", mutates_args=(), schema=f"({inputs}) -> Tensor")
    def operator(value, spatial_shapes, points, weights, engine):
        check_tensors(form, value, spatial_shapes, points, weights)
        run = _engine(engine, value.device).forward
        batch, _, heads, channels = value.shape
        if 0 in (batch, points.shape[1], heads, channels, points.shape[4]):  # nothing to sum
            return value.new_zeros(batch, points.shape[1], heads * channels)
        tensors = (value.contiguous(), points.contiguous(), weights.contiguous())
        return run(fused, tensors[0], pairs(spatial_shapes), *tensors[1:]).contiguous()

    @operator.register_fake
    def _(value, spatial_shapes, points, weights, engine):
        check_tensors(form, value, spatial_shapes, points, weights)
        batch, _, heads, channels = value.shape
        return value.new_empty(batch, points.shape[1], heads * channels)

    @torch.library.custom_op(
        f"fcclip::{form}_backward",
        mutates_args=(),
        schema=f"(Tensor grad_output, {inputs}) -> (Tensor, Tensor, Tensor)",
    )
    def backward_operator(grad_output, value, spatial_shapes, points, weights, engine):
        check_tensors(form, value, spatial_shapes, points, weights)
        run = _engine(engine, value.device).backward
        batch, _, heads, channels = value.shape
        expected = (batch, points.shape[1], heads * channels)
        if tuple(grad_output.shape) != expected or grad_output.dtype != value.dtype:
            raise InputError(
                f"the gradient must be {expected} {value.dtype}, got {tuple(grad_output.shape)} {grad_output.dtype}"
            )
        if 0 in (*expected, points.shape[4]):
            return tuple(
                torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (value, points, weights)
            )
        tensors = (value.contiguous(), points.contiguous(), weights.contiguous())
        grads = run(fused, grad_output.contiguous(), tensors[0], pairs(spatial_shapes), *tensors[1:])
        return tuple(grad.contiguous() for grad in grads)

    @backward_operator.register_fake
    def _(grad_output, value, spatial_shapes, points, weights, engine):
        return tuple(tensor.new_empty(tensor.shape) for tensor in (value, points, weights))

    def keep(ctx, inputs, output):
        value, ctx.spatial_shapes, points, weights, ctx.engine = inputs
        ctx.save_for_backward(value, points, weights)

    def differentiate(ctx, grad_output):
        value, points, weights = ctx.saved_tensors
        grads = backward_operator(grad_output, value, ctx.spatial_shapes, points, weights, ctx.engine)
        return grads[0], None, grads[1], grads[2], None

    operator.register_autograd(differentiate, setup_context=keep)
    for device_type in AUTOCAST_DEVICES:
        operator.register_autocast(device_type, torch.float32)


_define("ms_deform_attn", fused=False)
_define("ms_deform_attn_fused", fused=True)
