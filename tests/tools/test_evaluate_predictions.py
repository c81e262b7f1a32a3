"""The command line that evaluates predictions without a model."""

import json

import numpy as np
import pytest
from PIL import Image

from fcclip.data import read_label_map
from fcclip.errors import run_program
from tests.data.published_trees import write_tree
from tests.tools.conftest import REPOSITORY, load_program
from tests.weight_files import save_weights

tool = load_program(REPOSITORY / "tools" / "evaluate_predictions.py")
ADE20K = "openvocab_ade20k_panoptic_val"


def run(words):
    """The exit code of a command line."""
    return run_program(lambda: tool.main(words))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Four-image trees of ADE20K and Cityscapes, whose ground truth serves as predictions of another program."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    write_tree(ADE20K, tmp_path)
    write_tree("openvocab_cityscapes_fine_panoptic_val", tmp_path)
    return tmp_path


def results_file(root):
    """COCO results made of the instances of ADE20K."""
    truth = json.loads((root / "ADEChallengeData2016" / "ade20k_instance_val.json").read_text())
    keys = ("image_id", "category_id", "segmentation")
    rows = [{**{key: annotation[key] for key in keys}, "score": 0.5} for annotation in truth["annotations"]]
    path = root / "instances.json"
    path.write_text(json.dumps(rows))
    return path


def test_predictions_of_another_program_in_all_three_formats(root, capsys):
    ade = root / "ADEChallengeData2016"
    labels = root / "labels"
    labels.mkdir()
    for path in (ade / "annotations_detectron2" / "validation").glob("*.png"):
        Image.fromarray(read_label_map(path).astype(np.uint8)).save(labels / path.name)
    words = ["--dataset", ADE20K, "--panoptic", str(ade / "ade20k_panoptic_val.json"), "--semantic", str(labels)]
    words += ["--instances", str(results_file(root)), "--output", str(root / "out")]
    code = run([*words, "--training-set", "shapes_train"])
    printed = capsys.readouterr().out
    assert code == 0
    assert "copypaste: Task: panoptic_seg" in printed and "predictions" in printed
    found = json.loads((root / "out" / "results.json").read_text())["sets"][ADE20K]["predictions"]
    assert {name: groups["all"] for name, groups in found.items()} == pytest.approx({"PQ": 100, "AP": 100, "mIoU": 100})
    assert (root / "out" / ADE20K / "per_image.json").is_file()


def test_label_ids_of_cityscapes_with_a_suffix(root, capsys):
    city = root / "cityscapes" / "gtFine" / "val"
    labels = root / "labels"
    labels.mkdir()
    for path in city.rglob("*_labelIds.png"):
        name = path.name.replace("_gtFine_labelIds.png", "_pred.png")
        values = read_label_map(path)
        Image.fromarray(np.where(values == 0, 7, values).astype(np.uint8)).save(labels / name)
    words = [
        "--dataset",
        "openvocab_cityscapes_fine_panoptic_val",
        "--semantic",
        str(labels),
        "--label-suffix",
        "_pred",
    ]
    assert run([*words, "--label-ids", "dataset"]) == 0
    assert "IoU,iIoU,IoU_sup,iIoU_sup" in capsys.readouterr().out
    assert run(words) == 1
    assert "are not classes of 'openvocab_cityscapes_fine_panoptic_val' (19 classes, 0..18;" in capsys.readouterr().err


def test_saved_predictions_of_several_modes_have_a_line_each(root, tmp_path, capsys):
    from fcclip.modeling import build_model
    from tests.conftest import tiny_config
    from tests.tools.test_evaluate_zero_shot import tool as zero_shot

    cfg = tiny_config()
    save_weights(build_model(cfg), tmp_path / "tiny.safetensors", full=True, dtype=None)
    (tmp_path / "tiny.yaml").write_text(cfg.dump())
    words = ["--weights", str(tmp_path / "tiny.safetensors"), "--config-file", str(tmp_path / "tiny.yaml")]
    words += ["--output", str(tmp_path / "run"), "--datasets", ADE20K, "--modes", "ensemble", "in_vocabulary"]
    assert zero_shot.main([*words, "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"]) == 0
    modelled = json.loads((tmp_path / "run" / "results.json").read_text())["row"]
    capsys.readouterr()
    words = ["--dataset", ADE20K, "--output", str(tmp_path / "out")]
    assert run([*words, "--saved", str(tmp_path / "run" / ADE20K)]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sets"][ADE20K]
    assert found.keys() == {"ensemble", "in_vocabulary"}
    for cell in modelled:
        assert {mode: columns[cell["column"]]["all"] for mode, columns in found.items()} == cell["values"]
    assert run([*words, "--saved", str(tmp_path / "run" / ADE20K / "in_vocabulary")]) == 0


def test_a_folder_without_saved_predictions_is_named(root, capsys):
    assert run(["--dataset", ADE20K, "--saved", str(root)]) == 1
    assert f"'{root}' holds no saved predictions: there is no header.json" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--saved", "a", "--panoptic", "b"]])
def test_one_kind_of_predictions_must_be_given(words):
    with pytest.raises(SystemExit):
        tool.parse_arguments(["--dataset", ADE20K, *words])
