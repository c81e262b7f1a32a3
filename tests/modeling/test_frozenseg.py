"""FrozenSeg: both injectors, both layouts, and FC-CLIP where they are turned off."""

import logging

import pytest
import torch

from fcclip.config import load_config
from fcclip.finetuning import begin
from fcclip.modeling import build_model
from fcclip.modeling.frozenseg import FrozenSegDecoder, FrozenSegHead, Injectors
from fcclip.modeling.mask_decoder import DecoderHooks
from fcclip.modeling.sam_pixel_decoder import SamAttention, SamTransformer
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights, model_weights
from tests.conftest import tiny_config, tiny_frozenseg
from tests.modeling.test_fcclip import sample_image, training_sample
from tests.modeling.test_mask_decoder import inputs
from tests.msda_engines import built, engine  # noqa: F401
from tests.tools.conftest import REPOSITORY, load_program
from tests.weight_files import save_weights

WORDS = Vocabulary.from_names("cat, kitty; dog; grass:stuff", name="train")


def built_from(cfg, **former):
    for key, value in former.items():
        cfg.MODEL.MASK_FORMER[key] = value
    torch.manual_seed(0)
    return build_model(cfg, train_vocabulary=WORDS, test_vocabulary=WORDS)


def decoder(feature_level=0, query_level=2, num_layers=9):
    torch.manual_seed(0)
    widths = {"in_channels": 32, "dim": 32, "mask_dim": 32, "embed_dim": 16, "feedforward": 64}
    layers = {"num_queries": 6, "num_layers": num_layers, "heads": 4}
    return FrozenSegDecoder(feature_level=feature_level, query_level=query_level, **widths, **layers)


def run(module, hooks=Injectors):
    """Class logits of every prediction set."""
    pyramid, mask_features, words = inputs()
    torch.manual_seed(2)
    sam = {"sam": torch.randn(2, 32, 8, 8), "refined": torch.randn(2, 32, 4, 4)}
    hooks = hooks(module, mask_features=mask_features, size=pyramid[0].shape[-2:], **sam)
    return module(pyramid, mask_features, words, all_sets=True, hooks=hooks).class_logits


# ---- both injectors off ----


def test_with_both_injectors_off_it_is_fcclip_bit_for_bit():
    fcclip = built_from(tiny_config())
    frozenseg = built_from(tiny_frozenseg(), SAM_QUERY_FUSE_LAYER=3, SAM_FEATURE_FUSE_LAYER=3)
    assert frozenseg.sam is None and type(frozenseg.sem_seg_head) is FrozenSegHead
    for (ours, mine), (theirs, value) in zip(frozenseg.state_dict().items(), fcclip.state_dict().items(), strict=True):
        assert ours == theirs and torch.equal(mine, value)
    mine, theirs = (model([sample_image()])[0] for model in (frozenseg, fcclip))
    assert torch.equal(mine["sem_seg"], theirs["sem_seg"])
    assert torch.equal(mine["panoptic_seg"][0], theirs["panoptic_seg"][0])
    losses = []
    for model in (frozenseg.train(), fcclip.train()):
        losses.append(model([{**training_sample(), "point_seed": 0}]))
        sum(losses[-1].values()).backward()
    assert losses[0] == losses[1]
    for (name, mine), theirs in zip(frozenseg.named_parameters(), fcclip.parameters()):
        assert mine.grad is None if theirs.grad is None else torch.equal(mine.grad, theirs.grad), name


def test_decoder_hooks_as_they_are_change_nothing():
    module = decoder(feature_level=3, query_level=3)
    pyramid, mask_features, words = inputs()
    plain = module(pyramid, mask_features, words, all_sets=True).class_logits
    assert all(map(torch.equal, plain, run(module, lambda *_, **__: DecoderHooks())))
    assert all(map(torch.equal, plain, run(module)))


# ---- the injectors ----


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_feature_injector_works_at_any_level_and_takes_away_the_positions_there_alone(level):
    module = decoder(feature_level=level)
    assert list(module.transformer_cross_attention_layers_sam) == [str(index) for index in range(level, 9, 3)]
    positions, shapes = {}, {}
    for index, layer in enumerate(module.transformer_cross_attention_layers):
        layer.register_forward_pre_hook(lambda _, args, index=index: positions.update({index: args[3]}))
    for index, layer in module.transformer_cross_attention_layers_sam.items():
        layer.register_forward_hook(
            lambda _, args, out, index=index: shapes.update({index: (args[0].shape, out.shape)})
        )
    run(module)
    assert {index for index, position in positions.items() if isinstance(position, int)} == set(range(level, 9, 3))
    assert all(given == returned for given, returned in shapes.values()) and len(shapes) == 3


class Shifted(Injectors):
    """What SAM sees after the layers before `layer`, changed."""

    layer = 0

    def after_heads(self, layer, x, embedding):
        changed = super().after_heads(layer, x, embedding)
        return changed + 1 if layer == self.layer else changed


@pytest.mark.parametrize("layer", [3, 6])
def test_queries_that_are_given_something_change_what_comes_later_alone(layer):
    module = decoder()
    plain = run(module)
    shifted = run(module, type("Shifted", (Shifted,), {"layer": layer}))
    assert [torch.equal(a, b) for a, b in zip(plain, shifted)] == [index <= layer for index in range(10)]


def test_queries_are_given_something_after_the_layers_of_one_level_and_not_after_the_last():
    module, calls = decoder(query_level=2), []
    pooled = module.sam_vectors
    module.sam_vectors = lambda masks, sam: calls.append(masks.shape) or pooled(masks, sam)
    run(module)
    assert calls == [(2, 6, 8, 8)] * 2  # after layers 3 and 6 of 9; after the last it would have no effect


def test_an_empty_mask_gives_the_projection_of_zeros():
    module = decoder()
    vectors = module.sam_vectors(torch.full((1, 2, 4, 4), -1.0), torch.randn(1, 32, 8, 8))
    torch.testing.assert_close(vectors, module._mask_pooling_proj(torch.zeros(1, 2, 32)))


def test_gradients_reach_what_learns_and_neither_sam_nor_masks():
    model = built_from(tiny_frozenseg()).train()
    sum(model([training_sample()]).values()).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == (not name.startswith(("sam.", "backbone."))), name
    sam, masks = torch.randn(1, 32, 8, 8), torch.randn(1, 2, 4, 4, requires_grad=True)
    module = decoder()
    module.sam_vectors(masks, sam).sum().backward()
    assert masks.grad is None and module._mask_pooling_proj[1].weight.grad is not None


def test_the_shapes_config_takes_a_step_in_which_both_injectors_learn():
    model = built_from(load_config("shapes/frozenseg_shapes.yaml", ["MODEL.DEVICE", "cpu"])).train()
    losses = []
    for level in (model.sem_seg_head.predictor.query_level, 3):
        model.sem_seg_head.predictor.query_level = level
        losses.append(sum(model([{**training_sample(), "point_seed": 0}]).values()))
    assert not torch.equal(*losses)  # so the level is not the one after which nothing comes
    losses[0].backward()
    injector = model.sem_seg_head.predictor.transformer_cross_attention_layers_sam
    assert all(parameter.grad.any() for parameter in injector.parameters())
    assert all(parameter.grad is None for parameter in model.sam.parameters())


def test_images_of_any_size_share_a_batch_and_each_is_seen_as_if_alone():
    model = built_from(tiny_frozenseg())
    both = model([sample_image(64, 96), sample_image(64, 96, seed=1)])
    for seed, output in enumerate(both):
        alone = model([sample_image(64, 96, seed=seed)])[0]
        torch.testing.assert_close(output["sem_seg"], alone["sem_seg"], rtol=1e-4, atol=1e-5)
    assert model([sample_image(50, 70), sample_image(96, 40)])[1]["sem_seg"].shape == (3, 96, 40)


@pytest.mark.parametrize("key", ["SAM_QUERY_FUSE_LAYER", "SAM_FEATURE_FUSE_LAYER"])
def test_levels_that_do_not_exist_are_refused(key):
    with pytest.raises(ValueError, match=rf"MODEL.MASK_FORMER.{key} must be 0, 1 or 2.*got 4"):
        built_from(tiny_frozenseg(), **{key: 4})


def test_a_sam_of_another_width_and_images_in_another_order_are_refused():
    cfg = tiny_frozenseg()
    cfg.INPUT.FORMAT = "BGR"
    with pytest.raises(ValueError, match=r"INPUT.FORMAT must be RGB"):
        built_from(cfg)
    cfg = tiny_frozenseg()
    cfg.MODEL.SAM_NAME = "vit_b"
    with (
        pytest.raises(ValueError, match=r"HIDDEN_DIM \(32\) must equal the channels of SAM 'vit_b' \(256\)"),
        torch.device("meta"),
    ):
        built_from(cfg)


# ---- layouts ----


def walked(attention, query, value, size):
    """The published kernel on three-level parameters and one level, walking through flat memory image by image."""
    (height, width), heads, points = size, attention.heads, attention.points
    values = attention.value_proj(value)[0].unflatten(-1, (heads, -1))  # (S, M, D)
    tokens = height * width
    weights = attention.attention_weights(query)[0].unflatten(-1, (heads, -1)).softmax(-1).flatten()
    offsets = attention.sampling_offsets(query)[0].unflatten(-1, (heads, -1, 2))  # (S, M, 3 P, 2)
    cells = torch.arange(tokens)
    centres = torch.stack([(cells % width + 0.5) / width, (cells // width + 0.5) / height], dim=-1)
    locations = (centres[:, None, None] + offsets / torch.tensor([width, height])).flatten()
    out = torch.zeros(tokens, heads, values.shape[-1])
    for token in range(tokens):
        for head in range(heads):
            start = (token * heads + head) * points
            for point in range(start, start + points):
                x, y = locations[2 * point] * width - 0.5, locations[2 * point + 1] * height - 0.5
                for row in (y.floor(), y.floor() + 1):
                    for column in (x.floor(), x.floor() + 1):
                        if 0 <= row < height and 0 <= column < width:
                            share = (1 - (row - y).abs()) * (1 - (column - x).abs())
                            cell = int(row) * width + int(column)
                            out[token, head] += weights[point] * share * values[cell, head]
    return attention.output_proj(out.flatten(1))[None]


def random_attention(name="torch"):
    torch.manual_seed(0)
    attention = SamAttention(dim=32, levels=3, heads=4, engine=name)
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return attention, torch.randn(2, 15, 32), torch.randn(2, 15, 32)


def test_the_reference_layout_reads_memory_as_the_published_kernel_does_image_by_image():
    attention, query, value = random_attention()
    with torch.no_grad():
        found = attention(query, value, [(3, 5)])
        for index in range(2):
            torch.testing.assert_close(
                found[index : index + 1], walked(attention, query[index : index + 1], value[index : index + 1], (3, 5))
            )


def test_both_layouts_run_on_every_engine(engine):  # noqa: F811
    attention, query, value = random_attention()
    expected = attention(query, value, [(3, 5)])
    attention.engine = engine.name
    found = attention.to(engine.device)(query.to(engine.device), value.to(engine.device), [(3, 5)])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    attention.cpu().use_levels(1)
    clean = attention.to(engine.device)(query.to(engine.device), value.to(engine.device), [(3, 5)])
    assert clean.isfinite().all() and not torch.allclose(clean.cpu(), expected)


def transformer(layout):
    return SamTransformer(layout=layout, dim=32, num_layers=2, heads=2, feedforward=32, dropout=0.0, engine="torch")


def test_weights_decide_the_layout_and_parameters_stay_the_same_objects():
    source, target = transformer("reference"), transformer("clean")
    before = list(target.parameters())
    target.load_state_dict(source.state_dict())
    assert target.layout == "reference" and all(map(lambda a, b: a is b, before, target.parameters()))
    x = [torch.randn(1, 32, 4, 4)]
    assert torch.equal(target(x)[0], source(x)[0])
    target.load_state_dict(transformer("clean").state_dict())
    assert target.layout == "clean"


def in_reference_layout(model):
    model.sem_seg_head.pixel_decoder.sam_transformer.use_layout("reference")
    return model


def test_a_file_in_the_published_layout_with_all_of_sam_is_loaded_strictly(tmp_path):
    source = in_reference_layout(built_from(tiny_frozenseg()))
    unused = {"sam.prompt_encoder.x": torch.ones(1), "sam.mask_decoder.y.z": torch.ones(1)}
    torch.save({**source.state_dict(), **unused}, tmp_path / "published.pth")
    torch.manual_seed(1)
    target = build_model(tiny_frozenseg(), train_vocabulary=WORDS, test_vocabulary=WORDS)
    load_weights(target, tmp_path / "published.pth")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
    assert not target.sam.has_random_weights
    with torch.no_grad():
        assert torch.equal(target([sample_image()])[0]["sem_seg"], source([sample_image()])[0]["sem_seg"])


def test_a_file_that_does_not_fit_leaves_the_layout_as_it_is(tmp_path):
    weights = in_reference_layout(built_from(tiny_frozenseg())).state_dict()
    weights.pop("sem_seg_head.predictor.level_embed.weight")
    torch.save(weights, tmp_path / "broken.pth")
    target = built_from(tiny_frozenseg())
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing from the file \(1\): sem_seg_head.predictor.level_embed.weight"):
        load_weights(target, tmp_path / "broken.pth")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


# ---- FC-CLIP's weights ----


def test_weights_of_fcclip_start_a_training_and_it_is_said_what_was_taken(tmp_path, caplog):
    source = built_from(tiny_config())
    save_weights(source, tmp_path / "fcclip.safetensors", dtype=None)
    torch.manual_seed(0)
    target = build_model(tiny_frozenseg(), train_vocabulary=WORDS, test_vocabulary=WORDS)
    with caplog.at_level(logging.INFO):
        load_weights(target, tmp_path / "fcclip.safetensors", initialise=True)
    assert "starting from the FC-CLIP weights" in caplog.text and f"taken ({len(model_weights(source))})" in caplog.text
    assert "freshly initialised (27): sem_seg_head.pixel_decoder.fpn3.0.weight" in caplog.text
    assert all(torch.equal(target.state_dict()[key], value) for key, value in model_weights(source).items())
    with pytest.raises(ValueError, match=r"likely cause: weights of FC-CLIP, which lacks what FrozenSeg adds"):
        load_weights(target, tmp_path / "fcclip.safetensors")
    save_weights(target, tmp_path / "frozenseg.safetensors")
    with pytest.raises(ValueError, match=r"likely cause: weights of FrozenSeg"):
        load_weights(source, tmp_path / "frozenseg.safetensors")


def test_files_are_converted_with_their_sam(tmp_path):
    convert = load_program(REPOSITORY / "tools" / "convert_checkpoint.py").main
    source = built_from(tiny_frozenseg())
    torch.save({"model": source.state_dict()}, tmp_path / "full.pth")
    convert([str(tmp_path / "full.pth"), str(tmp_path / "w.pth"), "--layout", "trainable"])
    convert([str(tmp_path / "full.pth"), str(tmp_path / "same.pth"), "--layout", "full"])
    same, trained = (torch.load(tmp_path / f"{name}.pth")["model"] for name in ("same", "w"))
    assert same.keys() == source.state_dict().keys()
    assert not any(name.startswith(("sam.", "backbone.")) for name in trained)
    assert any("_attention_layers_sam." in name for name in trained)


def test_weights_that_were_trained_with_another_sam_are_refused(tmp_path):
    save_weights(built_from(tiny_frozenseg()), tmp_path / "w.safetensors")
    other = built_from(tiny_frozenseg())
    torch.nn.init.normal_(other.sam.image_encoder.pos_embed)
    with pytest.raises(ValueError, match=r"trained on another SAM.*(\n.*)*MODEL.SAM_NAME and MODEL.SAM_WEIGHTS"):
        load_weights(other, tmp_path / "w.safetensors")


def test_a_resumed_training_has_the_layout_of_its_checkpoint_before_it_is_distributed(tmp_path):
    source = in_reference_layout(built_from(tiny_frozenseg()))
    torch.save({"model": model_weights(source, full=True)}, tmp_path / "model_0000000.pth")
    target = built_from(tiny_frozenseg())
    begin(tiny_frozenseg(), target, last=tmp_path / "model_0000000.pth")
    assert target.sem_seg_head.pixel_decoder.sam_transformer.layout == "reference"
