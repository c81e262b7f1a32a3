"""Multi-scale deformable attention in CUDA: csrc/ms_deform_attn.cu, built by `fcclip.ops.build` with nvcc.

fp32, fp64, fp16 and bf16, the half types computed in fp32. The gradient of the values is added up with atomics, in an
order that changes from run to run; where `torch.use_deterministic_algorithms` asks for it, samples are sorted instead
and every bit is the same each time. Waits for nothing and takes all memory from torch: it can be captured in graphs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fcclip.errors import InputError
from fcclip.ops import torch_engine
from fcclip.ops.availability import Availability
from fcclip.ops.builder import COMMAND, BuildError, Extension, NoCompilerError, ask_compiler, availability, int64s, load

DEVICES = ("cuda",)
Shapes = Sequence[tuple[int, int]]

MAX_LEVELS = 64  # kMaxLevels of the source

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_NO_KERNEL_IMAGE = (209, 222)  # cudaErrorNoKernelImageForDevice, cudaErrorUnsupportedPtxVersion
_INT_MAX = 2**31 - 1
_PLACES_OF_32_BITS = _INT_MAX  # as many as can be counted with 32 bits, one of them for samples that lie nowhere


def available(device: torch.device) -> Availability:
    """On an NVIDIA GPU, once it is built for its architecture."""
    if device.type not in DEVICES:
        return Availability(f"it computes on CUDA devices, not on {device.type}")
    if torch.version.hip is not None or not torch.cuda.is_available():
        return Availability("torch sees no NVIDIA GPU")
    built = availability(EXTENSION)
    if built and not _covers(_architectures_of(load(EXTENSION)), torch.cuda.get_device_capability(device)):
        return Availability(_no_kernel_for(load(EXTENSION), device), broken=True)
    return built


def forward(
    fused: bool, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, *, library: ctypes.CDLL | None = None
) -> Tensor:
    """As `torch_engine.forward`, not differentiable; `library`: another than the one that is loaded."""
    batch, _, heads, channels = value.shape
    output = value.new_empty(batch, points.shape[1], heads * channels)
    _call(library or load(EXTENSION), "forward", fused, value, shapes, points, (value, points, weights, output))
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
    grad_points, grad_weights = torch.empty_like(points), torch.empty_like(weights)
    grad_value = None
    if not torch.are_deterministic_algorithms_enabled():
        grad_value = torch.zeros_like(value, dtype=_computed_in(value.dtype))
    target = ctypes.c_void_p() if grad_value is None else grad_value
    memory = (grad_output, value, points, weights, target, grad_points, grad_weights)
    _call(library, "backward", fused, value, shapes, points, memory)
    if grad_value is None:
        grad_value = _sorted_grad_value(library, fused, grad_output, value, shapes, points, weights)
    return grad_value.to(value.dtype), grad_points, grad_weights


def _sorted_grad_value(
    library: ctypes.CDLL,
    fused: bool,
    grad_output: Tensor,
    value: Tensor,
    shapes: Shapes,
    points: Tensor,
    weights: Tensor,
) -> Tensor:
    """The gradient of the values with the same bits each time: every cell adds up its samples in their own order."""
    batch, _, heads, _ = value.shape
    num_places = batch * heads * sum((height + 1) * (width + 1) for height, width in shapes)
    index_type = torch.int32 if num_places < _PLACES_OF_32_BITS else torch.int64
    places = torch.empty(weights.shape, dtype=index_type, device=value.device)
    coefficients = torch.empty(*weights.shape, 4, dtype=_computed_in(value.dtype), device=value.device)
    wide = ctypes.c_int32(index_type == torch.int64)
    _call(library, "places", fused, value, shapes, points, (wide, points, weights, places, coefficients))
    places, order = torch.sort(places.flatten(), stable=True)
    starts = torch.searchsorted(places, torch.arange(num_places + 1, dtype=index_type, device=value.device))
    grad_value = torch.empty_like(value)
    _call(library, "gather", fused, value, shapes, points, (grad_output, order, starts, coefficients, grad_value))
    return grad_value


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _call(
    library: ctypes.CDLL,
    kernel: str,
    fused: bool,
    value: Tensor,
    shapes: Shapes,
    points: Tensor,
    memory: Sequence[Tensor | ctypes.c_int32 | ctypes.c_void_p],
) -> None:
    """Queues a kernel on the current stream of the device of its tensors.

    Raises:
        ValueError: sizes that it was not made for.
        RuntimeError: the launch failed.
    """
    batch, cells, heads, channels = value.shape
    sizes = (batch, cells, heads, channels, points.shape[1], len(shapes), points.shape[4])
    if len(shapes) > MAX_LEVELS:
        raise InputError(f"the engine 'cuda' takes at most {MAX_LEVELS} levels, got {len(shapes)}")
    if max(*sizes, heads * channels * value.element_size(), sizes[5] * sizes[6]) > _INT_MAX:
        raise InputError(f"the engine 'cuda' counts to {_INT_MAX}, got (B, S, M, D, N, L, P) = {sizes}")
    numbers = int64s(sizes), int64s([size for pair in shapes for size in pair])
    arguments = [ctypes.c_void_p(part.data_ptr()) if isinstance(part, Tensor) else part for part in memory]
    function = getattr(library, f"fcclip_msda_{kernel}")
    with _on(value.device) as (index, stream):
        status = function(_DTYPES[value.dtype], int(fused), *numbers, index, ctypes.c_void_p(stream), *arguments)
    if status:
        is_foreign = status in _NO_KERNEL_IMAGE
        cause = _no_kernel_for(library, value.device) if is_foreign else _text(library.fcclip_msda_error, status)
        raise RuntimeError(
            f"the CUDA kernel '{kernel}' of multi-scale deformable attention failed with status {status}: {cause}; "
            f"(B, S, M, D, N, L, P) = {sizes}, levels {list(shapes)}, {value.dtype}, {value.device}"
        )


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[tuple[int, int]]:
    """With `device` as the current one: its index and its current stream."""
    with torch.cuda.device(device):
        yield device.index, torch.cuda.current_stream(device).cuda_stream


def _text(function: ctypes._CFuncPtr, *arguments: int) -> str:
    function.restype = ctypes.c_char_p
    return function(*arguments).decode()


# ---- architectures ----


def _architectures_of(library: ctypes.CDLL) -> list[str]:
    """What a library holds: "sm_80" for machine code, "compute_90" for what a driver can still translate."""
    return _text(library.fcclip_msda_architectures).split()


def _covers(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on its own generation from its own number on, PTX on everything that came later."""
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and (major, minor) <= capability:
            return True
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return False


def _no_kernel_for(library: ctypes.CDLL, device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"it was built for {', '.join(_architectures_of(library))}, which {torch.cuda.get_device_name(device)} "
        f"(sm_{major}{minor}) cannot run; `TORCH_CUDA_ARCH_LIST={major}.{minor} {COMMAND} cuda --force` builds it for "
        f"this GPU"
    )


def target_architectures() -> list[str]:
    """What to compile for: TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else the GPUs of this machine, else sm_80 and sm_90
    with PTX for later ones.

    Raises:
        NoCompilerError: something in TORCH_CUDA_ARCH_LIST that is not an architecture.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed and torch.version.hip is None and torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        listed = [f"{major}.{minor}" for major, minor in sorted(capabilities)]
    targets = []
    for entry in listed or ["8.0", "9.0+PTX"]:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise NoCompilerError(f"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0+PTX', got '{entry}'")
        number = match[1] + match[2]  # the letter of 9.0a gives instructions that nothing here uses
        targets += [f"sm_{number}"] + [f"compute_{number}"] * bool(match[4])
    return list(dict.fromkeys(targets))


# ---- build ----


def _compiler() -> tuple[list[str], str]:
    advice = (
        "The CUDA toolkit is needed (https://developer.nvidia.com/cuda-downloads, or `conda install -c nvidia "
        "cuda-nvcc cuda-cudart-dev`), with CUDA_HOME or PATH leading to its nvcc. Without it the engines 'triton' and "
        "'torch' serve, with the same results"
    )
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    home = next(filter(None, homes), None)
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None:
        usual = Path("/usr/local/cuda/bin/nvcc")
        nvcc = str(usual) if usual.exists() else "nvcc"
    command = [nvcc]
    release = ask_compiler(command, "--version", advice).splitlines()[-1]
    return command, f"{release} for {' '.join(target_architectures())}"


def _arguments(command: list[str]) -> list[str]:
    targets = target_architectures()
    codes = [f"-gencode=arch=compute_{target.partition('_')[2]},code={target}" for target in targets]
    return [
        *("-std=c++17", "-O3", "--threads", "0", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC"),
        f'-DFCCLIP_ARCHITECTURES="{" ".join(targets)}"',
        *codes,
    ]


def _try_out(library: ctypes.CDLL) -> None:
    """Both forms against the plain engine on a small problem, on every GPU of this machine that it was built for."""
    if not torch.cuda.is_available():  # built for another machine
        return
    engine = partial(forward, library=library), partial(backward, library=library)
    for index in range(torch.cuda.device_count()):
        if not _covers(_architectures_of(library), torch.cuda.get_device_capability(index)):
            continue
        if not torch_engine.agrees(*engine, f"cuda:{index}", channels=32, tolerance=1e-3):
            raise BuildError(
                f"the library was built but computes wrong numbers on {torch.cuda.get_device_name(index)}; please "
                f"report this with your versions of CUDA and its driver"
            )


EXTENSION = Extension("cuda", ("ms_deform_attn.cu",), _compiler, _arguments, _try_out)
