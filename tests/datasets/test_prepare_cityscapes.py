"""Pixels by hand: see downloads.py for what the images hold."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

from fcclip.data import read_id_map

TRUTH = "cityscapes/gtFine"
NAME = "frankfurt_000000_000294"
SECOND = "munster_000001_000294"


def panoptic(root, split="val"):
    return json.loads((root / TRUTH / f"cityscapes_panoptic_{split}.json").read_text())


def test_segments_are_the_instance_ids_that_are_evaluated(downloads, prepare, tmp_path):
    downloads.cityscapes(tmp_path)
    assert prepare("cityscapes_panoptic") == 0
    assert panoptic(tmp_path)["annotations"] == [
        {
            "image_id": NAME,
            "file_name": f"{NAME}_gtFine_panoptic.png",
            "segments_info": [
                {"id": 7, "category_id": 7, "area": 10, "bbox": [1, 0, 5, 2], "iscrowd": 0},
                {"id": 26, "category_id": 26, "area": 2, "bbox": [5, 2, 1, 2], "iscrowd": 1},
                {"id": 26000, "category_id": 26, "area": 8, "bbox": [1, 2, 4, 2], "iscrowd": 0},
            ],
        },
        {
            "image_id": SECOND,
            "file_name": f"{SECOND}_gtFine_panoptic.png",
            "segments_info": [{"id": 23, "category_id": 23, "area": 12, "bbox": [0, 0, 4, 3], "iscrowd": 0}],
        },
    ]
    folder = tmp_path / TRUTH / "cityscapes_panoptic_val"
    road, cars = [0, 7, 7, 7, 7, 7], [0, 26000, 26000, 26000, 26000, 26]
    assert read_id_map(folder / f"{NAME}_gtFine_panoptic.png").tolist() == [road, road, cars, cars]
    assert read_id_map(folder / f"{SECOND}_gtFine_panoptic.png").tolist() == [[23] * 4] * 3 + [[0] * 4] * 3
    assert panoptic(tmp_path)["images"][0] == {
        "id": NAME,
        "file_name": f"{NAME}_leftImg8bit.png",
        "width": 6,
        "height": 4,
    }
    assert [annotation["image_id"] for annotation in panoptic(tmp_path, "train")["annotations"]] == [
        "aachen_000000_000294",
        "zurich_000001_000294",
    ]


def test_train_ids_are_0_to_18_and_255(downloads, prepare, values, tmp_path):
    downloads.cityscapes(tmp_path)
    assert prepare("cityscapes_panoptic") == 0
    road, cars = [255, 0, 0, 0, 0, 0], [255, 13, 13, 13, 13, 13]
    assert values(f"{TRUTH}/val/frankfurt/{NAME}_gtFine_labelTrainIds.png") == [road, road, cars, cars]
    assert values(f"{TRUTH}/val/munster/{SECOND}_gtFine_labelTrainIds.png") == [[10] * 4] * 3 + [[255] * 4] * 3


def test_categories_and_vocabulary_know_the_same_labels(downloads, prepare, tmp_path):
    downloads.cityscapes(tmp_path)
    assert prepare("cityscapes_panoptic", "--splits", "val") == 0
    categories = panoptic(tmp_path)["categories"]
    ids = {category["id"]: category["isthing"] for category in categories}
    assert [*ids] == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [label for label, thing in ids.items() if thing] == [24, 25, 26, 27, 28, 31, 32, 33]
    assert categories[0] == {
        "id": 7,
        "name": "road",
        "color": [128, 64, 128],
        "supercategory": "flat",
        "isthing": 0,
    }


@pytest.mark.parametrize("kind", ["leftImg8bit", "gtFine_labelIds"])
def test_a_missing_companion_is_named(kind, downloads, prepare, capsys, tmp_path):
    downloads.cityscapes(tmp_path)
    (path,) = (tmp_path / "cityscapes").rglob(f"{NAME}_{kind}.png")
    path.unlink()
    assert prepare("cityscapes_panoptic", "--splits", "val") == 1
    assert f"{path}: no such" in capsys.readouterr().err


def test_what_comes_out_is_what_cityscapesscripts_makes(downloads, prepare, tmp_path):
    reason = "cityscapesscripts is not installed; pip install 'fcclip[cityscapes]'"
    pytest.importorskip("cityscapesscripts", reason=reason)
    convert = importlib.import_module("cityscapesscripts.preparation.createPanopticImgs").convert2panoptic
    labels = importlib.import_module("cityscapesscripts.helpers.labels")
    downloads.cityscapes(tmp_path)
    truth, theirs = tmp_path / TRUTH, tmp_path / "theirs"
    rng = np.random.default_rng(0)
    every = [label.id for label in labels.labels if label.id >= 0]
    instances = [label.id * 1000 + 7 for label in labels.labels if label.hasInstances]
    ids = rng.choice([*every, *instances], (30, 40)).astype(np.uint16)
    Image.fromarray(ids).save(truth / "val" / "frankfurt" / f"{NAME}_gtFine_instanceIds.png")
    label_ids = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
    Image.fromarray(label_ids).save(truth / "val" / "frankfurt" / f"{NAME}_gtFine_labelIds.png")
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(
        tmp_path / "cityscapes" / "leftImg8bit" / "val" / "frankfurt" / f"{NAME}_leftImg8bit.png"
    )
    assert prepare("cityscapes_panoptic", "--splits", "val") == 0
    theirs.mkdir()
    convert(str(truth), str(theirs), setNames=["val"])
    expected, ours = json.loads((theirs / "cityscapes_panoptic_val.json").read_text()), panoptic(tmp_path)
    assert ours["annotations"] == expected["annotations"] and ours["categories"] == expected["categories"]
    for name in (NAME, SECOND):
        file = f"cityscapes_panoptic_val/{name}_gtFine_panoptic.png"
        assert np.array_equal(read_id_map(truth / file), read_id_map(theirs / file))
    train_ids = np.array(Image.open(truth / "val" / "frankfurt" / f"{NAME}_gtFine_labelTrainIds.png"))
    assert train_ids.tolist() == [[labels.id2label[label_id].trainId for label_id in row] for row in label_ids.tolist()]
