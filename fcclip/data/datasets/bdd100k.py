"""BDD100K's ten thousand images: label maps of 19 classes, and panoptic files of 40."""

from __future__ import annotations

from pathlib import Path

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.panoptic import panoptic_dataset
from fcclip.data.datasets.semantic import semantic_dataset

COUNTS = {"train": 7_000, "val": 1_000}


def bdd100k_sem_seg(root: Path, *, name: str, split: str) -> Dataset:
    """BDD100K semantic, split train or val; published with its own class names alone."""
    folder = root / "bdd100k"
    return semantic_dataset(
        name=name,
        vocabulary="bdd100k_19",
        image_root=folder / "images" / "10k" / split,
        sem_seg_root=folder / "labels" / "sem_seg" / "masks" / split,
        published_count=COUNTS[split],
        benchmark="BDD100K",
    )


def bdd100k_panoptic(root: Path, *, name: str, split: str) -> Dataset:
    """BDD100K panoptic, split train or val: 10 of its classes are things. Label maps and instances are those of its
    segments; published with its own class names alone."""
    folder = root / "bdd100k"
    return panoptic_dataset(
        name=name,
        vocabulary="bdd100k_40",
        evaluator_type="coco_panoptic_seg",
        image_root=folder / "images" / "10k" / split,
        panoptic_root=folder / "labels" / "pan_seg" / "coco_pano" / split,
        panoptic_json=folder / "labels" / "pan_seg" / "meta" / f"coco_{split}.json",
        sem_seg_root=None,
        json_file=None,
        published_count=COUNTS[split],
        benchmark="BDD100K",
    )
