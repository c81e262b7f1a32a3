"""tools/benchmark.py: that it measures what a training does, and what it refuses."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest

from fcclip.errors import run_program

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark")


@pytest.fixture
def config(tiny_cfg, tmp_path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return str(path)


def test_a_step_is_measured_in_its_parts_and_recorded_with_its_surroundings(benchmark, config, tmp_path, capsys):
    arguments = ["--config-file", config, "--batch", "1", "2", "--size", "64", "--steps", "2"]
    assert benchmark.main(["training-step", *arguments, "--output", str(tmp_path / "a" / "step.json")]) == 0
    report = json.loads((tmp_path / "a" / "step.json").read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        parts = row["median_seconds"]
        assert parts["forward_time"] > 0 and parts["backward_time"] > 0 and parts["step_time"] > 0
        assert sum(parts.values()) < 3 * row["seconds"]
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"])
    assert {"torch", "git", "CPU"} <= set(report["environment"])
    assert "images/s" in capsys.readouterr().out


def test_made_up_samples_have_the_wanted_segments_and_cover_the_image(benchmark):
    sample = benchmark.made_up_sample(3, 100, 5, 7)
    targets = sample["targets"]
    assert sample["image"].shape == (3, 100, 100) and targets.id_map.shape == (100, 100)
    assert set(targets.id_map.unique().tolist()) <= set(targets.ids.tolist()) and len(targets) == 5
    assert int(targets.labels.max()) < 7


def test_what_cannot_be_measured_is_one_line(benchmark, config, capsys):
    assert run_program(partial(benchmark.main, ["training-step", "--config-file", config, "--batch", "0"])) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --batch and --steps") and error.count("\n") == 1
