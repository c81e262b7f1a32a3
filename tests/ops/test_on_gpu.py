"""What only a GPU shows of its engines: streams, graphs, waiting, memory beyond 32 bits, the same bits each time. What
they compute is tested with every other engine, in test_ms_deform_attn.py.
"""

import pytest
import torch

from fcclip.ops import ENGINES, ms_deform_attn, ms_deform_attn_fused
from tests.msda_engines import Engine
from tests.ops.test_ms_deform_attn import FORMS, assert_agrees, inputs, with_shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

SHAPES = [(16, 20), (32, 40), (64, 80)]


@pytest.fixture(params=[name for name, module in ENGINES.items() if module.DEVICES == ("cuda",)])
def name(request, built, monkeypatch) -> str:
    """Each engine of the GPU that this machine can run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(built(request.param)))
    availability = ENGINES[request.param].available(torch.device("cuda", 0))
    if not availability:
        assert not availability.broken, availability.reason
        pytest.skip(availability.reason)
    return request.param


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(form, *, dtype=torch.float32, device="cuda", **sizes):
    """value, points, weights and gradient of the output on the GPU, in the sizes of a small image."""
    sizes = {"batch": 2, "heads": 8, "channels": 32, "points": 4, "queries": 300, "spread": 0.3, **sizes}
    return [tensor.to(device) for tensor in inputs(SHAPES, form=form, dtype=dtype, **sizes)]


def forward_and_backward(form, name, value, points, weights, grad_output):
    leaves = [tensor.detach().requires_grad_() for tensor in (value, points, weights)]
    output = FORMS[form][0](leaves[0], SHAPES, *leaves[1:], engine=name)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_images_of_real_size_equal_plain_torch(name, form, dtype):
    tensors = problem(form, dtype=dtype)
    exact = [tensor.double() for tensor in tensors]
    share = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2 * torch.finfo(dtype).eps)
    names = ("output", "grad_value", "grad_points", "grad_weights")
    pairs = zip(names, forward_and_backward(form, name, *tensors), forward_and_backward(form, "torch", *exact))
    for result, ours, expected in pairs:
        difference = (ours.double() - expected).abs()
        largest = expected.abs().max().clamp(min=1)
        wrong = (difference > share * largest).sum()
        # a sample that rounding moves over a whole pixel has the derivative of the other side: a few in a million
        allowed = difference.numel() * 1e-4 if result == "grad_points" else 0
        assert wrong <= allowed, f"{result}: {int(wrong)} of {difference.numel()}, up to {difference.max():.1e}"


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_gradients_have_the_same_bits_each_time(name, deterministic, form):
    tensors = problem(form)
    first = forward_and_backward(form, name, *tensors)
    for _ in range(5):
        assert all(
            torch.equal(tensor, other) for tensor, other in zip(forward_and_backward(form, name, *tensors), first)
        )
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(forward_and_backward(form, name, *tensors), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_deterministic_gradients_equal_the_loop(name, deterministic, form, dtype):
    shapes = [(5, 11), (3, 2), (9, 4)]
    tensors = inputs(shapes, form=form, dtype=dtype, points=4, channels=32, spread=1.3)
    assert_agrees(form, Engine(name, "cuda"), *with_shapes(shapes, tensors))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_for_the_gpu(name, form):
    tensors = problem(form)
    forward_and_backward(form, name, *tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(form, name, *tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMS)
def test_graphs_replay_it_with_new_numbers(name, form):
    static = problem(form)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward_and_backward(form, name, *static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_and_backward(form, name, *static)
    for tensor, other in zip(static, problem(form, seed=7)):
        tensor.copy_(other)
    graph.replay()
    torch.testing.assert_close(results, forward_and_backward(form, name, *static), rtol=1e-4, atol=1e-4)


def test_it_runs_on_the_current_stream(name):
    """Work that is queued behind a long wait of its own stream sees what the wait leaves."""
    tensors = problem("fused")
    expected = forward_and_backward("fused", name, *tensors)[0]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        value = torch.zeros_like(tensors[0])
        torch.cuda._sleep(200_000_000)
        value.copy_(tensors[0])
        output = ms_deform_attn_fused(value, SHAPES, *tensors[1:3], engine=name)
    side.synchronize()
    assert torch.equal(output, expected)


def test_it_runs_on_the_device_of_its_tensors(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = forward_and_backward("fused", name, *problem("fused"))[0]
    computed = forward_and_backward("fused", name, *problem("fused", device="cuda:1"))[0]
    assert computed.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(computed.cpu(), expected.cpu())


def test_memory_beyond_32_bits(name):
    """More than 2^31 numbers of values, with queries that look at both ends of them."""
    shapes, heads, channels = [(1100, 1000)], 8, 256
    needed = 1_100_000 * heads * channels * 2 * 5  # bytes: value, its gradient in fp16 and fp32, room
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    value = torch.zeros(1, 1_100_000, heads, channels, dtype=torch.half, device="cuda")
    assert value.numel() > 2**31
    value[:, 0], value[:, -1] = 1, 3
    value.requires_grad_()
    corners = torch.tensor([[0.5 / 1000, 0.5 / 1100], [999.5 / 1000, 1099.5 / 1100]], dtype=torch.half, device="cuda")
    locations = corners.view(1, 2, 1, 1, 1, 2).repeat(1, 1, heads, 1, 1, 1)
    locations[:, 1] = torch.nextafter(locations[:, 1], torch.zeros_like(locations[:, 1]))  # 1 in fp16 is outside
    weights = torch.ones(1, 2, heads, 1, 1, dtype=torch.half, device="cuda")
    output = ms_deform_attn(value, shapes, locations, weights, engine=name)
    expected = ms_deform_attn(value[:, :, :1, :1], shapes, locations[:, :, :1], weights[:, :, :1], engine="torch")
    torch.testing.assert_close(output.view(1, 2, heads, channels), expected.view(1, 2, 1, 1).expand(1, 2, 8, 256))
    output.sum().backward()
    assert value.grad[0, -1].float().mean() > 0 and value.grad[0, 3000:-5000].abs().max() == 0
