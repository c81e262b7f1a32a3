"""The lists of PASCAL-5^i and COCO-20^i from four images each."""

import json

import numpy as np
import pytest
import scipy.io
from PIL import Image

from fcclip.data import get_dataset

LARGE = 50  # a square of so many pixels a side is large enough for every list, one of 40 is not


def image(path, size=(60, 120)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)


def mask(*squares, size=(60, 120)):
    """squares: (value, left edge, side)."""
    labels = np.zeros(size, np.uint8)
    for value, left, side in squares:
        labels[:side, left : left + side] = value
    return labels


def write(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


@pytest.fixture
def voc(tmp_path):
    """Two images of VOC train and val, one of SBD that is in val too, one of SBD alone."""
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("2007_000001", "2007_000002", "2008_000003", "2008_000004"):
        image(voc / "JPEGImages" / f"{name}.jpg")
    for split, name in (("train", "2007_000001"), ("val", "2007_000002\n2008_000003")):
        (voc / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{name}\n")
    return voc


MASKS = {
    "2007_000001": mask((1, 0, 4), (255, 10, 5)),
    "2007_000002": mask((7, 0, LARGE), (1, 60, 40)),
    "2008_000003": mask((20, 0, LARGE)),
    "2008_000004": mask((15, 0, 3), (12, 30, 3)),
}


def lists(root, name):
    return {
        f"{path.parent.name}/{path.stem}": path.read_text().split() for path in sorted((root / name).rglob("*.txt"))
    }


EXPECTED = {
    "trn/fold0": ["2007_000001__01"],
    "trn/fold1": [],
    "trn/fold2": ["2008_000004__12", "2008_000004__15"],
    "trn/fold3": [],
    "val/fold0": [],
    "val/fold1": ["2007_000002__07"],
    "val/fold2": [],
    "val/fold3": ["2008_000003__20"],
}


def test_pascal_from_voc_and_sbd(voc, prepare, tmp_path, capsys):
    sbd = tmp_path / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    (sbd / "train.txt").write_text("2008_000004\n")
    (sbd / "val.txt").write_text("2008_000003\n")
    for name, labels in MASKS.items():
        if name == "2008_000004":
            scipy.io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels}})
        else:
            write(voc / "SegmentationClass" / f"{name}.png", labels)
    assert prepare("pascal_5i") == 0
    assert lists(tmp_path, "pascal_5i") == EXPECTED
    assert "fold 0 (val) has 0 pairs, the published one 346" in capsys.readouterr().err
    [record] = get_dataset("pascal_5i_fold1_val", tmp_path).records()
    assert np.array_equal(np.array(Image.open(record["sem_seg_file_name"])), MASKS["2007_000002"])


@pytest.mark.parametrize("folder", ["SegmentationClassAug", "VOCdevkit/VOC2012/SegmentationClassAug"])
def test_pascal_from_masks_that_are_there(voc, prepare, tmp_path, folder):
    for name, labels in MASKS.items():
        write(tmp_path / folder / f"{name}.png", labels)
    assert prepare("pascal_5i") == 0
    assert lists(tmp_path, "pascal_5i") == EXPECTED


def test_pascal_without_masks_names_every_place(voc, prepare, capsys):
    assert prepare("pascal_5i") != 0
    error = capsys.readouterr().err
    assert error.count("SegmentationClassAug") == 2 and "benchmark_RELEASE/dataset/cls" in error


@pytest.fixture
def coco(tmp_path):
    """Four images, of which one has no object; categories with gaps, as COCO's."""
    for split, names in (("train", (1, 2)), ("val", (3, 4))):
        for number in names:
            image(tmp_path / "COCO2014" / f"{split}2014" / f"COCO_{split}2014_{number:012d}.jpg")
        rows = []
        for number, category, left, side in ((1, 90, 0, LARGE), (1, 1, 10, LARGE - 1), (3, 3, 0, LARGE), (3, 2, 60, 9)):
            corners = [left, 0, left + side, 0, left + side, side, left, side]
            if number in names:
                row = {"id": len(rows), "image_id": number, "category_id": category, "area": side * side}
                rows.append({**row, "segmentation": [corners], "iscrowd": 0})
        content = {
            "images": [{"id": number, "file_name": f"COCO_{split}2014_{number:012d}.jpg"} for number in names],
            "annotations": rows,
            "categories": [{"id": number} for number in (*range(1, 80), 90)],
        }
        folder = tmp_path / "COCO2014" / "annotations"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"instances_{split}2014.json").write_text(json.dumps(content))
    return tmp_path / "COCO2014"


def test_coco_masks_are_painted_small_over_large_and_small_objects_are_no_pairs(coco, prepare, tmp_path):
    assert prepare("coco_20i") == 0
    found = {key: names for key, names in lists(tmp_path, "coco_20i").items() if names}
    first = "COCO_train2014_000000000001"
    assert found == {
        "trn/fold0": [f"{first}__00"],  # what is left of class 79 is below 2 x 32 x 32 pixels
        "val/fold2": ["COCO_val2014_000000000003__02"],
    }
    labels = np.array(Image.open(coco / "annotations" / "train2014" / f"{first}.png"))
    assert labels[20, 5] == 80 and labels[20, 20] == 1 and labels[20, 70] == 0
    [record] = get_dataset("coco_20i_fold2_val", tmp_path).records()
    assert (record["mask_value"], record["class_name"]) == (3, "car")


def test_coco_masks_that_are_there_stay(coco, prepare, tmp_path):
    path = coco / "annotations" / "val2014" / "COCO_val2014_000000000003.png"
    write(path, mask((80, 0, LARGE)))
    before = path.read_bytes()
    assert prepare("coco_20i", "--splits", "val") == 0
    assert path.read_bytes() == before
    assert lists(tmp_path, "coco_20i")["val/fold3"] == ["COCO_val2014_000000000003__79"]


def test_a_mask_with_a_strange_value_is_named(voc, prepare, tmp_path, capsys):
    for name, labels in MASKS.items():
        write(tmp_path / "SegmentationClassAug" / f"{name}.png", labels + 30 * (name == "2008_000004"))
    assert prepare("pascal_5i") != 0
    assert "2008_000004.png: value 30" in capsys.readouterr().err
