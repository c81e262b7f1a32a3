"""Both forms of the operator, with every engine, against a written-out loop in float64."""

from functools import partial

import pytest
import torch

from fcclip.ops import ms_deform_attn, ms_deform_attn_fused
from tests.ops.oracle import oracle, oracle_fused

FORMS = {"locations": (ms_deform_attn, oracle), "fused": (ms_deform_attn_fused, oracle_fused)}
LEVELS = [(4, 6), (2, 3), (5, 1), (3, 3)]
HALVES = [torch.bfloat16, torch.float16]


def inputs(shapes, *, form, dtype=torch.float64, batch=2, heads=2, channels=3, queries=5, points=2, spread=1.0, seed=0):
    """value, points and weights of the form, gradient of the output; `spread`: of the samples, in levels."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(height * width for height, width in shapes)
    queries = total if form == "fused" else queries

    def rand(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    sizes = (batch, queries, heads, len(shapes), points)
    samples = (rand(*sizes, 2) - 0.5) * spread
    if form == "fused":
        samples = samples * torch.tensor([(width, height) for height, width in shapes])[:, None]
    else:
        samples = samples + 0.5
    weights = rand(*sizes) * (4 if form == "fused" else 1)
    tensors = (
        rand(batch, total, heads, channels) - 0.5,
        samples,
        weights,
        rand(batch, queries, heads * channels) - 0.5,
    )
    return [tensor.to(dtype) for tensor in tensors]


def compute(form, engine, value, shapes, points, weights, grad_output):
    """Output and the three gradients, on the CPU."""
    tensors = [tensor.detach().to(engine.device).requires_grad_() for tensor in (value, points, weights)]
    output = FORMS[form][0](tensors[0], shapes, *tensors[1:], engine=engine.name)
    grads = torch.autograd.grad(output, tensors, grad_output.to(engine.device))
    return [tensor.detach().cpu() for tensor in (output, *grads)]


def assert_agrees(form, engine, value, shapes, points, weights, grad_output):
    """Against the loop, in units of the largest number of each result. fp32 loses 1e-7 in a coordinate and the same in
    each of up to a few hundred terms of a sum. Half types are computed in fp32 and rounded once, each number to half an
    epsilon of its own size; only the gradient of the values may be added up in the half type, as GPUs do it fastest.
    """
    dtype = value.dtype
    share = 1e-10 if dtype == torch.float64 else 1e-5
    rounding = torch.finfo(dtype).eps / 2 if dtype in HALVES else 0
    truth = FORMS[form][1](value, shapes, points, weights, grad_output)
    names = ("output", "grad_value", "grad_points", "grad_weights")
    for name, computed in zip(names, compute(form, engine, value, shapes, points, weights, grad_output)):
        expected = getattr(truth, name)
        assert computed.dtype == dtype and computed.shape == expected.shape, name
        difference = (computed.double() - expected).abs()
        if name == "grad_points":
            difference = difference * truth.smooth[..., None]
        largest = expected.abs().max().clamp(min=1)
        allowed = share * largest + rounding * expected.abs()
        if name == "grad_value" and rounding:
            allowed = 2 * rounding * largest
        assert (difference <= allowed).all(), f"{name}: {difference.max():.2e} of {largest:.2e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("spread", [1.0, 3.0], ids=["inside", "partly outside"])
def test_every_engine_equals_the_written_out_loop(engine, form, dtype, levels, spread):
    shapes = LEVELS[:levels]
    assert_agrees(form, engine, *with_shapes(shapes, inputs(shapes, form=form, dtype=dtype, spread=spread)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels", [1, 5, 8, 16, 30, 32, 33, 64, 71, 128])
def test_heads_of_every_size(engine, form, dtype, channels):
    shapes = LEVELS[:2]
    heads = 1 + channels % 3
    tensors = inputs(shapes, form=form, dtype=dtype, heads=heads, channels=channels, spread=1.5, seed=channels)
    assert_agrees(form, engine, *with_shapes(shapes, tensors))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("points", range(1, 9))
def test_every_number_of_points_and_batches(engine, form, points):
    shapes = [LEVELS[points % 4], LEVELS[(points + 1) % 4]]
    sizes = {"points": points, "batch": 1 + points % 3, "heads": 1 + points // 3, "channels": 4, "seed": points}
    assert_agrees(form, engine, *with_shapes(shapes, inputs(shapes, form=form, queries=3, **sizes)))


@pytest.mark.parametrize("form", FORMS)
def test_more_queries_than_an_engine_takes_at_once(engine, form):
    shapes = [(17, 13), (9, 7)]
    sizes = {"batch": 1, "channels": 2, "queries": 291, "points": 3, "spread": 1.2}
    assert_agrees(form, engine, *with_shapes(shapes, inputs(shapes, form=form, **sizes)))


@pytest.mark.parametrize("form", FORMS)
def test_one_query_on_one_cell(engine, form):
    assert_agrees(form, engine, *with_shapes([(1, 1)], inputs([(1, 1)], form=form, batch=1, queries=1, spread=2.0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_borders_corners_and_whole_pixels_count_as_in_the_loop(engine, dtype):
    """Sizes are powers of two, so that these coordinates are exact: x of -1, -0.5, 0, 1, W - 1, W - 0.5 and W."""
    shapes = [(2, 4)]
    along = {2: [-0.25, 0.0, 0.25, 0.75, 1.0, 1.25], 4: [-0.125, 0.0, 0.125, 0.375, 0.875, 1.0, 1.125]}
    grid = torch.cartesian_prod(*(torch.tensor(along[size], dtype=dtype) for size in (4, 2)))
    value, _, _, _ = inputs(shapes, form="locations", dtype=dtype, batch=1, heads=1)
    locations = grid.view(1, -1, 1, 1, 1, 2)
    weights, grad = torch.ones(1, len(grid), 1, 1, 1, dtype=dtype), torch.ones(1, len(grid), 3, dtype=dtype)
    truth = oracle(value, shapes, locations, weights, grad)
    computed = compute("locations", engine, value, shapes, locations, weights, grad)
    for name, tensor in zip(("output", "grad_value", "grad_points", "grad_weights"), computed):
        torch.testing.assert_close(tensor.double(), getattr(truth, name), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("where", [50.0, -6e4, 1e9, -1e30, float("inf"), -float("inf"), float("nan")])
def test_far_away_and_nowhere_is_zero_and_so_are_its_gradients(engine, form, dtype, where):
    """One sample of each query, in x or in y; the others are not touched by it."""
    if torch.finfo(dtype).max < abs(where) < float("inf"):
        pytest.skip(f"{where} is not a number in {dtype}")
    shapes = LEVELS[:2]
    value, points, weights, grad_output = inputs(shapes, form=form, dtype=dtype)
    points[..., 0, 0, 0] = where
    points[..., 1, 1, 1] = where
    assert_agrees(form, engine, *with_shapes(shapes, (value, points, weights, grad_output)))
    _, _, grad_points, grad_weights = compute(form, engine, value, shapes, points, weights, grad_output)
    assert grad_points[..., 0, 0, :].abs().max() == 0 == grad_points[..., 1, 1, :].abs().max()
    assert form == "fused" or grad_weights[..., 0, 0].abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_values_that_no_sample_looks_at_do_not_reach_the_output(engine, form):
    shapes = LEVELS[:2]
    value, points, weights, grad_output = inputs(shapes, form=form, dtype=torch.float32)
    points[:, :, :, 0] = torch.tensor([float("nan"), 1e4])[:, None]  # rejected, so they must not multiply any by 0
    value[:, :24] = float("inf")  # the first level
    assert compute(form, engine, value, shapes, points, weights, grad_output)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["fp32", "bf16", "fp16"])
def test_a_logit_that_is_not_a_number_reaches_the_output(engine, dtype):
    shapes = LEVELS[:2]
    value, offsets, logits, grad_output = inputs(shapes, form="fused", dtype=dtype)
    logits[0, 3, 1, 0, 0] = float("nan")
    output = compute("fused", engine, value, shapes, offsets, logits, grad_output)[0].view(2, -1, 2, 3)
    assert output[0, 3, 1].isnan().all() and output.isnan().sum() == 3


def test_logits_of_any_size_become_shares(engine):
    shapes = LEVELS[:2]
    value, offsets, logits, grad_output = inputs(shapes, form="fused", dtype=torch.float32)
    logits[:, ::3] *= 1000
    logits[:, 1::3] -= 1e5
    logits[:, 2::3, :, 0] = -float("inf")
    assert_agrees("fused", engine, *with_shapes(shapes, (value, offsets, logits, grad_output)))


@pytest.mark.parametrize("form", FORMS)
def test_inputs_need_not_be_contiguous(engine, form):
    shapes = LEVELS[:2]
    value, points, weights, grad_output = inputs(shapes, form=form)
    scattered = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (value, points, weights)]
    scattered.append(grad_output.transpose(1, 2).contiguous().transpose(1, 2))
    assert not any(tensor.is_contiguous() for tensor in scattered)
    assert_agrees(form, engine, *with_shapes(shapes, scattered))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_nothing_gives_nothing(engine, form, empty):
    if form == "fused" and empty == "queries":
        pytest.skip("the queries are the cells, and there is at least one")
    shapes = LEVELS[:2]
    value, points, weights, grad_output = inputs(shapes, form=form, **{empty: 0})
    results = compute(form, engine, value, shapes, points, weights, grad_output)
    assert [tuple(tensor.shape) for tensor in results] == [
        tuple(tensor.shape) for tensor in (grad_output, value, points, weights)
    ]
    assert all(tensor.abs().sum() == 0 for tensor in results)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(engine, form):
    shapes = [(3, 4), (2, 2)]
    value, points, weights, _ = inputs(shapes, form=form, batch=1, queries=2, channels=2)
    tensors = [tensor.to(engine.device).requires_grad_() for tensor in (value, points, weights)]
    function = partial(FORMS[form][0], engine=engine.name)
    assert torch.autograd.gradcheck(lambda v, x, w: function(v, shapes, x, w), tensors)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_with_any_number_of_threads(engine, form):
    if engine.device != "cpu":
        pytest.skip("threads of the CPU")
    shapes = [(11, 13), (5, 7)]
    tensors = inputs(shapes, form=form, dtype=torch.float32, heads=3, channels=8, queries=178)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(compute(form, engine, *with_shapes(shapes, tensors)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(tensor, first) for other in results[1:] for tensor, first in zip(other, results[0]))


def with_shapes(shapes, tensors):
    value, points, weights, grad_output = tensors
    return value, shapes, points, weights, grad_output
