import json
import math
import subprocess

import pytest

from fcclip.evaluation import copypaste_lines, current_commit, format_table, results, unmet_expectations, write_results
from fcclip.evaluation.averages import mean_of_defined, seen_and_unseen

TASKS = {
    "panoptic_seg": {"PQ": 44.44, "PQ_seen": 50.0, "PQ_unseen": math.nan, "PQ-walkie-talkie": 1.0},
    "segm": {"AP": 12.3456789, "AP_seen": 20.0, "AP_unseen": 3.0, "AP-cup": 5.0},
    "bbox": {"AP": 99.0},
    "sem_seg": {"mIoU": 60.0, "mIoU_union": 55.0, "mIoU_seen": 70.0, "mIoU_unseen": 10.0},
}
SETS = {
    "shapes_val": {"ensemble": TASKS, "in_vocabulary": TASKS},
    "ade20k": {"ensemble": {"sem_seg": TASKS["sem_seg"]}},
}


def test_the_table_has_a_row_for_each_set_and_mode_and_dashes_for_what_is_undefined():
    table = format_table(SETS, title="after 100 iterations")
    assert "after 100 iterations" in table
    rows = {tuple(line.split()[:2]): line.split() for line in table.splitlines()}
    assert rows["shapes_val", "ensemble"][2:] == ["44.4", "50.0", "-", "12.3", "20.0", "3.0", "60.0", "70.0", "10.0"]
    assert rows["in", "vocabulary"][2:5] == ["44.4", "50.0", "-"]
    assert rows["ade20k", "ensemble"][2:] == ["-"] * 6 + ["60.0", "70.0", "10.0"]
    assert max(map(len, table.splitlines())) <= 120 and "\x1b" not in table


def test_results_json_has_the_schema(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results(path, SETS, seconds={"train": 12.5}, commit="abc")
    content = json.loads(path.read_text())
    assert content.keys() == {"schema", "commit", "sets", "seconds"}
    assert content["schema"] == 1 and content["commit"] == "abc" and content["seconds"] == {"train": 12.5}
    assert content["sets"]["shapes_val"]["ensemble"] == {
        "PQ": {"all": 44.44, "seen": 50.0, "unseen": None},
        "AP": {"all": 12.3456789, "seen": 20.0, "unseen": 3.0},
        "mIoU": {"all": 60.0, "seen": 70.0, "unseen": 10.0},
    }
    assert content["sets"]["ade20k"]["ensemble"]["PQ"] == {"all": None, "seen": None, "unseen": None}


def test_a_failed_write_leaves_the_earlier_results(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, {}, seconds={}, commit="first")
    with pytest.raises(TypeError):
        write_results(path, {}, seconds={"train": object()}, commit="second")
    assert json.loads(path.read_text())["commit"] == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_the_commit_is_that_of_the_source_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "__file__", str(tmp_path / "fcclip" / "evaluation" / "results.py"))
    assert current_commit() == "unknown"  # no checkout
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    assert current_commit() == "unknown"  # no commit yet
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], cwd=tmp_path, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert current_commit() == head.stdout.strip()
    (tmp_path / "file").write_text("two")
    assert current_commit() == head.stdout.strip() + "-dirty"


def test_lines_to_paste_leave_out_single_classes():
    assert copypaste_lines({"panoptic_seg": TASKS["panoptic_seg"]}) == [
        "copypaste: Task: panoptic_seg",
        "copypaste: PQ,PQ_seen,PQ_unseen",
        "copypaste: 44.4400,50.0000,nan",
    ]


def test_expectations_that_are_not_met_are_told():
    expected = [
        ("panoptic_seg", "PQ", 44.0, 0.5),
        ("panoptic_seg", "PQ", 40.0, 0.5),
        ("panoptic_seg", "PQ_unseen", 1.0, 5.0),
        ("keypoints", "AP", 1.0, 0.1),
    ]
    assert unmet_expectations(TASKS, expected) == [
        "panoptic_seg/PQ is 44.4400; expected 40.0 within 0.5",
        "panoptic_seg/PQ_unseen is nan; expected 1.0 within 5.0",
        "keypoints/AP was not evaluated; expected 1.0",
    ]


def test_means_leave_out_undefined_values_and_do_not_depend_on_the_order():
    values = [0.1, 1e16, math.nan, 0.3, -1e16]
    assert mean_of_defined(values) == mean_of_defined(reversed(values)) == pytest.approx(0.1)
    assert math.isnan(mean_of_defined([math.nan])) and math.isnan(mean_of_defined([]))
    assert seen_and_unseen("PQ", [1.0, math.nan, 3.0], [True, True, False]) == {"PQ_seen": 1.0, "PQ_unseen": 3.0}
    assert seen_and_unseen("PQ", [1.0], None) == {}
