"""Weights found, and written so that they are found again."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml

from fcclip import Segmenter
from fcclip.config import assets_dir, flatten
from fcclip.segmenter import pretrained
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_notes, model_weights, read_weight_file
from tests.segmenter.conftest import NAMES
from tests.weight_files import save_weights

RESULTS = {"shapes_val": {"panoptic_seg": {"PQ": 78.44}}}


@pytest.fixture(scope="module")
def saved(segmenter, tmp_path_factory):
    return segmenter.save_pretrained(tmp_path_factory.mktemp("saved") / "shapes", results=RESULTS)


def same(segmenter, other, image):
    assert all(
        torch.equal(value, model_weights(other.model)[key]) for key, value in model_weights(segmenter.model).items()
    )
    one, two = segmenter(image), other(image)
    np.testing.assert_array_equal(one.panoptic, two.panoptic)
    assert one.segments == two.segments


def test_a_name_a_file_and_its_config_give_the_same(segmenter, image):
    file = assets_dir() / "shapes_fcclip.safetensors"  # whose notes name its config
    for other in (
        Segmenter.from_pretrained(file),
        Segmenter.from_pretrained("shapes", "shapes/fcclip_shapes.yaml", "cpu"),
    ):
        same(segmenter, other, image)


def test_what_is_saved_is_found_again_in_a_folder_or_by_its_file_alone(segmenter, image, saved, tmp_path):
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    shutil.copyfile(saved / "model.safetensors", tmp_path / "alone.safetensors")
    for place in (saved, tmp_path / "alone.safetensors"):
        other = Segmenter.from_pretrained(place, device="cpu")
        same(segmenter, other, image)
        assert other.model.train_vocabulary.synonyms == segmenter.model.train_vocabulary.synonyms
        assert other.model.test_vocabulary.thing_classes == segmenter.model.test_vocabulary.thing_classes
        assert other(image, NAMES).segments == segmenter(image, NAMES).segments


def test_the_card_tells_of_vocabulary_fingerprint_and_numbers(segmenter, saved):
    card = (saved / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(card.split("---")[1])
    assert fields["library_name"] == "fcclip" and fields["pipeline_tag"] == "image-segmentation"
    trained = segmenter.model.train_vocabulary
    assert f"Trained on the 40 classes of 'shapes_seen' ({trained.hash[:12]}): red circle, red square" in card
    assert frozen_notes(segmenter.model)["clip"]["weights"] in card
    assert "| shapes_val | panoptic_seg | PQ | 78.4 |" in card


def test_no_path_of_this_machine_and_no_key_of_the_training_is_saved(tiny_cfg, tmp_path, image):
    tiny_cfg.OUTPUT_DIR, tiny_cfg.MODEL.FC_CLIP.TEXT_CACHE_DIR = str(tmp_path / "run"), str(tmp_path / "cache")
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = (), ()
    first = Segmenter(tiny_cfg, weights="random")
    folder = first.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (folder / "config.yaml").read_text()
    keys = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    assert keys["SOLVER.MAX_ITER"] != tiny_cfg.SOLVER.MAX_ITER
    # its CLIP has random weights that nobody else has, and an architecture of its own: both are beside it
    assert (folder / "tiny_convnext.json").is_file() and keys["MODEL.FC_CLIP.CLIP_MODEL_NAME"] == "tiny_convnext.json"
    shutil.move(folder, tmp_path / "elsewhere")
    other = Segmenter.from_pretrained(tmp_path / "elsewhere", device="cpu")
    np.testing.assert_array_equal(first(image, NAMES).outputs.scores, other(image, NAMES).outputs.scores)


def test_a_folder_of_a_training_is_taken_by_its_best_checkpoint(segmenter, tiny_cfg, tmp_path):
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = (), ()
    model = Segmenter(tiny_cfg, weights="random").model
    note = {"name": "own", "classes": [["cup", "mug"], ["sea"]], "things": [0]}
    content = {"model": model.state_dict(), "config": tiny_cfg.dump(), "vocabulary": note, **frozen_notes(model)}
    torch.save(content, tmp_path / "best.pth")
    other = Segmenter.from_pretrained(tmp_path, device="cpu")
    assert other.model.train_vocabulary.synonyms == (("cup", "mug"), ("sea",))
    assert other.model.seen_vocabulary.thing_classes == (0,)


def test_weights_that_say_no_config_need_one(tiny_cfg, tmp_path):
    save_weights(Segmenter(tiny_cfg, weights="random").model, tmp_path / "published.safetensors", full=True)
    with pytest.raises(ValueError, match="does not say which config it belongs to, as published files do not"):
        Segmenter.from_pretrained(tmp_path / "published.safetensors")
    (tmp_path / "own.yaml").write_text(tiny_cfg.dump())
    assert Segmenter.from_pretrained(tmp_path / "published.safetensors", tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", r"unknown pretrained segmenter 'shape'\. Did you mean 'shapes'\?"),
        ("none.pth", r"weights 'none\.pth' not found: no such file or folder"),
        ("weights/none.pth", r"weights 'weights/none\.pth' not found"),
        ("/nowhere/at/all", "weights '/nowhere/at/all' not found"),
    ],
)
def test_what_is_not_there_is_named(name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Segmenter.from_pretrained(name)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors, best\.pth, model_final\.pth"):
        Segmenter.from_pretrained(tmp_path)


# ---- the hub, without a network ----


@pytest.fixture
def offline_hub(saved, tmp_path, monkeypatch):
    """A cache in the hub's layout that holds owner/shapes at its branch and at a tag, and no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--owner--shapes"
    shutil.copytree(saved, model / "snapshots" / commit)
    for name in ("main", "v1"):
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["owner/shapes", "owner/shapes/model.safetensors"])
@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_model_of_the_hub_is_found_in_the_cache(segmenter, image, offline_hub, name, revision):
    path = pretrained.find(name, config=None, revision=revision)
    assert path.weights.name == "model.safetensors" and "0123456789abcdef" in str(path.weights)
    if revision is None and name == "owner/shapes":
        same(segmenter, Segmenter.from_pretrained(name, device="cpu"), image)


def test_a_model_that_is_not_on_this_machine_is_told_in_a_sentence(offline_hub):
    for name, revision in (("owner/other", None), ("owner/shapes", "v2"), ("owner/shapes/none.pth", None)):
        with pytest.raises(
            ConnectionError, match=f"'{name}' is no folder here, and the Hugging Face hub did not give it"
        ):
            Segmenter.from_pretrained(name, revision=revision)


def test_pushing_makes_the_repository_and_puts_what_saving_writes(segmenter, saved, monkeypatch):
    calls = {}

    class Hub:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["made"] = (repo_id, options)
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, **_):
            calls["files"] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert segmenter.push_to_hub("owner/shapes", private=True, token="t") == "https://hub/owner/shapes"
    assert calls["made"] == ("owner/shapes", {"private": True, "exist_ok": True}) and calls["token"] == "t"
    assert calls["files"] == sorted(path.name for path in saved.iterdir())

    def refuse(*_, **__):
        raise OSError("401 unauthorized")

    monkeypatch.setattr(Hub, "upload_folder", refuse)
    with pytest.raises(ConnectionError, match=r"could not be put on the Hugging Face hub \(OSError: 401"):
        segmenter.push_to_hub("owner/shapes")


def test_nothing_in_what_is_saved_is_pickled(saved):
    file = read_weight_file(saved / "model.safetensors")
    assert file.kind == "safetensors"
    assert Vocabulary.builtin("shapes_seen").hash == file.rest["vocabulary"]["sha256"]
    assert json.dumps(file.rest["clip"])
