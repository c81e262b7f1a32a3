"""Multi-scale deformable attention as published, as an engine: the peer that the others are measured against.

The CUDA operator is published_ms_deform_attn.cu. It knows locations and weights; for the fused form the softmax and the
locations are computed before it and their gradients after it with plain PyTorch, as the published module does, whose
autograd would keep softmax and locations, which are computed again here; for half types both are fp32, in which the
published model computes them. Up to 1024 channels and 2^31 numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fcclip.ops import cuda_engine
from fcclip.ops.availability import Availability
from fcclip.ops.builder import BuildError, Extension, NoCompilerError, NotBuiltError, build, load

DEVICES = ("cuda",)
Shapes = Sequence[tuple[int, int]]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def available(device: torch.device) -> Availability:
    """On a GPU, where there is nvcc: it is built by the first who asks."""
    if device.type not in DEVICES:
        return Availability(f"it computes on CUDA devices, not on {device.type}")
    if torch.version.hip is not None or not torch.cuda.is_available():
        return Availability("torch sees no NVIDIA GPU")
    try:
        _library()
    except NoCompilerError as error:
        return Availability(str(error))
    except BuildError as error:
        return Availability(str(error), broken=True)
    return Availability()


def forward(fused: bool, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    if fused:
        points, weights = _locations(shapes, _wide(points)), _softmax(_wide(weights))
    return _forward(value, shapes, points, weights)


def _forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    output = value.new_zeros(batch, locations.shape[1], heads * channels)
    tables = _tables(tuple(shapes), value.device)
    _call("forward", value, locations, (value, *tables, locations, weights, output))
    return output


def backward(
    fused: bool, grad_output: Tensor, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not fused:
        return _backward(grad_output, value, shapes, points, weights)
    shares = _softmax(_wide(weights))
    grads = _backward(grad_output, value, shapes, _locations(shapes, _wide(points)), shares)
    grad_logits = torch._softmax_backward_data(grads[2].flatten(-2), shares.flatten(-2), -1, shares.dtype)
    sizes = _centres(tuple(shapes), points.device, grads[1].dtype)[1]
    return grads[0], (grads[1] / sizes).to(value.dtype), grad_logits.view(weights.shape).to(value.dtype)


def _backward(
    grad_output: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    grads = torch.zeros_like(value, dtype=dtype), torch.zeros_like(locations), torch.zeros_like(weights)
    tables = _tables(tuple(shapes), value.device)
    _call("backward", value, locations, (grad_output, value, *tables, locations, weights, *grads))
    return grads[0].to(value.dtype), grads[1], grads[2]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _softmax(logits: Tensor) -> Tensor:
    return logits.flatten(-2).softmax(-1).view(logits.shape)


def _locations(shapes: Shapes, offsets: Tensor) -> Tensor:
    centres, sizes = _centres(tuple(shapes), offsets.device, offsets.dtype)
    return centres[:, None, None, None] + offsets / sizes


@functools.lru_cache(maxsize=16)
def _centres(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(S, 2) centres of all cells, 0..1, and (L, 1, 2) sizes of the levels, x first."""
    centres = []
    for height, width in shapes:
        sides = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in (height, width))
        y, x = torch.meshgrid(*sides, indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=dtype)
    return torch.cat(centres).to(device, dtype), sizes[:, None].to(device)


@functools.lru_cache(maxsize=16)
def _tables(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shapes and first cells of the levels in the memory of the GPU."""
    sizes = torch.tensor(shapes, device=device)
    areas = sizes.prod(1)
    return sizes, areas.cumsum(0) - areas


def _call(name: str, value: Tensor, locations: Tensor, tensors: Sequence[Tensor]) -> None:
    batch, cells, heads, channels = value.shape
    sizes = (batch, cells, heads, channels, locations.shape[1], locations.shape[3], locations.shape[4])
    if channels > 1024:
        raise ValueError(f"the published operator as written here takes at most 1024 channels a head, got {channels}")
    memory = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    numbers = (ctypes.c_int64 * len(sizes))(*sizes)
    with _on(value.device) as stream:
        function = getattr(_library(), f"published_{name}")
        wide = int(locations.dtype != value.dtype)
        status = function(_DTYPES[value.dtype], wide, numbers, ctypes.c_void_p(stream), *memory)
    if status:
        raise RuntimeError(f"the published CUDA kernel '{name}' failed with status {status} at sizes {sizes}")


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[int]:
    """With `device` as the current one: its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return load(EXTENSION)
    except NotBuiltError:
        build(EXTENSION)
        return load(EXTENSION)


EXTENSION = Extension(
    "published",
    str(Path(__file__).with_suffix(".cu")),
    cuda_engine.EXTENSION.compiler,
    cuda_engine.EXTENSION.arguments,
    lambda library: None,
)
