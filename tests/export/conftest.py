"""A tiny model with weights for everything, and its exported folder, which takes most of the time here."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fcclip import Segmenter
from fcclip.export import export_folder
from fcclip.vocabulary import Vocabulary
from tests.conftest import tiny_config

TRAIN = Vocabulary.from_names("cat; person; grass:stuff", name="train")
NAMES = Vocabulary.from_names("cat, kitty; dog; grass:stuff", name="test")


class Exported(NamedTuple):
    segmenter: Segmenter
    folder: Path


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} of the extra `export` is not installed")


def with_weights(cfg, folder: Path) -> Segmenter:
    """A seeded model whose frozen parts come from a file, as an export wants them."""
    torch.manual_seed(0)
    random = Segmenter(cfg, weights="random", train_vocabulary=TRAIN, test_vocabulary=NAMES)
    head = random.model.sem_seg_head
    with torch.no_grad():  # queries differ and some masks are empty, as on ordinary images
        head.predictor.query_feat.weight.mul_(30)
        head.pixel_decoder.mask_features.bias[0] = -10
    return Segmenter.from_pretrained(random.save_pretrained(folder), device="cpu")


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="session")
def shallow():
    """`tiny_config` with one layer in each decoder."""
    cfg = tiny_config()
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 2
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 128
    return cfg


@pytest.fixture(scope="session")
def segmenter(shallow, tmp_path_factory) -> Segmenter:
    return with_weights(shallow, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def exported(segmenter, tmp_path_factory) -> Exported:
    needs_onnx()
    folder = tmp_path_factory.mktemp("exported")
    return Exported(segmenter, export_folder(segmenter, folder, vocabulary=NAMES, extras=["all", "pt2"]))
