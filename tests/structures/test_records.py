"""Records that travel between rooms."""

import pytest
import torch

from fcclip.structures import Targets, TextEmbeddings, boxes_of_masks


def test_an_id_map_expands_to_one_mask_per_segment_empty_ones_included():
    id_map = torch.tensor([[5, 5, 0], [7, 5, 9]], dtype=torch.int32)
    targets = Targets(labels=torch.tensor([3, 1, 2]), id_map=id_map, ids=torch.tensor([5, 7, 4]))
    assert targets.expand().tolist() == [
        [[True, True, False], [False, True, False]],
        [[False, False, False], [True, False, False]],
        [[False] * 3] * 2,
    ]
    assert (len(targets), targets.image_size) == (3, (2, 3))


def test_targets_without_segments_expand_to_no_mask():
    targets = Targets(labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, 4, 5, dtype=torch.bool))
    assert targets.expand().shape == (0, 4, 5)


def test_targets_refuse_what_does_not_belong_together():
    masks, labels = torch.zeros(2, 3, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="either masks or id_map"):
        Targets(labels=labels)
    with pytest.raises(ValueError, match="needs ids"):
        Targets(labels=labels, id_map=torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="1 labels for 2 segments"):
        Targets(labels=labels[:1], masks=masks)
    with pytest.raises(ValueError, match="2 vectors for 1 synonyms"):
        TextEmbeddings(torch.zeros(2, 4), torch.zeros(1, dtype=torch.long), 1)


def test_boxes_are_tight_and_exclusive_at_right_and_bottom():
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    masks[1, 3, 5] = True
    assert boxes_of_masks(masks).tolist() == [[2, 1, 5, 3], [5, 3, 6, 4], [0, 0, 0, 0]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)
