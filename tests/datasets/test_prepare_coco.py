"""Pixels by hand: see downloads.py for what the images hold."""

import json

import numpy as np
import pytest
from PIL import Image

SEMANTIC = "coco_semantic_annos_from_panoptic_annos"
RUG, SKY, DOG = 132, 119, 16  # positions among the 133


def test_each_segment_becomes_the_position_of_its_category_crowds_too(downloads, prepare, values, tmp_path):
    downloads.coco(tmp_path)
    assert prepare(SEMANTIC) == 0
    for split, first, second in (("train", "000000000009", "000000000014"), ("val", "000000000139", "000000000144")):
        crowd, rug = [0, 0, 0, 0, 0, 255], [RUG, RUG, RUG, RUG, RUG, 255]
        assert values(f"coco/panoptic_semseg_{split}2017/{first}.png") == [crowd, crowd, rug, rug]
        assert values(f"coco/panoptic_semseg_{split}2017/{second}.png") == [[SKY] * 4] * 3 + [[DOG] * 4] * 3


def change_panoptic(root, change):
    path = root / "coco" / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_later_segment_with_the_same_id_is_painted_over_the_earlier(downloads, prepare, values, tmp_path):
    downloads.coco(tmp_path)
    change_panoptic(
        tmp_path,
        lambda content: content["annotations"][1]["segments_info"].append({"id": 70, "category_id": 200}),
    )
    assert prepare(SEMANTIC, "--splits", "val") == 0
    assert values("coco/panoptic_semseg_val2017/000000000144.png")[3:] == [[RUG] * 4] * 3


def test_an_unknown_category_is_named_before_anything_is_written(downloads, prepare, capsys, tmp_path):
    downloads.coco(tmp_path)
    change_panoptic(tmp_path, lambda content: content["annotations"][1]["segments_info"][0].update(category_id=12))
    assert prepare(SEMANTIC, "--splits", "val") == 1
    assert "000000000144.png has category 12, which is not one of COCO's 133 panoptic ones" in capsys.readouterr().err
    assert not (tmp_path / "coco" / "panoptic_semseg_val2017").exists()


def test_instances_in_place_of_panoptic_annotations_are_refused(downloads, prepare, capsys, tmp_path):
    downloads.coco(tmp_path)
    change_panoptic(tmp_path, lambda content: content.update(annotations=[{"id": 1, "segmentation": []}]))
    assert prepare(SEMANTIC, "--splits", "val") == 1
    assert "panoptic_val2017.json: these are not panoptic annotations" in capsys.readouterr().err


def test_the_171_ids_of_coco_stuff_become_their_positions(downloads, prepare, values, tmp_path):
    downloads.coco_stuff(tmp_path)
    assert prepare("coco_stuff_sem_seg") == 0
    person, wood = [255, 0, 0, 0, 0, 0], [255, 170, 170, 170, 170, 170]
    assert values("coco/stuffthingmaps_detectron2/val2017/000000000139.png") == [person, person, wood, wood]
    assert values("coco/stuffthingmaps_detectron2/train2017/000000000014.png") == [[11] * 4] * 3 + [[80] * 4] * 3


def test_every_id_of_coco_stuff_has_its_place(program):
    table = program("coco_stuff_sem_seg").TABLE
    missing = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}  # as published
    ids = [number for number in range(1, 183) if number not in missing]
    assert table[np.array(ids) - 1].tolist() == list(range(171))
    assert {*table[np.array([*missing]) - 1].tolist(), *table[182:255].tolist()} == {254} and table[255] == 255


@pytest.mark.parametrize("value", [11, 182, 254])
def test_a_value_without_a_class_is_named_with_its_file(value, downloads, prepare, capsys, tmp_path):
    downloads.coco_stuff(tmp_path)
    path = tmp_path / "coco" / "stuffthingmaps" / "val2017" / "000000000139.png"
    Image.fromarray(np.full((4, 6), value, np.uint8)).save(path)
    assert prepare("coco_stuff_sem_seg", "--splits", "val") == 1
    assert f"000000000139.png: value {value} stands for no class" in capsys.readouterr().err
