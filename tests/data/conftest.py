"""Small data sets that the tests write themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcclip.config import get_cfg
from fcclip.data import get_dataset
from fcclip.data.dataset import Dataset

COCO = "openvocab_coco_2017_{}_panoptic_with_sem_seg"


def save_id_map(path: Path, id_map: np.ndarray) -> None:
    """As a panoptic PNG: R + 256 G + 65536 B."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([id_map & 255, id_map >> 8 & 255, id_map >> 16], -1).astype(np.uint8)).save(path)


def save_image(path: Path, height: int, width: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def four_segments(height: int, width: int, first_id: int = 70001) -> np.ndarray:
    """An id map with a segment in each quarter: a thing, a stuff, a crowd and void."""
    id_map = np.zeros((height, width), np.int32)
    id_map[: height // 2, : width // 2] = first_id
    id_map[: height // 2, width // 2 :] = first_id + 1
    id_map[height // 2 :, : width // 2] = first_id + 2
    return id_map


def segments_of(id_map: np.ndarray, categories: tuple[int, ...]) -> list[dict]:
    """One entry an id, ascending, the last one a crowd."""
    ids = [int(value) for value in np.unique(id_map) if value]
    areas = [int((id_map == segment_id).sum()) for segment_id in ids]
    return [
        {
            "id": segment_id,
            "category_id": category,
            "area": area,
            "bbox": [0, 0, 1, 1],
            "iscrowd": int(segment_id == ids[-1]),
        }
        for segment_id, category, area in zip(ids, categories, areas, strict=True)
    ]


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """Six COCO val images, wide and tall in turn; each has a person (1), a sky (187) and a crowd of dogs (18)."""
    coco = tmp_path / "coco"
    images, annotations = [], []
    for index in range(6):
        height, width = ((24, 36), (40, 20))[index % 2]
        image_id, stem = 100 + index, f"{100 + index:012d}"
        save_image(coco / "val2017" / f"{stem}.jpg", height, width, seed=index)
        id_map = four_segments(height, width)
        save_id_map(coco / "panoptic_val2017" / f"{stem}.png", id_map)
        images.append({"id": image_id, "file_name": f"{stem}.jpg", "height": height, "width": width})
        annotations.append(
            {"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments_of(id_map, (1, 187, 18))}
        )
    (coco / "annotations").mkdir()
    content = {"images": images, "annotations": annotations, "categories": []}
    (coco / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def coco_val(coco_root: Path) -> Dataset:
    return get_dataset(COCO.format("val"), coco_root)


@pytest.fixture
def edit_json(coco_root: Path) -> Callable[[Callable[[dict], None]], Path]:
    """Changes the panoptic JSON of `coco_root`; returns its path."""

    def edit(change: Callable[[dict], None]) -> Path:
        path = coco_root / "coco" / "annotations" / "panoptic_val2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return path

    return edit


@pytest.fixture
def cfg():
    """The published augmentation on a small canvas, loading in the test's own process."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"
    cfg.INPUT.IMAGE_SIZE = 32
    cfg.INPUT.MIN_SIZE_TEST = 32
    cfg.INPUT.MAX_SIZE_TEST = 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 7
    return cfg
