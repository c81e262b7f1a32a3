import copy
import logging
import os
import pickle
import subprocess
import threading
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fcclip.engine import Checkpointer, load_checkpoint, save_checkpoint
from fcclip.files import write_atomically
from fcclip.modeling.backbones.fingerprint import clip_fingerprint
from fcclip.weights import initialise_from, load_weights, model_weights, save_weights
from fcclip.weights.checkpoint import published_names

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


def test_a_file_without_class_weights_is_complete(toy, tmp_path):
    weights = model_weights(toy())
    del weights["criterion.empty_weight"]
    load_weights(toy(), save(weights, tmp_path / "a.pth"))


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
    assert "unknown to the model (6): extra.0, extra.1, extra.2, extra.3, … and 2 more" in text


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


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_an_error_with_its_size(toy, tmp_path, share):
    path = save(model_weights(toy()), tmp_path / "a.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"damaged, cut off or no checkpoint \({int(share * len(content))} bytes"):
        load_weights(toy(), path)


def test_a_truncated_safetensors_file_is_an_error(toy, tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(toy(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_weights(toy(), path)


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(toy, tmp_path, zipped):
    path, trap = tmp_path / "a.pth", tmp_path / "trap"
    content = {"model": model_weights(toy()), "extra": Malicious(trap)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Malicious(trap)}, protocol=2))
    with pytest.raises(ValueError, match="could run any program, so it is refused"):
        load_weights(toy(), path)
    assert not trap.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_arrays_as_conversion_scripts_write_it_is_loaded(toy, tmp_path, protocol):
    source, target = toy(seed=0), toy(seed=1)
    arrays = {key: value.numpy() for key, value in source.state_dict().items()}
    content = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    assert load_weights(target, tmp_path / "a.pkl") == {"__author__": "third_party", "matching_heuristics": True}
    assert same(source, target)


def test_a_file_without_a_state_dict_says_what_it_holds(toy, tmp_path):
    torch.save({"epoch": 3, "state": {}}, tmp_path / "a.pth")
    with pytest.raises(
        ValueError,
        match="neither a state dict nor one under the key 'model' or 'state_dict'; its keys are epoch, state",
    ):
        load_weights(toy(), tmp_path / "a.pth")


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
    path = save(part_of(source.state_dict(), "visual"), tmp_path / "a.pth", clip=clip_fingerprint(source))
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
    assert "left, head of a fixed list of classes (2): sem_seg_head.predictor.class_embed.* (2)\n" in text
    assert (
        "left, outside pixel decoder and mask decoder (2): backbone.res2.0.conv1.weight, criterion.empty_weight\n"
        in text
    )
    assert "freshly initialised (15): sem_seg_head.pixel_decoder.input_proj.0.0.weight, " in text
    assert text.rstrip().endswith("void_embedding.weight")
    assert "taken (81): " in text and "sem_seg_head.predictor.transformer_ffn_layers.* (12), " in text


def test_queries_of_the_same_number_are_taken_under_their_old_name(tiny_model):
    model = tiny_model()
    weights = mask2former(model, queries=8)
    start = initialise_from(model, weights, versions={}, source="x")
    assert QUERIES in start.taken
    assert torch.equal(model.state_dict()[QUERIES], weights["sem_seg_head.predictor.static_query.weight"])


def test_new_weights_keep_names_that_only_look_old(tiny_model):
    versions = {"sem_seg_head": {"version": 2}, "sem_seg_head.predictor": {"version": 2}}
    weights = {"sem_seg_head.mask_features.weight": 1, "sem_seg_head.predictor.static_query.weight": 2}
    assert published_names(weights, versions) == weights
    assert list(published_names(weights, {})) == ["sem_seg_head.pixel_decoder.mask_features.weight", QUERIES]


def test_versions_are_read_from_the_file(tiny_model, tmp_path, caplog):
    model = tiny_model()
    state = OrderedDict(mask2former(model))
    state._metadata = OrderedDict({"": {"version": 1}, "sem_seg_head": {"version": 2}})
    with caplog.at_level(logging.INFO):
        load_weights(model, save(state, tmp_path / "a.pth"), initialise=True)
    assert "left, outside pixel decoder and mask decoder (39): sem_seg_head.input_proj.* (12), " in caplog.text


def test_without_being_asked_mask2former_is_refused(tiny_model, tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="closed-vocabulary Mask2Former, .* start of a training"):
        load_weights(model, save(mask2former(model), tmp_path / "a.pth"))


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


# ---- writing ----


def test_a_failing_write_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"value": 1})

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*No space left.*untouched; is the disk full"):
        write_atomically(path, fail)
    assert load_checkpoint(path) == {"value": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"value": 1})
    (tmp_path / ".a.pth.writing").symlink_to("/dev/full")
    with pytest.raises(OSError, match="is the disk full"):
        save_checkpoint(path, {"value": torch.zeros(100_000)})
    assert load_checkpoint(path) == {"value": 1}


def test_a_crash_before_the_rename_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"value": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"value": 2})
    assert load_checkpoint(path) == {"value": 1}


def test_last_checkpoint_names_the_newest_and_old_periodic_ones_are_removed(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.last() is None
    for iteration in (9, 19, 29):
        checkpointer.save_periodic(iteration, {"iteration": iteration})
        checkpointer.wait()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000029.pth"
    checkpointer.save("model_final", {"iteration": 30})
    checkpointer.wait()
    assert checkpointer.last() == tmp_path / "model_final.pth"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000019.pth",
        "model_0000029.pth",
        "model_final.pth",
    ]


def test_keep_zero_keeps_every_checkpoint(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=0)
    for iteration in range(5):
        checkpointer.save_periodic(iteration, {})
    checkpointer.wait()
    assert len(list(tmp_path.glob("model_*.pth"))) == 5


def test_checkpoints_of_an_earlier_longer_run_neither_count_nor_vanish(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_periodic(99, {})
    checkpointer.wait()
    checkpointer.save_periodic(9, {})
    checkpointer.wait()
    checkpointer.save_periodic(19, {})
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model_0000019.pth", "model_0000099.pth"]


def test_a_purge_that_fails_is_a_warning_and_the_new_checkpoint_stands(tmp_path, monkeypatch, caplog):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_periodic(9, {})
    checkpointer.wait()
    monkeypatch.setattr(type(tmp_path), "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("read-only")))
    checkpointer.save_periodic(19, {"value": 2})
    checkpointer.wait()
    assert "could not remove" in caplog.text and load_checkpoint(checkpointer.last()) == {"value": 2}


def test_a_last_checkpoint_that_names_a_missing_file_says_what_is_there(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    save_checkpoint(tmp_path / "model_0000004.pth", {})
    with pytest.raises(FileNotFoundError, match=r"names 'model_0000009.pth'.*in the folder: model_0000004.pth"):
        Checkpointer(tmp_path).last()


def test_what_a_killed_run_half_wrote_is_cleaned_up(tmp_path):
    (tmp_path / ".model_final.pth.writing").write_bytes(b"half")
    (tmp_path / "keep.txt").write_text("x")
    Checkpointer(tmp_path).remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


# ---- writing while the training goes on ----


@pytest.fixture
def disk(monkeypatch):
    """What `torch.save` does: `full` makes it fail with `error`, `go` cleared makes it wait; `wrote` lists contents."""
    error = OSError(28, "No space left on device")
    disk = SimpleNamespace(full=False, error=error, go=threading.Event(), wrote=[])
    disk.go.set()
    real = torch.save

    def save(content, file):
        assert disk.go.wait(20), "nobody let the write go on"
        if disk.full:
            file.write(b"half")
            raise disk.error
        real(content, file)
        disk.wrote.append(content)

    monkeypatch.setattr(torch, "save", save)
    yield disk
    disk.go.set()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_what_was_handed_over_whatever_happens_to_it_later(tmp_path, disk):
    disk.go.clear()
    weight, inner = torch.zeros(3), torch.zeros(2)
    content = {"a": weight, "state": {0: {"b": [inner, (inner[:1], "word")]}}, "numbers": [1, 2]}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save("model_final", content)
    assert names(tmp_path) in ([], [".model_final.pth.writing"])
    weight.fill_(7)
    inner.fill_(7)
    content["numbers"].append(3)
    content["late"] = True
    disk.go.set()
    checkpointer.wait()
    loaded = load_checkpoint(tmp_path / "model_final.pth")
    assert not loaded["a"].any() and not loaded["state"][0]["b"][0].any() and not loaded["state"][0]["b"][1][0].any()
    assert loaded["state"][0]["b"][1][1] == "word" and loaded["numbers"] == [1, 2] and "late" not in loaded


def test_files_are_written_one_after_the_other_in_the_order_they_were_handed_over(tmp_path, disk):
    checkpointer = Checkpointer(tmp_path, keep=0)
    disk.go.clear()
    handed_over = threading.Thread(
        target=lambda: [checkpointer.save_periodic(number, {"number": number}) for number in range(5)]
    )
    handed_over.start()
    handed_over.join(0.2)
    assert handed_over.is_alive() and len(list(tmp_path.glob("*.writing"))) <= 1  # the second waits for the first
    disk.go.set()
    handed_over.join()
    checkpointer.wait()
    assert [content["number"] for content in disk.wrote] == list(range(5))
    assert checkpointer.last().name == "model_0000004.pth"


def test_a_write_that_fails_harms_nothing_is_told_and_is_tried_again_with_the_next(tmp_path, disk, caplog):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_periodic(1, {"iteration": 1})
    checkpointer.settle()
    disk.full = True
    checkpointer.save_periodic(3, {"iteration": 3})
    checkpointer.settle()
    checkpointer.check()
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    assert load_checkpoint(checkpointer.last()) == {"iteration": 1}
    assert "model_0000003.pth" in caplog.text and "No space left on device" in caplog.text
    disk.full = False
    checkpointer.save_periodic(5, {"iteration": 5})
    checkpointer.wait()
    assert names(tmp_path) == ["last_checkpoint", "model_0000005.pth"]


def test_the_second_failure_in_a_row_is_raised_and_the_one_before_a_good_write_is_forgotten(tmp_path, disk):
    checkpointer = Checkpointer(tmp_path)
    for number, full in enumerate((True, False, True)):
        disk.full = full
        checkpointer.save_periodic(number, {})
        checkpointer.settle()
        checkpointer.check()
    checkpointer.save_periodic(3, {})
    checkpointer.settle()
    with pytest.raises(OSError, match="cannot write .*model_0000003.pth"):
        checkpointer.check()
    with pytest.raises(OSError, match="cannot write .*model_0000003.pth"):
        checkpointer.save_periodic(4, {})
    assert checkpointer.last().name == "model_0000001.pth"


def test_a_failure_at_the_end_is_raised_even_when_an_evaluation_was_noted_after_it(tmp_path, disk):
    checkpointer = Checkpointer(tmp_path)
    disk.full = True
    checkpointer.save("model_final", {})
    checkpointer.save_evaluation({"iteration": 5})
    with pytest.raises(OSError, match="cannot write .*model_final.pth"):
        checkpointer.wait()
    assert checkpointer.noted_evaluation() == {"iteration": 5}
    checkpointer.wait()  # told once


def test_our_own_mistake_in_a_write_is_raised_at_once(tmp_path, disk):
    disk.full, disk.error = True, TypeError("cannot pickle a lambda")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save("model_final", {})
    checkpointer.settle()
    with pytest.raises(TypeError, match="cannot pickle a lambda"):
        checkpointer.check()


def test_as_a_context_it_waits_and_hides_no_other_error(tmp_path, disk):
    disk.go.clear()
    threading.Timer(0.2, disk.go.set).start()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save("model_final", {})
    assert names(tmp_path) == ["last_checkpoint", "model_final.pth"]
    disk.full = True
    with pytest.raises(OSError, match="cannot write"), checkpointer:
        checkpointer.save("model_final", {})
    with pytest.raises(LookupError), checkpointer:
        checkpointer.save("model_final", {})
        raise LookupError


def test_best_weights_are_neither_named_as_the_last_checkpoint_nor_purged(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_evaluation({"iteration": 0, "best": {"value": 2.0}}, best={"iteration": 0})
    checkpointer.wait()
    assert checkpointer.last() is None
    assert checkpointer.noted_evaluation() == {"iteration": 0, "best": {"value": 2.0}}
    for number in range(3):
        checkpointer.save_periodic(number, {})
    checkpointer.save_evaluation({"iteration": 2})
    checkpointer.wait()
    assert names(tmp_path) == ["best.pth", "last_checkpoint", "last_evaluation", "model_0000002.pth"]
    assert checkpointer.last().name == "model_0000002.pth" and load_checkpoint(tmp_path / "best.pth")["iteration"] == 0
    checkpointer.forget_evaluation()
    checkpointer.forget_evaluation()
    assert checkpointer.noted_evaluation() == {} and (tmp_path / "best.pth").exists()


def test_an_evaluation_is_noted_only_when_its_best_weights_are_written(tmp_path, disk):
    checkpointer = Checkpointer(tmp_path)
    disk.full = True
    checkpointer.save_evaluation({"iteration": 1}, best={"iteration": 1})
    checkpointer.settle()
    assert names(tmp_path) == []
    disk.full = False
    checkpointer.save_evaluation({"iteration": 3})
    checkpointer.wait()
    assert load_checkpoint(tmp_path / "best.pth") == {"iteration": 1}
    assert checkpointer.noted_evaluation() == {"iteration": 3}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_disk_that_is_really_full_leaves_what_was_there(small_disk, pieces, caplog):
    """With one large tensor torch tells of an unexpected position instead of the full disk."""
    checkpointer = Checkpointer(small_disk, keep=1)
    checkpointer.save_periodic(1, {"value": torch.rand(20_000)})
    checkpointer.settle()
    before = (small_disk / "model_0000001.pth").read_bytes()
    for number in (3, 5):
        checkpointer.save_periodic(number, {str(piece): torch.rand(80_000 // pieces) for piece in range(pieces)})
        checkpointer.settle()
    with pytest.raises(OSError, match="cannot write .*model_0000005.pth.*No space left on device.*disk full"):
        checkpointer.check()
    assert (small_disk / "model_0000001.pth").read_bytes() == before
    assert names(small_disk) == ["last_checkpoint", "model_0000001.pth"]
    assert checkpointer.last().name == "model_0000001.pth" and caplog.text.count("No space left on device") == 2


def test_a_folder_that_has_become_read_only_leaves_what_was_there(small_disk, caplog):
    checkpointer = Checkpointer(small_disk)
    checkpointer.save_periodic(1, {"value": 1})
    checkpointer.settle()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    checkpointer.save_periodic(3, {"value": 3})
    checkpointer.save_evaluation({"iteration": 3})
    with pytest.raises(OSError, match="cannot write .*Read-only file system.*read-only"):
        checkpointer.wait()
    assert load_checkpoint(checkpointer.last()) == {"value": 1} and "last_evaluation" in caplog.text


# ---- reading it again ----


@pytest.mark.parametrize(("place", "damaged", "good"), [("in a tensor", (5,), 3), ("in the pickle", (5, 3), 1)])
def test_one_wrong_bit_is_found_and_a_good_checkpoint_of_the_run_is_named(tmp_path, place, damaged, good):
    checkpointer = Checkpointer(tmp_path)
    for iteration in (1, 3, 5):
        checkpointer.save_periodic(iteration, {"model": {"weight": torch.rand(50_000)}, "iteration": iteration})
    checkpointer.save_evaluation({}, best={"iteration": 5})
    checkpointer.wait()
    for iteration in (1, 3, 5):
        path = tmp_path / f"model_000000{iteration}.pth"
        if iteration in damaged:
            content = bytearray(path.read_bytes())
            content[100_000 if place == "in a tensor" else content.index(b"iteration") + 3] ^= 1
            path.write_bytes(content)
        os.utime(path, (iteration, iteration))  # the order in which they were written
    with pytest.raises(ValueError, match="model_0000005.pth' (is damaged|cannot be read).*earlier checkpoint"):
        load_checkpoint(checkpointer.last())
    name = f"model_000000{good}.pth"
    with pytest.raises(ValueError, match=f"can be read is {name}: .* write that name into .*last_checkpoint"):
        checkpointer.load(checkpointer.last())
    (tmp_path / "last_checkpoint").write_text(name)
    assert checkpointer.load(checkpointer.last())["iteration"] == good


def test_a_damaged_checkpoint_without_another_says_so(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save("model_final", {"value": torch.rand(1000)})
    checkpointer.wait()
    (tmp_path / "model_final.pth").write_bytes((tmp_path / "model_final.pth").read_bytes()[:-100])
    with pytest.raises(ValueError, match="no other checkpoint that can be read"):
        checkpointer.load(tmp_path / "model_final.pth")
