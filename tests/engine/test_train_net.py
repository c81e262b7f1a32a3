"""The command line: what it refuses before a process is started, and the whole way on six rendered pictures."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from fcclip.engine import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def train_net(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("train_net")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Four training pictures and two in every other set."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "datasets")
        importlib.import_module("prepare_shapes").prepare(
            out=folder, seed=3, num_pictures=4, num_workers=1, num_evaluation=2
        )
    return folder


@pytest.fixture
def config(tmp_path, tiny_cfg, world, monkeypatch) -> Path:
    """A tiny config file; OUTPUT_DIR is `out` beside it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(world))
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


def test_a_missing_config_is_named_with_its_neighbour(train_net, capsys):
    assert "config file 'shapes/fcclip_shape.yaml' not found" in refusal(train_net, capsys, "shapes/fcclip_shape.yaml")


def test_an_unknown_key_is_named_with_its_neighbour(train_net, capsys, config):
    text = refusal(train_net, capsys, config, "SOLVER.BASE_LRR", 1)
    assert "unknown key 'SOLVER.BASE_LRR'. Did you mean 'SOLVER.BASE_LR'?" in text


def test_a_command_line_that_cannot_be_read_leaves_with_2(train_net, capsys):
    with pytest.raises(SystemExit) as left:
        train_net.main(["--num-gpus", "two", "--config-file", "x"])
    assert left.value.code == 2


@pytest.mark.parametrize("words", [(), ("--eval-only",)])
def test_missing_weights_are_named(train_net, capsys, config, words):
    text = refusal(train_net, capsys, config, *words, "MODEL.WEIGHTS", "nowhere.pth")
    assert "MODEL.WEIGHTS 'nowhere.pth' not found" in text


def test_evaluating_without_weights_is_refused(train_net, capsys, config):
    assert "--eval-only needs MODEL.WEIGHTS" in refusal(train_net, capsys, config, "--eval-only")


def test_augmentation_without_semantic_maps_is_refused(train_net, capsys, config):
    words = ("--eval-only", "TEST.AUG.ENABLED", True, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False)
    text = refusal(train_net, capsys, config, *words)
    assert "TEST.AUG.ENABLED" in text and "MODEL.MASK_FORMER.TEST.SEMANTIC_ON" in text


def test_an_unknown_data_set_is_named_with_its_neighbour(train_net, capsys, config):
    text = refusal(train_net, capsys, config, "DATASETS.TEST", "('shapes_vall',)")
    assert "unknown data set 'shapes_vall'. Did you mean 'shapes_val'" in text


def test_a_class_list_of_another_length_is_refused(train_net, capsys, config):
    text = refusal(train_net, capsys, config, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7)
    assert "'shapes_seen' has 40 classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 7. Set it to 40" in text


def test_a_batch_that_processes_cannot_share_is_refused_before_they_start(train_net, capsys, config):
    text = refusal(train_net, capsys, config, "--num-gpus", 2, "SOLVER.IMS_PER_BATCH", 3)
    assert "SOLVER.IMS_PER_BATCH 3 cannot be split evenly over 2 process(es)" in text


def test_training_sets_with_different_classes_are_refused(train_net, capsys, config):
    text = refusal(train_net, capsys, config, "DATASETS.TRAIN", "('shapes_train', 'shapes_tune')")
    assert "have different classes" in text


def test_an_output_folder_that_cannot_be_written_is_refused(train_net, capsys, config, tmp_path):
    (tmp_path / "file").write_text("x")
    text = refusal(train_net, capsys, config, "OUTPUT_DIR", tmp_path / "file" / "out")
    assert f"OUTPUT_DIR '{tmp_path}/file/out' cannot be written" in text and "Choose a folder" in text


def test_a_read_only_output_folder_is_refused(train_net, capsys, config, monkeypatch):
    def read_only(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(train_net.tempfile, "TemporaryFile", read_only)
    assert "cannot be written (Permission denied)" in refusal(train_net, capsys, config)


def test_more_gpus_than_there_are_is_refused(train_net, capsys, config):
    if torch.cuda.is_available():
        assert "--num-gpus 99" in refusal(train_net, capsys, config, "--num-gpus", 99, "MODEL.DEVICE", "cuda")
    else:
        assert "MODEL.DEVICE is 'cuda'" in refusal(train_net, capsys, config, "MODEL.DEVICE", "cuda")


def test_our_own_mistakes_keep_their_traceback(train_net, config, monkeypatch):
    monkeypatch.setattr(train_net, "check", lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        run(train_net, config)


def test_the_error_of_a_loader_process_is_told_without_its_traceback(train_net):
    wrapped = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "loader.py", line 1, in load\nValueError: a.jpg cannot be read: cut off\nsecond line'
    )
    assert train_net.short_message(wrapped) == "a.jpg cannot be read: cut off\nsecond line"
    assert train_net.short_message(f"process 1 of 2 failed: {wrapped}").startswith(
        "process 1 of 2 failed: a.jpg cannot"
    )
    assert train_net.short_message("plain: text") == "plain: text"


def test_six_pictures_are_trained_on_resumed_and_evaluated(train_net, config, capsys, tmp_path):
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


def test_a_missing_training_picture_is_one_message(train_net, config, capsys, world):
    pictures = sorted((world / "shapes" / "train").iterdir())
    contents = {path: path.read_bytes() for path in pictures}
    try:
        for path in pictures:
            path.unlink()
        text = refusal(train_net, capsys, config, "DATALOADER.NUM_WORKERS", 1)
        assert str(world / "shapes" / "train") in text
    finally:
        for path, content in contents.items():
            path.write_bytes(content)
