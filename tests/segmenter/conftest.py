"""The shipped segmenter, built once; and text embeddings that cost nothing."""

import hashlib

import numpy as np
import pytest
import torch

from fcclip import Segmenter
from fcclip.data import read_image
from tests.tools.conftest import REPOSITORY

IMAGES = REPOSITORY / "demo" / "images"
NAMES = "red circle; blue star, azure star; sand:stuff"


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return Segmenter.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="session")
def image():
    return read_image(IMAGES / "shapes_1.jpg")


@pytest.fixture(scope="session")
def result(segmenter, image):
    return segmenter(image, NAMES)


@pytest.fixture
def no_text_tower(monkeypatch):
    """Every name gets a vector of its own; returns the names that were asked for."""
    asked = []

    def vectors(clip_model, names, *_):
        asked.extend(names)
        seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") for name in names]
        drawn = [np.random.default_rng(seed).standard_normal(clip_model.text_projection.shape[-1]) for seed in seeds]
        return torch.nn.functional.normalize(torch.tensor(np.array(drawn), dtype=torch.float32), dim=-1)

    monkeypatch.setattr("fcclip.modeling.text.encode_class_names", vectors)
    return asked
