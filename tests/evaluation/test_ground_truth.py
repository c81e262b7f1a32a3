import numpy as np
import pytest
from PIL import Image

from fcclip.evaluation import GroundTruth, write_id_map
from fcclip.evaluation.ground_truth import in_order, keep_once

IDS = np.array([[0, 7, 7], [70_000, 5, 7]])
SEGMENTS = [
    {"id": 7, "category_id": 2, "iscrowd": 0},
    {"id": 70_000, "category_id": 300, "iscrowd": 1},  # 5 is listed nowhere
]


@pytest.fixture
def record(tmp_path):
    write_id_map(tmp_path / "ids.png", IDS)
    return {
        "image_id": 1,
        "file_name": "1.jpg",
        "pan_seg_file_name": str(tmp_path / "ids.png"),
        "segments_info": SEGMENTS,
    }


def test_labels_are_painted_from_segments_where_there_is_no_label_map(record):
    ground_truth = GroundTruth(record)
    assert ground_truth.labels.tolist() == [
        [255, 2, 2],
        [300, 255, 2],
    ]  # crowds have their class, as in COCO's label maps
    assert GroundTruth(record, 65_535).labels.tolist() == [[65_535, 2, 2], [300, 65_535, 2]]
    assert ground_truth.label_source.endswith("ids.png") and ground_truth.labels is ground_truth.labels


def test_a_label_map_is_read_where_there_is_one(record, tmp_path):
    labels = np.array([[0, 1, 2], [300, 65_535, 7]], np.uint16)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    ground_truth = GroundTruth(record | {"sem_seg_file_name": str(tmp_path / "labels.png")})
    np.testing.assert_array_equal(ground_truth.labels, labels)
    assert ground_truth.label_source.endswith("labels.png")


def test_what_is_asked_for_once_is_made_once(record):
    ground_truth, made = GroundTruth(record), []
    for _ in range(3):
        assert ground_truth.once("key", lambda: made.append(1) or len(made)) == 1
    assert ground_truth.once("other", list) == [] and made == [1]


def test_image_ids_have_one_order_whatever_came_first():
    assert in_order({"b": 0, 10: 0, "a": 0, 9: 0}) == [9, 10, "a", "b"]


def test_images_that_come_twice_are_named():
    kept = dict.fromkeys(range(9))
    with pytest.raises(ValueError, match=r"image 0, 1, 2, 3, 4 and 2 more came twice"):
        keep_once(kept, dict.fromkeys(range(7)))
    keep_once(kept, {"0": None})
    assert len(kept) == 10
