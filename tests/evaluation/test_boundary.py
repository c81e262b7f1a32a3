import math

import numpy as np
import pytest

from fcclip.evaluation import BoundaryEvaluator, GroundTruth

NAMES = ("sky", "sea", "cup")


def evaluated(*pairs, ignore_label=255):
    """The results on images of (ground truth, prediction)."""
    evaluator = BoundaryEvaluator(class_names=NAMES, ignore_label=ignore_label)
    for number, (truth, predicted) in enumerate(pairs):
        ground_truth = GroundTruth({"image_id": number})
        ground_truth.__dict__["labels"] = truth
        evaluator.process(ground_truth, {"sem_seg": predicted})
    return evaluator.results()["boundary"]


def square(side, top=2, size=40):
    """A cup in the sea; boundaries are one pixel wide."""
    labels = np.ones((size, size), np.int32)
    labels[top : top + side, 2 : 2 + side] = 2
    return labels


def written_out(truth, predicted, index):
    """Boundary IoU by its definition: pixels of a class with a pixel of another, or the outside, beside them."""
    times = max(1, round(0.02 * math.hypot(*truth.shape)))

    def boundary(labels):
        inside = np.pad(labels == index, times)
        windows = np.lib.stride_tricks.sliding_window_view(inside, (2 * times + 1,) * 2)
        return (labels == index) & ~windows.all((-2, -1))

    first, second = boundary(truth), boundary(predicted)
    return 100 * (first & second).sum() / (first | second).sum()


def test_a_perfect_prediction_has_one_hundred_and_an_absent_class_none():
    results = evaluated((square(10), square(10)))
    assert results["BoundaryIoU-sea"] == results["BoundaryIoU-cup"] == results["mBoundaryIoU"] == 100
    assert math.isnan(results["BoundaryIoU-sky"]) and math.isnan(results["min(IoU, B-Iou)-sky"])


@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_the_definition_says(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(30, 160, 2))
    truth, predicted = (np.kron(rng.integers(0, 3, (3, 3)), np.ones((60, 60), int))[: size[0], : size[1]] for _ in "ab")
    results = evaluated((truth, predicted))
    for index, name in enumerate(NAMES):
        if (truth == index).any() or (predicted == index).any():
            assert results[f"BoundaryIoU-{name}"] == pytest.approx(written_out(truth, predicted, index))


def test_it_falls_faster_than_the_iou_and_the_lower_of_both_is_told():
    results = evaluated((square(20), square(18)))
    iou = 100 * 18**2 / 20**2
    assert results["BoundaryIoU-cup"] < iou
    assert results["min(IoU, B-Iou)-cup"] == results["BoundaryIoU-cup"]


def test_ignored_pixels_do_not_count():
    truth, predicted = square(10), square(10)
    truth[30:], predicted[30:] = 255, 0
    results = evaluated((truth, predicted))
    assert results["BoundaryIoU-cup"] == 100 and math.isnan(results["BoundaryIoU-sky"])
