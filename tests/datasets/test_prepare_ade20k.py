"""Pixels by hand: see downloads.py for what the images hold."""

import io
import json
import os
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from fcclip.data import get_dataset, read_id_map, read_image
from fcclip.evaluation import GroundTruth, PanopticEvaluator

ADE = "ADEChallengeData2016"
ROAD, SKYSCRAPER, PERSON, BED, WALL = 6, 48, 12, 7, 0
ROAD_ID, SKYSCRAPER_ID = 140 + 256 * 140 + 65536 * 140, 140 + 256 * 140 + 65536 * 200
PERSON_ID = 150 + 256 * 5 + 65536 * 61


def read_json(path):
    return json.loads(path.read_text())


def without_info(path):
    return {key: value for key, value in read_json(path).items() if key != "info"}


# ---- semantic ----


def test_labels_are_one_less_and_other_becomes_255(downloads, prepare, values, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_sem_seg") == 0
    first = [
        [6, 12, 6, 6, 6, 255],
        [6, 12, 6, 6, 6, 255],
        [48, 48, 48, 48, 48, 255],
        [48, 48, 48, 48, 48, 255],
    ]
    assert values(f"{ADE}/annotations_detectron2/training/ADE_train_00000001.png") == first
    assert values(f"{ADE}/annotations_detectron2/validation/ADE_val_00000002.png") == [[0] * 4] * 3 + [[7] * 4] * 3


# ---- instances ----


def test_each_instance_becomes_an_annotation(downloads, prepare, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_ins_seg") == 0
    content = read_json(tmp_path / ADE / "ade20k_instance_val.json")
    assert content["images"] == [
        {"id": "ADE_val_00000001", "file_name": "ADE_val_00000001.jpg", "width": 6, "height": 4},
        {"id": "ADE_val_00000002", "file_name": "ADE_val_00000002.jpg", "width": 4, "height": 6},
    ]
    instances = [
        {key: instance[key] for key in instance if key != "segmentation"} for instance in content["annotations"]
    ]
    first = {"image_id": "ADE_val_00000001", "iscrowd": 0, "category_id": PERSON, "area": 1}
    assert instances == [
        {"id": 1, **first, "bbox": [1, 0, 1, 1]},
        {"id": 2, **first, "bbox": [1, 2, 1, 1]},
        {
            "id": 3,
            "image_id": "ADE_val_00000002",
            "iscrowd": 0,
            "category_id": BED,
            "area": 12,
            "bbox": [0, 3, 4, 3],
        },
    ]
    bed = coco_mask.decode(content["annotations"][2]["segmentation"])
    assert bed.tolist() == [[0] * 4] * 3 + [[1] * 4] * 3
    person = coco_mask.decode(content["annotations"][1]["segmentation"])
    assert person.shape == (4, 6) and person.sum() == person[2, 1] == 1


def test_the_categories_of_instances_are_the_100_things(downloads, prepare, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_ins_seg", "--splits", "train") == 0
    categories = read_json(tmp_path / ADE / "ade20k_instance_train.json")["categories"]
    ids = [category["id"] for category in categories]
    assert len(ids) == 100 and ids[:6] == [7, 8, 10, 12, 14, 15] and ids[-1] == 149
    assert categories[0] == {"id": 7, "name": "bed"}


@pytest.mark.parametrize(
    ("pixel", "sentence"),
    [
        ((5, 1, 0), "instance 1 is of two classes, 4 and 5"),
        ((0, 7, 0), "instance 7 has class 0, expected 1..100"),
        ((101, 7, 0), "instance 7 has class 101, expected 1..100"),
    ],
)
def test_an_instance_without_one_known_class_is_named(pixel, sentence, downloads, prepare, capsys, tmp_path):
    downloads.ade20k(tmp_path)
    path = tmp_path / ADE / "annotations_instance" / "validation" / "ADE_val_00000001.png"
    pixels = np.array(Image.open(path))
    pixels[3, 3] = pixel
    Image.fromarray(pixels).save(path)
    assert prepare("ade20k_ins_seg", "--splits", "val") == 1
    message = capsys.readouterr().err
    assert f"ADE_val_00000001.png: {sentence}" in message and "1 of 2 images failed; the others are made" in message
    assert not (tmp_path / ADE / "ade20k_instance_val.json").exists()


def test_an_image_without_instances_file_is_named(downloads, prepare, capsys, tmp_path):
    downloads.ade20k(tmp_path)
    (tmp_path / ADE / "annotations_instance" / "validation" / "ADE_val_00000002.png").unlink()
    assert prepare("ade20k_ins_seg") == 1
    assert "in one of them only: 1, e.g. ADE_val_00000002" in capsys.readouterr().err


def test_a_map_of_another_size_than_its_image_is_named(downloads, prepare, capsys, tmp_path):
    downloads.ade20k(tmp_path)
    path = tmp_path / ADE / "annotations_instance" / "validation" / "ADE_val_00000001.png"
    Image.open(path).resize((5, 4)).save(path)
    assert prepare("ade20k_ins_seg", "--splits", "val") == 1
    assert "ADE_val_00000001.png: 4 x 5 pixels (height x width), but its image" in capsys.readouterr().err


# ---- panoptic ----


def panoptic(root, split="val"):
    content = read_json(root / ADE / f"ade20k_panoptic_{split}.json")
    return content, {annotation["image_id"]: annotation["segments_info"] for annotation in content["annotations"]}


def test_stuff_is_painted_first_and_measured_then_as_published(downloads, prepare, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_pan_seg") == 0
    content, segments = panoptic(tmp_path)
    first = segments["ADE_val_00000001"]
    second_person = first[3]["id"]
    rest = {"iscrowd": 0}
    assert first == [
        {"id": ROAD_ID, "category_id": ROAD, "area": 8, "bbox": [0, 0, 5, 2], **rest},
        {"id": SKYSCRAPER_ID, "category_id": SKYSCRAPER, "area": 10, "bbox": [0, 2, 5, 2], **rest},  # 9 are left of it
        {"id": PERSON_ID, "category_id": PERSON, "area": 1, "bbox": [1, 0, 1, 1], **rest},
        {"id": second_person, "category_id": PERSON, "area": 1, "bbox": [1, 2, 1, 1], **rest},
    ]
    above, below = [ROAD_ID, 0, ROAD_ID, ROAD_ID, ROAD_ID, 0], [SKYSCRAPER_ID] * 5 + [0]
    expected = [[*above], above, [*below], below]
    expected[0][1], expected[2][1] = PERSON_ID, second_person  # the person in row 1 has no instance: void
    assert read_id_map(tmp_path / ADE / "ade20k_panoptic_val" / "ADE_val_00000001.png").tolist() == expected
    assert content["annotations"][0]["file_name"] == "ADE_val_00000001.png"
    assert content["images"][1] == {
        "id": "ADE_val_00000002",
        "file_name": "ADE_val_00000002.jpg",
        "width": 4,
        "height": 6,
    }


def test_later_instances_have_a_colour_near_that_of_the_class(downloads, prepare, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_pan_seg") == 0
    ids = set()
    for split in ("train", "val"):
        second = panoptic(tmp_path, split)[1][f"ADE_{split}_00000001"][3]["id"]
        distances = [abs((second >> shift & 255) - (PERSON_ID >> shift & 255)) for shift in (0, 8, 16)]
        assert 0 < max(distances) <= 30
        ids.add(second)
    assert len(ids) == 2


def test_the_categories_of_panoptic_are_150_with_things_and_colours(downloads, prepare, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_pan_seg", "--splits", "val") == 0
    categories = panoptic(tmp_path)[0]["categories"]
    assert [category["id"] for category in categories] == list(range(150)) and sum(
        category["isthing"] for category in categories
    ) == 100
    assert categories[7] == {"id": 7, "name": "bed", "isthing": 1, "color": [204, 5, 255]}


def test_ids_are_distinct_and_a_perfect_prediction_of_road_and_skyscraper_scores_100(downloads, prepare, tmp_path):
    downloads.ade20k(tmp_path)
    for path in (tmp_path / ADE).glob("annotations_instance/validation/*.png"):
        size = np.array(Image.open(path)).shape[:2]
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)  # nothing is painted over the stuff
        halves = np.full(size, ROAD + 1, np.uint8)
        halves[size[0] // 2 :] = SKYSCRAPER + 1
        Image.fromarray(halves).save(tmp_path / ADE / "annotations" / "validation" / path.name)
    assert prepare("ade20k_pan_seg", "--splits", "val") == 0
    content, segments = panoptic(tmp_path)
    assert len({tuple(category["color"]) for category in content["categories"]}) == 150
    assert all([entry["id"] for entry in listed] == [ROAD_ID, SKYSCRAPER_ID] for listed in segments.values())
    dataset = get_dataset("openvocab_ade20k_panoptic_val", tmp_path)
    evaluator = PanopticEvaluator(class_names=dataset.metadata["stuff_classes"], thing_classes=range(0))
    for ground_truth in map(GroundTruth, dataset.records()):
        evaluator.process(ground_truth, {"panoptic_seg": (ground_truth.id_map, ground_truth.segments)})
    assert evaluator.results()["panoptic_seg"]["PQ"] == 100


def test_corrected_areas_are_those_of_the_png(downloads, prepare, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_pan_seg", "--corrected") == 0
    content, segments = panoptic(tmp_path)
    assert content["info"]["corrected"] is True
    for image_id, listed in segments.items():
        id_map = read_id_map(tmp_path / ADE / "ade20k_panoptic_val" / f"{image_id}.png")
        ids, areas = np.unique(id_map[id_map > 0], return_counts=True)
        assert {segment["id"]: segment["area"] for segment in listed} == dict(zip(ids.tolist(), areas.tolist()))
        assert len(listed) == len(ids)
    assert [segment["area"] for segment in segments["ADE_val_00000001"]] == [8, 9, 1, 1]


def test_a_covered_segment_stays_as_published_and_goes_when_corrected(downloads, prepare, tmp_path):
    downloads.ade20k(tmp_path)
    path = tmp_path / ADE / "annotations_instance" / "validation" / "ADE_val_00000002.png"
    Image.fromarray(np.full((6, 4, 3), (1, 2, 0), np.uint8)).save(path)  # the bed covers the wall
    assert prepare("ade20k_pan_seg", "--splits", "val") == 0
    assert [(segment["category_id"], segment["area"]) for segment in panoptic(tmp_path)[1]["ADE_val_00000002"]] == [
        (WALL, 12),
        (BED, 24),
    ]
    (tmp_path / ADE / "ade20k_panoptic_val.json").unlink()
    assert prepare("ade20k_pan_seg", "--splits", "val", "--corrected") == 0
    assert [segment["category_id"] for segment in panoptic(tmp_path)[1]["ADE_val_00000002"]] == [BED]


def test_corrected_files_are_not_mixed_with_published_ones(downloads, prepare, capsys, files, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_pan_seg") == 0
    before = files()
    assert prepare("ade20k_pan_seg", "--corrected") == 1
    assert "was made by another program or with other options: expected info" in capsys.readouterr().err
    assert files() == before


def test_what_an_interrupted_run_with_other_options_made_is_made_again(
    downloads, prepare, monkeypatch, files, tmp_path
):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_pan_seg") == 0
    whole = {name: content for name, (_, content) in files().items()}
    for path in (tmp_path / ADE).glob("ade20k_panoptic_*.json"):
        path.unlink()
    replace, calls = os.replace, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    assert prepare("ade20k_pan_seg", "--corrected") == 130
    monkeypatch.setattr(os, "replace", replace)
    assert prepare("ade20k_pan_seg") == 0
    assert {name: content for name, (_, content) in files().items()} == whole


def test_ids_of_many_instances_are_distinct_never_zero_and_no_colour_of_another_class(program):
    module = program("ade20k_pan_seg")
    palette = {red + 256 * green + 65536 * blue: index for index, (red, green, blue) in enumerate(module.PALETTE)}
    new_id = module._ids("ADE_val_00000001")
    ids = [new_id(category) for category in [*module.THINGS, *module.THINGS, *[PERSON] * 300]]
    assert len({*ids}) == len(ids) and 0 not in ids
    assert [palette.get(segment_id) for segment_id in ids] == [*module.THINGS, *[None] * 400]


# ---- a JSON file and its images belong together ----


@pytest.mark.parametrize("name", ["ade20k_ins_seg", "ade20k_pan_seg"])
def test_a_json_file_of_another_program_is_kept_when_it_is_complete(name, downloads, prepare, files, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare(name) == 0
    for path in (tmp_path / ADE).glob("ade20k_*_val.json"):
        path.write_text(json.dumps(without_info(path)))
    before = files()
    assert prepare(name) == 0
    assert files() == before


def test_images_are_not_added_to_what_another_program_made(downloads, prepare, capsys, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_pan_seg", "--splits", "val") == 0
    path = tmp_path / ADE / "ade20k_panoptic_val.json"
    path.write_text(json.dumps(without_info(path)))
    (tmp_path / ADE / "ade20k_panoptic_val" / "ADE_val_00000002.png").unlink()
    assert prepare("ade20k_pan_seg", "--splits", "val") == 1
    message = capsys.readouterr().err
    assert "was made by another program or with other options: expected info" in message and "Delete it" in message


def test_a_json_file_of_other_images_is_refused_from_another_program_and_made_anew_from_this(
    downloads, prepare, capsys, tmp_path
):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_ins_seg", "--splits", "val") == 0
    path = tmp_path / ADE / "ade20k_instance_val.json"
    complete = path.read_bytes()
    content = read_json(path)
    content["images"] = content["images"][:1]
    path.write_text(json.dumps(content))
    assert prepare("ade20k_ins_seg", "--splits", "val") == 0
    assert path.read_bytes() == complete
    del content["info"]
    path.write_text(json.dumps(content))
    assert prepare("ade20k_ins_seg", "--splits", "val") == 1
    assert "with other options and lists 1 images, where the download has 2 or others" in capsys.readouterr().err


def test_a_json_file_cut_in_half_is_made_anew_with_its_pngs(downloads, prepare, capsys, files, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_pan_seg") == 0
    before = {name: content for name, (_, content) in files().items()}
    path = tmp_path / ADE / "ade20k_panoptic_val.json"
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / ADE / "ade20k_panoptic_val" / "ADE_val_00000001.png").unlink()
    assert prepare("ade20k_pan_seg") == 0
    assert "is not JSON" in capsys.readouterr().err
    assert {name: content for name, (_, content) in files().items()} == before


def test_a_missing_png_of_this_program_is_made_again_and_fits_the_json_file(downloads, prepare, files, tmp_path):
    downloads.ade20k(tmp_path)
    assert prepare("ade20k_pan_seg") == 0
    before = files()
    png = f"{ADE}/ade20k_panoptic_val/ADE_val_00000001.png"
    (tmp_path / png).unlink()
    assert prepare("ade20k_pan_seg") == 0
    after = files()
    assert after.pop(png)[1] == before.pop(png)[1] and after == before


# ---- the full set ----

FULL = "ADE20K_2021_17_01"


def test_objects_of_the_full_set_become_847_classes(downloads, prepare, values, tmp_path):
    downloads.ade20k_full(tmp_path)
    assert prepare("ade20k_full_sem_seg") == 0
    wall, sky = [65535, 0, 0, 0, 0, 0], [65535, 2, 2, 2, 2, 2]
    labels = f"{FULL}/annotations_detectron2"
    assert values(f"{labels}/validation/ADE_val_00000001.tif") == [wall, wall, sky, sky]
    assert values(f"{labels}/training/ADE_frame_00000370.tif") == [wall[:4]] * 3 + [sky[:4]] * 3
    read = cv2.imread(str(tmp_path / labels / "validation" / "ADE_val_00000001.tif"), cv2.IMREAD_UNCHANGED)
    assert read.dtype == np.uint16 and read.tolist() == [wall, wall, sky, sky]
    assert sorted(path.name for path in (tmp_path / labels / "training").iterdir()) == [
        "ADE_frame_00000370.tif",
        "ADE_train_00000001.tif",
    ]


def test_images_of_the_full_set_have_a_short_side_of_at_most_512_and_say_so(downloads, prepare, tmp_path):
    downloads.ade20k_full(tmp_path)
    assert prepare("ade20k_full_sem_seg", "--splits", "val") == 0
    folder = tmp_path / FULL / "images_detectron2" / "validation"
    assert read_image(folder / "ADE_val_00000001.jpg").shape == (4, 6, 3)
    assert read_image(folder / "ADE_val_00000002.jpg").shape == (512, 1025, 3)  # 520 x 1041: 1041 * 512 / 520 = 1024.98
    with Image.open(folder / "ADE_val_00000002.jpg") as image:
        assert b"quality 75" in image.info["comment"]
        pixels = np.array(image)
    original = read_image(next((tmp_path / FULL / "images").rglob("ADE_val_00000002.jpg")))
    encoded = io.BytesIO()
    Image.fromarray(cv2.resize(original, (1025, 512), interpolation=cv2.INTER_LINEAR)).save(encoded, "JPEG", quality=75)
    assert np.array_equal(pixels, np.array(Image.open(encoded)))
    labels = np.array(Image.open(tmp_path / FULL / "annotations_detectron2" / "validation" / "ADE_val_00000002.tif"))
    assert labels.shape == (512, 1025) and {*np.unique(labels).tolist()} == {0, 2, 65535}


def test_every_class_of_the_full_set_has_its_object(program):
    module = program("ade20k_full_sem_seg")
    assert len({*module.FULL_IDS}) == 847 and module.TABLE[[2978, 312, 3148]].tolist() == [0, 1, 846]
    assert module.TABLE[0] == 65535 and (module.TABLE < 847).sum() == 847


@pytest.mark.parametrize(
    ("size", "smaller"), [((512, 900), (512, 900)), ((1024, 1366), (512, 683)), ((2048, 1536), (683, 512))]
)
def test_the_longer_side_is_rounded(size, smaller, program):
    assert program("ade20k_full_sem_seg").smaller_size(*size) == smaller


class Malicious:
    def __reduce__(self):
        return print, ("the pickle was run",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Malicious()),
        pickle.dumps({"folder": ["a"]}),
        pickle.dumps({"folder": ["a"], "filename": []}),
        pickle.dumps({"folder": ["../a"], "filename": ["b.jpg"]}),
        pickle.dumps({"folder": ["a"], "filename": [3]}),
        b"<html>",
    ],
)
def test_an_index_that_is_none_is_refused_and_none_of_it_is_run(content, downloads, prepare, capsys, tmp_path):
    downloads.ade20k_full(tmp_path)
    (tmp_path / FULL / "index_ade20k.pkl").write_bytes(content)
    assert prepare("ade20k_full_sem_seg") == 1
    output = capsys.readouterr()
    assert "index_ade20k.pkl: " in output.err and "the pickle was run" not in output.out
