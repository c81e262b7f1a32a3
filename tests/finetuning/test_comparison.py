"""Before and after a fine-tuning: the same classes in both columns."""

import math
from dataclasses import replace

import pytest

from fcclip.data import get_dataset
from fcclip.files import read_json, write_json
from fcclip.finetuning import figures_of, format_comparison, grouped_figures
from fcclip.vocabulary import Vocabulary

WORDS = Vocabulary.from_names("cat; dog; cow; sheep; sand:stuff")
FORMER, OWN = Vocabulary.from_names("cat; sand:stuff; hound"), Vocabulary.from_names("cow; cat")
TASKS = {
    "panoptic_seg": {"PQ": 50.0, "PQ-cat": 80.0, "PQ-dog": 10.0, "PQ-cow": 30.0, "PQ-sheep": math.nan, "PQ-sand": 60.0},
    "sem_seg": {
        "mIoU": 40.0,
        "IoU-cat": 70.0,
        "IoU-dog": 20.0,
        "IoU-cow": 0.0,
        "IoU-sheep": 40.0,
        "IoU-sand": math.nan,
    },
}


@pytest.fixture
def figures():
    dataset = replace(get_dataset("shapes_val"), metadata={"stuff_classes": WORDS.class_names})
    return grouped_figures(TASKS, dataset, WORDS, former=FORMER, own=OWN)


def test_classes_are_grouped_by_what_the_start_knew(figures):
    assert figures["PQ"] == {"all": 50.0, "seen": 70.0, "own": 30.0, "unseen": 10.0}  # sheep has no figure
    assert figures["mIoU"] == {"all": 40.0, "seen": 70.0, "own": 0.0, "unseen": 30.0}
    assert all(math.isnan(value) for value in figures["AP"].values())


def test_a_table_tells_before_after_and_the_change(figures):
    after = {"pets": {**figures, "PQ": {"all": 51.25, "seen": 70.0, "own": math.nan, "unseen": 0.0}}}
    lines = format_comparison({"pets": figures}, after).splitlines()
    rows = {line.split()[-10]: line.split()[-9:] for line in lines if len(line.split()) > 9 and "before" not in line}
    assert list(rows) == ["all", "seen", "own", "unseen"]
    assert rows["all"] == ["50.0", "51.2", "+1.2", "-", "-", "-", "40.0", "40.0", "+0.0"]
    assert rows["own"][:3] == ["30.0", "-", "-"] and rows["unseen"][:3] == ["10.0", "0.0", "-10.0"]


def test_groups_without_a_figure_are_left_out(figures):
    only = {"PQ": {"all": 1.0, "seen": math.nan, "own": 1.0, "unseen": math.nan}}
    text = format_comparison({}, {"pets": only})
    assert "own" in text and "unseen" not in text and text.count("-  ") >= 2


def test_figures_are_read_back_with_nan_for_null(figures, tmp_path):
    write_json(tmp_path / "finetune.json", {"pets": figures})
    found = figures_of(read_json(tmp_path / "finetune.json"))["pets"]
    assert found["PQ"] == figures["PQ"] and math.isnan(found["AP"]["all"])
