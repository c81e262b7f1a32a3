"""The operator against a written-out loop in float64."""

import math

import pytest
import torch

from fcclip.ops import ENGINES, ms_deform_attn, select_engine


def oracle(value, shapes, locations, weights):
    """One scalar after the other, straight from the definition."""
    batch, _, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads * channels, dtype=value.dtype)
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                start = 0
                for level in range(levels):
                    height, width = shapes[level]
                    for p in range(points):
                        x = float(locations[b, q, m, level, p, 0]) * width - 0.5
                        y = float(locations[b, q, m, level, p, 1]) * height - 0.5
                        left, top = math.floor(x), math.floor(y)
                        for row, row_share in ((top, top + 1 - y), (top + 1, y - top)):
                            for column, column_share in ((left, left + 1 - x), (left + 1, x - left)):
                                if 0 <= row < height and 0 <= column < width:
                                    cell = value[b, start + row * width + column, m]
                                    share = weights[b, q, m, level, p] * row_share * column_share
                                    output[b, q, m * channels : (m + 1) * channels] += share * cell
                    start += height * width
    return output


def inputs(shapes, *, batch=2, heads=2, channels=3, queries=5, points=2, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(height * width for height, width in shapes)

    def rand(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    locations = (rand(batch, queries, heads, len(shapes), points, 2) - 0.5) * spread + 0.5
    weights = rand(batch, queries, heads, len(shapes), points)
    return rand(batch, total, heads, channels) - 0.5, locations, weights


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "shapes", [[(4, 6)], [(2, 3), (5, 1)], [(1, 1), (3, 3), (6, 4)], [(2, 2), (3, 5), (4, 4), (7, 2)]]
)
@pytest.mark.parametrize("spread", [1.0, 3.0], ids=["inside", "partly outside"])
def test_every_engine_equals_the_written_out_loop(engine, shapes, spread):
    value, locations, weights = inputs(shapes, spread=spread)
    expected = oracle(value, shapes, locations, weights)
    torch.testing.assert_close(ms_deform_attn(value, shapes, locations, weights, engine=engine), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_borders_and_corners_count_as_in_the_loop(engine):
    shapes = [(2, 3)]
    value, _, weights = inputs(shapes, batch=1, queries=5, heads=1, points=1)
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 1.0], [1 / 6, 0.25], [-0.2, 0.5]], dtype=torch.float64)
    locations = corners.view(1, 5, 1, 1, 1, 2)
    expected = oracle(value, shapes, locations, weights)
    torch.testing.assert_close(ms_deform_attn(value, shapes, locations, weights, engine=engine), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_far_outside_gives_zero(engine):
    shapes = [(3, 3)]
    value, locations, weights = inputs(shapes)
    assert ms_deform_attn(value, shapes, locations + 50, weights, engine=engine).abs().max() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_those_of_finite_differences(engine):
    shapes = [(3, 4), (2, 2)]
    value, locations, weights = inputs(shapes, batch=1, queries=2, channels=2)
    tensors = [one.requires_grad_() for one in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, x, w, engine=engine), tensors)


def test_shapes_that_do_not_fit_are_refused():
    value, locations, weights = inputs([(2, 2)])
    with pytest.raises(ValueError, match=r"value must be \(B, S, M, D\) with S = 9"):
        ms_deform_attn(value, [(3, 3)], locations, weights)
    with pytest.raises(ValueError, match="expected attention_weights"):
        ms_deform_attn(value, [(2, 2)], locations[:, :2], weights)


def test_the_engine_is_chosen_by_key_and_the_variable_wins(monkeypatch):
    monkeypatch.delenv("FCCLIP_MSDA", raising=False)
    assert select_engine("auto") in ENGINES
    with pytest.raises(ValueError, match="unknown engine .* 'tritn'"):
        select_engine("tritn")
    monkeypatch.setenv("FCCLIP_MSDA", "nothing")
    with pytest.raises(ValueError, match="unknown engine .* 'nothing'"):
        select_engine("torch")
