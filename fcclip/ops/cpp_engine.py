"""Multi-scale deformable attention in C++ for the CPU: csrc/ms_deform_attn_cpu.cpp, built by `fcclip.ops.build`.

fp32, fp64 and bf16 (computed in fp32) natively, fp16 as fp32 copies. Deterministic with any number of threads.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fcclip.ops import torch_engine
from fcclip.ops.availability import Availability
from fcclip.ops.builder import BuildError, Extension, NoCompilerError, accepts, ask_compiler, availability, load

DEVICES = ("cpu",)
Shapes = Sequence[tuple[int, int]]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads(); }\n"


def available(device: torch.device) -> Availability:
    """On a CPU, once it is built."""
    if device.type not in DEVICES:
        return Availability(f"it computes on the CPU, not on {device.type}")
    return availability(EXTENSION)


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """As `torch_engine.forward`, not differentiable."""
    return _forward(load(EXTENSION), False, value, shapes, locations, weights)


def backward(
    grad_output: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_engine.backward`."""
    return _backward(load(EXTENSION), False, grad_output, value, shapes, locations, weights)


def forward_fused(value: Tensor, shapes: Shapes, offsets: Tensor, logits: Tensor) -> Tensor:
    """As `torch_engine.forward_fused`, not differentiable."""
    return _forward(load(EXTENSION), True, value, shapes, offsets, logits)


def backward_fused(
    grad_output: Tensor, value: Tensor, shapes: Shapes, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_engine.backward_fused`."""
    return _backward(load(EXTENSION), True, grad_output, value, shapes, offsets, logits)


def _forward(
    library: ctypes.CDLL, fused: bool, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor
) -> Tensor:
    if value.dtype == torch.float16:
        return _forward(library, fused, value.float(), shapes, points.float(), weights.float()).half()
    batch, _, heads, channels = value.shape
    output = value.new_empty(batch, points.shape[1], heads * channels)
    _call(library.fcclip_msda_forward, fused, shapes, (value, points, weights), (output,))
    return output


def _backward(
    library: ctypes.CDLL,
    fused: bool,
    grad_output: Tensor,
    value: Tensor,
    shapes: Shapes,
    points: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if value.dtype == torch.float16:
        inputs = [tensor.float() for tensor in (grad_output, value, points, weights)]
        grads = _backward(library, fused, inputs[0], inputs[1], shapes, inputs[2], inputs[3])
        return tuple(grad.half() for grad in grads)
    grads = tuple(torch.empty_like(tensor) for tensor in (value, points, weights))
    _call(library.fcclip_msda_backward, fused, shapes, (value, points, weights), grads, grad_output)
    return grads


def _call(
    function: ctypes._CFuncPtr,
    fused: bool,
    shapes: Shapes,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, ...],
    *first: Tensor,
) -> None:
    """Hands the tensors over as memory; ctypes lets other Python threads run meanwhile."""
    value, points, _ = inputs
    batch, cells, heads, channels = value.shape
    sizes = (batch, cells, heads, channels, points.shape[1], len(shapes), points.shape[4])
    memory = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*first, *inputs, *outputs)]
    flat = [size for pair in shapes for size in pair]
    status = function(_DTYPES[value.dtype], int(fused), _array(sizes), _array(flat), *memory)
    if status:
        raise torch.OutOfMemoryError(
            f"not enough memory for multi-scale deformable attention over {batch} x {cells} cells on the CPU"
        )


def _array(numbers: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)


# ---- build ----


def _compiler() -> tuple[list[str], str]:
    advice = (
        "GCC or Clang is needed (Debian, Ubuntu: `apt install g++`; macOS: `xcode-select --install`), or the variable "
        "CXX must name one that works. Without it the engine 'torch' serves, with the same results"
    )
    if sys.platform == "win32":
        raise NoCompilerError("the C++ engine is built with GCC or Clang, not on Windows; the engine 'torch' serves")
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    return command, ask_compiler(command, "--version", advice).splitlines()[0]


def _arguments(command: list[str]) -> list[str]:
    native = next(([flag] for flag in ("-march=native", "-mcpu=native") if accepts(command, flag)), [])
    threads = ["-fopenmp"] if accepts(command, "-fopenmp", program=_OPENMP) else []
    installed = Path(torch.__file__).parent  # as torch.utils.cpp_extension says, whose import is slow and warns
    return [
        *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC", "-shared"),
        *native,
        *threads,
        f"-I{installed / 'include'}",
        *(f"-L{installed / 'lib'}", f"-Wl,-rpath,{installed / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]


def _try_out(library: ctypes.CDLL) -> None:
    """Both forms, forward and backward, against the plain engine on a small problem."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    shapes = [(4, 5), (2, 3)]
    value, points, weights = random(2, 26, 2, 20), random(2, 26, 2, 2, 3, 2), random(2, 26, 2, 2, 3)
    grad_output = random(2, 26, 40)
    engine = partial(_forward, library), partial(_backward, library)
    if not torch_engine.agrees(*engine, grad_output, value, shapes, points, weights, tolerance=1e-4):
        raise BuildError("the library was built but computes wrong numbers; please report this with your compiler")


EXTENSION = Extension("cpp", "ms_deform_attn_cpu.cpp", _compiler, _arguments, _try_out)
