"""tools/benchmark.py growth: what is measured, what is drawn, and the memory that a large image may take."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from fcclip.errors import run_program

ROOT = Path(__file__).resolve().parents[2]
POINT = {"size": [64, 96], "names": 150, "queries": 250, "batch": 1, "semantic": "labels"}


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark_growth")


@pytest.fixture
def main(growth):
    return importlib.import_module("benchmark").main


def test_one_value_changes_at_a_time_and_all_are_drawn(growth, main, monkeypatch, tmp_path):
    def process(name, point, arguments, opts):
        point = json.loads(point)
        return 1024.0 * point["batch"], point["names"] / 100

    monkeypatch.setattr(growth, "of_a_process", process)
    output, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    assert main(["growth", "--output", str(output), "--plot", str(plot)]) == 0
    first, *rows = json.loads(output.read_text())["rows"]
    changed = [{key for key in POINT if row[key] != first[key]} for row in rows]
    assert all(keys - {"semantic"} <= {"size", "names", "queries", "batch"} and len(keys) <= 2 for keys in changed)
    assert all(keys <= {"names", "semantic"} for keys in changed if len(keys) == 2)
    assert max(row["names"] for row in rows if row["semantic"] == "scores") == 847  # 5,000 would take 11 GiB
    assert growth.series([first, *rows], "batch", "labels") == [(1, 1.5, 1), (2, 1.5, 2), (4, 1.5, 4)]
    assert Image.open(plot).size > (800, 400)


@pytest.mark.parametrize("semantic", ["labels", "scores"])
def test_a_point_is_measured_with_all_outputs(growth, main, tiny_cfg, tmp_path, capsys, semantic):
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg.dump())
    point = json.dumps(POINT | {"batch": 2, "semantic": semantic, "names": 3})
    assert main(["growth", "--model", str(config), "--memory-of", point]) == 0
    memory, seconds = json.loads(capsys.readouterr().out)
    assert seconds > 0 and memory >= 0


def test_what_cannot_be_measured_is_one_line(main, capsys):
    assert run_program(partial(main, ["growth", "--batch", "0"])) == 1
    assert "--batch" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quarter_of_the_largest_image_takes_a_quarter_of_two_gib(growth, monkeypatch):
    """RN50 with plain PyTorch and all outputs on a quarter of the pixels of 1376 x 2048; measured: 428 MiB. glibc is
    told to hand back what is freed, because the holes that it keeps differ from run to run by 150 MiB."""
    monkeypatch.setenv("FCCLIP_MSDA", "torch")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    point = json.dumps(POINT | {"size": [688, 1024]})
    assert growth.of_a_process("RN50", point, ["growth"], [])[0] < 512
