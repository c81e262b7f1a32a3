import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.published_trees import write_tree
from tests.tools.conftest import REPOSITORY, load_program

COCO = "openvocab_coco_2017_val_panoptic_with_sem_seg"


tool = load_program(REPOSITORY / "tools" / "check_dataset.py")


@pytest.fixture
def run(root, capsys):
    """Function (*words) -> (exit code, what is printed, what is said on the error stream)."""

    def call(*words):
        capsys.readouterr()
        try:
            code = tool.main(["--workers", "0", *map(str, words)])
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return call


def own_yaml(root, **changes):
    """A YAML that describes shapes_val as the user's own."""
    content = json.loads((root / "shapes/annotations/panoptic_val.json").read_text())
    keys = {
        "type": "panoptic",
        "images": "shapes/val",
        "annotations": "shapes/annotations/panoptic_val.json",
        "masks": "shapes/panoptic_val",
        "classes": [category["name"] for category in content["categories"]],
        "things": [category["name"] for category in content["categories"] if category["isthing"]],
    }
    path = root / "meine Daten.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {**keys, **changes}.items()))
    return path


def test_a_healthy_data_set_leaves_with_0(run):
    code, out, _ = run("shapes_train", "shapes_val")
    assert code == 0
    assert "shapes_train: in order" in out and "shapes_val: in order" in out
    assert "ERROR" not in out and "warn" not in out


def test_the_summary_names_vocabulary_images_classes_and_what_was_seen(run, root):
    _, out, _ = run("shapes_val")
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0] == "shapes_val (panoptic)"
    assert lines[1] == f"files      {os.path.join('shapes', 'annotations', 'panoptic_val.json')} below {root}"
    assert lines[2].startswith("vocabulary 'shapes' (not published), 60 classes, ") and "sha256 " in lines[2]
    assert lines[3].split() == ["images", "2"]
    assert lines[4].startswith("classes    60, ") and lines[4].endswith("of them used; 48 things, 12 stuff")
    assert lines[5].startswith("seen       40 ") and "'shapes_seen'" in lines[5] and lines[5].endswith("20 are unseen")


def test_errors_leave_with_1_and_are_named_with_file_and_remedy(run, root):
    image = root / "shapes/val/000000000001.jpg"
    image.write_bytes(image.read_bytes()[:1000])
    code, out, _ = run("shapes_val")
    assert code == 1
    assert "ERROR images that cannot be read: 1" in out
    assert "shapes/val/000000000001.jpg: image file is truncated" in out
    assert "-> copy or download them again" in out
    assert "shapes_val: not fit for use (1 error, " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shapes_vall"], "unknown data set 'shapes_vall'. Did you mean 'shapes_val'?"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["shapes_val", "--preview", "0"], "--preview must be 1 or more, got 0"),
        (["shapes_val", "--workers", "-1"], "--workers must be 0 or more, got -1"),
    ],
)
def test_a_command_line_that_cannot_be_used_leaves_with_2(run, words, message):
    code, out, error = run(*words)
    assert code == 2 and not out
    assert message in error


def test_the_first_files_of_a_kind_are_shown(run, root):
    for number in range(5):
        Image.new("RGB", (8, 8)).save(root / f"shapes/val/more_{number}.jpg")
    code, out, _ = run("shapes_val")
    assert code == 0
    assert "images that no annotation lists: they are not used: 5" in out
    assert out.count("more_") == 3 and "and 2 more (--output)" in out


def test_the_output_file_has_every_issue_and_every_class(run, root, tmp_path):
    for number in range(5):
        Image.new("RGB", (8, 8)).save(root / f"shapes/val/more_{number}.jpg")
    code, out, _ = run("shapes_val", "shapes_train", "--output", tmp_path / "reports" / "é.json")
    assert code == 0 and "é.json" in out
    content = json.loads((tmp_path / "reports" / "é.json").read_text(encoding="utf-8"))
    first, second = content["reports"]
    assert (first["dataset"], second["dataset"]) == ("shapes_val", "shapes_train")
    unlisted = [issue for issue in first["issues"] if issue["kind"] == "unlisted-file"]
    assert len(unlisted) == 5 and unlisted[0]["file"].endswith("more_0.jpg") and unlisted[0]["level"] == "note"
    assert len(first["classes"]) == 60 and sum(entry["images"] > 0 for entry in second["classes"]) > 3


def test_a_preview_is_a_sheet_of_images_with_labels_drawn(run, tmp_path):
    code, out, _ = run("shapes_train", "--preview", "12", "--output", tmp_path / "out" / "report.json")
    assert code == 0
    assert f"3 images with their labels: {tmp_path / 'out' / 'shapes_train_preview.jpg'}" in out
    sheet = np.asarray(Image.open(tmp_path / "out" / "shapes_train_preview.jpg"))
    assert sheet.shape[0] > 1000 and sheet.shape[1] > 1000  # two rows of two
    assert (sheet[-600:, -500:] > 250).mean() > 0.99  # the fourth place stays empty
    assert sheet[:500, :500].std() > 20


@pytest.mark.parametrize(
    "name",
    [COCO, "openvocab_coco_2017_val", "openvocab_ade20k_full_sem_seg_val", "openvocab_lvis_v1_val"],
)
def test_every_kind_of_label_can_be_drawn(run, tmp_path, monkeypatch, name):
    write_tree(name, tmp_path / "tree")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "tree"))
    code, out, _ = run(name, "--preview", "12")
    assert code == 0
    assert "usable; look at the warnings (1 warning, " in out
    sheet = Image.open(tmp_path / "output" / f"{name}_preview.jpg")
    assert min(sheet.size) > 1000


def test_own_data_are_checked_and_drawn_by_their_yaml(run, root, tmp_path):
    code, out, _ = run(own_yaml(root), "--preview", "2")
    assert code == 0
    assert "meine Daten: in order" in out
    assert (tmp_path / "output" / "meine Daten_preview.jpg").is_file()


def test_a_yaml_that_describes_no_data_set_leaves_with_2(run, root):
    code, out, error = run(own_yaml(root, image="shapes/val"), "shapes_val")
    assert code == 2 and not out
    assert "meine Daten.yaml" in error and "'image'" in error


def test_the_program_runs_by_itself_in_processes(root):
    command = [sys.executable, str(REPOSITORY / "tools" / "check_dataset.py"), "shapes_val", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "shapes_val: in order" in done.stdout
    assert "Error" not in done.stderr  # on a busy machine there may be lines of progress
