"""The pixel decoder: shapes, gradients, initialisation."""

import pytest
import torch

from fcclip.modeling.pixel_decoder import ConvNorm, MSDeformAttn, MSDeformAttnPixelDecoder
from tests.msda_engines import built, engine  # noqa: F401

CHANNELS = {"res2": 8, "res3": 16, "res4": 24, "res5": 32}


def decoder(**changes):
    values = {
        "in_channels": CHANNELS,
        "encoder_levels": ["res3", "res4", "res5"],
        "top_down_levels": ["res2"],
        "dim": 32,
        "mask_dim": 48,
        "heads": 4,
        "num_layers": 2,
        "feedforward": 64,
    }
    torch.manual_seed(0)
    return MSDeformAttnPixelDecoder(**{**values, **changes})


def features(height=64, width=96, batch=2):
    strides = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    return {
        name: torch.randn(batch, CHANNELS[name], height // stride, width // stride) for name, stride in strides.items()
    }


def test_outputs_are_mask_features_at_stride_4_and_a_pyramid_from_coarse_to_fine():
    mask_features, pyramid = decoder()(features())
    assert mask_features.shape == (2, 48, 16, 24)
    assert [tuple(level.shape) for level in pyramid] == [(2, 32, 2, 3), (2, 32, 4, 6), (2, 32, 8, 12)]


def test_a_gradient_reaches_every_parameter():
    module = decoder()
    with torch.no_grad():  # attention starts uniform and offsets constant; leave that point
        for layer in module.transformer.encoder.layers:
            layer.self_attn.sampling_offsets.weight.normal_(std=0.1)
            layer.self_attn.attention_weights.weight.normal_(std=0.1)
    mask_features, pyramid = module(features())
    (mask_features.square().sum() + sum(level.square().sum() for level in pyramid)).backward()
    without = [
        name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert without == []


def test_layers_that_are_computed_again_give_the_same_gradients_and_keep_less():
    torch.manual_seed(1)
    inputs, gradients, kept = features(), [], []
    for use_checkpoint in (False, True):
        module, sizes = decoder(use_checkpoint=use_checkpoint), {}

        def remember(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            mask_features, pyramid = module(inputs)
        (mask_features.sum() + sum(level.square().sum() for level in pyramid)).backward()
        gradients.append({name: weight.grad for name, weight in module.named_parameters()})
        kept.append(sum(sizes.values()))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert kept[1] < kept[0] / 2


def test_offsets_start_on_a_ring_and_attention_uniform():
    attention = MSDeformAttn(dim=32, levels=3, heads=8)
    bias = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor(directions, dtype=torch.float32)[:, None, None] * torch.tensor([1.0, 2, 3, 4])[:, None]
    torch.testing.assert_close(bias, expected.expand(-1, 3, -1, -1), atol=1e-5, rtol=0)  # fp32 sines
    assert attention.sampling_offsets.weight.abs().max() == 0
    assert attention.attention_weights.weight.abs().max() == 0 == attention.attention_weights.bias.abs().max()


def test_layers_start_with_equal_biases_and_different_weights():
    first, second = decoder().transformer.encoder.layers
    assert torch.equal(first.linear1.bias, second.linear1.bias) and first.linear1.bias.abs().max() > 0
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_half_precision_features_are_computed_in_single_precision():
    module = decoder()
    halves = {name: value.bfloat16() for name, value in features().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask_features, pyramid = module(halves)
    assert mask_features.dtype == torch.float32 and pyramid[0].dtype == torch.float32


def test_without_norm_the_top_down_convolutions_have_a_bias():
    assert ConvNorm(8, 32, 3, norm="").bias is not None and ConvNorm(8, 32, 3, norm="GN").bias is None
    with pytest.raises(ValueError, match="NORM must be 'GN' or ''"):
        ConvNorm(8, 32, 3, norm="BN")


def test_widths_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="CONVS_DIM must be divisible by the 32 groups"):
        decoder(dim=48)
    with pytest.raises(ValueError, match="must be divisible by its 5 heads"):
        decoder(heads=5)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_every_engine_gives_the_same_outputs_and_gradients_compiled_in_one_graph_or_not(engine):  # noqa: F811
    torch._dynamo.reset()
    inputs = features(batch=1)
    expected = outputs_and_gradients(decoder(engine="torch"), inputs)
    module = decoder(engine=engine.name).to(engine.device)
    inputs = {name: one.to(engine.device) for name, one in inputs.items()}
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        for found, wanted in zip(outputs_and_gradients(module, inputs, run), expected):
            # the bias in front of a group norm has no gradient but for rounding
            torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()) + 1e-9)


def outputs_and_gradients(module, inputs, run=None):
    """Everything that a module gives: outputs, then the gradient of each parameter; offsets and weights that vary."""
    generator = torch.Generator().manual_seed(1)
    for layer in module.transformer.encoder.layers:
        for linear in (layer.self_attn.sampling_offsets, layer.self_attn.attention_weights):
            with torch.no_grad():
                linear.weight.copy_(0.1 * torch.randn(linear.weight.shape, generator=generator))
    module.zero_grad()
    mask_features, pyramid = (module if run is None else run)(inputs)
    (mask_features.square().mean() + sum(level.square().mean() for level in pyramid)).backward()
    return [mask_features.detach(), *(one.detach() for one in pyramid), *(one.grad for one in module.parameters())]
