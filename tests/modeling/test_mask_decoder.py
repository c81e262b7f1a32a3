"""The masked decoder: shapes, gradients, exact short cuts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fcclip.modeling.classifier import mask_pool
from fcclip.modeling.mask_decoder import (
    Attention,
    MeansInsideMasks,
    MultiScaleMaskedTransformerDecoder,
    attention_mask,
    mask_product,
)
from fcclip.structures import TextEmbeddings


def decoder(**changes):
    values = {
        "in_channels": 32,
        "dim": 32,
        "mask_dim": 32,
        "embed_dim": 16,
        "num_queries": 6,
        "num_layers": 4,
        "heads": 4,
        "feedforward": 64,
    }
    torch.manual_seed(0)
    return MultiScaleMaskedTransformerDecoder(**{**values, **changes})


def inputs(channels=32):
    torch.manual_seed(1)
    pyramid = [torch.randn(2, channels, 2 * 2**i, 3 * 2**i) for i in range(3)]
    words = TextEmbeddings(F.normalize(torch.randn(5, 16), dim=-1), torch.tensor([0, 0, 1, 2, 3]), 4)
    return pyramid, torch.randn(2, 32, 16, 24), words


@pytest.mark.parametrize("pre_norm", [False, True])
def test_there_is_one_prediction_set_per_layer_and_one_for_the_start_queries(pre_norm):
    found = decoder(pre_norm=pre_norm)(*inputs(), all_sets=True)
    assert [tuple(one.shape) for one in found.class_logits] == [(2, 6, 4)] * 5
    assert found.mask_logits().shape == (2, 6, 16, 24)
    assert found.mask_logits(0).shape == (2, 6, 16, 24)


def test_the_last_set_is_the_same_when_the_others_are_left_out():
    module, data = decoder(), inputs()
    every, last = module(*data, all_sets=True), module(*data, all_sets=False)
    assert len(last.class_logits) == 1
    assert torch.equal(every.class_logits[-1], last.class_logits[0])
    assert torch.equal(every.mask_logits(), last.mask_logits())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_means_of_masks_that_are_products_and_their_gradients_are_those_of_whole_masks(dtype):
    generator = torch.Generator().manual_seed(4)
    draw = [torch.randn(size, generator=generator) for size in ((2, 8, 5, 7), (2, 12, 8), (2, 12, 8))]
    features, embeddings, weights = draw[0].requires_grad_(), *draw[1:]
    embeddings[0, 0] = 0  # an empty mask

    def run(pool):
        features.grad = None
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            pooled = pool()
        (pooled.float() * weights).sum().backward()
        return pooled, features.grad

    whole = run(lambda: mask_pool(features, mask_product(embeddings, features).detach()))
    parts = run(lambda: MeansInsideMasks.apply(features, embeddings, 4))
    assert parts[0][0, 0].abs().max() == 0
    precision = {"rtol": 1e-5, "atol": 1e-6} if dtype is None else {"rtol": 2e-2, "atol": 2e-2}
    for one, other in zip(parts, whole):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **precision)


def test_a_mask_of_more_cells_than_float16_can_count_has_its_mean():
    features = torch.full((1, 2, 256, 257), 3.0, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        pooled = MeansInsideMasks.apply(features, torch.ones(1, 1, 2), 1)
    (pooled.float() * 1000).sum().backward()
    assert pooled.flatten().tolist() == pytest.approx([3.0, 3.0], rel=1e-2)
    torch.testing.assert_close(features.grad, torch.full_like(features, 1000 / (256 * 257)), rtol=1e-2, atol=0)


def test_a_gradient_reaches_every_parameter():
    module = decoder(in_channels=48)
    pyramid, mask_features, words = inputs(channels=48)
    found = module(pyramid, mask_features.requires_grad_(), words, all_sets=True)
    sum(one.square().sum() for one in (*found.class_logits, *found.mask_embeddings)).backward()
    without = [
        name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert without == []
    assert mask_features.grad.abs().sum() > 0


def test_attention_equals_pytorchs_with_its_parameters():
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(32, 4, batch_first=True), Attention(dim=32, heads=4)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    blocked = torch.rand(2, 5, 7) > 0.6
    blocked[..., 0] = False
    expected, _ = theirs(query, key, value, attn_mask=blocked.repeat_interleave(4, 0))
    torch.testing.assert_close(ours(query, key, value, blocked), expected, atol=1e-5, rtol=1e-5)


def test_masks_from_resized_features_equal_resized_masks():
    torch.manual_seed(0)
    embedding, features = torch.randn(1, 5, 8), torch.randn(1, 8, 16, 24)
    masks = torch.einsum("bqc,bchw->bqhw", embedding, features)
    expected = F.interpolate(masks, size=(4, 6), mode="bilinear", align_corners=False).sigmoid().flatten(2) < 0.5
    small = F.interpolate(features, size=(4, 6), mode="bilinear", align_corners=False)
    expected = expected & ~expected.all(-1, keepdim=True)
    assert torch.equal(attention_mask(embedding, small), expected)


def test_a_query_that_would_see_nothing_sees_everything():
    features = torch.ones(1, 1, 2, 2)
    blocked = attention_mask(torch.tensor([[[-1.0], [1.0]]]), features)
    assert not blocked.any()


def test_projections_exist_only_where_widths_differ_or_are_enforced():
    def count(**changes):
        return sum(isinstance(one, nn.Conv2d) for one in decoder(**changes).input_proj)

    assert (count(), count(in_channels=48), count(enforce_input_proj=True)) == (0, 3, 3)


def test_values_that_cannot_work_are_refused_by_key():
    with pytest.raises(ValueError, match="MASK_DIM .48. must equal MODEL.MASK_FORMER.HIDDEN_DIM"):
        decoder(mask_dim=48)
    with pytest.raises(ValueError, match="DEC_LAYERS must be at least 1"):
        decoder(num_layers=-1)
    with pytest.raises(ValueError, match="divisible by NHEADS 5"):
        decoder(heads=5)
