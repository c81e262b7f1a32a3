"""tools/benchmark.py evaluation: that it compares equal things, and says how much faster ours is."""

import importlib
import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fcclip.errors import run_program

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--images", "2", "--rounds", "2", "--size", "48", "64", "--classes", "6", "--queries", "5"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("benchmark")


def test_every_task_is_compared_measured_in_turns_and_recorded(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert benchmark.main(["evaluation", *SMALL, "--output", str(tmp_path / "evaluation.json")]) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    tasks = {"panoptic quality", "mean IoU", "mean IoU with head", "instance encoding"}
    assert report["tasks"].keys() == tasks and report["image"] == [48, 64]
    for row in report["tasks"].values():
        assert len(row["ratios"]) == 2 and all(seconds > 0 for seconds in row["seconds"].values())
    assert {"CPU", "git", "torch"} <= set(report["environment"])
    out = capsys.readouterr().out
    assert all(task in out for task in tasks) and "2 images compared in each task, all equal" in out
    assert torch.get_num_threads() == threads


@pytest.fixture
def world(benchmark, tmp_path):
    options = Namespace(images=2, size=[48, 64], classes=6, segments=9, queries=5, instances=11)
    return benchmark.made_up_predictions(tmp_path, options)


def test_made_up_predictions_are_neither_right_nor_hopeless(benchmark, world):
    images, head = world
    assert head.scores.shape == (6, 48, 64)
    for image in images:
        assert len(image.output["instances"]) == 11 and image.output["sem_seg"].shape == (48, 64)
        ids, segments = image.output["panoptic_seg"]
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in segments}
    evaluator = benchmark.PanopticEvaluator(
        class_names=[f"class {index}" for index in range(6)], thing_classes=range(3)
    )
    for image in images:
        evaluator.process(benchmark.GroundTruth(image.record), image.output)
    assert 0 < evaluator.results()["panoptic_seg"]["PQ"] < 100


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("compare_panoptic", lambda result, args: args[-1].tp.update({0: args[-1].tp[0] + 1})),
        ("compare_semantic", lambda result, args: args[-1].confusion.__setitem__((0, 0), -1)),
        ("encode_instances", lambda result, args: result[0].update(counts="0")),
    ],
)
def test_numbers_that_differ_are_not_measured(benchmark, monkeypatch, capsys, function, wrong):
    peer = benchmark.load_peer("published_evaluation")
    original = getattr(peer, function)

    def broken(*args):
        result = original(*args)
        wrong(result, args)
        return result

    setattr(peer, function, broken)
    monkeypatch.setattr(benchmark, "load_peer", lambda name: peer)
    assert run_program(partial(benchmark.main, ["evaluation", *SMALL])) == 1
    assert "image 0: ours and the published steps differ" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--size", "0", "9"], ["--classes", "1"]])
def test_nothing_to_measure_is_one_line(benchmark, capsys, arguments):
    assert run_program(partial(benchmark.main, ["evaluation", *arguments])) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --images, --rounds") and error.count("\n") == 1
