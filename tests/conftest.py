"""What tests of every room share: a model that is built and run in a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode

from fcclip.config import load_config
from fcclip.modeling import FCCLIP, build_model
from fcclip.vocabulary import Vocabulary

DATA = Path(__file__).parent / "data"
# The shapes config made tiny: random ConvNeXt CLIP, width 32, 8 queries, 64 points, on the CPU.
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FC_CLIP.CLIP_MODEL_NAME": str(DATA / "tiny_convnext.json"),
    "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS": "",
    "MODEL.FC_CLIP.EMBED_DIM": 16,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.NHEADS": 2,
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.IMAGE_SIZE": 64,
    "SEED": 0,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are marked slow run last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Text features are kept in a folder of the test session, never in the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def tiny_config() -> CfgNode:
    """The shapes config with `TINY`, in fp32; not frozen."""
    settings = {**TINY, "SOLVER.AMP.ENABLED": False}
    cfg = load_config("shapes/fcclip_shapes.yaml", [word for pair in settings.items() for word in pair])
    cfg.defrost()
    return cfg


def tiny_frozenseg() -> CfgNode:
    """`tiny_config` as FrozenSeg, with a random SAM of two narrow blocks; both injectors work in its two layers."""
    cfg = tiny_config()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NAME = "FrozenSeg", "FrozenSegHead"
    cfg.MODEL.SAM_NAME, cfg.MODEL.SAM_WEIGHTS = str(DATA / "tiny_sam.json"), ""
    cfg.MODEL.MASK_FORMER.SAM_QUERY_FUSE_LAYER = 0
    return cfg


def tiny_fusioner() -> CfgNode:
    """Fusioner made tiny: a random CLIP ViT, width 16, one layer, on the CPU; not frozen."""
    overrides = {
        "MODEL.DEVICE": "cpu",
        "MODEL.FC_CLIP.CLIP_MODEL_NAME": str(DATA / "tiny_vit.json"),
        "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS": "",
        "MODEL.FC_CLIP.EMBED_DIM": 16,
        "MODEL.FUSIONER.WIDTH": 16,
        "MODEL.FUSIONER.WINDOW": 0,
        "MODEL.FUSIONER.LAYERS": 1,
        "MODEL.FUSIONER.HEADS": 2,
        "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 8,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.DATASET_MAPPER_NAME": "coco_panoptic_lsj",
        "INPUT.IMAGE_SIZE": 64,
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 96,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SEED": 0,
    }
    cfg = load_config("fusioner/Base-Fusioner.yaml", [word for pair in overrides.items() for word in pair])
    cfg.defrost()
    return cfg


@pytest.fixture
def tiny_cfg() -> CfgNode:
    """`tiny_config`, to be changed at will."""
    return tiny_config()


@pytest.fixture
def tiny_model(tiny_cfg) -> Callable[..., FCCLIP]:
    """Function (words=…, train_words=…, cfg=…) -> a seeded model; words as in `Vocabulary.from_names`."""

    def build(
        words: str = "cat, kitty; dog; grass:stuff",
        train_words: str = "cat; person; grass:stuff",
        cfg: CfgNode = tiny_cfg,
        seed: int = 0,
    ) -> FCCLIP:
        torch.manual_seed(seed)
        train = Vocabulary.from_names(train_words, name="train")
        return build_model(cfg, train_vocabulary=train, test_vocabulary=Vocabulary.from_names(words, name="test"))

    return build
