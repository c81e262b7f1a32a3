"""The command line: what it refuses before a process is started, and the whole way on six rendered images."""

import ctypes
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fcclip.config import load_config
from fcclip.data import loaders
from fcclip.data.mappers import PanopticJitterMapper
from fcclip.engine import REQUEUE_EXIT_CODE, RunLock, best_choice, load_checkpoint
from fcclip.losses import SetCriterion
from tests.conftest import tiny_config
from tests.engine.programs import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path, tiny_cfg, shapes_world, monkeypatch) -> Path:
    """A tiny config file; OUTPUT_DIR is `out` beside it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_world))
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "out")
    tiny_cfg.DATASETS.TEST = ("shapes_val", "shapes_val_seen")
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.INPUT.MAX_SIZE_TEST = 64, 64
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.STEPS = 2, 4, (3,)
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    tiny_cfg.SEED = -1
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return path


def run(train_net, config, *words) -> int:
    return train_net.main(["--config-file", str(config), *map(str, words)])


def refusal(train_net, capsys, config, *words) -> str:
    """The error of a command line that must leave with 1, without a traceback."""
    assert run(train_net, config, *words) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and "Traceback" not in text
    return text


BEST = ("TEST.EVAL_PERIOD", 2)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("SOLVER.BASE_LRR", 1), ("'SOLVER.BASE_LRR'", "'SOLVER.BASE_LR'")),
        (("MODEL.WEIGHTS", "nowhere.pth"), ("MODEL.WEIGHTS 'nowhere.pth'",)),
        (("--eval-only", "MODEL.WEIGHTS", "nowhere.pth"), ("MODEL.WEIGHTS 'nowhere.pth'",)),
        (("--eval-only",), ("--eval-only needs MODEL.WEIGHTS",)),
        (("--eval-only", "DATASETS.TEST", ()), ("--eval-only needs DATASETS.TEST",)),
        (
            ("--eval-only", "TEST.AUG.ENABLED", True, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False),
            ("TEST.AUG.ENABLED", "MODEL.MASK_FORMER.TEST.SEMANTIC_ON"),
        ),
        (("--dry-run", "--eval-only"), ("--dry-run",)),
        (("DATASETS.TEST", "('shapes_vall',)"), ("'shapes_vall'", "'shapes_val'")),
        (("DATASETS.TRAIN", "('shapes_train', 'shapes_tune')"), ("different classes",)),
        (("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7), ("NUM_CLASSES is 7", "Set it to 40")),
        (("--num-gpus", 2, "SOLVER.IMS_PER_BATCH", 3), ("SOLVER.IMS_PER_BATCH 3", "2 process(es)")),
        ((*BEST, "SOLVER.BEST.DATASET", "shapes_tun"), ("'shapes_tun'", "'shapes_tune'")),
        ((*BEST, "SOLVER.BEST.METRIC", "panoptic/PQ"), ("panoptic_seg, segm, bbox, sem_seg",)),
        ((*BEST, "SOLVER.BEST.METRIC", "panoptic_seg"), ("SOLVER.BEST.METRIC", "'panoptic_seg'")),
    ],
)
def test_what_cannot_work_is_refused_before_a_process_starts(train_net, capsys, config, monkeypatch, words, parts):
    monkeypatch.setattr(train_net, "launch", None)
    text = refusal(train_net, capsys, config, *words)
    assert all(part in text for part in parts), text


def test_an_output_folder_that_cannot_be_written_is_refused(train_net, capsys, config, tmp_path):
    (tmp_path / "file").write_text("x")
    text = refusal(train_net, capsys, config, "OUTPUT_DIR", tmp_path / "file" / "out")
    assert f"OUTPUT_DIR '{tmp_path}/file/out' cannot be written" in text and "Choose a folder" in text


def test_more_gpus_than_there_are_is_refused(train_net, capsys, config):
    if torch.cuda.is_available():
        assert "--num-gpus 99" in refusal(train_net, capsys, config, "--num-gpus", 99, "MODEL.DEVICE", "cuda")
    else:
        assert "MODEL.DEVICE is 'cuda'" in refusal(train_net, capsys, config, "MODEL.DEVICE", "cuda")


def test_six_images_are_trained_on_resumed_and_evaluated(train_net, config, capsys, tmp_path):
    out = tmp_path / "out"
    assert run(train_net, config) == 0
    files = {path.name for path in out.iterdir()}
    assert {
        "config.yaml",
        "log.txt",
        "metrics.json",
        "last_checkpoint",
        "model_0000001.pth",
        "model_final.pth",
    } <= files
    seed = yaml.safe_load((out / "config.yaml").read_text())["SEED"]
    assert seed >= 0 and load_checkpoint(out / "model_final.pth")["seed"] == seed
    printed = capsys.readouterr().out
    assert "shapes_val_seen" in printed and "out of vocabulary" in printed and "trainable" in printed
    for name in ("shapes_val", "shapes_val_seen"):
        content = json.loads((out / "inference" / name / "results.json").read_text())
        assert content["vocabulary"] == "shapes"
        assert {"ensemble", "in_vocabulary", "out_of_vocabulary"} == set(content["results"])
        assert {"panoptic_seg", "segm", "sem_seg"} <= set(content["results"]["ensemble"])
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert lines[0]["iteration"] == 3 and "total_loss" in lines[0]
    assert "shapes_val/panoptic_seg/PQ" in lines[-1] and "shapes_val/in_vocabulary/panoptic_seg/PQ" in lines[-1]

    assert run(train_net, config, "--resume", "SOLVER.MAX_ITER", 6) == 0
    assert "resumed from" in capsys.readouterr().out
    assert load_checkpoint(out / "model_final.pth")["iteration"] == 5
    assert yaml.safe_load((out / "config.yaml").read_text())["SEED"] == seed

    weights = ("MODEL.WEIGHTS", out / "model_final.pth", "DATASETS.TEST", "('shapes_val',)")
    other = ("OUTPUT_DIR", tmp_path / "other")
    assert run(train_net, config, "--eval-only", *weights, *other) == 0
    assert not (tmp_path / "other" / "metrics.json").exists()
    again = json.loads((tmp_path / "other" / "inference" / "shapes_val" / "results.json").read_text())
    assert again == json.loads((out / "inference" / "shapes_val" / "results.json").read_text())

    augmentation = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64, 96)")
    assert run(train_net, config, "--eval-only", *weights, "OUTPUT_DIR", tmp_path / "augmented", *augmentation) == 0
    plain, augmented = (
        json.loads((tmp_path / "augmented" / folder / "shapes_val" / "results.json").read_text())["results"]
        for folder in ("inference", "inference_TTA")
    )
    assert plain == again["results"]
    assert {mode: set(tasks) for mode, tasks in augmented.items()} == {mode: {"sem_seg_TTA"} for mode in plain}
    assert "Task: sem_seg_TTA" in capsys.readouterr().out

    text = refusal(
        train_net, capsys, config, "--eval-only", *weights, *other, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 5
    )
    assert "trained with 8 queries, the model has 5" in text
    assert "Traceback" in (tmp_path / "other" / "log.txt").read_text()

    text = refusal(
        train_net,
        capsys,
        config,
        "--eval-only",
        *weights,
        *other,
        "TEST.EXPECTED_RESULTS",
        "[['panoptic_seg','PQ',99.0,0.1]]",
    )
    assert "results are not those of TEST.EXPECTED_RESULTS" in text


# ---- what can go wrong while it trains ----

SHORT = ("DATASETS.TEST", "()", "SEED", 0)  # nothing is evaluated


@pytest.fixture
def images(shapes_world):
    """The training images, which are there again after the test."""
    paths = sorted((shapes_world / "shapes" / "train").glob("*.*"))
    contents = {path: path.read_bytes() for path in paths}
    yield paths
    for path, content in contents.items():
        path.write_bytes(content)


def before_the_step(monkeypatch, number, do):
    """Does something when the losses of the 0-based step are computed for the first time."""
    real, calls = SetCriterion.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == number + 1:
            do()
        return real(*args, **kwargs)

    monkeypatch.setattr(SetCriterion, "forward", forward)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("what", "message"), [("deleted", "no such image"), ("corrupt", "cannot be read as an image")])
def test_an_image_that_goes_bad_during_the_training_is_named(
    train_net, config, capsys, images, monkeypatch, num_workers, what, message
):
    def spoil():
        for path in images:
            path.unlink() if what == "deleted" else path.write_bytes(b"\x89PNG not an image")

    before_the_step(monkeypatch, 2, spoil)
    text = refusal(train_net, capsys, config, *SHORT, "DATALOADER.NUM_WORKERS", num_workers, "SOLVER.MAX_ITER", 30)
    assert any(str(path) in text for path in images) and message in text


def test_a_loss_that_is_not_finite_is_one_message_or_left_out(train_net, config, capsys, monkeypatch, tmp_path):
    real, calls = SetCriterion.forward, []

    def forward(*args, **kwargs):
        losses = real(*args, **kwargs)
        calls.append(1)
        return losses | {"loss_mask": losses["loss_mask"] * math.nan} if len(calls) % 4 == 2 else losses

    monkeypatch.setattr(SetCriterion, "forward", forward)
    text = refusal(train_net, capsys, config, *SHORT)
    assert "not finite at iteration 1: process 0: loss_mask = nan (images: " in text and ".jpg" in text
    calls.clear()
    assert run(train_net, config, *SHORT, "SOLVER.NON_FINITE", "skip:1") == 0
    assert load_checkpoint(tmp_path / "out" / "model_final.pth")["iteration"] == 3


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="loading processes must be forked to do what we want")


@needs_fork
def test_a_loading_process_that_is_killed_is_one_message_wherever_the_training_stands(
    train_net, config, capsys, monkeypatch
):
    def kill_the_loader():
        (loading,) = multiprocessing.active_children()
        os.kill(loading.pid, signal.SIGKILL)
        time.sleep(5)  # torch raises here

    before_the_step(monkeypatch, 1, kill_the_loader)
    text = refusal(train_net, capsys, config, *SHORT, "DATALOADER.NUM_WORKERS", 1)
    assert "DataLoader worker (pid" in text and "killed by signal: Killed" in text


@needs_fork
def test_a_loading_process_that_hangs_is_one_message_and_keeps_nobody_from_leaving(
    train_net, config, capsys, monkeypatch
):
    """It holds Python's lock, so that it cannot even follow a SIGTERM."""
    monkeypatch.setattr(loaders, "TIMEOUT_S", 1)
    monkeypatch.setattr(PanopticJitterMapper, "__call__", lambda *_: ctypes.PyDLL(None).sleep(1000))
    began = time.monotonic()
    text = refusal(train_net, capsys, config, *SHORT, "DATALOADER.NUM_WORKERS", 1)
    assert "no batch came for 1 s: a loading process hangs" in text
    assert not multiprocessing.active_children() and time.monotonic() - began < 20


# ---- resuming ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes_world) -> Path:
    """The OUTPUT_DIR of four iterations; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(shapes_world))
        patch.syspath_prepend(ROOT)
        cfg = tiny_config()
        cfg.OUTPUT_DIR, cfg.DATASETS.TEST, cfg.SEED = str(folder / "out"), (), 0
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 2, 4, (3,), 2
        (folder / "tiny.yaml").write_text(cfg.dump())
        assert run(importlib.import_module("train_net"), folder / "tiny.yaml") == 0
    return folder / "out"


@pytest.fixture
def out(trained, tmp_path) -> Path:
    """OUTPUT_DIR with a copy of `trained`."""
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "out"


def test_changed_keys_are_refused_by_name_and_harmless_ones_are_not(train_net, config, capsys, out):
    words = ("INPUT.IMAGE_SIZE", 96, "SOLVER.BASE_LR", 0.5, "DATALOADER.NUM_WORKERS", 1)
    text = refusal(train_net, capsys, config, "--resume", *SHORT, *words)
    assert "INPUT.IMAGE_SIZE: 64 -> 96" in text and "SOLVER.BASE_LR: 0.001 -> 0.5" in text
    assert "NUM_WORKERS" not in text and "Restore these keys to resume" in text
    harmless = ("DATALOADER.NUM_WORKERS", 1, "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_KEEP", 1)
    assert run(train_net, config, "--resume", *SHORT, *harmless) == 0
    assert "resuming with changes that the training does not depend on" in capsys.readouterr().out
    assert load_checkpoint(out / "model_final.pth")["iteration"] == 4


def test_a_checkpoint_with_a_wrong_bit_is_refused_and_a_good_one_resumes(train_net, config, capsys, out):
    content = bytearray((out / "model_final.pth").read_bytes())
    content[len(content) // 2] ^= 4
    (out / "model_final.pth").write_bytes(content)
    text = refusal(train_net, capsys, config, "--resume", *SHORT)
    assert "model_final.pth' is damaged" in text and "write its name into last_checkpoint" in text
    (out / "last_checkpoint").write_text("model_0000001.pth")
    assert run(train_net, config, "--resume", *SHORT) == 0
    assert load_checkpoint(out / "model_final.pth")["iteration"] == 3


def test_a_folder_that_another_training_holds_is_refused(train_net, config, capsys, out):
    before = (out / "log.txt").read_text()
    with RunLock(out):
        for words in ((), ("--resume",)):
            text = refusal(train_net, capsys, config, *words, *SHORT)
            assert f"OUTPUT_DIR '{out}' is in use by process {os.getpid()}" in text
        assert (out / "log.txt").read_text() == before
        weights = ("MODEL.WEIGHTS", out / "model_final.pth", "DATASETS.TEST", "('shapes_val',)")
        assert run(train_net, config, "--eval-only", *weights) == 0
        assert run(train_net, config, "--dry-run", "--resume", *SHORT) == 0
    assert run(train_net, config, "--resume", *SHORT) == 0


def test_a_new_training_in_the_folder_of_another_says_so(train_net, config, capsys, out):
    assert run(train_net, config, *SHORT) == 0
    assert f"{out} holds an earlier training, whose checkpoints this one replaces" in capsys.readouterr().out


# ---- the best weights and the drawings ----

EVALUATED = ("TEST.EVAL_PERIOD", 2, "DATASETS.TEST", "('shapes_val',)")


def test_evaluations_choose_the_best_weights_on_another_data_set_and_draw(train_net, config, capsys, tmp_path):
    assert run(train_net, config, *EVALUATED) == 0
    out, printed = tmp_path / "out", capsys.readouterr().out
    assert "best.pth: the weights with the highest panoptic_seg/PQ on 'shapes_tune'" in printed
    best = load_checkpoint(out / "best.pth")["best"]
    assert best["metric"] == "shapes_tune/panoptic_seg/PQ" and best["iteration"] in (1, 3)
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    evaluations = [line for line in lines if "panoptic_seg/PQ" in line]
    assert [line["iteration"] for line in evaluations] == [1, 3]
    assert best["value"] == max(line["shapes_tune/panoptic_seg/PQ"] for line in evaluations)
    assert not (out / "inference" / "shapes_tune").exists()
    events = EventAccumulator(str(out), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert "total_loss" in tags["scalars"] and "panoptic_seg/PQ" in tags["scalars"]
    assert len(tags["images"]) == 2  # there are two images in the set
    for tag in tags["images"]:
        drawings = events.Images(tag)
        assert tag.startswith("images/0000") and [one.step for one in drawings] == [1, 3]
        assert drawings[0].width >= 256 and Image.open(io.BytesIO(drawings[0].encoded_image_string)).mode == "RGB"


@pytest.mark.parametrize("words", [("SOLVER.BEST.DATASET", ""), ("TEST.EVAL_PERIOD", 0)])
def test_no_best_weights_are_chosen_without_a_data_set_or_a_period(config, words):
    cfg = load_config(config, [*map(str, EVALUATED), *map(str, words)])
    assert best_choice(cfg) is None


def test_a_reported_data_set_that_is_asked_to_choose_is_warned_of(train_net, config, caplog):
    cfg = load_config(config, ["SOLVER.BEST.DATASET", "shapes_val", "TEST.EVAL_PERIOD", "2"])
    assert best_choice(cfg).is_reported
    assert "best.pth is chosen by 'shapes_val', which is in DATASETS.TEST: its results there look better" in caplog.text


def test_a_metric_that_is_not_evaluated_is_named_with_those_that_are(train_net, config, capsys):
    text = refusal(train_net, capsys, config, *EVALUATED, "SOLVER.BEST.METRIC", "panoptic_seg/QP")
    assert "'panoptic_seg/QP'; 'shapes_tune' is evaluated for " in text and "panoptic_seg/PQ" in text


# ---- trying out ----


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dry_run_tells_sizes_and_leaves_nothing_but_the_log(
    train_net, config, capsys, tmp_path, monkeypatch, processes
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run(train_net, config, "--dry-run", "--num-gpus", processes, *SHORT) == 0
    text = (tmp_path / "out" / "log.txt").read_text()
    for expected in (
        r"parameters: \d+\.\d+ M, trainable",
        rf"first batch, {2 // processes} of 2 images in this process:",
        r"\.jpg, image 3x64x64, \d+ segments on a grid of 64x64",
        r"loss \d+",
        r"memory: \d+ MiB at most",
        r"a step takes [\d.]+ s",
        r"4 iterations to go: about 0:00:\d\d",
    ):
        assert re.search(expected, text), expected
    ranks = [f"log.txt.rank{rank}" for rank in range(1, processes)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", *ranks]


def test_a_dry_run_leaves_a_training_as_it_is(train_net, config, capsys, out):
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "log.txt" and path.is_file()}
    assert run(train_net, config, "--dry-run", "--resume", *SHORT, "SOLVER.MAX_ITER", 6) == 0
    assert "2 iterations to go" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.name != "log.txt"}


# ---- asked to stop ----


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of POSIX")
@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGUSR1), pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_program_that_is_asked_to_stop_saves_and_leaves_with_75(config, environment, tmp_path, processes, number):
    """The signal goes to the program that was started, which hands it on to its processes."""
    out, words = tmp_path / "out", map(str, (*SHORT, "SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINT_PERIOD", 0))
    program = subprocess.Popen(
        [sys.executable, ROOT / "train_net.py", "--config-file", config, "--num-gpus", str(processes), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + PATIENCE_S
        while not ((out / "metrics.json").is_file() and (out / "metrics.json").read_text()):
            if program.poll() is not None or time.monotonic() > until:
                program.kill()  # else its output never ends
                pytest.fail(program.communicate()[0])
            time.sleep(0.1)
        program.send_signal(number)
        text = program.communicate(timeout=60)[0]
    finally:
        program.kill()
    assert program.returncode == REQUEUE_EXIT_CODE, text
    last = load_checkpoint(out / (out / "last_checkpoint").read_text())
    assert f"stopped after iteration {last['iteration']}; go on with --resume" in text and last["iteration"] >= 19
    assert len(last["random"]) == processes and "Traceback" not in text
    assert not list(out.glob(".*.writing")) and not (out / ".locked_by").exists()
