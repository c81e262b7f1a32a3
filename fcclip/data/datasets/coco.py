"""COCO 2017: panoptic, instance and COCO-Stuff ground truth."""

from __future__ import annotations

from pathlib import Path

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.instances import instance_dataset
from fcclip.data.datasets.panoptic import panoptic_dataset
from fcclip.data.datasets.semantic import semantic_dataset

COUNTS = {"train": 118_287, "val": 5_000, "test": 5_000}
PUBLISHED_VOCABULARY = "coco_panoptic_with_prompt_eng.txt"


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
        published_count=COUNTS[split],
        published_vocabulary=PUBLISHED_VOCABULARY,
        benchmark="COCO",
    )


def coco_instances(root: Path, *, name: str, split: str) -> Dataset:
    """COCO 2017 instances, split train or val: the 80 things."""
    coco = root / "coco"
    return instance_dataset(
        name=name,
        vocabulary="coco_panoptic",
        image_root=coco / f"{split}2017",
        json_file=coco / "annotations" / f"instances_{split}2017.json",
        image_id=int,
        published_count=COUNTS[split],
        published_vocabulary=PUBLISHED_VOCABULARY,
    )


def coco_stuff_sem_seg(root: Path, *, name: str, split: str) -> Dataset:
    """COCO-Stuff 164k, split train or test (the images of val2017): 171 classes."""
    coco, folder = root / "coco", {"train": "train2017", "test": "val2017"}[split]
    return semantic_dataset(
        name=name,
        vocabulary="coco_stuff_171",
        image_root=coco / folder,
        sem_seg_root=coco / "stuffthingmaps_detectron2" / folder,
        published_count=COUNTS[split],
        published_vocabulary="coco_stuff_with_prompt_eng.txt",
    )
