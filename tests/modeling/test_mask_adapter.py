"""The Mask-Adapter: its maps, its parameters, its training."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fcclip import Segmenter
from fcclip.modeling import Ensemble, build_model
from fcclip.modeling.backbones.clip import build_clip
from fcclip.modeling.classifier import geometric_ensemble
from fcclip.modeling.mask_adapter import MaskAdapter, similar_masks
from fcclip.modeling.out_of_vocabulary import OUT_OF_VOCABULARY_CLASSIFIERS
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights
from tests.conftest import DATA
from tests.modeling.test_fcclip import sample_image, training_sample
from tests.weight_files import save_weights

WIDTH = 24
REPOSITORY, SHAPES = Path(__file__).parents[2], Vocabulary.builtin("shapes")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_clip(str(DATA / "tiny_convnext.json"))


@pytest.fixture
def adapter(backbone):
    torch.manual_seed(0)
    adapter = OUT_OF_VOCABULARY_CLASSIFIERS["mask_adapter"](backbone, width=WIDTH, num_maps=4, query_chunk=3)
    for name, weight in adapter.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(weight)
    return adapter.eval()


@pytest.fixture
def adapter_cfg(tiny_cfg):
    tiny_cfg.MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER = "mask_adapter"
    tiny_cfg.MODEL.MASK_ADAPTER.NUM_CHANNELS = WIDTH
    return tiny_cfg


@pytest.fixture
def seen(backbone):
    """Dense features of two images, and seven masks of each at stride 4."""
    torch.manual_seed(1)
    return backbone(torch.randn(2, 3, 64, 96)).dense, torch.randn(2, 7, 16, 24)


def test_it_has_the_published_parameters(backbone):
    with torch.device("meta"):
        counts = {
            dim: sum(weight.numel() for weight in MaskAdapter(backbone.clip_model.visual, embed_dim=dim).parameters())
            for dim in (768, 640)
        }
        shapes = {
            key: tuple(value.shape)
            for key, value in MaskAdapter(backbone.clip_model.visual, embed_dim=768).state_dict().items()
        }
    assert counts == {768: 14_907_568, 640: 14_807_088}
    block = {"dwconv.weight": (768, 1, 7, 7), "dwconv.bias": (768,), "norm.weight": (768,), "norm.bias": (768,)}
    block |= {"pwconv1.weight": (3072, 768), "pwconv1.bias": (3072,), "gamma": (768,)}
    block |= {"pwconv2.weight": (768, 3072), "pwconv2.bias": (768,)}
    assert shapes == {
        **{f"cnext{number}.{key}": shape for number in (1, 2, 3) for key, shape in block.items()},
        **{"fuse.weight": (768, 768, 1, 1), "fuse.bias": (768,), "norm.weight": (768,), "norm.bias": (768,)},
        **{"final.weight": (16, 768, 1, 1), "final.bias": (16,)},
        **{"mask_downscaling.0.weight": (4, 1, 3, 3), "mask_downscaling.0.bias": (4,)},
        **{"mask_downscaling.1.weight": (4,), "mask_downscaling.1.bias": (4,)},
        **{"mask_downscaling.3.weight": (16, 4, 3, 3), "mask_downscaling.3.bias": (16,)},
        **{"mask_downscaling.4.weight": (16,), "mask_downscaling.4.bias": (16,)},
        **{"mask_downscaling.6.weight": (768, 16, 1, 1), "mask_downscaling.6.bias": (768,)},
    }


def step_by_step(adapter, dense, mask_logits):
    """One mask of one image, as the paper describes it, nothing joined or shared."""
    [visual] = adapter._visual

    def embed(vectors):
        return visual.head(visual.trunk.head(vectors[..., None, None]))

    height, width = dense.shape[1:]
    cells = embed(dense.flatten(1).T).T.reshape(1, -1, height, width)
    binary = (mask_logits > adapter.threshold).float()[None, None]
    binary = F.avg_pool2d(binary, 2)  # of masks at stride 4: what bilinear resizing to stride 8 is
    x = adapter.fuse(cells + adapter.mask_downscaling(binary))
    for block in (adapter.cnext1, adapter.cnext2, adapter.cnext3):
        y = block.norm(block.dwconv(x).permute(0, 2, 3, 1))
        x = x + (block.gamma * block.pwconv2(F.gelu(block.pwconv1(y)))).permute(0, 3, 1, 2)
    maps = adapter.final(adapter.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))[0].sigmoid().flatten(1)
    pooled = (maps / maps.sum(1, keepdim=True)) @ dense.flatten(1).T
    return embed(pooled).mean(0)


def test_every_mask_gets_what_the_paper_gives_it_in_chunks_or_not_and_in_any_order(adapter, seen):
    dense, masks = seen
    with torch.no_grad():
        regions = adapter(dense, masks)
        for image, query in ((0, 0), (1, 6)):
            expected = step_by_step(adapter, dense[image], masks[image, query])
            torch.testing.assert_close(regions[image, query], expected, atol=1e-5, rtol=1e-5)
        adapter.query_chunk = 100
        torch.testing.assert_close(adapter(dense, masks), regions, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adapter(dense, masks.flip(1)), regions.flip(1), atol=1e-5, rtol=1e-5)
        assert adapter(dense, masks[:, :0]).shape == (2, 0, 16)


def test_maps_that_are_the_same_everywhere_give_the_embedding_of_the_mean_cell(adapter, backbone, seen):
    dense, masks = seen
    torch.nn.init.zeros_(adapter.final.weight)
    with torch.no_grad():
        everywhere = OUT_OF_VOCABULARY_CLASSIFIERS["mask_pool"](backbone)(dense, torch.ones(2, 1, 2, 3))
        torch.testing.assert_close(adapter(dense, masks), everywhere.expand(-1, 7, -1), atol=1e-5, rtol=1e-5)


def test_the_clip_of_a_resnet_and_impossible_settings_are_refused(backbone):
    resnet = build_clip(str(DATA / "tiny_resnet.json"))
    with pytest.raises(ValueError, match="a Mask-Adapter needs a ConvNeXt CLIP"):
        OUT_OF_VOCABULARY_CLASSIFIERS["mask_adapter"](resnet)
    with pytest.raises(ValueError, match="MASK_THRESHOLD must lie between 0 and 1"):
        OUT_OF_VOCABULARY_CLASSIFIERS["mask_adapter"](backbone, threshold=1.0)


def test_its_file_is_read_by_the_published_names_and_no_other_model_takes_it(tiny_model, adapter_cfg, tmp_path):
    model = tiny_model(cfg=adapter_cfg)
    published = {key.replace("classifier.", "mask_adapter."): value for key, value in model.state_dict().items()}
    torch.save({"model": published}, tmp_path / "adapter.pth")
    other = tiny_model(cfg=adapter_cfg, seed=1)
    load_weights(other, tmp_path / "adapter.pth")
    assert torch.equal(other.classifier.fuse.weight, model.classifier.fuse.weight)
    assert not any("visual" in key for key in model.classifier.state_dict())
    adapter_cfg.MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER = ""
    plain = tiny_model(cfg=adapter_cfg)
    with pytest.raises(ValueError, match="set MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER mask_adapter"):
        load_weights(plain, tmp_path / "adapter.pth")
    save_weights(plain, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="weights without a Mask-Adapter, which the config asks for"):
        load_weights(other, tmp_path / "plain.safetensors")


@pytest.mark.parametrize("stage", ["warmup", "mixed"])
def test_only_the_adapter_learns(tiny_model, adapter_cfg, stage):
    adapter_cfg.MODEL.MASK_ADAPTER.TRAIN = stage
    model = tiny_model(cfg=adapter_cfg).train()
    losses = model([training_sample(), training_sample(1, labels=())])
    names = {"loss_mask_adapter_ce"} | ({"loss_mask_adapter_cosine"} if stage == "mixed" else set())
    assert set(losses) == names and losses["loss_mask_adapter_ce"] > 0
    sum(losses.values()).backward()
    learns = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert learns == {f"classifier.{name}" for name, _ in model.classifier.named_parameters()}
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.grad is not None], lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model([training_sample()])["loss_mask_adapter_ce"]
        loss.backward()
        optimizer.step()
    assert loss < losses["loss_mask_adapter_ce"]
    assert sum(model([training_sample(labels=())]).values()) == 0


def test_a_stage_without_an_adapter_is_refused(tiny_cfg):
    tiny_cfg.MODEL.MASK_ADAPTER.TRAIN = "warmup"
    with pytest.raises(ValueError, match=r"MODEL.MASK_ADAPTER.TRAIN is warmup, but the model has no adapter"):
        build_model(tiny_cfg)


def test_a_predicted_mask_shows_what_a_true_one_shows_above_an_iou_of_70_percent():
    true = torch.zeros(2, 1, 10, dtype=torch.bool)
    true[0, :, :5], true[1, :, 5:] = True, True
    predicted = torch.zeros(3, 1, 10, dtype=torch.bool)
    predicted[0, :, :4], predicted[1, :, 5:8], predicted[2, :, 1:5] = True, True, True  # 0.8, 0.6 and 0.8
    queries, matched = similar_masks(predicted, true)
    assert matched.tolist() == [0] and queries.tolist()[0] in (0, 2)
    assert len(similar_masks(predicted[:0], true)[0]) == 0


def test_regions_are_read_as_finely_as_masks(tiny_model, adapter_cfg):
    model = tiny_model(cfg=adapter_cfg)
    [scored] = model.score([sample_image()])
    assert model.mask_grid(scored) == (16, 24)
    assert model.embed_regions(scored, torch.ones(2, 64, 96, dtype=torch.bool)).shape == (2, 16)
    other = Vocabulary.from_names("cup; sea:stuff")
    [fresh] = model.score([sample_image()], other)
    assert torch.equal(model.rescore(scored, other).out_logits, fresh.out_logits)


@pytest.mark.parametrize("unseen_only", [True, False])
@pytest.mark.parametrize("trust", [0.0, 0.2, 0.4, 0.9])
def test_above_its_limit_void_wins_whatever_clip_says(trust, unseen_only):
    torch.manual_seed(0)
    ensemble = Ensemble(0.9, 1.0, trust=trust, trust_unseen_only=unseen_only)
    assert trust < 0.5 or ensemble.void_limit == 1
    void = torch.cat([torch.rand(400), (ensemble.void_limit + torch.tensor([1e-6, 1e-4])).clamp(max=1).repeat(50)])
    shares = (10 * torch.randn(500, 3)).softmax(-1) * (1 - void[:, None])
    out_logits = 100 * torch.randn(500, 3)  # CLIP is sure of one class
    logits = torch.cat([shares, void[:, None]], dim=-1).log().clamp(min=-100)
    found = geometric_ensemble(
        *(logits, out_logits, torch.tensor([True, False, False])),
        **{"alpha": 0.9, "beta": 1.0, "trust": trust, "trust_unseen_only": unseen_only},
    )
    surely_void = logits.softmax(-1)[:, -1] > ensemble.void_limit
    assert (found.softmax(-1)[surely_void].argmax(-1) == 3).all()
    assert surely_void.sum() > 50 or trust >= 0.5
    assert (found[~surely_void].argmax(-1) != 3).any()


def test_for_panoptic_maps_alone_it_does_not_look_at_masks_that_are_void_whatever_it_says(monkeypatch):
    """What is left is a smaller batch, which rounds in another way: scores agree to 1e-5."""
    torch.manual_seed(0)
    model = Segmenter.from_pretrained("shapes", device="cpu").model
    model.classifier = OUT_OF_VOCABULARY_CLASSIFIERS["mask_adapter"](model.backbone, width=WIDTH).eval()
    pixels = np.array(Image.open(REPOSITORY / "demo" / "images" / "shapes_1.jpg").resize((256, 256)))
    images = [{"image": torch.from_numpy(turned.transpose(2, 0, 1).copy())} for turned in (pixels, pixels[::-1])]
    looked, regions = [], model.classifier._regions
    monkeypatch.setattr(
        model.classifier, "_regions", lambda *inputs: looked.append(inputs[-1].shape[:2].numel()) or regions(*inputs)
    )
    with torch.no_grad():
        whole = [model.outputs(scored, heads=("panoptic",)) for scored in model.score(images, SHAPES)]
        assert sum(looked) == 2 * 30
        looked.clear()
        for found, expected in zip(model(images, vocabulary=SHAPES, heads=("panoptic",)), whole):
            assert torch.equal(found["panoptic_seg"][0], expected["panoptic_seg"][0])
            segments, others = found["panoptic_seg"][1], expected["panoptic_seg"][1]
            assert len(segments) == len(others) > 1
            for segment, other in zip(segments, others):
                assert segment == {**other, "score": pytest.approx(other["score"], rel=1e-5)}
        assert 2 * 2 < sum(looked) < 2 * 15
        looked.clear()
        model(images, vocabulary=SHAPES, heads=("panoptic", "semantic"))
        assert sum(looked) == 2 * 30
