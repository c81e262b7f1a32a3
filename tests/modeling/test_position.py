"""The sine position embedding."""

import math

import torch

from fcclip.modeling.position import sine_positions

CPU = torch.device("cpu")


def test_a_single_cell_has_the_angle_of_a_whole_turn():
    angle = 2 * math.pi / (1 + 1e-6)
    embedding = sine_positions(1, 1, 8, CPU)[:, 0, 0]
    periods = [10000 ** (2 * (c // 2) / 4) for c in range(4)]
    expected = [math.sin(angle / p) if c % 2 == 0 else math.cos(angle / p) for c, p in enumerate(periods)]
    torch.testing.assert_close(embedding, torch.tensor(expected * 2), atol=1e-6, rtol=0)


def test_the_first_half_knows_only_the_row_and_the_second_only_the_column():
    embedding = sine_positions(3, 5, 16, CPU)
    assert embedding.shape == (16, 3, 5)
    assert torch.equal(embedding[:8, :, 0], embedding[:8, :, 4]) and not torch.equal(embedding[:8, 0], embedding[:8, 2])
    assert torch.equal(embedding[8:, 0], embedding[8:, 2]) and not torch.equal(embedding[8:, :, 0], embedding[8:, :, 4])
