"""tools/benchmark.py inference, text and train: the published steps give what ours give, and what --check refuses."""

import importlib
import json
from argparse import Namespace
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


@pytest.fixture
def inference(benchmark):
    return importlib.import_module("benchmark_inference")


@pytest.fixture
def config(tiny_cfg, tmp_path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return str(path)


def test_both_agree_and_are_recorded_and_a_lost_ratio_is_refused(benchmark, config, tmp_path, capsys):
    arguments = ["inference", "--models", config, "--size", "64", "96", "--kept", "5", "--rounds", "1"]
    output = tmp_path / "inference.json"
    assert benchmark.main([*arguments, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    [row] = report["rows"]
    assert row["ratio"] == pytest.approx(row["seconds"]["published"] / row["seconds"]["ours"])
    assert {"backbone", "pixel decoder", "masked decoder", "panoptic", "all heads"} <= row["parts"].keys()
    assert min(report[name] for name in ("gflops", "copy_gb_per_second", "fresh_gb_per_second")) > 0
    assert "allocator" in report["environment"]
    row["ratio"] = 100.0
    output.write_text(json.dumps(report))
    assert run_program(partial(benchmark.main, [*arguments, "--check", str(output)])) == 1
    assert "recorded was 100.00" in capsys.readouterr().err


def test_autocast_and_compiled_parts_are_for_ours_alone(benchmark, config, tmp_path, monkeypatch):
    """Both still agree without them; what is timed says how far it is off."""
    monkeypatch.setattr("fcclip.modeling.build.cpu_multiplies_bfloat16", lambda: True)
    runs, real = [], torch.compile

    def backend(graph, example_inputs):
        return lambda *inputs: runs.append(graph) or graph.forward(*inputs)

    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    output = tmp_path / "inference.json"
    arguments = ["inference", "--models", config, "--size", "64", "96", "--rounds", "1", "--output", str(output)]
    assert benchmark.main([*arguments, "TEST.AMP.ENABLED", "True", "MODEL.COMPILE", "mask_decoder"]) == 0
    [row] = json.loads(output.read_text())["rows"]
    assert row["autocast of ours"] == "torch.bfloat16" and row["differences"]["semantic"] > 1e-4
    assert len(runs) == 4 and len(set(runs)) == 1  # to warm up, in the round, and twice for the parts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.parametrize("part", ["inference --size 64 96 --kept 5", "train --size 64 --segments 3"])
def test_both_agree_on_a_gpu(benchmark, config, tmp_path, part):
    output = tmp_path / "report.json"
    arguments = [*part.split(), "--models", config, "--rounds", "1", "--device", "cuda", "--memory"]
    assert benchmark.main([*arguments, "--output", str(output)]) == 0
    [row] = json.loads(output.read_text())["rows"]
    assert min(row["memory_mib"].values()) > 0 and min(row["seconds"].values()) > 0


def test_on_a_gpu_the_published_operator_must_run(inference, monkeypatch):
    """Nothing slower takes its place."""
    monkeypatch.setattr(inference, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with inference.with_peers(), pytest.raises(ValueError, match="the engine 'published' cannot run on cuda"):
        inference.checked_device(Namespace(device="cuda"))


def test_text_vectors_agree_with_the_published_steps(benchmark, config, capsys):
    assert benchmark.main(["text", "--model", config, "--names", "5"]) == 0
    assert "published" in capsys.readouterr().out


def test_losses_and_gradients_agree_with_the_published_steps(benchmark, config, tmp_path):
    output = tmp_path / "train.json"
    arguments = ["train", "--models", config, "--size", "64", "--segments", "3", "--rounds", "1", "--memory"]
    again = ["MODEL.SEM_SEG_HEAD.USE_CHECKPOINT", "True"]
    assert benchmark.main([*arguments, "--output", str(output), *again]) == 0
    [row] = json.loads(output.read_text())["rows"]
    assert row["differences"]["losses"] < 1e-5 and row["differences"]["gradients"] < 1e-3
    assert {"backbone", "pixel decoder", "masked decoder", "criterion"} < row["parts"].keys()
    assert min(row["memory_mib"].values()) > 0 and min(row["seconds_alone"].values()) > 0


def test_losses_that_differ_are_not_compared(benchmark, config, monkeypatch, capsys):
    peer = importlib.import_module("benchmark_train")
    monkeypatch.setattr(peer, "LOSSES", -1.0)
    arguments = ["train", "--models", config, "--size", "64", "--segments", "3", "--rounds", "1"]
    assert run_program(partial(benchmark.main, arguments)) == 1
    assert "ours and the published steps differ" in capsys.readouterr().err


def test_outputs_that_differ_are_not_compared(inference):
    masks = torch.zeros(4, 4, dtype=torch.int32)
    instances = (torch.rand(3), None, None)
    published = {"sem_seg": torch.rand(2, 4, 4), "panoptic_seg": (masks, []), "instances": instances}
    ours = {**published, "instances": type("Instances", (), {"scores": instances[0]})}
    inference._check_equal("same", ours, published)
    for change in ({"sem_seg": published["sem_seg"] + 0.1}, {"panoptic_seg": (masks + 1, [])}):
        with pytest.raises(ValueError, match="other: ours and the published steps differ"):
            inference._check_equal("other", {**ours, **change}, published)


def test_what_cannot_be_measured_is_one_line(benchmark, config, capsys):
    assert run_program(partial(benchmark.main, ["inference", "--models", config, "--rounds", "0"])) == 1
    assert "--rounds" in capsys.readouterr().err
