import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fcclip.segmenter.segments import named_segments, run_lengths


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_are_those_of_the_coco_tools(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((rng.integers(1, 9), rng.integers(1, 9))) < rng.choice([0.1, 0.5, 0.95])
    top, left = rng.integers(0, 3, 2)
    size = (top + mask.shape[0] + rng.integers(0, 3), left + mask.shape[1] + rng.integers(0, 3))
    whole = np.zeros(size, np.uint8)
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    expected = coco_mask.encode(np.asfortranarray(whole))
    found = run_lengths(mask, top=top, left=left, size=size)
    assert found == {"size": list(size), "counts": expected["counts"].decode()}


@pytest.mark.parametrize("value", [True, False])
def test_run_lengths_of_everything_and_of_nothing(value):
    mask = np.full((3, 4), value)
    assert run_lengths(mask)["counts"] == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_segments_know_name_box_and_mask_and_the_best_comes_first():
    ids = np.zeros((4, 6), np.int32)
    ids[1:3, 2:5], ids[3, 5] = 1, 3
    record = {"isthing": True, "category_id": 0, "area": 0}
    first, second = named_segments(
        ids, [{**record, "id": 1, "score": 0.5}, {**record, "id": 3, "score": 0.7}], ("red circle",)
    )
    assert (first.id, first.box, second.id, second.box) == (3, (5, 3, 6, 4), 1, (2, 1, 5, 3))
    np.testing.assert_array_equal(second.mask, ids == 1)
    assert second.record()["bbox"] == [2, 1, 3, 2] and second.record()["name"] == "red circle"
