"""The Triton engine: without a GPU its kernels run in triton's interpreter, on the CPU, against the written-out loop.

Whether triton interprets is decided when it is imported, so these tests run in a process of their own, which the first
one starts. The interpreter cuts bf16 off instead of rounding it, so there results may be one unit off.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fcclip.ops import triton_engine
from fcclip.ops.availability import Availability
from tests.msda_engines import Engine
from tests.ops import test_ms_deform_attn as every_engine
from tests.ops.test_ms_deform_attn import FORMS, HALVES, assert_agrees, compute, inputs, with_shapes

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.device("cuda")

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of the interpreter")
normal = pytest.mark.skipif(INTERPRETED, reason="not in the process of the interpreter")


@normal
def test_the_kernels_in_the_interpreter():
    """About half a minute of one core."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture
def engine(monkeypatch) -> Engine:
    """The Triton engine, for tensors of the CPU."""
    monkeypatch.setattr(triton_engine, "DEVICES", ("cpu",))
    return Engine("triton", "cpu")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def small(shapes, form, **sizes):
    return inputs(shapes, form=form, **{"batch": 1, "heads": 1, "queries": 7, "spread": 1.4, **sizes})


@interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=["fp64", "fp32", "fp16"])
@pytest.mark.parametrize("levels", [1, 3])
def test_both_forms_equal_the_loop(engine, form, dtype, levels):
    shapes = [(4, 2), (2, 3), (1, 5)][:levels]
    sizes = {"batch": 3 - levels // 2, "heads": levels - levels // 2}  # 3 and 1, or 2 and 2
    assert_agrees(form, engine, *with_shapes(shapes, small(shapes, form, dtype=dtype, **sizes)))


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_bf16_equals_the_loop_as_far_as_the_interpreter_can(engine, form, monkeypatch):
    """It cuts off: a whole unit of the last place instead of half of one."""
    unit = torch.finfo(torch.bfloat16).eps
    monkeypatch.setattr(every_engine, "torch", _OtherEpsilon(2 * unit))
    shapes = [(2, 3), (3, 1)]
    assert_agrees(form, engine, *with_shapes(shapes, small(shapes, form, dtype=torch.bfloat16)))


class _OtherEpsilon:
    """torch, but for the epsilon that the tolerance is made of."""

    def __init__(self, eps):
        self.eps = eps

    def __getattr__(self, name):
        return getattr(torch, name) if name != "finfo" else lambda dtype: self


@interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "channels", "points"), [(1, 1, 1), (3, 5, 3), (1, 33, 8)])
def test_sizes_need_not_be_powers_of_two(engine, form, heads, channels, points):
    shapes = [(2, 3), (3, 1)]
    sizes = {"heads": heads, "channels": channels, "points": points, "dtype": torch.float32}
    assert_agrees(form, engine, *with_shapes(shapes, small(shapes, form, **sizes)))


@interpreted
def test_tiles_that_are_not_full_and_more_queries_than_one(engine):
    shapes = [(9, 11), (3, 10)]
    sizes = {"heads": 1, "channels": 2, "points": 1, "dtype": torch.float32}
    for form, queries in (("fused", 129), ("locations", 129), ("locations", 70)):
        assert_agrees(form, engine, *with_shapes(shapes, small(shapes, form, queries=queries, **sizes)))


@interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, HALVES[1]], ids=["fp64", "fp16"])
def test_deterministic_gradients_equal_the_loop(engine, deterministic, form, dtype):
    shapes = [(3, 4), (2, 1)]
    assert_agrees(form, engine, *with_shapes(shapes, small(shapes, form, dtype=dtype, channels=5, batch=2)))


@interpreted
@pytest.mark.parametrize(
    ("form", "where"), [("fused", float("nan")), ("locations", float("nan")), ("locations", -float("inf"))]
)
def test_nowhere_is_zero(engine, form, where):
    every_engine.test_far_away_and_nowhere_is_zero_and_so_are_its_gradients(engine, form, torch.float32, where)


@interpreted
def test_what_counts_and_what_spreads_is_as_in_every_engine(engine):
    every_engine.test_borders_corners_and_whole_pixels_count_as_in_the_loop(engine, torch.float32)
    every_engine.test_values_that_no_sample_looks_at_do_not_reach_the_output(engine, "locations")
    shapes = [(2, 3), (3, 1)]
    value, offsets, logits, grad_output = small(shapes, "fused", dtype=torch.float32)
    logits[:, ::3] *= 1000
    logits[:, 1::3] -= 1e5
    logits[:, 2::3, :, 0] = -float("inf")
    assert_agrees("fused", engine, value, shapes, offsets, logits, grad_output)
    logits[0, 3, 0, 0, 0] = float("nan")
    output = compute("fused", engine, value, shapes, offsets, logits, grad_output)[0]
    assert output[0, 3].isnan().all() and output.isnan().sum() == 3


@interpreted
def test_one_query_on_one_cell(engine):
    for form in FORMS:
        every_engine.test_one_query_on_one_cell(engine, form)


@interpreted
def test_the_kernels_add_up_what_every_program_found(engine):
    """All samples of all queries on one cell."""
    value, points, weights, grad_output = small([(5, 6)], "locations", dtype=torch.float32, queries=70)
    points[:] = torch.tensor([0.31, 0.42])
    grads = compute("locations", engine, value, [(5, 6)], points, weights, grad_output)[1]
    assert ((grads != 0).any(-1).sum(1) <= 4).all()
    assert_agrees("locations", engine, value, [(5, 6)], points, weights, grad_output)


@interpreted
def test_more_levels_than_the_kernels_take_are_refused(engine):
    shapes = [(1, 1)] * 9
    with pytest.raises(ValueError, match="'triton' takes at most 8 levels, got 9"):
        compute("fused", engine, *with_shapes(shapes, small(shapes, "fused")))


# ---- when it cannot run ----


@pytest.fixture
def gpu(monkeypatch):
    """Function (capability) -> nothing: from now on torch sees this GPU."""

    def pretend(capability):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "a GPU")

    return pretend


@normal
def test_it_says_why_it_cannot_run(gpu, monkeypatch):
    assert triton_engine.available(torch.device("cpu")) == Availability("it computes on CUDA devices, not on cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(importlib.util, "find_spec", lambda name: object())
        assert triton_engine.available(CUDA) == Availability("torch sees no NVIDIA GPU")
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "triton is not installed; `pip install triton`" in triton_engine.available(CUDA).reason
    gpu((7, 5))
    assert "triton needs sm_80 or newer, a GPU is sm_75" in triton_engine.available(CUDA).reason


@normal
def test_a_triton_that_does_not_fit_is_broken(gpu, monkeypatch):
    def fail():
        raise ImportError("cannot import name 'knobs'")

    gpu((9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_engine, "_kernels", fail)
    availability = triton_engine.available(CUDA)
    assert availability.broken and "triton cannot be used: ImportError: cannot import name" in availability.reason


@normal
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus_and_only_once_for_all_images(capability):
    """triton brings all that it needs to compile; what is missing here is a driver that says for which GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    program = f"from tests.ops.test_triton_engine import compile_kernels; compile_kernels({capability})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def compile_kernels(capability: int) -> None:
    """All kernels, one form in fp32 and the other in bf16; fails if an image of another size compiles them again."""
    from types import SimpleNamespace

    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", capability, 32)
    answers = {"get_current_device": 0, "get_current_stream": 0, "get_current_target": target}
    driver.set_active(SimpleNamespace(**{name: lambda *_, answer=answer: answer for name, answer in answers.items()}))
    kernels = triton_engine._kernels()
    images = ([(32, 32), (64, 64), (128, 128)], [(25, 38), (50, 76), (99, 151)])
    for dtype, fused in ((torch.float32, True), (torch.bfloat16, False)):
        compiled = []
        for shapes in images:
            cells = sum(height * width for height, width in shapes)
            value = torch.empty(2, cells, 8, 32, device="meta")
            points = torch.empty(2, cells if fused else 300, 8, 3, 4, 2, device="meta")
            sizes, constants, _ = triton_engine._launch(fused, value, shapes, points)
            tuned = {"TILE": 32, "grid": (1, 1), "num_warps": 4}
            forward = kernels.forward.fn.warmup(*[dtype] * 4, *sizes, **constants, **tuned)
            memory = [*[dtype] * 4, torch.float32, *[dtype] * 4]
            constants.update(SORTED=False, BLOCK_K=16)
            backward = kernels.backward.fn.warmup(*memory, *sizes, 2, cells + 500, **constants, **tuned)
            compiled.append((forward, backward))
            assert all("global.v4" in kernel.asm["ptx"] for kernel in compiled[0]), "no loads of 16 bytes"
        assert compiled[0][0] is compiled[1][0] and compiled[0][1] is compiled[1][1]
    constants = {name: constants[name] for name in ("M", "D", "L", "P", "BLOCK")}
    memory = (torch.float32, torch.int64, torch.int64, torch.float32, torch.float32)
    kernels.gather.warmup(*memory, *sizes[:-2], cells, cells + 500, **constants, grid=(1, 1), num_warps=1)


@normal
def test_triton_is_imported_by_the_first_call_only():
    program = "import sys, fcclip.ops; sys.exit('fcclip.ops.triton_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
