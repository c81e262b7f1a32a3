"""Region embeddings of the published out-of-vocabulary classifiers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fcclip.modeling.backbones.clip import ConvNeXtCLIP, build_clip
from fcclip.modeling.out_of_vocabulary import OUT_OF_VOCABULARY_CLASSIFIERS

DATA = Path(__file__).parents[1] / "data"
TINY = {"convnext": str(DATA / "tiny_convnext.json"), "resnet": str(DATA / "tiny_resnet.json")}


def classifier_of(backbone):
    return OUT_OF_VOCABULARY_CLASSIFIERS[backbone.region_classifier](backbone)


@pytest.fixture(params=TINY)
def backbone(request):
    torch.manual_seed(0)
    return build_clip(TINY[request.param])


@pytest.mark.parametrize("family", TINY)
def test_a_mask_of_everything_gives_a_whole_image_embedding(family):
    """For ConvNeXt that is CLIP's own image embedding; CLIP's ResNet also lets the query see its mean token, which a
    mask does not hold.
    """
    torch.manual_seed(0)
    backbone = build_clip(TINY[family])
    images = torch.randn(2, 3, 64, 64)
    dense = backbone(images).dense
    embedding = classifier_of(backbone)(dense, torch.ones(2, 1, *dense.shape[-2:]))
    assert embedding.shape == (2, 1, backbone.embed_dim)
    if family == "convnext":
        torch.testing.assert_close(embedding[:, 0], backbone.clip_model.encode_image(images))


def test_regions_do_not_see_outside_their_mask_and_an_empty_mask_is_finite(backbone):
    torch.manual_seed(0)
    dense = backbone(torch.randn(1, 3, 128, 128)).dense
    masks = torch.full((1, 2, 4, 4), -1.0)
    masks[0, 0, :, :2] = 1
    found = classifier_of(backbone)(dense, masks)
    assert found.isfinite().all()
    if isinstance(backbone, ConvNeXtCLIP):  # a ResNet's query is the mean of all cells
        changed = dense.clone()
        changed[..., 2:] += 1
        torch.testing.assert_close(classifier_of(backbone)(changed, masks)[0, 0], found[0, 0])


def test_masked_attention_pool_equals_a_loop_over_queries():
    torch.manual_seed(0)
    backbone = build_clip(TINY["resnet"])
    pool = backbone.clip_model.visual.attnpool
    dense = backbone(torch.randn(1, 3, 128, 96)).dense
    height, width = dense.shape[-2:]
    masks = torch.randn(1, 3, height, width)
    found = classifier_of(backbone)(dense, masks)
    grid = round((len(pool.positional_embedding) - 1) ** 0.5)
    spatial = pool.positional_embedding[1:].T.view(1, -1, grid, grid)
    spatial = (
        torch.nn.functional.interpolate(spatial, size=(height, width), mode="bilinear", align_corners=False)[0]
        .flatten(1)
        .T
    )
    cells = dense[0].flatten(1).T
    query = pool.q_proj(cells.mean(0) + pool.positional_embedding[0])
    keys, values = pool.k_proj(cells + spatial), pool.v_proj(cells + spatial)
    size = query.shape[0] // pool.num_heads
    for q in range(3):
        inside = masks[0, q].flatten() > 0
        heads = []
        for h in range(pool.num_heads):
            part = slice(h * size, (h + 1) * size)
            weights = (keys[inside, part] @ query[part] / size**0.5).softmax(0)
            heads.append(weights @ values[inside, part])
        torch.testing.assert_close(found[0, q], pool.c_proj(torch.cat(heads)), atol=1e-5, rtol=1e-5)


def test_an_empty_mask_of_a_resnet_sees_every_cell():
    torch.manual_seed(0)
    backbone = build_clip(TINY["resnet"])
    dense = backbone(torch.randn(1, 3, 128, 128)).dense
    empty, full = classifier_of(backbone)(dense, torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).expand(-1, -1, 4, 4))[0]
    torch.testing.assert_close(empty, full)


@pytest.mark.parametrize("family", TINY)
def test_masks_of_another_size_are_resized_to_the_features(family):
    torch.manual_seed(0)
    backbone = build_clip(TINY[family])
    dense = backbone(torch.randn(1, 3, 128, 96)).dense
    masks = torch.randn(1, 3, 16, 12)
    small = F.interpolate(masks, size=dense.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(classifier_of(backbone)(dense, masks), classifier_of(backbone)(dense, small))
