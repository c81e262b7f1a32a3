"""Mapillary Vistas v1.2."""

from __future__ import annotations

from pathlib import Path

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.panoptic import panoptic_dataset

FOLDERS = {"train": "training", "val": "validation"}


def mapillary_vistas_panoptic(root: Path, *, name: str, split: str) -> Dataset:
    """Mapillary Vistas panoptic, split train or val: 65 classes, 37 of them things; it has no instance JSON."""
    folder = root / "mapillary_vistas" / FOLDERS[split]
    return panoptic_dataset(
        name=name,
        vocabulary="mapillary_vistas",
        evaluator_type="mapillary_vistas_panoptic_seg",
        image_root=folder / "images",
        panoptic_root=folder / "panoptic",
        panoptic_json=folder / "panoptic" / "panoptic_2018.json",
        sem_seg_root=folder / "labels",
        json_file=None,
        ignore_label=65,
        published_count={"train": 18_000, "val": 2_000}[split],
        published_vocabulary="mapillary_vistas_with_prompt_eng.txt",
        benchmark="Mapillary",
        test_size=(1024, 2560),
    )
