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
from fcclip.ops.builder import BuildError, Extension, NoCompilerError, accepts, ask_compiler, availability, int64s, load

DEVICES = ("cpu",)
Shapes = Sequence[tuple[int, int]]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads(); }\n"


def available(device: torch.device) -> Availability:
    """On a CPU, once it is built."""
    if device.type not in DEVICES:
        return Availability(f"it computes on the CPU, not on {device.type}")
    return availability(EXTENSION)


def forward(
    fused: bool, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, *, library: ctypes.CDLL | None = None
) -> Tensor:
    """As `torch_engine.forward`, not differentiable; `library`: another than the one that is loaded."""
    library = library or load(EXTENSION)
    if value.dtype == torch.float16:
        return forward(fused, value.float(), shapes, points.float(), weights.float(), library=library).half()
    batch, _, heads, channels = value.shape
    output = value.new_empty(batch, points.shape[1], heads * channels)
    _call(library.fcclip_msda_forward, fused, shapes, (value, points, weights), (output,))
    return output


def backward(
    fused: bool,
    grad_output: Tensor,
    value: Tensor,
    shapes: Shapes,
    points: Tensor,
    weights: Tensor,
    *,
    library: ctypes.CDLL | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_engine.backward`; `library` as for `forward`."""
    library = library or load(EXTENSION)
    if value.dtype == torch.float16:
        inputs = (grad_output.float(), value.float(), shapes, points.float(), weights.float())
        return tuple(grad.half() for grad in backward(fused, *inputs, library=library))
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
    status = function(_DTYPES[value.dtype], int(fused), int64s(sizes), int64s(flat), *memory)
    if status:
        raise torch.OutOfMemoryError(
            f"not enough memory for multi-scale deformable attention over {batch} x {cells} cells on the CPU"
        )


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
    engine = partial(forward, library=library), partial(backward, library=library)
    if not torch_engine.agrees(*engine, "cpu", channels=20, tolerance=1e-4):
        raise BuildError("the library was built but computes wrong numbers; please report this with your compiler")


EXTENSION = Extension(
    name="cpp",
    sources=("ms_deform_attn_cpu.cpp", "output_maps_cpu.cpp"),
    headers=("exponential.h",),
    compiler=_compiler,
    arguments=_arguments,
    try_out=_try_out,
)
