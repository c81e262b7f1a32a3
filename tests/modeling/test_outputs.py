"""Post-processing by hand on small masks; the recordings are in test_parity.py."""

import pytest
import torch

from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.outputs import (
    HEADS,
    OutputSettings,
    instance_inference,
    make_outputs,
    panoptic_inference,
    semantic_inference,
    semantic_labels,
)
from tests.msda_engines import built, output_functions  # noqa: F401

pytestmark = pytest.mark.usefixtures("output_functions")  # plain and compiled

BIG = 12.0  # a logit whose sigmoid and softmax are 1 to fp32


def one_hot_logits(*labels, num_classes=3):
    logits = torch.zeros(len(labels), num_classes + 1)
    logits[torch.arange(len(labels)), list(labels)] = BIG
    return logits


def masks(*rows):
    """Rows of a map one pixel high."""
    return OutputMasks.whole(torch.tensor(rows, dtype=torch.float32)[:, None] * BIG)  # (Q, 1, w)


def panoptic(class_logits, output_masks, things=(0,), threshold=0.0, overlap=0.8):
    id_map, segments = panoptic_inference(
        class_logits, output_masks, thing_classes=things, object_mask_threshold=threshold, overlap_threshold=overlap
    )
    return id_map.tolist(), [(one["id"], one["category_id"], one["isthing"], one["area"]) for one in segments]


def test_semantic_scores_sum_class_times_mask_probability():
    class_logits, mask_logits = torch.randn(3, 5), torch.randn(3, 2, 4)
    scores = semantic_inference(class_logits, OutputMasks.whole(mask_logits))
    expected = sum(class_logits.softmax(-1)[q, :4, None, None] * mask_logits[q].sigmoid() for q in range(3))
    torch.testing.assert_close(scores, expected)


def test_labels_are_the_argmax_of_the_scores_whatever_the_blocks(monkeypatch):
    class_logits, output_masks = torch.randn(9, 8), OutputMasks.whole(torch.randn(9, 11, 13))
    expected = semantic_inference(class_logits, output_masks).argmax(0)
    assert torch.equal(semantic_labels(class_logits, output_masks), expected)
    monkeypatch.setattr("fcclip.modeling.output_masks._BLOCK_CPU", 200)
    assert torch.equal(semantic_labels(class_logits, output_masks), expected)


def test_things_get_a_segment_each_and_stuff_of_a_class_shares_one():
    class_logits = one_hot_logits(0, 0, 2, 2)
    id_map, segments = panoptic(
        class_logits, masks([1, -1, -1, -1, -1], [-1, 1, -1, -1, -1], [-1, -1, 1, -1, -1], [-1, -1, -1, 1, -1])
    )
    assert id_map == [[1, 2, 3, 3, 0]]
    assert segments == [(1, 0, True, 1), (2, 0, True, 1), (3, 2, False, 2)]


def test_a_mask_that_lost_too_much_of_itself_is_dropped():
    class_logits = one_hot_logits(0, 1)
    class_logits[1, 1] = 4  # the weaker of the two
    overlapping = masks([1, 1, -1, -1], [1, 1, 1, -1])
    assert panoptic(class_logits, overlapping, overlap=0.8)[1] == [(1, 0, True, 2)]
    assert panoptic(class_logits, overlapping, overlap=0.3)[1] == [(1, 0, True, 2), (2, 1, False, 1)]


def test_exactly_half_probability_is_inside_and_a_share_equal_to_the_threshold_stays():
    class_logits = one_hot_logits(0)
    id_map, _ = panoptic(class_logits, OutputMasks.whole(torch.tensor([[[0.0, -0.1]]])), overlap=1.0)
    assert id_map == [[1, 0]]


def test_void_low_and_undefined_scores_leave_nothing():
    empty = ([[0, 0]], [])
    mask = masks([1, 1])
    assert panoptic(one_hot_logits(3), mask) == empty
    assert panoptic(torch.zeros(1, 4), mask, threshold=0.25) == empty
    assert panoptic(torch.full((1, 4), torch.nan), mask) == empty


def test_instances_are_the_things_among_the_best_pairs():
    class_logits = one_hot_logits(0, 1, 3)
    output_masks = masks([1, 1, -1], [-1, -1, 1], [1, 1, 1])
    found = instance_inference(class_logits, output_masks, thing_classes=[0], topk=2)
    assert found.pred_classes.tolist() == [0]
    assert found.pred_masks.dtype == torch.bool and found.pred_masks.tolist() == [[[True, True, False]]]
    assert found.pred_boxes.tolist() == [[0, 0, 2, 1]]
    assert float(found.scores[0]) == pytest.approx(1, abs=1e-4)


def test_one_query_may_appear_with_several_classes_and_topk_may_exceed_the_pairs():
    class_logits = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    found = instance_inference(class_logits, masks([1, -1]), thing_classes=[0, 1, 2], topk=100)
    assert sorted(found.pred_classes.tolist()) == [0, 1, 2]


def test_an_empty_mask_scores_zero_and_no_things_give_no_instances():
    found = instance_inference(one_hot_logits(0), masks([-1, -1]), thing_classes=[0], topk=1)
    assert found.scores.tolist() == [0.0] and found.pred_boxes.tolist() == [[0, 0, 0, 0]]
    assert len(instance_inference(one_hot_logits(0), masks([1, 1]), thing_classes=[], topk=5)) == 0


@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_blocks_of_rows_give_the_same_as_the_whole(rows_at_once, monkeypatch):
    torch.manual_seed(0)
    class_logits, mask_logits = torch.randn(20, 6), torch.randn(20, 9, 11) * 3
    mask_logits[7] = mask_logits[4]  # of equal ones the first wins
    class_logits[7] = class_logits[4]
    masks = OutputMasks.whole(mask_logits)
    options = {"thing_classes": [0, 2], "object_mask_threshold": 0.1, "overlap_threshold": 0.02}
    id_map, segments = panoptic_inference(class_logits, masks, **options)
    instances = instance_inference(class_logits, masks, thing_classes=[0, 2], topk=30)
    monkeypatch.setattr("fcclip.modeling.output_masks._BLOCK_CPU", rows_at_once * 20 * 11)
    chunked_map, chunked_segments = panoptic_inference(class_logits, masks, **options)
    assert len(segments) >= 3 and torch.equal(chunked_map, id_map) and chunked_segments == segments
    same = instance_inference(class_logits, masks, thing_classes=[0, 2], topk=30)
    assert len(instances.scores) > 5
    for name in ("pred_classes", "pred_masks", "pred_boxes"):
        assert torch.equal(getattr(same, name), getattr(instances, name))
    torch.testing.assert_close(same.scores, instances.scores)  # sums of rows, added in another order


def test_the_three_heads_together_give_what_each_gives_alone():
    torch.manual_seed(0)
    class_logits, mask_logits = torch.randn(20, 6) * 3, torch.randn(20, 8, 12) * 3
    class_logits[5:9, 5] = 9.0  # void, which the panoptic map leaves out
    settings = OutputSettings(object_mask_threshold=0.3, overlap_threshold=0.02, topk=7, masks_first=False)
    for output in ((32, 48), (21, 50)):
        masks = OutputMasks(mask_logits, (32, 48), (32, 48), output)
        together = make_outputs(class_logits, masks, [0, 2], heads=HEADS[:3], settings=settings)
        (semantic,), (panoptic,), (instances,) = (
            make_outputs(class_logits, masks, [0, 2], heads=[head], settings=settings).values() for head in HEADS[:3]
        )
        torch.testing.assert_close(together["sem_seg"], semantic)
        assert torch.equal(together["panoptic_seg"][0], panoptic[0]) and together["panoptic_seg"][1] == panoptic[1]
        assert len(panoptic[1]) > 1 and len(instances) > 1
        assert torch.equal(together["instances"].pred_masks, instances.pred_masks)
        torch.testing.assert_close(together["instances"].scores, instances.scores)


def test_masks_are_enlarged_cropped_and_resized():
    masks = OutputMasks(torch.arange(16.0).view(1, 4, 4), (16, 16), (8, 12), (4, 6))
    [maps] = masks.of(torch.tensor([0]))
    assert maps.shape == (1, 4, 6)
    assert float(maps.max()) < 12  # rows of the padding are gone


def test_as_many_masks_are_made_at_once_as_fit_into_the_budget(monkeypatch):
    monkeypatch.setattr("fcclip.modeling.output_masks._MASKS_CPU", 100)
    masks = OutputMasks(torch.zeros(9, 2, 2), (8, 8), (8, 8), (5, 6))
    assert [len(chunk) for chunk in masks.of(torch.arange(7))] == [3, 3, 1]
    assert [len(chunk) for chunk in OutputMasks.whole(torch.zeros(9, 99, 99)).of(torch.arange(2))] == [1, 1]
    assert list(masks.of(torch.arange(0))) == []
