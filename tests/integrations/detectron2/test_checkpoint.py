"""Loading through detectron2's checkpointer, which only warns by itself, and through fcclip's."""

import logging
import pickle

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from fcclip.integrations.detectron2 import Checkpointer
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights, vocabulary_note
from tests.weight_files import save_weights

pytestmark = pytest.mark.usefixtures("detectron2_knows_fcclip")
BOTH = pytest.mark.parametrize("checkpointer", [DetectionCheckpointer, Checkpointer])


@pytest.fixture
def build(detectron2_cfg):
    """Function (seed, **changes of the shapes config) -> a model with the shipped CLIP."""

    def build(seed=0, **changes):
        torch.manual_seed(seed)
        return build_model(detectron2_cfg(tiny=False, **changes))

    return build


def trained(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}


@BOTH
@pytest.mark.parametrize("layout", ["bare", "wrapped", "of a wrapper", "with strays", "with half of the CLIP"])
def test_every_published_layout_is_loaded_without_a_warning(build, tmp_path, checkpointer, layout, caplog):
    source, model = build(seed=1), build(seed=2)
    weights = trained(source)
    if layout == "of a wrapper":
        weights = {f"module.{key}": value for key, value in weights.items()}
    if layout == "with strays":
        weights |= {"pixel_mean": torch.zeros(3, 1, 1), "backbone.clip_model.attn_mask": torch.zeros(77, 77)}
    if layout == "with half of the CLIP":
        clip = {key: value for key, value in source.state_dict().items() if key.startswith("backbone.")}
        weights |= dict(list(clip.items())[::2])
    torch.save(weights if layout == "bare" else {"model": weights, "iteration": 3}, tmp_path / "model.pth")
    caplog.clear()
    checkpointer(model).load(str(tmp_path / "model.pth"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(torch.equal(value, trained(model)[key]) for key, value in trained(source).items())


@BOTH
def test_weights_that_lack_a_trained_key_are_refused_by_name(build, tmp_path, checkpointer):
    model = build()
    weights = trained(model)
    del weights["void_embedding.weight"]
    torch.save({"model": weights}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"(?s)missing from the file \(1\): void_embedding.weight.*likely cause"):
        checkpointer(model).load(str(tmp_path / "model.pth"))


@BOTH
def test_unknown_keys_are_refused_by_name_and_nothing_is_loaded(build, tmp_path, checkpointer):
    model, other = build(seed=1), build(seed=2)
    torch.save({"model": {**trained(other), "sem_seg_head.new.weight": torch.zeros(2)}}, tmp_path / "model.pth")
    before = {key: value.clone() for key, value in trained(model).items()}
    with pytest.raises(ValueError, match=r"unknown to the model \(1\): sem_seg_head.new.weight"):
        checkpointer(model).load(str(tmp_path / "model.pth"))
    assert all(torch.equal(value, trained(model)[key]) for key, value in before.items())


def test_weights_of_another_shape_are_refused(build, tmp_path):
    torch.save({"model": trained(build(MODEL__MASK_FORMER__NUM_OBJECT_QUERIES=5))}, tmp_path / "model.pth")
    model = build()
    with pytest.raises(ValueError, match=r"(?s)query_feat.weight.*so a missing key may be one of another shape"):
        DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    with pytest.raises(ValueError, match="trained with 5 queries, the model has 30.*NUM_OBJECT_QUERIES 5"):
        Checkpointer(model).load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_is_loaded_whole_or_refused(build, strict):
    model, other = build(seed=1), build(seed=2)
    result = model.load_state_dict(trained(other), strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(model.void_embedding.weight, other.void_embedding.weight)
    with pytest.raises(ValueError, match="the state dict' do not fit the model"):
        model.load_state_dict({"void_embedding.weight": torch.zeros(1, 64)}, strict=strict)


def test_shared_weights_and_shipped_files_are_read(build, tmp_path):
    source, model = build(seed=1), build(seed=1)
    torch.nn.init.zeros_(model.void_embedding.weight)
    save_weights(source, tmp_path / "model.safetensors", {"note": 3}, dtype=torch.float32)
    notes = Checkpointer(model).load(str(tmp_path / "model.safetensors"))
    assert notes["note"] == 3 and torch.equal(model.void_embedding.weight, source.void_embedding.weight)
    Checkpointer(model).load("shapes_fcclip.safetensors")
    load_weights(source, "shapes_fcclip.safetensors")
    assert torch.equal(model.void_embedding.weight, source.void_embedding.weight)


def test_files_hold_no_frozen_clip_and_come_back(build, tmp_path):
    source, model = build(seed=1), build(seed=1)
    torch.nn.init.zeros_(model.void_embedding.weight)
    Checkpointer(source, str(tmp_path)).save("model_0000003", iteration=3)
    content = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert content["model"].keys() == trained(source).keys() and content["iteration"] == 3
    assert Checkpointer(model, str(tmp_path)).resume_or_load("")["iteration"] == 3
    assert torch.equal(model.void_embedding.weight, source.void_embedding.weight)
    Checkpointer(source, str(tmp_path), full=True).save("full")
    content = torch.load(tmp_path / "full.pth", weights_only=True)
    assert content["model"].keys() == source.state_dict().keys()
    DetectionCheckpointer(model).load(str(tmp_path / "full.pth"))
    Checkpointer(source, "").save("nowhere")


def test_the_model_learns_the_former_classes_of_a_fine_tuned_file(build, tmp_path):
    model, own = build(), Vocabulary.from_names("zebra; red circle", name="own")
    notes = {"vocabulary": vocabulary_note(own), "former_vocabulary": vocabulary_note(Vocabulary.builtin("shapes"))}
    torch.save({"model": trained(build(seed=1)), **notes}, tmp_path / "tuned.pth")
    Checkpointer(model).load(str(tmp_path / "tuned.pth"))
    assert Vocabulary.builtin("shapes").seen_by(model.seen_vocabulary).all()
    Checkpointer(model).load("shapes_fcclip.safetensors")
    assert model.seen_vocabulary is model.train_vocabulary


def test_a_pickle_that_wants_code_does_nothing(build, tmp_path):
    class Evil:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "ran",))

    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(ValueError, match="model.pkl"):
        Checkpointer(build()).load(str(tmp_path / "model.pkl"))
    assert not (tmp_path / "ran").exists()
