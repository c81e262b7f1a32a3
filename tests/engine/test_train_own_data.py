"""train_net.py, tools/check.py and the Segmenter on data sets that are described by a YAML file."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from fcclip import Segmenter
from fcclip.checks.run import check_run
from fcclip.config import load_config
from fcclip.engine import best_choice, load_checkpoint
from fcclip.modeling import build_model
from tests.data.own_world import CLASSES, edit_json, write_own
from tests.engine.test_train_net import refusal, run

MAPPERS = {"panoptic": "coco_panoptic_lsj", "instances": "coco_instance_lsj", "semantic": "mask_former_semantic"}
TASKS = {
    "panoptic": {"panoptic_seg", "segm", "bbox", "sem_seg"},
    "instances": {"segm", "bbox"},
    "semantic": {"sem_seg"},
}


@pytest.fixture
def config(tmp_path, tiny_cfg):
    """(type, training YAML, test YAMLs) -> a config file; OUTPUT_DIR is `out` beside it."""

    def write(kind: str, train: Path, test: tuple[Path, ...] | None = None) -> Path:
        tiny_cfg.OUTPUT_DIR = str(tmp_path / "out")
        tiny_cfg.DATASETS.TRAIN = (str(train),)
        tiny_cfg.DATASETS.TEST = tuple(map(str, (train,) if test is None else test))
        tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
        tiny_cfg.INPUT.DATASET_MAPPER_NAME = MAPPERS[kind]
        tiny_cfg.INPUT.MIN_SIZE_TEST = tiny_cfg.INPUT.MAX_SIZE_TEST = 64
        tiny_cfg.INPUT.MIN_SIZE_TRAIN = (64,)
        tiny_cfg.SOLVER.BEST.DATASET = ""
        tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.STEPS = 2, 3, ()
        path = tmp_path / "tiny.yaml"
        path.write_text(tiny_cfg.dump(), encoding="utf-8")
        return path

    return write


def results_of(folder: Path, name: str) -> dict:
    content = json.loads((folder / "inference" / name / "results.json").read_text())
    assert content["vocabulary"] == name and not content["published_vocabulary"]
    return content["results"]


@pytest.mark.parametrize("kind", ["panoptic", "instances", "semantic"])
def test_every_type_is_trained_on_evaluated_and_resumed(train_net, config, tmp_path, kind, capsys):
    path = config(kind, write_own(tmp_path / "größer gleich", kind))
    assert run(train_net, path) == 0
    printed = capsys.readouterr().out
    assert f"vocabulary: the classes of {tmp_path}/größer gleich/own_{kind}.yaml" in printed
    trained = load_checkpoint(tmp_path / "out" / "model_final.pth")
    assert trained["iteration"] == 2 and trained["vocabulary"]["name"] == f"own_{kind}"
    results = results_of(tmp_path / "out", f"own_{kind}")
    assert results.keys() == {"ensemble", "in_vocabulary", "out_of_vocabulary"}
    for tasks in results.values():
        assert tasks.keys() == TASKS[kind]
        for task in tasks.values():
            (headline,) = (task[key] for key in ("PQ", "AP", "mIoU") if key in task)
            assert math.isfinite(headline) and 0 <= headline <= 100

    assert run(train_net, path, "--resume", "SOLVER.MAX_ITER", 4) == 0
    assert load_checkpoint(tmp_path / "out" / "model_final.pth")["iteration"] == 3
    weights = ("MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth", "OUTPUT_DIR", tmp_path / "again")
    assert run(train_net, path, "--eval-only", *weights) == 0
    assert results_of(tmp_path / "again", f"own_{kind}") == results_of(tmp_path / "out", f"own_{kind}")


def test_a_class_that_training_did_not_know_counts_as_unseen(train_net, config, tmp_path):
    train = write_own(tmp_path / "a", "semantic", classes=["meadow:stuff", "automobile", "sky:stuff", "person"])
    path = config("semantic", train, (write_own(tmp_path / "b", "semantic"),))
    assert run(train_net, path) == 0
    found = results_of(tmp_path / "out", "own_semantic")["ensemble"]["sem_seg"]
    assert found["mIoU_unseen"] == found["IoU-grass"]  # 'car, automobile' shares a word, the sky is in no image
    assert found["mIoU_seen"] == pytest.approx((found["IoU-car"] + found["IoU-person"]) / 2)


def test_own_and_registered_sets_may_be_mixed(
    train_net,
    config,
    shapes_world,
    monkeypatch,
    tmp_path,
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_world))
    path = config("semantic", write_own(tmp_path / "a", "semantic"))
    words = ("DATASETS.TEST", f"('shapes_val', '{tmp_path}/a/own_semantic.yaml')")
    assert run(train_net, path, *words, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False) == 0
    assert {one.name for one in (tmp_path / "out" / "inference").iterdir()} == {"shapes_val", "own_semantic"}
    last = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])
    assert "own_semantic/sem_seg/mIoU" in last and "shapes_val/panoptic_seg/PQ" in last


def test_what_is_wrong_with_a_yaml_is_told_before_a_process_is_started(
    train_net,
    capsys,
    config,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(train_net, "launch", None)
    train = write_own(tmp_path / "a", "semantic")
    path = config("semantic", train)
    twin = shutil.copytree(tmp_path / "a", tmp_path / "b") / train.name
    text = refusal(train_net, capsys, path, "DATASETS.TEST", f"('{train}', '{twin}')")
    assert "are named 'own_semantic', the name that results are stored by" in text
    broken = write_own(tmp_path / "c", "semantic", image="images")
    assert "unknown key 'image'. Did you mean 'images'?" in refusal(
        train_net, capsys, path, "DATASETS.TRAIN", f"('{broken}',)"
    )
    assert "nowhere.yaml' does not exist" in refusal(train_net, capsys, path, "DATASETS.TEST", "('nowhere.yaml',)")
    words = ("TEST.EVAL_PERIOD", 2, "SOLVER.BEST.DATASET", twin)
    assert "Rename the YAML of one of them" in refusal(train_net, capsys, path, *words)


def test_a_mapper_that_does_not_fit_is_an_error_that_names_those_that_do(
    train_net,
    capsys,
    config,
    tmp_path,
):
    path = config("panoptic", write_own(tmp_path / "a", "instances"))
    text = refusal(train_net, capsys, path)
    assert "set INPUT.DATASET_MAPPER_NAME to coco_instance_lsj or mask_former_instance" in text


def test_a_training_is_not_resumed_with_other_classes(train_net, capsys, config, tmp_path):
    train = write_own(tmp_path / "a", "semantic")
    path = config("semantic", train)
    assert run(train_net, path) == 0
    write_own(tmp_path / "a", "semantic", classes=[*CLASSES[:3], "people"])
    capsys.readouterr()
    text = refusal(train_net, capsys, path, "--resume", "SOLVER.MAX_ITER", 4)
    assert "was begun with other classes (4, here 4): class 3 was 'person' and is 'people'. Restore the list" in text


def test_a_yaml_may_choose_the_best_weights(train_net, config, tmp_path):
    train = write_own(tmp_path / "train", "semantic")
    path = config("semantic", train, ())
    val = shutil.copytree(tmp_path / "train", tmp_path / "val") / "own_semantic.yaml"
    val = val.rename(val.with_name("chosen.yaml"))
    words = ("TEST.EVAL_PERIOD", 2, "SOLVER.BEST.DATASET", val, "SOLVER.BEST.METRIC", "sem_seg/mIoU")
    assert run(train_net, path, *words) == 0
    assert (tmp_path / "out" / "best.pth").is_file()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert any("chosen/sem_seg/mIoU" in line for line in lines)


def test_the_reported_set_may_choose_when_it_is_named(train_net, config, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config("semantic", write_own(tmp_path / "a", "semantic"))
    words = ["TEST.EVAL_PERIOD", 2, "SOLVER.BEST.DATASET", "./a/own_semantic.yaml"]  # the same file, spelled otherwise
    cfg = load_config(path, [*words, "SOLVER.BEST.METRIC", "sem_seg/mIoU"])
    best = best_choice(cfg)
    assert best.is_reported and "its results there look better than they are" in caplog.text
    scalars = best.scalars({"own_semantic": {"sem_seg": {"mIoU": 7.0, "IoU-sky": 3.0}}}, evaluate=None)
    assert scalars == {"own_semantic/sem_seg/mIoU": 7.0}


def test_a_model_and_a_segmenter_take_their_words_from_a_yaml(tiny_cfg, tmp_path):
    train = write_own(tmp_path / "a", "panoptic", classes=[*CLASSES[:3], "people"])
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = (str(train),), (str(write_own(tmp_path / "b", "semantic")),)
    model = build_model(tiny_cfg)
    assert model.train_vocabulary.name == "own_panoptic"
    assert model.test_vocabulary.class_names == ("grass", "car", "sky", "person")
    result = Segmenter(tiny_cfg, weights="random")(np.zeros((40, 60, 3), np.uint8))
    assert result.class_names == ("grass", "car", "sky", "person")


# ---- tools/check.py ----


@pytest.fixture
def check():
    """(config file, *overrides) -> issues of tools/check.py as (level, text)."""

    def issues(path: Path, *overrides: str) -> list[tuple[str, str]]:
        return [(issue.level, f"{issue.text} {issue.remedy}") for issue in check_run(str(path), overrides)]

    return issues


def errors(issues: list[tuple[str, str]]) -> list[str]:
    return [text for level, text in issues if level == "error"]


@pytest.mark.parametrize("kind", ["panoptic", "instances", "semantic"])
def test_the_checker_of_a_run_finds_nothing_wrong_with_a_sound_yaml(check, config, tmp_path, kind):
    found = check(config(kind, write_own(tmp_path / "a", kind)))
    assert errors(found) == []
    assert sum(f"own_{kind}.yaml: 5 images; the first" in text for _, text in found) == 2


def test_the_checker_of_a_run_names_what_is_missing_and_where_it_was_looked_for(check, config, tmp_path):
    path = config("panoptic", write_own(tmp_path / "a", "panoptic"))
    (tmp_path / "a" / "labels").rename(tmp_path / "a" / "elsewhere")
    (text,) = errors(check(path))[:1]
    assert f"only 2 of 3 files and folders found where {tmp_path}/a/own_panoptic.yaml says; missing: " in text
    assert "paths in it are relative to its folder" in text and "DETECTRON2" not in text
    edit_json(tmp_path / "a" / "labels.json", lambda content: content["categories"][1].update(name="Car"))
    (tmp_path / "a" / "elsewhere").rename(tmp_path / "a" / "labels")
    assert "Did you mean 'car'?" in errors(check(path))[0]
