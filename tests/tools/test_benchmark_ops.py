"""tools/benchmark.py ops: that it compares equal things in turns, and what it says about them."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from fcclip.errors import run_program
from fcclip.ops import ENGINES
from tests.msda_engines import built  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["ops", "--device", "cpu", "--sizes", "64x96", "--rounds", "2"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    module = importlib.import_module("benchmark_ops")
    monkeypatch.setattr(module, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(module, "machine_speed", lambda device: {"bytes_per_second": 1e10, "flops_per_second": 1e11})
    return importlib.import_module("benchmark")


@pytest.fixture
def ops(benchmark):
    return importlib.import_module("benchmark_ops")


def test_every_engine_is_measured_in_both_forms_and_directions(benchmark, built, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(built("cpp")))
    output = tmp_path / "new" / "ops.json"
    assert benchmark.main([*SMALL, "--batch", "1", "2", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    rows = report["rows"]
    keys = ("batch", "form", "direction", "engine")
    assert {tuple(row[key] for key in keys) for row in rows} == {
        (batch, form, direction, engine)
        for batch in (1, 2)
        for form in ("locations", "fused")
        for direction in ("forward", "backward")
        for engine in ("torch", "gather", "cpp")
    }
    for row in rows:
        assert row["lowest_ratio"] <= row["ratio"] <= row["highest_ratio"] and row["fastest_seconds"] <= row["seconds"]
        assert row["ratio"] == 1 or row["engine"] != "torch"
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert {"torch", "git", "CPU"} <= set(report["environment"]) and "cuda" not in {row["engine"] for row in rows}
    assert "floor" in capsys.readouterr().out


def test_the_floor_counts_every_number_once_and_every_corner(ops):
    problem = ops.Problem("64x96", 2, "float32", "fused", "cpu")
    assert problem.shapes == [(2, 3), (4, 6), (8, 12)]
    value, offsets, logits, grad_output = problem.tensors()
    inputs = value.nbytes + offsets.nbytes + logits.nbytes
    assert problem.cost("forward") == (inputs + grad_output.nbytes, 2 * 4 * logits.numel() * 32)
    assert problem.cost("backward") == (2 * inputs + grad_output.nbytes, 2 * 2 * 4 * logits.numel() * 32)
    assert ops.Problem("64x96", 2, "bfloat16", "fused", "cpu").cost("forward")[0] * 2 == inputs + grad_output.nbytes


def test_both_forms_are_the_same_problem(ops):
    fused, located = (ops.Problem("64x96", 1, "float64", form, "cpu") for form in ("fused", "locations"))
    outputs = [
        ops.FORMS[problem.form](*(lambda t: (t[0], problem.shapes, t[1], t[2]))(problem.tensors()), engine="torch")
        for problem in (fused, located)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)  # centres in fp32


def test_engines_that_disagree_are_not_compared(benchmark, monkeypatch, capsys):
    wrong = ENGINES["torch"]
    monkeypatch.setattr(ENGINES["cpp"], "available", wrong.available)
    monkeypatch.setattr(ENGINES["cpp"], "forward", lambda *inputs: 1.1 * wrong.forward(*inputs))
    monkeypatch.setattr(ENGINES["cpp"], "backward", wrong.backward)
    assert run_program(partial(benchmark.main, [*SMALL, "--engines", "torch", "cpp", "--forms", "locations"])) == 1
    assert "engines 'cpp' and 'torch' differ by" in capsys.readouterr().err


def test_what_cannot_be_measured_is_one_line(benchmark, capsys):
    for arguments, message in (
        (["--sizes", "64"], "--sizes takes HEIGHTxWIDTH in pixels, e.g. 640x960, got '64'"),
        (["--dtypes", "float23"], "unknown dtype 'float23'"),
        (["--forms", "fussed"], "Did you mean 'fused'?"),
        (["--engines", "cpp"], "the engine 'cpp' cannot run on cpu: it is not built"),
        (["--batch", "0"], "--rounds and --batch must be at least 1"),
    ):
        assert run_program(partial(benchmark.main, [*SMALL, *arguments])) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_published_operator_takes_part_only_here_and_only_where_it_can_run(ops, capsys):
    before = dict(ENGINES)
    with ops.with_peers():
        running, absent = ops.engines_that_run(torch.device("cpu"), None)
        assert running[0] == "torch" and "CUDA devices, not on cpu" in absent["published"]
        ENGINES["published"].available = ENGINES["torch"].available
        assert ops.engines_that_run(torch.device("cpu"), None)[0][:2] == ["published", "torch"]
    assert before == ENGINES
