"""Pixels by hand: see downloads.py for what the images hold."""

import json

import numpy as np
import pytest
from PIL import Image

from fcclip.data import get_dataset, read_id_map

FOLDER = "bdd100k/labels/pan_seg"


def test_segments_have_the_ids_of_the_bitmasks_and_what_is_ignored_is_void(downloads, prepare, tmp_path):
    downloads.bdd100k(tmp_path)
    assert prepare("bdd100k_panoptic") == 0
    content = json.loads((tmp_path / FOLDER / "meta/coco_val.json").read_text())
    assert [annotation["segments_info"] for annotation in content["annotations"]] == [
        [
            {"id": 7, "category_id": 7, "area": 10, "bbox": [1, 0, 5, 2], "iscrowd": 0},
            {"id": 32, "category_id": 35, "area": 2, "bbox": [5, 2, 1, 2], "iscrowd": 1},
            {"id": 300, "category_id": 35, "area": 8, "bbox": [1, 2, 4, 2], "iscrowd": 0},
        ],
        [{"id": 30, "category_id": 30, "area": 12, "bbox": [0, 0, 4, 3], "iscrowd": 0}],
    ]
    road, cars = [0, 7, 7, 7, 7, 7], [0, 300, 300, 300, 300, 32]
    assert read_id_map(tmp_path / FOLDER / "coco_pano/val/val-00000000.png").tolist() == [road, road, cars, cars]
    assert read_id_map(tmp_path / FOLDER / "coco_pano/val/val-00000001.png").tolist() == [[30] * 4] * 3 + [[0] * 4] * 3
    assert [category["id"] for category in content["categories"] if category["isthing"]] == [*range(31, 41)]
    record = get_dataset("bdd10k_40_panoptic_val", tmp_path).records()[0]
    assert [segment["category_id"] for segment in record["segments_info"]] == [6, 34, 34]


@pytest.mark.parametrize("pixel", [(41, 0, 0, 9), (8, 0, 0, 7), (8, 0, 0, 0)])
def test_a_bitmask_that_cannot_be_true_is_named(downloads, prepare, capsys, tmp_path, pixel):
    downloads.bdd100k(tmp_path)
    path = tmp_path / FOLDER / "bitmasks/val/val-00000000.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0] = pixel
    Image.fromarray(pixels).save(path)
    assert prepare("bdd100k_panoptic", "--splits", "val") == 1
    assert f"{path}: a segment has the id 0, several classes, or one that is not among 1..40" in capsys.readouterr().err
