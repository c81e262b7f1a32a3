"""The operator as torch sees it: compilers, exports, autocast, and what it refuses."""

from functools import partial

import pytest
import torch

from fcclip.ops import ENGINES, ms_deform_attn, ms_deform_attn_fused
from fcclip.ops.engines import PLAIN
from tests.ops.test_ms_deform_attn import FORMS, inputs

SHAPES = [(4, 6), (2, 3)]
FLAT = [4, 6, 2, 3]
OPERATORS = {"locations": torch.ops.fcclip.ms_deform_attn, "fused": torch.ops.fcclip.ms_deform_attn_fused}
BACKWARDS = {
    "locations": torch.ops.fcclip.ms_deform_attn_backward,
    "fused": torch.ops.fcclip.ms_deform_attn_fused_backward,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_the_operator_keeps_the_contract_of_torch(engine, form, dtype):
    """Schema, fake kernel, autograd registration and tracing with shapes that change."""
    value, points, weights, grad_output = (
        tensor.to(engine.device) for tensor in inputs(SHAPES, form=form, dtype=dtype, spread=1.5)
    )
    tensors = [tensor.requires_grad_() for tensor in (value, points, weights)]
    torch.library.opcheck(OPERATORS[form], (tensors[0], FLAT, *tensors[1:], engine.name))
    backward_inputs = (grad_output, value.detach(), FLAT, points.detach(), weights.detach(), engine.name)
    torch.library.opcheck(BACKWARDS[form], backward_inputs)


@pytest.mark.parametrize("form", FORMS)
def test_the_operator_and_the_function_give_the_same(engine, form):
    """For the engine `torch` the function is plain operations, and the operator has gradients that are written out."""
    value, points, weights, grad_output = (tensor.to(engine.device) for tensor in inputs(SHAPES, form=form, spread=1.5))
    tensors = [tensor.requires_grad_() for tensor in (value, points, weights)]
    function = FORMS[form][0](tensors[0], SHAPES, *tensors[1:], engine=engine.name)
    operator = OPERATORS[form](tensors[0], FLAT, *tensors[1:], engine.name)
    torch.testing.assert_close(operator, function)
    for tensor, other in zip(*(torch.autograd.grad(output, tensors, grad_output) for output in (operator, function))):
        torch.testing.assert_close(tensor, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed sizes", "changing sizes"])
def test_torch_compile_takes_it_as_one_graph(engine, form, dynamic):
    if engine.name == "gather":
        pytest.skip("the engine gather is for exports; compilers have better ones")
    torch._dynamo.reset()
    function = partial(FORMS[form][0], engine=engine.name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shapes in ([(4, 6), (2, 3)], [(3, 5), (2, 2)]):
        value, points, weights, grad_output = (
            tensor.to(engine.device) for tensor in inputs(shapes, form=form, spread=1.5)
        )
        tensors = [tensor.requires_grad_() for tensor in (value, points, weights)]
        results = []
        for run in (function, compiled):
            output = run(tensors[0], shapes, *tensors[1:])
            results.append((output.detach(), *torch.autograd.grad(output, tensors, grad_output)))
        for ours, expected in zip(*results):
            torch.testing.assert_close(ours, expected)


class Attention(torch.nn.Module):
    """The operator as a module, which is what can be exported."""

    def __init__(self, form, engine):
        super().__init__()
        self.function = partial(FORMS[form][0], engine=engine)

    def forward(self, value, points, weights):
        return self.function(value, SHAPES, points, weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_torch_export_keeps_it_and_its_numbers(engine, form, strict):
    tensors = [tensor.to(engine.device) for tensor in inputs(SHAPES, form=form)[:3]]
    module = Attention(form, engine.name)
    expected = module(*tensors)
    program = torch.export.export(module, tuple(tensors), strict=strict)
    torch.testing.assert_close(program.module()(*tensors), expected)
    torch.testing.assert_close(module(*tensors), expected)  # nothing of the tracer stayed behind
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    if engine.name in PLAIN:
        assert any("grid_sampler" in name for name in operations) == (engine.name == "torch")
        assert not any("fcclip" in name for name in operations)
    else:
        assert operations == {f"{OPERATORS[form]}.default".removeprefix("torch.ops.")}


def test_onnx_sees_grid_sample():
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript")
    tensors = tuple(tensor.float() for tensor in inputs(SHAPES, form="fused")[:3])
    program = torch.onnx.export(Attention("fused", "torch"), tensors, dynamo=True)
    assert "GridSample" in {node.op_type for node in program.model_proto.graph.node}
    onnx.checker.check_model(program.model_proto)


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_everything_is_computed_in_fp32(engine, form):
    """As the published model does; the gradients have the types of the inputs."""
    tensors = [tensor.to(engine.device) for tensor in inputs(SHAPES, form=form, dtype=torch.bfloat16)[:3]]
    tensors = [
        tensor.to(dtype).requires_grad_() for tensor, dtype in zip(tensors, (torch.bfloat16, torch.float32, torch.half))
    ]
    function = partial(FORMS[form][0], engine=engine.name)
    expected = function(tensors[0].float(), SHAPES, *(tensor.float() for tensor in tensors[1:]))
    with torch.autocast(engine.device, dtype=torch.bfloat16):
        computed = function(tensors[0], SHAPES, *tensors[1:])
    torch.testing.assert_close(computed, expected)
    computed.sum().backward()
    assert [tensor.grad.dtype for tensor in tensors] == [torch.bfloat16, torch.float32, torch.half]
    with torch.autocast(engine.device, dtype=torch.bfloat16):
        assert function(*with_shapes([tensor.detach().double() for tensor in tensors])).dtype == torch.float64


def test_sizes_past_32_bits_have_shapes(engine):
    """Nothing is computed on the meta device: more than 2^31 elements of every input."""
    shapes = [(2048, 4096), (1024, 2048), (512, 1024)]
    cells = sum(height * width for height, width in shapes)
    with torch.device("meta"):
        value = torch.empty(2, cells, 8, 64, requires_grad=True)
        offsets, logits = torch.empty(2, cells, 8, 3, 4, 2), torch.empty(2, cells, 8, 3, 4)
    assert min(value.numel(), offsets.numel(), 2 * logits.numel()) > 2**31
    flat = [size for pair in shapes for size in pair]
    output = torch.ops.fcclip.ms_deform_attn_fused(value, flat, offsets, logits, engine.name)
    assert output.shape == (2, cells, 512)
    output.sum().backward()
    assert value.grad.shape == value.shape


def test_more_cells_than_their_indices_can_count_are_refused():
    with torch.device("meta"):
        tensors = torch.empty(1, 2**31, 1, 1), torch.empty(1, 1, 1, 1, 1, 2), torch.empty(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="at most 2147483647 cells"):
        ms_deform_attn(tensors[0], [(2**16, 2**15)], *tensors[1:], engine="torch")


# ---- what it refuses ----


@pytest.mark.parametrize("form", FORMS)
def test_shapes_that_do_not_fit_are_refused(engine, form):
    value, points, weights, grad_output = (tensor.to(engine.device) for tensor in inputs(SHAPES, form=form))
    function = partial(FORMS[form][0], engine=engine.name)
    for arguments, message in (
        (
            (value, [(4, 6), (2, 4)], points, weights),
            r"value must be \(B, S, M, D\) with S = 32 .* got \(2, 30, 2, 3\)",
        ),
        ((value[0], SHAPES, points, weights), r"value must be \(B, S, M, D\)"),
        ((value, SHAPES, points[:, :2], weights), "expected .* got"),
        ((value, SHAPES, points, weights[..., :1]), "expected .* got"),
        ((value, SHAPES, points[..., :1], weights), "expected .* got"),
        ((value, SHAPES, points[..., 0], weights), r"must be \(B, N, M, L, P, 2\)"),
        ((value[:1], SHAPES, points, weights), "expected .* got"),
        ((value[:, :24], [(4, 6)], points, weights), "expected .* got"),
        ((value, [], points, weights), "pairs .* of positive ints"),
        ((value, [(4, 6), (0, 3)], points, weights), "pairs .* of positive ints"),
        ((value, torch.tensor(SHAPES), points, weights), "Python ints"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments)
    with pytest.raises(ValueError, match=r"the gradient must be \(2, \d+, 6\)"):
        BACKWARDS[form](grad_output[:, :, :4], value, FLAT, points, weights, engine.name)


def test_the_queries_of_the_fused_form_are_the_cells():
    value, offsets, logits, _ = inputs(SHAPES, form="fused")
    with pytest.raises(ValueError, match=r"expected attention_logits \(2, 30, 2, 2, 2\)"):
        ms_deform_attn_fused(value, SHAPES, offsets[:, :7], logits[:, :7], engine="torch")


@pytest.mark.parametrize("form", FORMS)
def test_mixed_and_unknown_types_are_refused(engine, form):
    value, points, weights, _ = (tensor.to(engine.device) for tensor in inputs(SHAPES, form=form))
    function = partial(FORMS[form][0], engine=engine.name)
    with pytest.raises(ValueError, match=r"one dtype of float32, .* value torch.float32, sampling_\w+ torch.float64"):
        function(value.float(), SHAPES, points, weights)
    with pytest.raises(ValueError, match="attention_\\w+ torch.float16"):
        function(value, SHAPES, points, weights.half())
    with pytest.raises(ValueError, match="one dtype of .* got value torch.int64"):
        function(value.long(), SHAPES, points.long(), weights.long())


def test_tensors_on_different_devices_are_refused(engine):
    value, points, weights, _ = (tensor.to(engine.device) for tensor in inputs(SHAPES, form="fused"))
    with pytest.raises(ValueError, match=f"one device, got value on {engine.device}.*, sampling_offsets on meta"):
        ms_deform_attn_fused(value, SHAPES, points.to("meta"), weights, engine=engine.name)


@pytest.mark.parametrize(
    "name", [name for name, engine in ENGINES.items() if engine.DEVICES and "cpu" not in engine.DEVICES]
)
def test_tensors_of_the_cpu_are_refused_by_an_engine_of_the_gpu(name):
    value, points, weights, _ = inputs(SHAPES, form="fused", dtype=torch.float32)
    with pytest.raises(ValueError, match=f"the engine '{name}' .* computes on cuda, but its tensors lie on cpu"):
        ms_deform_attn_fused(value, SHAPES, points, weights, engine=name)


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="unknown engine .* 'cudaa'.* Known: .*torch"):
        ms_deform_attn(*with_shapes(inputs(SHAPES, form="locations")[:3]), engine="cudaa")


def with_shapes(tensors):
    value, points, weights = tensors
    return value, SHAPES, points, weights
