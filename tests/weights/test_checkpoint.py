"""What the weights in a file mean to a model."""

import copy
import logging
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fcclip.weights import frozen_notes, initialise_from, load_weights, model_weights
from tests.weight_files import save_weights

QUERIES = "sem_seg_head.predictor.query_feat.weight"


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def save(weights, path, **more):
    torch.save({"model": weights, **more}, path)
    return path


# ---- loading ----


def test_weights_come_back_as_they_were_saved(toy, tmp_path):
    source, target = toy(seed=0), toy(seed=1)
    target.backbone.load_state_dict(source.backbone.state_dict())
    save(model_weights(source), tmp_path / "a.pth", iteration=7)
    assert not same(source, target)
    assert load_weights(target, tmp_path / "a.pth") == {"iteration": 7}
    assert same(source, target)


def test_a_bare_state_dict_with_a_module_prefix_is_understood(toy, tmp_path):
    source, target = toy(seed=0), toy(seed=1)
    torch.save({f"module.{key}": value for key, value in source.state_dict().items()}, tmp_path / "a.pth")
    load_weights(target, tmp_path / "a.pth")
    assert same(source, target)


@pytest.mark.parametrize("part", ["nothing", "text tower only", "everything"])
def test_any_part_of_the_frozen_clip_may_be_in_the_file(toy, tmp_path, part):
    source, target = toy(seed=0), toy(seed=1)
    weights = source.state_dict()
    for key in list(weights):
        if key.startswith("backbone.clip_model.") and (
            part == "nothing" or (part == "text tower only" and "visual" in key)
        ):
            del weights[key]
    load_weights(target, save(weights, tmp_path / "a.pth"))
    assert torch.equal(target.void_embedding.weight, source.void_embedding.weight)
    visual = [model.backbone.clip_model.visual.weight for model in (source, target)]
    assert torch.equal(*visual) == (part == "everything")


def test_constants_and_class_weights_of_a_file_are_not_taken(toy, tmp_path):
    source, target = toy(), toy()
    weights = model_weights(source) | {
        "criterion.empty_weight": torch.ones(99),
        "pixel_mean": torch.ones(3),
        "pixel_std": torch.ones(3),
        "backbone.clip_model.attn_mask": torch.ones(77, 77),
    }
    load_weights(target, save(weights, tmp_path / "a.pth"))
    assert target.criterion.empty_weight.tolist() == pytest.approx([1, 1, 1, 0.1])


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"queries": 3}, "trained with 3 queries, the model has 4: set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 3"),
        ({"channels": 9}, "another backbone, whose res5 has 9 channels instead of 6"),
        ({"embed": 7}, "another CLIP, with embeddings of size 7 instead of 5"),
        ({"layers": 3}, "3 layers where the model has 2: set MODEL.MASK_FORMER.DEC_LAYERS 4"),
        ({"dim": 4}, "HIDDEN_DIM .* 4, not 8"),
    ],
)
def test_weights_of_another_config_are_refused_with_the_likely_cause(toy, tmp_path, changes, cause):
    save(model_weights(toy(**changes)), tmp_path / "a.pth")
    model = toy(seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=cause):
        load_weights(model, tmp_path / "a.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # all or nothing


def test_missing_unknown_and_misshapen_keys_are_counted_and_named(toy, tmp_path):
    weights = model_weights(toy())
    del weights["void_embedding.weight"]
    weights[QUERIES] = torch.zeros(2, 8)
    weights |= {f"extra.{index}": torch.zeros(1) for index in range(6)}
    with pytest.raises(ValueError) as error:
        load_weights(toy(), save(weights, tmp_path / "a.pth"))
    text = str(error.value)
    assert f"wrong shape (1): {QUERIES} (file 2x8, model 4x8)" in text
    assert "missing from the file (1): void_embedding.weight" in text
    assert "unknown to the model (6): extra.0, extra.1, extra.2, extra.3 and 2 more" in text


@pytest.mark.parametrize(
    ("weights", "cause"),
    [
        ({"visual.trunk.stem.0.weight": torch.zeros(1)}, "a CLIP, not a segmenter"),
        ({"encoder.weight": torch.zeros(1)}, "no key starts with 'sem_seg_head.'"),
        ({"sem_seg_head.predictor.class_embed.weight": torch.zeros(1)}, "a closed-vocabulary MaskFormer, which"),
        (
            {
                "sem_seg_head.predictor.class_embed.weight": torch.zeros(1),
                "sem_seg_head.predictor.transformer_ffn_layers.0.norm.weight": torch.zeros(1),
            },
            r"a closed-vocabulary Mask2Former, .*start of a training \(MODEL.WEIGHTS without --eval-only\), not more",
        ),
    ],
)
def test_files_of_other_models_are_recognised(toy, tmp_path, weights, cause):
    with pytest.raises(ValueError, match=cause):
        load_weights(toy(), save(weights, tmp_path / "a.pth"))


def test_a_file_with_the_clip_of_another_backbone_is_refused(toy, tmp_path):
    weights = model_weights(toy()) | {"backbone.clip_model.visual.conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="CLIP in the file is another one"):
        load_weights(toy(), save(weights, tmp_path / "a.pth"))


def test_a_missing_file_is_named(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match="weights file .*nowhere.pth' not found"):
        load_weights(toy(), tmp_path / "nowhere.pth")


# ---- weights to share ----


def with_clip_of(target, source):
    target.backbone.load_state_dict(source.backbone.state_dict())
    return target


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shared_weights_keep_their_metadata_and_leave_the_clip_out(toy, tmp_path, dtype):
    source = toy(seed=0)
    target = with_clip_of(toy(seed=1), source)
    path = tmp_path / "a.safetensors"
    save_weights(source, path, {"classes": [["cat", "kitten"]], "note": "x"}, dtype=dtype)
    with safe_open(path, "pt") as file:
        assert not any(key.startswith("backbone") for key in file.keys())  # noqa: SIM118
        assert file.get_tensor("void_embedding.weight").dtype is dtype
    rest = load_weights(target, path)
    assert rest["classes"] == [["cat", "kitten"]] and rest["note"] == "x"
    assert target.void_embedding.weight.dtype is torch.float32
    # half precision keeps 11 bits
    torch.testing.assert_close(target.void_embedding.weight, source.void_embedding.weight, rtol=2**-11, atol=1e-7)


def test_shared_weights_without_a_dtype_are_kept_to_the_bit(toy, tmp_path):
    source = toy(seed=0)
    source.void_embedding.half()
    source.sem_seg_head.pixel_decoder.level_embed.data.fill_(-0.0)
    save_weights(source, tmp_path / "a.safetensors", dtype=None, full=True)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == source.state_dict().keys()
    for key, value in source.state_dict().items():
        assert found[key].dtype == value.dtype and found[key].numpy().tobytes() == value.numpy().tobytes()


# ---- the CLIP that weights belong to ----


def test_weights_trained_on_another_clip_are_refused_and_nothing_is_loaded(toy, tmp_path):
    save_weights(toy(seed=0), tmp_path / "a.safetensors")
    load_weights(with_clip_of(toy(seed=1), toy(seed=0)), tmp_path / "a.safetensors")
    model = toy(seed=1)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="trained on another CLIP"):
        load_weights(model, tmp_path / "a.safetensors")
    assert same(model, before)


def test_a_file_with_its_own_clip_needs_no_other(toy, tmp_path):
    source, target = toy(seed=0), toy(seed=1)
    save_weights(source, tmp_path / "a.safetensors", dtype=None, full=True)
    load_weights(target, tmp_path / "a.safetensors")
    assert same(source, target)


def part_of(weights, *starts):
    """A state dict with only those tensors of the CLIP whose names start so."""
    prefix = "backbone.clip_model."
    return {
        key: value
        for key, value in weights.items()
        if not key.startswith(prefix) or key.removeprefix(prefix).startswith(starts)
    }


def test_a_part_of_the_clip_on_random_weights_is_refused_with_the_key(tiny_model, tmp_path):
    source, target = tiny_model(seed=0), tiny_model(seed=1)
    save(part_of(source.state_dict(), "transformer", "token_embedding"), tmp_path / "a.pth")
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(
        ValueError, match=r"a part of the CLIP only, \d+ tensors, .*\d+ would stay random .*CLIP_PRETRAINED_WEIGHTS"
    ):
        load_weights(target, tmp_path / "a.pth")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_the_whole_clip_of_a_file_ends_the_randomness(tiny_model, tmp_path):
    source, target = tiny_model(seed=0), tiny_model(seed=1)
    save(source.state_dict(), tmp_path / "full.pth")
    load_weights(target, tmp_path / "full.pth")
    assert same(source, target) and target.backbone.pretrained == "full.pth"
    save(part_of(source.state_dict(), "visual"), tmp_path / "part.pth")
    load_weights(target, tmp_path / "part.pth")


def test_weights_without_a_word_on_their_clip_are_warned_of_on_random_weights(tiny_model, tmp_path, caplog):
    source, target = tiny_model(seed=0), tiny_model(seed=1)
    save(model_weights(source), tmp_path / "a.pth")
    load_weights(target, tmp_path / "a.pth")
    assert "random weights: set MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS" in caplog.text
    caplog.clear()
    target.backbone.pretrained = "some file"
    load_weights(target, tmp_path / "a.pth")
    assert caplog.text == ""


def test_a_part_of_another_clip_is_said_to_make_a_mixture(tiny_model, tmp_path, caplog):
    source, target = tiny_model(seed=0), tiny_model(seed=1)
    target.backbone.pretrained = "some file"
    save(part_of(source.state_dict(), "visual"), tmp_path / "a.pth")
    load_weights(target, tmp_path / "a.pth")
    assert "now a mixture of both" in caplog.text
    caplog.clear()
    halves = {key: value.half() for key, value in part_of(target.state_dict(), "visual").items()}
    load_weights(target, save(halves, tmp_path / "b.pth"))
    assert caplog.text == ""


def test_a_part_of_the_clip_must_complete_the_one_of_the_fingerprint(tiny_model, tmp_path):
    source, target = tiny_model(seed=0), tiny_model(seed=1)
    path = save(part_of(source.state_dict(), "visual"), tmp_path / "a.pth", **frozen_notes(source))
    target.backbone.pretrained = "some file"
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="trained on another CLIP"):
        load_weights(target, path)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    target.backbone.clip_model.load_state_dict(source.backbone.clip_model.state_dict())
    load_weights(target, path)
    assert same(source, target)


def test_the_activation_of_a_clip_in_the_file_comes_with_it(tiny_model, tiny_cfg, tmp_path):
    tiny_cfg.MODEL.FC_CLIP.QUICK_GELU = "on"
    source = tiny_model(cfg=tiny_cfg)
    save_weights(source, tmp_path / "a.safetensors", dtype=None, full=True)
    tiny_cfg.MODEL.FC_CLIP.QUICK_GELU = "auto"
    target = tiny_model(cfg=tiny_cfg, seed=1)
    load_weights(target, tmp_path / "a.safetensors")
    assert target.backbone.quick_gelu and same(source, target)
    tiny_cfg.MODEL.FC_CLIP.QUICK_GELU = "off"
    with pytest.raises(ValueError, match="was trained with QuickGELU"):
        load_weights(tiny_model(cfg=tiny_cfg), tmp_path / "a.safetensors")


def test_numbers_of_another_kind_and_broken_numbers_are_refused(toy, tmp_path):
    weights = model_weights(toy())
    quantised = weights | {QUERIES: torch.zeros(4, 8, dtype=torch.int8)}
    with pytest.raises(ValueError, match=rf"not floating-point \(1\): {QUERIES} \(int8\)"):
        load_weights(toy(), save(quantised, tmp_path / "a.pth"))
    broken = weights | {QUERIES: torch.full((4, 8), torch.inf)}
    with pytest.raises(ValueError, match=rf"with NaN or infinity \(1\): {QUERIES}"):
        load_weights(toy(), save(broken, tmp_path / "a.pth"))


# ---- Mask2Former as a start ----


def mask2former(model, queries=3, old=True):
    """Weights that Mask2Former would have beside those of an FC-CLIP, with another backbone and other queries."""
    weights = {}
    for key, value in model_weights(model).items():
        if key.startswith("sem_seg_head.") and "class_embed" not in key and "_mask_pooling_proj" not in key:
            weights[key] = torch.randn(value.shape)
    del weights["sem_seg_head.predictor.logit_scale"]
    projection = "sem_seg_head.pixel_decoder.input_proj.0.0.weight"
    width = len(weights[projection])
    weights[projection] = torch.randn(width, 7, 1, 1)
    for name in ("query_feat", "query_embed"):
        weights[f"sem_seg_head.predictor.{name}.weight"] = torch.randn(queries, width)
    weights |= {
        "sem_seg_head.predictor.class_embed.weight": torch.randn(134, width),
        "sem_seg_head.predictor.class_embed.bias": torch.randn(134),
        "backbone.res2.0.conv1.weight": torch.randn(4, 4, 1, 1),
        "criterion.empty_weight": torch.ones(134),
    }
    if not old:
        return weights
    renamed = {}
    for key, value in weights.items():
        key = key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query")
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("form", ["pth", "pkl"])
def test_a_training_can_start_from_mask2former_under_any_of_its_names(tiny_model, tmp_path, caplog, old, form):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    new_names = mask2former(model, old=False)
    names = {key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): key
             for key in new_names}  # fmt: skip
    weights = {name: new_names[key] for name, key in names.items()} if old else new_names
    path = tmp_path / f"model_final.{form}"
    if form == "pth":
        save(weights, path)
    else:
        path.write_bytes(pickle.dumps({"model": {key: value.numpy() for key, value in weights.items()}}))
    with caplog.at_level(logging.INFO):
        load_weights(model, path, initialise=True)
    fresh = ("class_embed", "_mask_pooling_proj", "logit_scale", "query_", "input_proj.0.0.weight")
    for key, value in model.state_dict().items():
        head = key.startswith("sem_seg_head.") and not any(word in key for word in fresh)
        assert torch.equal(value, new_names[key] if head else before[key]), key
    text = caplog.text
    assert "starting from the Mask2Former weights in" in text
    assert "left, of another shape (3): " in text and "query_feat.weight (file 3x32, model 8x32)" in text
    assert "left, head of a fixed list of classes (2): sem_seg_head.predictor.class_embed.weight, " in text
    assert (
        "left, outside pixel decoder and mask decoder (2): backbone.res2.0.conv1.weight, criterion.empty_weight\n"
        in text
    )
    assert "freshly initialised (15): " in text and "sem_seg_head.pixel_decoder.input_proj.0.0.weight" in text
    assert "taken (81): " in text


def test_queries_of_the_same_number_are_taken_under_their_old_name(tiny_model):
    model = tiny_model()
    weights = mask2former(model, queries=8)
    start = initialise_from(model, weights, source="x")
    assert QUERIES in start.taken
    assert torch.equal(model.state_dict()[QUERIES], weights["sem_seg_head.predictor.static_query.weight"])


def test_initialising_from_a_segmenter_of_our_own_is_a_strict_load(toy, tmp_path):
    source, target = toy(seed=0), toy(seed=1)
    load_weights(target, save(source.state_dict(), tmp_path / "a.pth"), initialise=True)
    assert same(source, target)
    with pytest.raises(ValueError, match="another backbone"):
        load_weights(target, save(model_weights(toy(channels=9)), tmp_path / "a.pth"), initialise=True)


def test_a_start_of_which_nothing_fits_is_refused(tiny_model, tmp_path):
    weights = {
        "sem_seg_head.predictor.class_embed.weight": torch.zeros(3, 3),
        "sem_seg_head.predictor.transformer_ffn_layers.0.norm.weight": torch.zeros(3),
    }
    with pytest.raises(ValueError, match=r"no weights of .* fit the model[^!]*of another shape \(1\)"):
        load_weights(tiny_model(), save(weights, tmp_path / "a.pth"), initialise=True)


def test_a_file_of_ovrcoat_brings_its_tuned_clip_and_leaves_the_frozen_one(tiny_model, tmp_path, caplog):
    model = tiny_model()
    tuned = {key: value + 0.01 if "visual." in key else value for key, value in model.state_dict().items()}
    tuned["backbone.clip_model.logit_scale"] = torch.tensor(3.5)
    frozen = {f"frozen_{key}": value for key, value in model.state_dict().items() if key.startswith("backbone.")}
    torch.save({"model": {**tuned, **frozen, "criterion.empty_weight": torch.ones(134)}}, tmp_path / "ovrcoat.pth")
    with caplog.at_level("INFO"):
        load_weights(model, tmp_path / "ovrcoat.pth")
    assert f"{len(frozen)} tensors of a CLIP that only taught are left out" in caplog.text
    assert model.backbone.logit_scale == 3.5
    key = next(key for key in tuned if "visual." in key and tuned[key].is_floating_point())
    assert torch.equal(model.state_dict()[key], tuned[key])


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"MODEL.META_ARCHITECTURE": "MAFT_Plus"},
        {"MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER": "mask_adapter", "MODEL.MASK_ADAPTER.NUM_CHANNELS": 16},
    ],
    ids=["ovrcoat", "maft_plus", "mask_adapter"],
)
def test_files_of_others_with_other_queries_or_another_clip_are_refused_with_the_cause(
    tiny_model, tiny_cfg, tmp_path, keys
):
    for key, value in keys.items():
        tiny_cfg.merge_from_list([key, value])
    weights = {
        key.replace("classifier.", "mask_adapter."): value
        for key, value in tiny_model(cfg=tiny_cfg).state_dict().items()
    }
    stem = "backbone.clip_model.visual.trunk.stem.0.weight"
    foreign = save(weights | {stem: weights[stem].repeat(2, 1, 1, 1)}, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match="the CLIP in the file is another one than the model's: .*CLIP_MODEL_NAME"):
        load_weights(tiny_model(cfg=tiny_cfg), foreign)
    tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 9
    with pytest.raises(ValueError, match="8 queries, the model has 9: set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 8"):
        load_weights(tiny_model(cfg=tiny_cfg), save(weights, tmp_path / "queries.pth"))
