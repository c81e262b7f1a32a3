"""A small shapes world on the disk, and detectron2 configs: the published files, or the shapes file, made tiny.

detectron2 is imported inside the fixtures: where it is absent each test file says so and is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fcclip.config import configs_dir, load_config
from tests.conftest import DATA, TINY
from tests.tools.conftest import REPOSITORY, load_program

ADE20K = "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml"
SHAPES = "shapes/fcclip_shapes.yaml"
FROZENSEG = "coco/frozenseg/convnext_large_eval_ade20k.yaml"
SMALL_SAM = {
    "MODEL__SAM_NAME": str(DATA / "tiny_sam.json"),
    "MODEL__SAM_WEIGHTS": "",
    "MODEL__MASK_FORMER__SAM_QUERY_FUSE_LAYER": 0,
}
SMALL = {**TINY, "INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 96, "SOLVER.IMS_PER_BATCH": 4}


@pytest.fixture(scope="session")
def detectron2_knows_fcclip() -> None:
    from fcclip.integrations.detectron2 import register

    register()


@pytest.fixture
def both_cfgs(detectron2_knows_fcclip) -> Callable[..., tuple[Any, Any]]:
    """Function (YAML, tiny=True, **KEY__PART=value) -> the config as detectron2 reads it, and as fcclip does."""
    from detectron2.config import get_cfg

    from fcclip.integrations.detectron2 import add_fcclip_config

    def build(name: str = SHAPES, *, tiny: bool = True, **changes: Any) -> tuple[Any, Any]:
        settings = {**(SMALL if tiny else {"MODEL.DEVICE": "cpu"})}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        overrides = [item for pair in settings.items() for item in pair]
        cfg = get_cfg()
        add_fcclip_config(cfg)
        cfg.merge_from_file(str(configs_dir() / name))
        cfg.merge_from_list(overrides)
        ours = load_config(name, overrides)
        return cfg, ours

    return build


@pytest.fixture
def detectron2_cfg(both_cfgs) -> Callable[..., Any]:
    """The first of `both_cfgs`."""
    return lambda *args, **changes: both_cfgs(*args, **changes)[0]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The root folder of a shapes world with four images in each set."""
    root = tmp_path_factory.mktemp("datasets")
    load_program(REPOSITORY / "datasets" / "prepare_shapes.py").prepare(
        out=root, seed=5, num_images=4, num_workers=1, num_evaluation=4
    )
    return root


@pytest.fixture
def shapes(world, monkeypatch) -> Path:
    """The same world, where data sets are looked for."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(world))
    return world
