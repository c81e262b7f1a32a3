"""The assignment of queries to segments."""

import itertools

import torch

from fcclip.losses.matching import match, match_costs


def test_costs_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    class_logits = torch.randn(2, 3, 5, generator=generator)
    x = torch.randn(2, 3, 7, generator=generator)
    t = (torch.rand(2, 2, 7, generator=generator) > 0.5).float()
    labels = torch.tensor([1, 3])
    costs = match_costs(class_logits, x, labels, t, class_weight=2.0, mask_weight=5.0, dice_weight=3.0)
    for s, q, m in itertools.product(range(2), range(3), range(2)):
        probability = x[s, q].sigmoid()
        expected = (
            -2.0 * class_logits[s, q].softmax(-1)[labels[m]]
            + 5.0 * torch.nn.functional.binary_cross_entropy_with_logits(x[s, q], t[s, m])
            + 3.0 * (1 - (2 * (probability * t[s, m]).sum() + 1) / (probability.sum() + t[s, m].sum() + 1))
        )
        torch.testing.assert_close(costs[s, q, m], expected)


def test_the_cheapest_assignment_of_all_is_found():
    costs = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(0))
    [[(rows, columns)]] = match([costs])
    best = min(
        sum(float(costs[0, q, m]) for m, q in enumerate(choice)) for choice in itertools.permutations(range(4), 3)
    )
    assert abs(float(costs[0, rows, columns].sum()) - best) < 1e-6


def test_images_without_segments_and_more_segments_than_queries_are_fine():
    assignments = match([torch.zeros(2, 4, 0), torch.rand(2, 2, 5)])
    assert [len(rows) for rows, _ in assignments[0]] == [0, 0]
    assert [len(rows) for rows, _ in assignments[1]] == [2, 2]
    assert match([]) == []


def test_a_cost_that_is_not_finite_is_the_dearest():
    costs = torch.tensor([[[float("nan"), 1.0], [2.0, float("inf")]]])
    [[(rows, columns)]] = match([costs])
    assert sorted(zip(rows.tolist(), columns.tolist())) == [(0, 1), (1, 0)]
