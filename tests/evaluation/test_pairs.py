import json

import numpy as np
import pytest

from fcclip.evaluation.ground_truth import GroundTruth
from fcclip.evaluation.pairs import NovelClassesEvaluator, PairEvaluator, pair_areas
from tests.modeling.test_parity import DATA


def test_sums_and_scores_are_the_recorded_ones():
    arrays = np.load(DATA / "fusioner_metric_56.npz")
    recorded = json.loads((DATA / "fusioner_metric_56.json").read_text())
    evaluator = PairEvaluator(class_names=list(map(str, range(21))))
    for index, (predicted, mask, category) in enumerate(zip(arrays["prediction"], arrays["mask"], recorded["classes"])):
        evaluator.keep(index, pair_areas(predicted, mask == category, mask == 255, category=category))
    intersection, union = evaluator.sums()
    assert np.array_equal(intersection, arrays["intersection"]) and np.array_equal(union, arrays["union"])
    scores = evaluator.results()["pairs"]
    assert scores["mIoU"] / 100 == pytest.approx(recorded["miou"], abs=1e-6)
    assert scores["FB_IoU"] / 100 == pytest.approx(recorded["fb_iou"], abs=1e-6)


def pair(mask, predicted, *, category, value):
    truth = GroundTruth({"image_id": f"{category}-{value}", "category_id": category, "mask_value": value})
    truth.__dict__["labels"] = np.array(mask)
    return truth, {"panoptic_seg": (np.array(predicted), [])}


def test_sums_come_before_the_division_and_ignored_pixels_count_nowhere():
    evaluator = PairEvaluator(class_names=["cat", "dog"])
    evaluator.process(*pair([[3, 3, 0, 255]], [[7, 0, 0, 7]], category=0, value=3))
    evaluator.process(*pair([[9, 9, 9, 0]], [[7, 7, 7, 7]], category=1, value=9))
    scores = evaluator.results()["pairs"]
    assert scores["IoU-cat"] == 50 and scores["IoU-dog"] == 75 and scores["mIoU"] == 62.5
    # foreground (1 + 3) / (2 + 4), background (1 + 0) / (2 + 1)
    assert scores["FB_IoU"] == pytest.approx(100 * (4 / 6 + 1 / 3) / 2)
    assert evaluator.per_image == {"0-3": 50, "1-9": 75}


def test_a_pair_without_a_pixel_of_its_class_is_skipped_and_counted():
    evaluator, other = (PairEvaluator(class_names=["cat", "dog"]) for _ in range(2))
    evaluator.process(*pair([[0, 255]], [[7, 7]], category=0, value=3))
    other.process(*pair([[9, 0]], [[7, 0]], category=1, value=9))
    evaluator.merge(other.state())
    scores = evaluator.results()["pairs"]
    assert (scores["pairs"], scores["skipped"], scores["mIoU"]) == (1, 1, 100)
    assert np.isnan(scores["IoU-cat"])


def test_all_novel_classes_at_once_compete_and_what_is_called_novel_on_the_background_counts_against_them():
    evaluator = NovelClassesEvaluator(class_names=["cat", "dog"])
    truth = GroundTruth({"image_id": "a", "mask_values": [3, 9], "sem_seg_file_name": "a.png"})
    truth.__dict__["labels"] = np.array([[3, 3, 9, 5, 0, 255]])  # 5 is a base class
    segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 0}]
    evaluator.process(truth, {"panoptic_seg": (np.array([[2, 0, 1, 1, 0, 2]]), segments)})
    scores = evaluator.results()["novel_classes"]
    assert (scores["IoU-cat"], scores["IoU-dog"], scores["mIoU"]) == (50, 50, 50)
    assert scores["IoU-background"] == pytest.approx(100 / 3)
