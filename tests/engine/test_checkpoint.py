import os
import pickle

import pytest
import torch
from safetensors import safe_open

from fcclip.engine import (
    Checkpointer,
    clip_fingerprint,
    load_checkpoint,
    load_weights,
    model_weights,
    save_checkpoint,
    save_weights,
    write_atomically,
)

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
        ({"sem_seg_head.predictor.class_embed.weight": torch.zeros(1)}, "closed-vocabulary MaskFormer or Mask2Former"),
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
    with pytest.raises(ValueError, match=rf"damaged, cut off or no checkpoint \({int(share * len(content))} bytes\)"):
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


def test_a_pkl_file_is_not_opened(toy, tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle file"):
        load_weights(toy(), tmp_path / "a.pkl")


def test_a_file_without_a_state_dict_says_what_it_holds(toy, tmp_path):
    torch.save({"epoch": 3, "state": {}}, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match="neither a state dict nor one under the key 'model'; its keys are epoch, state"
    ):
        load_weights(toy(), tmp_path / "a.pth")


# ---- weights to share ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shared_weights_keep_their_metadata_and_leave_the_clip_out(toy, tmp_path, dtype):
    source, target = toy(seed=0), toy(seed=1)
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


def test_the_fingerprint_tells_clips_apart_and_survives_half_precision(toy):
    one, other = toy(seed=0), toy(seed=1)
    assert clip_fingerprint(one) != clip_fingerprint(other)
    before = clip_fingerprint(one)
    one.backbone.half()
    assert clip_fingerprint(one) == before


def test_weights_trained_on_another_clip_are_loaded_with_a_warning(toy, tmp_path, caplog):
    save_weights(toy(seed=0), tmp_path / "a.safetensors")
    load_weights(toy(seed=0), tmp_path / "a.safetensors")
    assert "another CLIP" not in caplog.text
    load_weights(toy(seed=1), tmp_path / "a.safetensors")
    assert "trained on another CLIP" in caplog.text


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
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000029.pth"
    checkpointer.save("model_final", {"iteration": 30})
    assert checkpointer.last() == tmp_path / "model_final.pth"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000019.pth",
        "model_0000029.pth",
        "model_final.pth",
    ]


def test_keep_zero_keeps_every_checkpoint(tmp_path):
    for iteration in range(5):
        Checkpointer(tmp_path, keep=0).save_periodic(iteration, {})
    assert len(list(tmp_path.glob("model_*.pth"))) == 5


def test_checkpoints_of_an_earlier_longer_run_neither_count_nor_vanish(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_periodic(99, {})
    checkpointer.save_periodic(9, {})
    checkpointer.save_periodic(19, {})
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model_0000019.pth", "model_0000099.pth"]


def test_a_purge_that_fails_is_a_warning_and_the_new_checkpoint_stands(tmp_path, monkeypatch, caplog):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_periodic(9, {})
    monkeypatch.setattr(type(tmp_path), "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("read-only")))
    checkpointer.save_periodic(19, {"value": 2})
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
