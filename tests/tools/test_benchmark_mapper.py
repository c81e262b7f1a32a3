"""tools/benchmark.py mapper: that it compares equal things, and says how much faster ours is."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from fcclip.errors import run_program

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark")


def test_both_mappers_are_compared_measured_in_turns_and_recorded(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = ["--images", "5", "--rounds", "2", "--size", "256", "--output", str(tmp_path / "mapper.json")]
    assert benchmark.main(["mapper", *arguments]) == 0
    report = json.loads((tmp_path / "mapper.json").read_text())
    assert len(report["ratios"]) == 2 and report["samples"] == 10
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert {"CPU", "git", "torch"} <= set(report["environment"])
    out = capsys.readouterr().out
    assert f"ratio {report['ratio']:.2f}" in out and "5 samples compared, all equal" in out
    assert torch.get_num_threads() == threads


def test_made_up_images_are_as_large_as_said_and_have_their_segments(benchmark, tmp_path):
    records = benchmark.made_up_records(tmp_path, 4, 12)
    assert [(record["height"], record["width"]) for record in records] == [(480, 640)] * 3 + [(640, 480)]
    assert all(len(record["segments_info"]) == 12 for record in records)
    assert all(80_000 < Path(record["file_name"]).stat().st_size < 250_000 for record in records)


def test_samples_that_differ_are_not_measured(benchmark, monkeypatch, capsys):
    peer = benchmark.load_peer("published_panoptic_lsj")

    def wrong(record, rng, *, size):
        sample = original(record, rng, size=size)
        sample["gt_masks"][0] = ~sample["gt_masks"][0]
        return sample

    original, peer.map_record = peer.map_record, wrong
    monkeypatch.setattr(benchmark, "load_peer", lambda name: peer)
    assert run_program(partial(benchmark.main, ["mapper", "--images", "1", "--rounds", "1", "--size", "64"])) == 1
    assert "the two mappers give different samples" in capsys.readouterr().err


def test_nothing_to_measure_is_one_line(benchmark, capsys):
    assert run_program(partial(benchmark.main, ["mapper", "--rounds", "0"])) == 1
    assert capsys.readouterr().err == "error: --images, --rounds and --size must be at least 1, --segments 0 or more\n"
