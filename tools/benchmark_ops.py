"""The part `ops` of tools/benchmark.py: multi-scale deformable attention, every engine that this machine can run.

All engines take turns in every round, so that whatever else the machine does slows all of them; before that, each must
give the numbers of the first. On a GPU with nvcc the published CUDA operator takes part as the engine `published`
(benchmarks/peers/published_ms_deform_attn.py), and the others are compared with it instead of `torch`. The floor of a
row is the longer of two times that nothing can beat: that of its bytes, if every input were read and every output
written once, and that of its multiplications and additions. The machine's own speed in both is measured in the same
run, by a large copy and a large matrix product in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fcclip.config import lookup, resolve_device
from fcclip.engine import environment_report
from fcclip.errors import InputError
from fcclip.ops import ENGINES, ms_deform_attn, ms_deform_attn_fused

STRIDES = (32, 16, 8)  # of FC-CLIP's encoder, coarse to fine
HEADS, CHANNELS, POINTS = 8, 32, 4
SIZES = ("512x512", "640x960", "800x1216", "1024x1024", "1024x2048")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FORMS = {"locations": ms_deform_attn, "fused": ms_deform_attn_fused}
DIRECTIONS = ("forward", "backward")
CPU_DEFAULTS = {"sizes": ["512x512", "640x960"], "batch": [1], "dtypes": ["float32"]}  # about a minute on two cores
GPU_DEFAULTS = {"sizes": list(SIZES), "batch": [1, 2, 8], "dtypes": ["float32", "bfloat16"]}
ENOUGH_SECONDS = 0.02  # one measurement repeats what is shorter
PEERS = {"published": "published_ms_deform_attn"}  # engines that are measured but never chosen
PEER_FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "peers"
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}  # half types: four times their epsilon
MIB = 2**20


@dataclass(frozen=True)
class Problem:
    """What is attended to: `form` of FORMS, `size` "HxW" of the image."""

    size: str
    batch: int
    dtype: str
    form: str
    device: str

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the levels, coarse to fine."""
        height, width = image_size(self.size)
        return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]

    def tensors(self) -> list[Tensor]:
        """value, points, weights and the gradient of the output. Offsets lie around the ring on which a training
        begins, at 1 to 4 pixels with a deviation of one, so neighbours look at neighbours, as in a trained network.
        """
        generator = torch.Generator().manual_seed(0)
        cells = sum(height * width for height, width in self.shapes)
        samples = (self.batch, cells, HEADS, len(STRIDES), POINTS)
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
        direction = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None]
        offsets = torch.randn(*samples, 2, generator=generator) + direction * torch.arange(1, POINTS + 1)[:, None]
        weights = torch.randn(samples, generator=generator)
        if self.form == "locations":
            sizes = torch.tensor([(width, height) for height, width in self.shapes])[:, None]
            centres = []
            for height, width in self.shapes:
                x, y = ((torch.arange(size) + 0.5) / size for size in (width, height))
                centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
            offsets = torch.cat(centres)[:, None, None, None] + offsets / sizes
            weights = weights.flatten(-2).softmax(-1).view(samples)
        value = torch.randn(self.batch, cells, HEADS, CHANNELS, generator=generator)
        grad_output = torch.randn(self.batch, cells, HEADS * CHANNELS, generator=generator)
        return [tensor.to(self.device, DTYPES[self.dtype]) for tensor in (value, offsets, weights, grad_output)]

    def cost(self, direction: str) -> tuple[int, int]:
        """Bytes that must move and floating-point operations. Forward multiplies and adds each channel of four corners
        of every sample; backward does so twice, for the products with the gradient and for the gradient of the value.
        """
        cells = sum(height * width for height, width in self.shapes)
        values = self.batch * cells * HEADS * CHANNELS
        samples = self.batch * cells * HEADS * len(STRIDES) * POINTS
        once = values + 3 * samples  # value, two coordinates, one weight
        numbers = {"forward": once + values, "backward": 2 * once + values}[direction]
        flops = {"forward": 8, "backward": 16}[direction] * samples * CHANNELS
        return numbers * DTYPES[self.dtype].itemsize, flops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ops`."""
    parser.add_argument("--device", default="auto", help="as MODEL.DEVICE (default auto)")
    parser.add_argument("--sizes", nargs="+", metavar="HxW", help=f"images, e.g. {' '.join(SIZES)}")
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="images at once")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), metavar="FORM", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--engines", nargs="+", metavar="ENGINE", help="default: all that can run")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of every engine (default 7)")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the results")
    parser.set_defaults(run=benchmark_ops)


def load_peer(name: str) -> ModuleType:
    """A module of benchmarks/peers: what ours is measured against."""
    spec = importlib.util.spec_from_file_location(name, PEER_FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def with_peers() -> Iterator[None]:
    """For as long as it lasts, the peers are engines like all others."""
    try:
        ENGINES.update({name: load_peer(file) for name, file in PEERS.items()})
        yield
    finally:
        for name in PEERS:
            ENGINES.pop(name, None)


@with_peers()
def benchmark_ops(options: argparse.Namespace) -> dict[str, Any]:
    """Checks that all engines agree, measures them in turns, prints the table, and returns everything as JSON values.

    Raises:
        ValueError: engines disagree, one that is named cannot run, or the options cannot work.
    """
    device = resolve_device(options.device)
    defaults = GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    sizes, batches, dtypes = (getattr(options, name) or defaults[name] for name in ("sizes", "batch", "dtypes"))
    for kind, names, known in (("dtype", dtypes, DTYPES), ("form", options.forms, FORMS)):
        for name in names:
            lookup(kind, name, known)
    if options.rounds < 1 or min(batches) < 1:
        raise InputError("--rounds and --batch must be at least 1")
    engines, absent = engines_that_run(device, options.engines)
    for name, reason in absent.items():
        print(f"without '{name}': {reason}")
    problems = [
        Problem(size, batch, dtype, form, str(device))
        for dtype, batch, size, form in itertools.product(dtypes, batches, sizes, options.forms)
    ]
    for dtype, form in itertools.product(dtypes, options.forms):
        check_agreement(Problem("128x160", 1, dtype, form, str(device)), engines)
    speed = machine_speed(device)
    rows = [row for problem in problems for row in measure(problem, engines, speed, options.rounds)]
    report = {
        "benchmark": "ops",
        "levels": len(STRIDES),
        "heads": HEADS,
        "channels": CHANNELS,
        "points": POINTS,
        "rounds": options.rounds,
        "machine": speed,
        "absent": absent,
        "environment": environment_report(device),
        "rows": rows,
    }
    _print(report)
    return report


def image_size(text: str) -> tuple[int, int]:
    """ "640x960" -> (640, 960).

    Raises:
        ValueError: anything else.
    """
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise InputError(f"--sizes takes HEIGHTxWIDTH in pixels, e.g. 640x960, got '{text}'")
    return int(height), int(width)


def engines_that_run(device: torch.device, names: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Engines that can run, the one that others are compared with first, and why the others cannot.

    Raises:
        ValueError: one of `names` does not exist or cannot run.
    """
    absent = {}
    for name in names or ENGINES:
        availability = lookup("engine", name, ENGINES).available(device)
        if not availability and names:
            raise InputError(f"the engine '{name}' cannot run on {device}: {availability.reason}")
        if not availability:
            absent[name] = availability.reason
    running = [name for name in dict.fromkeys(names or ENGINES) if name not in absent]
    baselines = [*PEERS, "torch"]
    return sorted(running, key=lambda name: baselines.index(name) if name in baselines else len(baselines)), absent


def check_agreement(problem: Problem, engines: list[str]) -> None:
    """Refuses to compare the speed of things that are not the same."""
    value, points, weights, grad_output = problem.tensors()
    results = {}
    for name in engines:
        tensors = [tensor.requires_grad_() for tensor in (value, points, weights)]
        output = FORMS[problem.form](tensors[0], problem.shapes, *tensors[1:], engine=name)
        results[name] = [output.detach(), *torch.autograd.grad(output, tensors, grad_output)]
    first = engines[0]
    share = AGREEMENT.get(value.dtype, 4 * torch.finfo(value.dtype).eps)
    for name in engines[1:]:
        for result, expected in zip(results[name], results[first]):
            difference, largest = float((result - expected).abs().max()), float(expected.abs().max())
            if not difference <= share * largest:
                raise InputError(
                    f"engines '{name}' and '{first}' differ by {difference:.1e} of {largest:.1e} ({problem.form}, "
                    f"{problem.dtype})"
                )


def measure(problem: Problem, engines: list[str], speed: dict[str, float], rounds: int) -> Iterator[dict[str, Any]]:
    """One row per direction and engine, from the median over rounds."""
    value, points, weights, grad_output = problem.tensors()
    calls = {name: calls_of(problem, name, value, points, weights, grad_output) for name in engines}
    memory = {name: most_memory(calls[name], problem.device) for name in engines}  # also the warm-up
    for direction in DIRECTIONS:
        repeats = {name: repeats_of(calls[name][direction], problem.device) for name in engines}
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds):
            for name in engines if turn % 2 == 0 else reversed(engines):
                seconds[name].append(timed(calls[name][direction], problem.device, repeats[name]))
        moved, flops = problem.cost(direction)
        floor = max(moved / speed["bytes_per_second"], flops / speed["flops_per_second"])
        for name in engines:
            median = statistics.median(seconds[name])
            ratios = [slow / fast for slow, fast in zip(seconds[engines[0]], seconds[name])]
            yield {
                "size": problem.size,
                "batch": problem.batch,
                "dtype": problem.dtype,
                "form": problem.form,
                "direction": direction,
                "engine": name,
                "seconds": median,
                "fastest_seconds": min(seconds[name]),
                "compared_with": engines[0],
                "ratio": statistics.median(ratios),
                "lowest_ratio": min(ratios),
                "highest_ratio": max(ratios),
                "bytes": moved,
                "flops": flops,
                "floor_seconds": floor,
                "share_of_floor": floor / median,
                "memory_mib": memory[name],
            }


def calls_of(problem: Problem, name: str, *tensors: Tensor) -> dict[str, Callable[[], Any]]:
    """What is measured of an engine: forward without autograd, and its gradients once forward is done."""
    *inputs, grad_output = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    plain = [tensor.detach() for tensor in inputs]

    def run(value: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return FORMS[problem.form](value, problem.shapes, points, weights, engine=name)

    kept: list[Tensor] = []

    def backward() -> Any:
        if not kept:
            kept.append(run(*leaves))
        return torch.autograd.grad(kept[0], leaves, grad_output, retain_graph=True)

    return {"forward": lambda: run(*plain), "backward": backward, "forget": kept.clear}


def most_memory(calls: dict[str, Callable[[], Any]], device: str) -> float | None:
    """MiB that forward with autograd and backward take at most beyond their inputs; None on a CPU."""
    if not device.startswith("cuda"):
        calls["forward"](), calls["backward"]()
        return None
    calls["forward"](), calls["backward"](), calls["forget"]()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    calls["backward"]()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def timed(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Mean seconds of a call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats


def repeats_of(call: Callable[[], Any], device: str) -> int:
    """How often a measurement calls what it measures."""
    return max(1, round(ENOUGH_SECONDS / max(timed(call, device, 1), 1e-6)))


def machine_speed(device: torch.device) -> dict[str, float]:
    """The fastest of a few large copies, in bytes read and written, and of a few matrix products in fp32."""
    numbers = torch.zeros(2**26 if device.type == "cpu" else 2**28, device=device)  # beyond any cache
    target = torch.empty_like(numbers)
    side = 2048 if device.type == "cpu" else 8192
    matrix, product = torch.randn(side, side, device=device), torch.empty(side, side, device=device)

    def fastest(call: Callable[[], Any]) -> float:
        return min(timed(call, str(device), 1) for _ in range(6))

    return {
        "bytes_per_second": 2 * numbers.nbytes / fastest(lambda: target.copy_(numbers)),
        "flops_per_second": 2 * side**3 / fastest(lambda: torch.mm(matrix, matrix, out=product)),
    }


def _print(report: dict[str, Any]) -> None:
    baseline = report["rows"][0]["compared_with"]
    console = Console()
    console.print(
        f"multi-scale deformable attention, median of {report['rounds']} rounds, in ms; ratios to {baseline}; "
        "floor: the bytes and flops that nobody can save"
    )
    problems = itertools.groupby(report["rows"], key=lambda row: (row["size"], row["batch"], row["dtype"]))
    for (size, batch, dtype), rows in problems:
        table = Table(
            title=f"{size}, batch {batch}, {dtype}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for name in ("form", "direction", "engine", "ms", "ratio", "range", "floor", "reached"):
            justify = "left" if name in ("form", "direction", "engine") else "right"
            table.add_column(name, justify=justify, no_wrap=True)
        for row in rows:
            ratio = (f"{row['ratio']:.1f}", f"{row['lowest_ratio']:.1f} to {row['highest_ratio']:.1f}")
            table.add_row(
                *(row["form"], row["direction"], row["engine"], f"{1000 * row['seconds']:.3g}"),
                *(("", "") if row["engine"] == baseline else ratio),
                *(f"{1000 * row['floor_seconds']:.3g}", f"{100 * row['share_of_floor']:.0f} %"),
            )
        console.print(table)
    environment, speed = report["environment"], report["machine"]
    where = environment.get("GPU", environment["CPU"])
    console.print(
        f"{where}; copies {speed['bytes_per_second'] / 1e9:.3g} GB/s, multiplies {speed['flops_per_second'] / 1e9:.3g} "
        f"GFLOP/s in fp32; torch {environment['torch']}; commit {environment['git']}"
    )
