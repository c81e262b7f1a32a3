"""tools/benchmark.py evaluation: that it compares equal things, says how much faster ours is, and what all of it adds
to a network."""

import importlib
import json
import time
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
    module = importlib.import_module("benchmark")
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.005)
    monkeypatch.setattr(module, "BUSY_IMAGES", 5)
    return module


def test_every_task_is_compared_measured_in_turns_and_recorded(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert benchmark.main(["evaluation", *SMALL, "--output", str(tmp_path / "evaluation.json")]) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    tasks = {"panoptic quality", "mean IoU", "mean IoU with head", "instance encoding"}
    assert report["tasks"].keys() == tasks and report["image"] == [48, 64]
    for row in report["tasks"].values():
        assert len(row["ratios"]) == 2 and all(seconds > 0 for seconds in row["seconds"].values())
    added = report["beside_a_network"]
    assert added.keys() == {"network alone", "with three tasks", "without threads"}
    assert added["network alone"]["added"] == 0 and added["without threads"]["seconds"] > 0
    assert {"CPU", "git", "torch"} <= set(report["environment"]) and report["allocator"]
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
    group = benchmark.three_evaluators(6)
    for image in images:
        for evaluator in group:
            evaluator.process(benchmark.GroundTruth(image.record), image.output)
    assert 0 < group[0].results()["panoptic_seg"]["PQ"] < 100


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


def test_work_of_the_network_is_the_same_every_time(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "BUSY_SECONDS", 0.05)

    work = benchmark.busy_work()
    began = time.thread_time()
    work()
    assert 0.02 < time.thread_time() - began < 0.15


def test_an_allocator_that_is_not_the_usual_one_is_told(benchmark, monkeypatch):
    for name in (
        "LD_PRELOAD",
        "MALLOC_ARENA_MAX",
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
        "GLIBC_TUNABLES",
    ):
        monkeypatch.delenv(name, raising=False)
    assert benchmark.allocator() == "the system's default"
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert benchmark.allocator() == "MALLOC_TRIM_THRESHOLD_=1000000"


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--size", "0", "9"], ["--classes", "1"]])
def test_nothing_to_measure_is_one_line(benchmark, capsys, arguments):
    assert run_program(partial(benchmark.main, ["evaluation", *arguments])) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --images, --rounds") and error.count("\n") == 1
