"""Multi-scale deformable attention in Triton, for NVIDIA GPUs whose owner has no nvcc: triton_kernels.py.

Compiled and tuned by triton on the first call of each kind, which takes seconds to a minute; triton keeps the result.
fp32, fp64, fp16 and bf16, the half types computed in fp32. The gradient of the values is added up with atomics; where
`torch.use_deterministic_algorithms` asks for it, samples are sorted instead and every bit is the same each time.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fcclip.errors import InputError
from fcclip.ops.availability import Availability

DEVICES = ("cuda",)
Shapes = Sequence[tuple[int, int]]

LEAST_CAPABILITY = (8, 0)  # triton supports nothing older


def available(device: torch.device) -> Availability:
    """On an NVIDIA GPU from sm_80 on, where triton is installed."""
    if device.type not in DEVICES:
        return Availability(f"it computes on CUDA devices, not on {device.type}")
    if importlib.util.find_spec("triton") is None:
        return Availability("triton is not installed; `pip install triton` (Linux)")
    if torch.version.hip is not None or not torch.cuda.is_available():
        return Availability("torch sees no NVIDIA GPU")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        return Availability(f"triton needs sm_80 or newer, {name} is sm_{major}{minor}")
    try:
        _kernels().check_driver()
    except Exception as error:  # whatever a triton that does not fit this torch or this Python fails with
        return Availability(f"triton cannot be used: {type(error).__name__}: {error}", broken=True)
    return Availability()


@functools.cache
def _kernels() -> ModuleType:
    """triton is imported with the first use: it takes a second, and not everyone has it."""
    from fcclip.ops import triton_kernels

    return triton_kernels


def forward(fused: bool, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """As `torch_engine.forward`, not differentiable."""
    batch, _, heads, channels = value.shape
    output = value.new_empty(batch, points.shape[1], heads * channels)
    sizes, constants, grid = _launch(fused, value, shapes, points)
    with torch.cuda.device_of(value):
        _kernels().forward[grid](value, points, weights, output, *sizes, **constants)
    return output


def backward(
    fused: bool, grad_output: Tensor, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_engine.backward`."""
    kernels = _kernels()
    batch, cells, heads, _ = value.shape
    grad_points, grad_weights = torch.empty_like(points), torch.empty_like(weights)
    in_order = torch.are_deterministic_algorithms_enabled()
    computed_in = kernels.compute_type(value.dtype)
    num_places = sum((height + 1) * (width + 1) for height, width in shapes)
    if in_order:
        grad_value = torch.empty_like(value)
        sample_places = torch.empty(weights.shape, dtype=torch.int64, device=value.device)
        coefficients = torch.empty(*weights.shape, 4, dtype=computed_in, device=value.device)
        first_pass = (grad_value, grad_points, grad_weights, sample_places, coefficients)
    else:
        grad_value = torch.zeros_like(value, dtype=computed_in)
        first_pass = (grad_value, grad_points, grad_weights, grad_points, grad_points)  # the last two are not used
    sizes, constants, grid = _launch(fused, value, shapes, points)
    block_k = _power_of_two_from(len(shapes) * points.shape[4])
    with torch.cuda.device_of(value):
        kernels.backward[grid](
            grad_output,
            value,
            points,
            weights,
            *first_pass,
            *sizes,
            batch,
            num_places,
            SORTED=in_order,
            BLOCK_K=block_k,
            **constants,
        )
        if in_order:
            sample_places, order = torch.sort(sample_places.flatten(), stable=True)
            every_place = torch.arange(batch * heads * num_places + 1, device=value.device)
            starts = torch.searchsorted(sample_places, every_place)
            constants = {name: constants[name] for name in ("M", "D", "L", "P", "BLOCK")}
            inputs = (grad_output, order, starts, coefficients, grad_value, *sizes[:-2], cells, num_places)
            kernels.gather[(cells * heads, batch)](*inputs, **constants, num_warps=1)
    return grad_value.to(value.dtype), grad_points, grad_weights


def _launch(
    fused: bool, value: Tensor, shapes: Shapes, points: Tensor
) -> tuple[tuple, dict[str, int | bool], Callable[[dict[str, int]], tuple[int, int]]]:
    """Runtime numbers and constants of a kernel, and how many programs there are for a size of tile."""
    batch, cells, heads, channels = value.shape
    queries = points.shape[1]
    most = _kernels().MAX_LEVELS
    if len(shapes) > most:
        raise InputError(f"the engine 'triton' takes at most {most} levels, got {len(shapes)}")
    on_grid = queries == cells
    padded = [*shapes, *[(1, 1)] * (most - len(shapes))]
    sizes = (*(height for height, _ in padded), *(width for _, width in padded), queries, cells)
    constants = {
        "M": heads,
        "D": channels,
        "L": len(shapes),
        "P": points.shape[4],
        "FUSED": fused,
        "ON_GRID": on_grid,
        "BLOCK": _power_of_two_from(channels),
    }

    def grid(tuned: dict[str, int]) -> tuple[int, int]:  # as in _tile_of_queries
        tile = tuned["TILE"]
        if not on_grid:
            return -(-queries // tile) * heads, batch
        wide = 8 if tile >= 32 else 4
        return sum(-(-height // (tile // wide)) * -(-width // wide) for height, width in shapes) * heads, batch

    return sizes, constants, grid


def _power_of_two_from(number: int) -> int:
    return 1 << (number - 1).bit_length()
