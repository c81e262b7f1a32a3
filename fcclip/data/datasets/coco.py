"""COCO 2017 with panoptic ground truth."""

from __future__ import annotations

from pathlib import Path

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.panoptic import panoptic_dataset

__all__ = ["coco_panoptic"]


def coco_panoptic(root: Path, *, name: str, split: str) -> Dataset:
    """COCO 2017 panoptic, split train or val: 133 classes, 80 of them things."""
    coco = root / "coco"
    return panoptic_dataset(
        name=name,
        vocabulary="coco_panoptic",
        evaluator_type="coco_panoptic_seg",
        image_root=coco / f"{split}2017",
        panoptic_root=coco / f"panoptic_{split}2017",
        panoptic_json=coco / "annotations" / f"panoptic_{split}2017.json",
        sem_seg_root=coco / f"panoptic_semseg_{split}2017",
        json_file=coco / "annotations" / f"instances_{split}2017.json",
        image_id=int,
    )
