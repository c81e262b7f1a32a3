"""The whole table, on four-image trees of every data set and on the shapes world; killed, resumed, shared out."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fcclip.data import DATASETS, get_dataset
from fcclip.errors import run_program
from fcclip.modeling import build_model
from fcclip.reports import published_results, zero_shot
from tests.conftest import tiny_config
from tests.data.own_world import write_own
from tests.data.published_trees import write_tree
from tests.tools.conftest import REPOSITORY, load_program
from tests.weight_files import save_weights

PROGRAM = REPOSITORY / "tools" / "evaluate_zero_shot.py"
BENCHMARKS = [benchmark["data_set"] for benchmark in published_results()["benchmarks"]]
SHAPES = ("shapes_val", "shapes_val_seen", "shapes_val_unseen")


tool = load_program(PROGRAM)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(config file, weights) of the tiny model, of which every image is 64 pixels wide."""
    folder = tmp_path_factory.mktemp("tiny")
    cfg = tiny_config()
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 64
    cfg.SOLVER.BEST.DATASET = ""
    torch.manual_seed(0)
    weights = folder / "tiny.safetensors"
    save_weights(build_model(cfg), weights, full=True, dtype=None)
    config = folder / "tiny.yaml"
    config.write_text(cfg.dump())
    return config, weights


def run(tiny, output, *arguments):
    """(exit code, what was printed, results.json)."""
    config, weights = tiny
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        words = ["--weights", weights, "--config-file", config, "--output", output, *arguments]
        code = run_program(lambda: tool.main([str(word) for word in words]))
    results = output / "results.json"
    return code, printed.getvalue(), json.loads(results.read_text()) if results.is_file() else None


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    for name in BENCHMARKS:
        write_tree(name, root)
    return root


SMALL = ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64, "DATASETS.TRAIN", "()")


@pytest.fixture(scope="module")
def whole_row(tiny, trees, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(trees))
        patch.setenv("COLUMNS", "100")
        return run(tiny, tmp_path_factory.mktemp("row"), *SMALL)


def test_the_row_has_every_column_of_the_model_zoo(whole_row):
    code, _, results = whole_row
    assert code == 0
    columns = [f"{cell['label']} {cell['column']}" for cell in results["row"]]
    benchmarks = published_results()["benchmarks"]
    labels = {entry["data_set"]: get_dataset(entry["data_set"]).benchmark for entry in benchmarks}
    wanted = [f"{labels[entry['data_set']]} {column}" for entry in benchmarks for column in entry["columns"]]
    assert columns == wanted and len(columns) == 18
    for cell in results["row"]:
        (value,) = cell["values"].values()
        assert 0 <= value <= 100, cell
        assert cell["verdict"] == "not comparable"
    assert results["sets"].keys() == set(BENCHMARKS) and not results["missing"]


def test_each_data_set_has_its_words_and_its_outputs(whole_row):
    _, _, results = whole_row
    assert len({content["vocabulary_sha256"] for content in results["sets"].values()}) == len(BENCHMARKS)
    tasks = {name: set(content["results"]["ensemble"]) for name, content in results["sets"].items()}
    assert tasks["openvocab_ade20k_panoptic_val"] == {"panoptic_seg", "segm", "bbox", "sem_seg"}
    assert tasks["openvocab_cityscapes_fine_panoptic_val"] == {"panoptic_seg", "segm", "sem_seg"}
    assert tasks["openvocab_mapillary_vistas_panoptic_val"] == {"panoptic_seg", "sem_seg"}
    assert tasks["openvocab_pascal_ctx459_sem_seg_val"] == {"sem_seg"}
    assert tasks["bdd10k_40_panoptic_val"] == {"panoptic_seg"}


def test_it_is_said_with_what_it_was_evaluated(whole_row):
    _, printed, results = whole_row
    assert results["notes"].keys() >= {"weights", "config", "mIoU rule", "CLIP", "versions", "commit", "vocabulary"}
    assert "torch " in results["notes"]["versions"] and "since 2022-07-06" in results["notes"]["mIoU rule"]
    text = printed[printed.index("│") :]
    assert "here" in text and "published" in text and "difference" in text
    assert "not comparable: openvocab_pascal20_sem_seg_val: vocabulary: fcclip (not the published one);" in text
    table = printed.splitlines()[next(i for i, line in enumerate(printed.splitlines()) if "│" in line) :]
    assert max(len(line) for line in table if not line.startswith("results:")) <= 100


def test_sets_that_are_not_there_are_named_and_the_rest_is_evaluated(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    write_tree("openvocab_pascal20_sem_seg_val", tmp_path / "data")
    code, printed, results = run(tiny, tmp_path / "out", *SMALL)
    assert code == 0 and len(results["row"]) == 18
    assert f"missing: openvocab_ade20k_panoptic_val: there is no {tmp_path}" in printed.replace("\n    ", " ")
    assert {cell["verdict"] for cell in results["row"] if cell["label"] == "COCO"} == {"missing"}


def test_without_any_data_it_says_where_it_looked(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    code, printed, _ = run(tiny, tmp_path / "out", *SMALL)
    assert code == 1 and "none of the data sets is there; looked at" in printed and "nowhere/coco" in printed


def test_a_figure_out_of_tolerance_makes_the_exit_code_one(tiny, trees, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(trees))
    monkeypatch.setattr(zero_shot, "differences", lambda *_, **__: [])
    monkeypatch.setattr(zero_shot, "backbone_of", lambda cfg: published_results()["backbones"][0])
    code, printed, results = run(tiny, tmp_path, "--datasets", "openvocab_pascal20_sem_seg_val", *SMALL)
    assert code == 1 and results["verdict"] == "FAIL"
    assert "FAIL  PAS-20 mIoU: " in printed and "published 89.50" in printed


def test_earlier_predictions_are_neither_removed_nor_mixed(tiny, trees, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(trees))
    some = ("--datasets", "openvocab_pascal20_sem_seg_val")
    assert run(tiny, tmp_path, *some, *SMALL)[0] == 0
    code, printed, _ = run(tiny, tmp_path, *some, *SMALL)
    assert code == 1 and "holds predictions of an earlier evaluation. --resume goes on" in printed
    assert run(tiny, tmp_path, "--resume", *some, *SMALL)[0] == 0
    code, printed, _ = run(tiny, tmp_path, "--resume", *some, *SMALL, "INPUT.MAX_SIZE_TEST", 32)
    assert code == 1 and "INPUT.MAX_SIZE_TEST was 64, now 32" in printed


def test_a_page_shows_images_and_oracles_are_told_apart(tiny, trees, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(trees))
    some = ("--datasets", "openvocab_cityscapes_fine_panoptic_val", "openvocab_pascal20_sem_seg_val")
    code, printed, plain = run(tiny, tmp_path / "out", "--images", 1, *some, *SMALL)
    assert code == 0 and f"page with images: {tmp_path}/out/page/index.html" in printed
    assert (tmp_path / "out/page/openvocab_pascal20_sem_seg_val/best1_prediction.jpg").is_file()
    found = {}
    for oracle in ("classes", "masks"):
        code, printed, found[oracle] = run(tiny, tmp_path / oracle, "--oracle", oracle, *some, *SMALL)
        assert code == 0 and f"oracle: true {oracle} instead of predicted ones" in printed
        assert f"true {oracle} instead of predicted ones" in found[oracle]["not_comparable"][some[1]]
    values = {
        name: [cell["values"]["ensemble"] for cell in results["row"]] for name, results in (*found.items(), ("", plain))
    }
    assert values[""] != values["masks"]
    code, printed, _ = run(tiny, tmp_path / "all", "--oracles", *some, *SMALL)
    assert code == 0 and "true void" in printed and "true masks, in_vocabulary" in printed
    assert len(json.loads((tmp_path / "all" / "oracles.json").read_text())[some[1]]) == 8
    code, printed, _ = run(tiny, tmp_path / "out", "--resume", "--oracle", "masks", *some, *SMALL)
    assert code == 1 and "oracle was None, now 'masks'" in printed


@pytest.mark.parametrize("kind", ["panoptic", "instances", "semantic"])
def test_data_of_a_users_own_has_a_row_too(tiny, tmp_path, kind):
    path = write_own(tmp_path / "own", kind)
    code, printed, results = run(tiny, tmp_path / "out", "--datasets", path, "--images", 1, *SMALL)
    assert code == 0, printed
    columns = {"panoptic": ["PQ", "AP", "mIoU"], "instances": ["AP"], "semantic": ["mIoU"]}
    assert [cell["column"] for cell in results["row"]] == columns[kind]
    assert {cell["verdict"] for cell in results["row"]} == {"not published"} and "published  " not in printed
    assert (tmp_path / "out" / "page" / "index.html").is_file()
    again = run(tiny, tmp_path / "out", "--resume", "--datasets", path, *SMALL)
    assert comparable(again[2]) == comparable(results)


def test_all_modes_come_from_one_pass(tiny, trees, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(trees))
    some = ("--datasets", "openvocab_pascal20_sem_seg_val")
    code, printed, results = run(
        tiny, tmp_path, "--modes", "ensemble", "out_of_vocabulary", "--first", 2, *some, *SMALL
    )
    assert code == 0 and results["row"][0]["values"].keys() == {"ensemble", "out_of_vocabulary"}
    assert "out of vocabulary" in printed and "2 images, published 1449" in printed.replace("\n    ", " ")
    assert "evaluated openvocab_pascal20_sem_seg_val: 2 images" in printed
    assert results["notes"]["images"] == "only the first 2 of each data set"


def test_options_may_stand_in_any_order():
    args = tool.parse_arguments(["--weights", "w", "--datasets", "a", "./b.yaml", "MODEL.DEVICE", "cpu"])
    assert args.datasets == ["a", "./b.yaml"] and args.opts == ["MODEL.DEVICE", "cpu"]
    args = tool.parse_arguments(["--weights", "w", "--datasets", "a", "--resume", "SEED", "1"])
    assert args.datasets == ["a"] and args.opts == ["SEED", "1"] and args.resume
    args = tool.parse_arguments(["--weights", "w", "--modes", "ensemble", "SEED", "1"])
    assert args.modes == ["ensemble"] and args.opts == ["SEED", "1"]
    for words in (["MODEL.DEVICE"], ["--modes", "all"], ["--first", "0"]):
        with pytest.raises(SystemExit):
            tool.parse_arguments(["--weights", "w", *words])


def test_the_config_is_that_of_the_weights(tiny, tmp_path):
    args = tool.parse_arguments(["--weights", "shapes_fcclip.safetensors", "SEED", "5"])
    cfg = tool.read_config(args)
    assert cfg.DATASETS.TEST == SHAPES and cfg.SEED == 5 and cfg.MODEL.WEIGHTS == "shapes_fcclip.safetensors"
    with pytest.raises(ValueError, match="fits none of the published backbones; give --config-file"):
        tool.read_config(tool.parse_arguments(["--weights", str(tiny[1])]))


def test_a_published_checkpoint_is_known_by_its_shapes(tmp_path, capsys):
    weights = {"sem_seg_head.pixel_decoder.input_proj.0.0.weight": torch.zeros(256, 3072, 1, 1)}
    torch.save({"model": {**weights, "void_embedding.weight": torch.zeros(1, 768)}}, tmp_path / "fcclip.pth")
    cfg = tool.read_config(tool.parse_arguments(["--weights", str(tmp_path / "fcclip.pth")]))
    assert cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME == "RN50x16" and cfg.MODEL.FC_CLIP.ENSEMBLE_ON_VALID_MASK
    assert "is of ResNet50x16: taking coco/" in capsys.readouterr().out


def test_a_checkpoint_of_a_training_brings_its_config(tiny_cfg, tmp_path):
    tiny_cfg.INPUT.MIN_SIZE_TEST = 77
    torch.save({"model": {"weight": torch.zeros(1)}, "config": tiny_cfg.dump()}, tmp_path / "model_final.pth")
    cfg = tool.read_config(tool.parse_arguments(["--weights", str(tmp_path / "model_final.pth"), "SEED", "3"]))
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.SEED, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM) == (77, 3, 32)


# ---- the shapes world: killed, resumed, shared out ----


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The root of a shapes world whose three test sets have twelve images each."""
    root = tmp_path_factory.mktemp("shapes")
    render = load_program(REPOSITORY / "datasets" / "prepare_shapes.py")
    with contextlib.redirect_stdout(io.StringIO()):
        render.prepare(out=root, seed=0, num_images=1, num_workers=1, num_evaluation=12)
    return root


def start(tiny, shapes, output, *arguments):
    config, weights = tiny
    words = ["--weights", weights, "--config-file", config, "--output", output, *arguments]
    environment = os.environ | {"DETECTRON2_DATASETS": str(shapes), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def comparable(results):
    """Results without what may differ between runs."""
    volatile = {"time", "machine", "versions"}
    return {**results, "notes": {name: text for name, text in results["notes"].items() if name not in volatile}}


def lines_in(output):
    return sum(path.read_bytes().count(b"\n") for path in output.glob("**/images.*.jsonl"))


@pytest.mark.slow
def test_killed_half_way_it_resumes_to_the_same_row_with_two_processes_too(tiny, shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    code, printed, whole = run(tiny, tmp_path / "whole")
    assert code == 0 and [cell["data_set"] for cell in whole["row"][::3]] == list(SHAPES)
    assert all(name in printed for name in SHAPES)
    table = printed[printed.rindex("┼") :]
    assert "here" in table and "difference" not in table

    process = start(tiny, shapes, tmp_path / "parts")
    deadline = time.monotonic() + 300
    while lines_in(tmp_path / "parts") < 15 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = lines_in(tmp_path / "parts")
    assert 15 <= kept < 36

    process = start(tiny, shapes, tmp_path / "parts", "--resume", "--num-gpus", 2)
    told = process.communicate(timeout=400)[0]
    assert process.returncode == 0, told
    assert "images are evaluated from saved predictions" in told
    resumed = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert comparable(resumed) == comparable(whole)
    for path in sorted((tmp_path / "whole").glob("*/predictions.json")):
        other = tmp_path / "parts" / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes()


def test_names_of_data_sets_are_checked_before_anything_is_loaded(tiny, tmp_path):
    code, printed, _ = run(tiny, tmp_path, "--datasets", "shapes_vall")
    assert code == 1 and "Did you mean 'shapes_val'?" in printed
    assert "shapes_val" in DATASETS
