"""The CUDA engine without a GPU: its source compiled for the CPU (cuda_on_cpu/), where blocks run one after the other
and the threads of a block in turns from barrier to barrier. This is the arithmetic and the barriers of every kernel;
what only a GPU shows (instructions of its own, races between blocks, speed) is in the tests marked `gpu`.
"""

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fcclip.ops import ENGINES, cuda_engine
from fcclip.ops.availability import Availability
from fcclip.ops.builder import SOURCES
from tests.msda_engines import Engine
from tests.ops import test_ms_deform_attn as every_engine
from tests.ops.test_ms_deform_attn import FORMS, assert_agrees, compute, inputs, with_shapes

HEADERS = Path(__file__).parent / "cuda_on_cpu"
PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"

globals().update({name: value for name, value in vars(every_engine).items() if name.startswith("test_")})
for _name in ("test_the_same_bits_with_any_number_of_threads", "test_gradients_are_those_of_finite_differences"):
    del globals()[_name]  # there are no such threads; the loop knows the gradients already, and 50 times faster

COMMON = [(5, 11), (3, 2), (9, 4)]  # three levels, four points: the kernels that know their sizes
NAMES = ("output", "grad_value", "grad_points", "grad_weights")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    """The kernels as functions of the CPU."""
    return compiled(SOURCES / cuda_engine.EXTENSION.sources[0], tmp_path_factory.mktemp("cuda_on_cpu"))


def compiled(source: Path, folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA source for the CPU")
    built = folder / "library.so"
    flags = ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", f"-I{HEADERS}", "-x", "c++"]
    few_images = "-DFCCLIP_GRID_HEIGHT=2"  # so that the third is computed by the blocks of the first
    done = subprocess.run([compiler, *flags, few_images, str(source), "-o", str(built)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return ctypes.CDLL(str(built))


@pytest.fixture
def engine(library, monkeypatch) -> Engine:
    """The CUDA engine, for tensors of the CPU."""
    monkeypatch.setattr(cuda_engine, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda_engine, "load", lambda extension: library)
    monkeypatch.setattr(cuda_engine, "available", lambda device: Availability())
    monkeypatch.setattr(cuda_engine, "_on", lambda device: contextlib.nullcontext((0, 0)))
    yield Engine("cuda", "cpu")
    library.fcclip_cpu_order(0)
    library.fcclip_cpu_fail(0)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def common(form, *, dtype=torch.float32, channels=32, **sizes):
    """A problem for the kernels that know their sizes, with tiles that are not full and samples outside."""
    sizes = {"batch": 2, "heads": 2, "points": 4, "queries": 70, "spread": 1.3, **sizes}
    return inputs(COMMON, form=form, dtype=dtype, channels=channels, **sizes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels", [8, 16, 32, 64])
def test_the_kernels_that_know_their_sizes_equal_the_loop(engine, form, dtype, channels):
    assert_agrees(form, engine, *with_shapes(COMMON, common(form, dtype=dtype, channels=channels, batch=1)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [32, 12, 33], ids=["common", "vectors", "odd"])
def test_no_barrier_is_missing(engine, library, form, channels):
    """Threads reach their barriers in other orders each time. Only the atomics of grad_value may notice."""
    tensors = common(form, channels=channels, batch=3)
    results = []
    for seed in range(4):
        library.fcclip_cpu_order(seed)
        results.append(compute(form, engine, *with_shapes(COMMON, tensors)))
    for other in results[1:]:
        for name, tensor, first in zip(NAMES, other, results[0]):
            tolerance = 1e-5 if name == "grad_value" else 0
            assert (tensor - first).abs().max() <= tolerance, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_deterministic_gradients_equal_the_loop_and_keep_every_bit(engine, library, deterministic, form, dtype):
    tensors = common(form, dtype=dtype, channels=5, batch=3, heads=1)
    assert_agrees(form, engine, *with_shapes(COMMON, tensors))
    results = []
    for seed in range(3):
        library.fcclip_cpu_order(seed)
        results.append(compute(form, engine, *with_shapes(COMMON, tensors)))
    assert all(torch.equal(tensor, first) for other in results[1:] for tensor, first in zip(other, results[0]))


@pytest.mark.parametrize("form", FORMS)
def test_places_past_32_bits_are_sorted_as_64(engine, monkeypatch, deterministic, form):
    monkeypatch.setattr(cuda_engine, "_PLACES_OF_32_BITS", 0)
    assert_agrees(form, engine, *with_shapes(COMMON, common(form, channels=4)))


def test_all_samples_may_look_at_one_cell_and_a_block_adds_to_it_once_a_level(engine, library):
    """One list of 256 corners in each table; 70 queries are two blocks, and a sample has four cells."""
    value, points, weights, grad_output = common("locations")
    points[:] = torch.tensor([0.31, 0.42])
    library.fcclip_cpu_take_additions()
    assert_agrees("locations", engine, *with_shapes(COMMON, (value, points, weights, grad_output)))
    batch, heads, channels, blocks, cells = 2, 2, 32, 2, 4
    assert library.fcclip_cpu_take_additions() == batch * heads * channels * blocks * cells * len(COMMON)


@pytest.mark.parametrize("form", FORMS)
def test_every_sample_may_look_at_cells_of_its_own(engine, form):
    """Tables as full as they become."""
    shapes = [(40, 40)]
    tensors = inputs(shapes, form=form, dtype=torch.float32, batch=1, heads=1, channels=4, queries=130, points=4)
    assert_agrees(form, engine, *with_shapes(shapes, [tensor[:, :1600] for tensor in tensors]))


@pytest.mark.parametrize("form", FORMS)
def test_memory_that_does_not_begin_at_16_bytes(engine, form):
    tensors = []
    for tensor in common(form, batch=1):
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
        assert room.copy_(tensor).data_ptr() % 16 == 4
        tensors.append(room)
    assert_agrees(form, engine, *with_shapes(COMMON, tensors))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("points", [60, 400])
def test_many_points_leave_room_for_fewer_queries(engine, form, points):
    shapes = [(3, 3)]
    tensors = inputs(shapes, form=form, dtype=torch.float32, batch=1, heads=1, queries=9, points=points)
    assert_agrees(form, engine, *with_shapes(shapes, tensors))


def test_more_points_than_a_block_has_memory_for_are_refused(engine):
    tensors = inputs([(1, 1)], form="locations", dtype=torch.float32, batch=1, heads=1, queries=1, points=20_000)
    with pytest.raises(RuntimeError, match=r"'backward' .* status -1: more samples of a query .* P\) = .*, 20000\)"):
        compute("locations", engine, *with_shapes([(1, 1)], tensors))


def test_more_levels_than_the_kernels_take_are_refused(engine):
    shapes = [(1, 1)] * 65
    tensors = inputs(shapes, form="locations", dtype=torch.float32, batch=1, heads=1, queries=1, points=1)
    with pytest.raises(ValueError, match="at most 64 levels, got 65"):
        compute("locations", engine, *with_shapes(shapes, tensors))
    shapes = shapes[1:]
    tensors = inputs(shapes, form="fused", dtype=torch.float32, batch=1, heads=1, points=1)
    assert_agrees("fused", engine, *with_shapes(shapes, tensors))


def test_sizes_that_the_kernels_cannot_count_are_refused(engine):
    value = torch.empty(1).expand(1, 4, 2**15, 2**15)
    points, weights = torch.empty(1).expand(1, 1, 2**15, 1, 1, 2), torch.empty(1).expand(1, 1, 2**15, 1, 1)
    with pytest.raises(ValueError, match=r"counts to 2147483647, got \(B, S, M, D, N, L, P\) = \(1, 4, 32768, 32768"):
        cuda_engine.forward(False, value, [(2, 2)], points, weights)


def test_a_launch_that_fails_names_kernel_sizes_and_cause(engine, library):
    library.fcclip_cpu_fail(700)
    with pytest.raises(
        RuntimeError,
        match=r"CUDA kernel 'forward' .* status 700: made up for a test; \(B, S, M, D, N, L, P\) = "
        r"\(2, 97, 2, 32, 97, 3, 4\), levels \[\(5, 11\), \(3, 2\), \(9, 4\)\], torch.float32, cpu",
    ):
        compute("fused", engine, *with_shapes(COMMON, common("fused")))


def test_a_gpu_that_the_library_was_not_built_for_is_named(engine, library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(cuda_engine, "_architectures_of", lambda library: ["sm_80", "sm_90", "compute_90"])
    library.fcclip_cpu_fail(209)
    with pytest.raises(
        RuntimeError,
        match="status 209: it was built for sm_80, sm_90, compute_90, which Old GPU \\(sm_70\\) cannot run; "
        "`TORCH_CUDA_ARCH_LIST=7.0 python -m fcclip.ops.build cuda --force` builds it for this GPU",
    ):
        compute("fused", engine, *with_shapes(COMMON, common("fused")))


# ---- the peer that it is measured against ----


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """benchmarks/peers/published_ms_deform_attn.py with its kernels on the CPU."""
    spec = importlib.util.spec_from_file_location("published_ms_deform_attn", PEERS / "published_ms_deform_attn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = compiled(PEERS / "published_ms_deform_attn.cu", tmp_path_factory.mktemp("peer_on_cpu"))
    module.DEVICES = ("cpu",)
    module._library = lambda: library
    module._on = lambda device: contextlib.nullcontext(0)
    return module


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("channels", [3, 32, 40, 64, 71])
def test_the_published_parallelisation_passes_the_same_test(peer, monkeypatch, form, dtype, channels):
    monkeypatch.setitem(ENGINES, "published", peer)
    shapes = [(4, 5), (2, 3)]
    tensors = inputs(shapes, form=form, dtype=dtype, batch=2, heads=2, channels=channels, points=2, spread=1.3)
    assert_agrees(form, Engine("published", "cpu"), *with_shapes(shapes, tensors))
