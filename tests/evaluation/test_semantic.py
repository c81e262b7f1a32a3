import math

import numpy as np
import pytest
import torch
from PIL import Image

from fcclip.evaluation import GroundTruth, SemanticEvaluator

NAMES = ("cup", "sand", "sea", "sky", "walkie-talkie")


def add(evaluator, image_id, truth, predicted):
    evaluator.keep(image_id, evaluator.count(truth, predicted, name="val/7.png"))


def metrics(truth, predicted, **options):
    evaluator = SemanticEvaluator(class_names=NAMES, **options)
    add(evaluator, 0, np.asarray(truth), torch.as_tensor(predicted))
    return evaluator.results()["sem_seg"]


def slow_metrics(truth, predicted, ignore_label):
    """Both rules and the other scores from sets of pixels."""
    pixels = [(g, p) for g, p in zip(np.ravel(truth).tolist(), np.ravel(predicted).tolist()) if g != ignore_label]
    iou, union_iou, accuracy, weights = {}, {}, {}, {}
    for k in range(len(NAMES)):
        hit = sum(g == k and p == k for g, p in pixels)
        either = sum(k in pair for pair in pixels)
        true = sum(g == k for g, _ in pixels)
        if either:
            union_iou[k] = hit / either
        if true:
            iou[k], accuracy[k], weights[k] = hit / either, hit / true, true / len(pixels)
    return {
        "mIoU": sum(iou.values()) / len(iou),
        "mIoU_union": sum(union_iou.values()) / len(union_iou),
        "fwIoU": sum(iou[k] * weights[k] for k in iou),
        "mACC": sum(accuracy.values()) / len(accuracy),
        "pACC": sum(g == p for g, p in pixels) / len(pixels),
    } | {f"IoU-{NAMES[k]}": value for k, value in iou.items()}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_scores_equal_sets_of_pixels_on_random_maps(dtype):
    rng = np.random.default_rng(0)
    for _ in range(10):
        truth = rng.choice([0, 1, 3, 255], (16, 18)).astype(dtype)  # 2 and 4 are absent
        predicted = np.where(rng.random(truth.shape) < 0.6, truth % 255, rng.choice([0, 2, 3], truth.shape))
        found = metrics(truth, predicted.astype(np.int64), ignore_label=255)
        for key, value in slow_metrics(truth, predicted, 255).items():
            assert found[key] == pytest.approx(100 * value, abs=1e-9), key
        assert math.isnan(found["IoU-sea"]) and math.isnan(found["IoU-walkie-talkie"])


def test_a_class_that_is_only_predicted_counts_under_the_union_rule_alone():
    found = metrics([[0, 0, 1, 1]], [[0, 0, 1, 2]])
    assert found["mIoU"] == pytest.approx(100 * (1 + 1 / 2) / 2)
    assert found["mIoU_union"] == pytest.approx(100 * (1 + 1 / 2 + 0) / 3)
    assert math.isnan(found["IoU-sea"])


def test_predictions_on_ignored_pixels_never_count():
    found = metrics([[0, 0, 255, 255]], [[0, 0, 0, 3]], ignore_label=255)
    assert found["mIoU"] == found["mIoU_union"] == found["pACC"] == 100.0


def test_an_ignored_value_may_be_one_of_the_classes():
    assert metrics([[0, 1]], [[1, 1]], ignore_label=0)["pACC"] == 100.0


def test_only_ignored_pixels_leave_every_score_undefined():
    assert all(math.isnan(value) for value in metrics([[255, 255]], [[0, 1]]).values())


def test_seen_and_unseen_average_the_classes_that_the_mean_averages():
    found = metrics([[0, 0, 1, 3]], [[0, 1, 1, 4]], seen=[True, False, True, False, False])
    assert found["mIoU_seen"] == pytest.approx(50.0)  # class 0; class 2 never occurs
    assert found["mIoU_unseen"] == pytest.approx((50.0 + 0.0) / 2)
    assert found["mIoU_union_unseen"] == pytest.approx((50.0 + 0.0 + 0.0) / 3)
    assert "mIoU_seen" not in metrics([[0]], [[0]])


def test_merged_shares_equal_one_process():
    rng = np.random.default_rng(1)
    images = [(rng.integers(0, 5, (6, 7)), torch.as_tensor(rng.integers(0, 5, (6, 7)))) for _ in range(4)]
    alone, first, second = (SemanticEvaluator(class_names=NAMES) for _ in range(3))
    for index, image in enumerate(images):
        add(alone, index, *image)
        add((first, second)[index % 2], index, *image)
    first.merge(second.state())
    assert repr(first.results()) == repr(alone.results())


def test_each_image_has_a_mean_of_its_own(tmp_path):
    rng, evaluator = np.random.default_rng(2), SemanticEvaluator(class_names=NAMES)
    expected = {}
    for image_id in (8, 3):
        truth, predicted = rng.choice([0, 1, 3, 255], (6, 7)), rng.integers(0, 5, (6, 7))
        Image.fromarray(truth.astype(np.uint8)).save(tmp_path / f"{image_id}.png")
        record = {"image_id": image_id, "sem_seg_file_name": str(tmp_path / f"{image_id}.png")}
        evaluator.process(GroundTruth(record), {"sem_seg": predicted})
        expected[image_id] = metrics(truth, predicted)["mIoU"]
    assert evaluator.per_image == pytest.approx(expected)
    with pytest.raises(ValueError, match="image 3 came twice"):
        evaluator.process(GroundTruth(record), {"sem_seg": predicted})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_on_a_gpu_equal_those_in_main_memory():
    rng = np.random.default_rng(3)
    truth, predicted = rng.choice([0, 1, 3, 255], (60, 70)), torch.as_tensor(rng.integers(0, 5, (60, 70)))
    on_gpu, here = (SemanticEvaluator(class_names=NAMES) for _ in range(2))
    add(on_gpu, 0, truth, predicted.cuda())
    add(here, 0, truth, predicted)
    np.testing.assert_array_equal(on_gpu.confusion, here.confusion)


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([[0, 171]], [[0, 0]], r"ground-truth class 171 .* 5 classes \(0\.\.4, ignore 255\)\. If 171 means unlabelled"),
        ([[0, -1]], [[0, 0]], "ground-truth class -1 .* set ignore_label: -1"),
        ([[0, 1]], [[0, 6]], r"predicted class 6 is not one of the 5 classes"),
        ([[0, 1]], [[0]], r"shape \(1, 1\), the ground truth \(1, 2\)"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(truth, predicted, message):
    evaluator = SemanticEvaluator(class_names=NAMES)
    with pytest.raises(ValueError, match=f"val/7.png: .*{message}"):
        add(evaluator, 0, np.array(truth), torch.tensor(predicted))
