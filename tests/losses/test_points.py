"""Sampled points."""

import pytest
import torch
import torch.nn.functional as F

from fcclip.losses import sample_maps, sample_targets, uncertain_points
from fcclip.losses.points import sample_cells
from fcclip.structures import Targets


def blocks(height=10, width=14):
    """An id map of four blocks, of which three are segments and one listed segment has no pixel."""
    id_map = torch.ones(height, width, dtype=torch.int32)
    id_map[:, 5:] = 2
    id_map[6:, :9] = 3
    id_map[:2, :2] = 8
    return Targets(labels=torch.tensor([0, 1, 2, 0]), id_map=id_map, ids=torch.tensor([1, 2, 3, 77]))


@pytest.mark.parametrize("as_masks", [False, True])
def test_labels_at_points_equal_grid_sampling_of_the_padded_masks(as_masks):
    targets = blocks()
    points = torch.rand(4, 200, 2, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    padded = F.pad(targets.expand().float(), (0, 2, 0, 6))  # 16 x 16
    expected = F.grid_sample(padded[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]
    if as_masks:
        targets = Targets(labels=targets.labels, masks=targets.expand())
    sampled = sample_targets(targets, torch.arange(4), points, (16, 16))
    torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=0)  # fp32 rounding of coordinates up to 16
    assert sampled[3].abs().max() == 0


def test_segments_may_repeat_and_share_points():
    targets = blocks()
    points = torch.rand(1, 9, 2, generator=torch.Generator().manual_seed(1))
    sampled = sample_targets(targets, torch.tensor([2, 0, 2]), points, targets.image_size)
    assert sampled.shape == (3, 9)
    assert torch.equal(sampled[0], sampled[2])


def test_maps_are_sampled_at_pixel_centres_exactly():
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[0.5 / 4, 0.5 / 3], [3.5 / 4, 2.5 / 3], [2 / 4, 1.5 / 3], [2.0, 2.0]]])
    torch.testing.assert_close(sample_maps(maps, points)[0, 0], torch.tensor([0.0, 11.0, 5.5, 0.0]))


def test_cells_with_their_channels_together_are_sampled_like_maps_also_beyond_the_border():
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(1, 5, 3, 4, generator=generator)
    points = torch.rand(1, 200, 2, generator=generator) * 1.6 - 0.3
    sampled = sample_cells(maps[0].flatten(1).T.contiguous(), (3, 4), points[0])
    torch.testing.assert_close(sampled.T, sample_maps(maps, points)[0], rtol=1e-5, atol=1e-5)


def test_most_points_lie_where_the_prediction_is_uncertain():
    columns = torch.linspace(-8, 8, 64)
    mask_logits = columns.expand(2, 64, 64)  # uncertain only at x = 0.5
    generator = torch.Generator().manual_seed(0)
    points = uncertain_points(mask_logits, 100, 3.0, 0.75, lambda n: torch.rand(2, n, 2, generator=generator))
    assert points.shape == (2, 100, 2)
    # 225 of 300 candidates are dropped, so the 75 kept lie within a quarter of the width
    assert (points[:, :75, 0] - 0.5).abs().max() < 0.2
    assert (points[:, 75:, 0] - 0.5).abs().max() > 0.3
