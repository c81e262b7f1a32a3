import numpy as np
import pytest
from PIL import Image

from fcclip.evaluation import GroundTruth, write_id_map
from fcclip.evaluation.ground_truth import ClassEvaluator, in_order

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
    assert in_order(["b", 10, "a", 9]) == [9, 10, "a", "b"]


class Kept(ClassEvaluator):
    def measure(self, ground_truth, output):
        return output

    def results(self):
        return {}


def test_images_that_come_twice_are_named():
    first, second = Kept(class_names="ab"), Kept(class_names="ab")
    for image_id in range(7):
        first.keep(image_id, None)
        second.keep(image_id + 3, None)
    with pytest.raises(ValueError, match=r"image 3, 4, 5 and 1 more came twice"):
        first.merge(second.state())
    with pytest.raises(ValueError, match="image 0 came twice"):
        first.keep(0, None)
    first.keep("0", None)
    assert len(first.images) == 8


def test_a_list_of_classes_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 class names and a class 4"):
        Kept(class_names="ab", classes=[0, 4])
    with pytest.raises(ValueError, match="2 class names, but `seen` has 3"):
        Kept(class_names="ab", seen=[True] * 3)
