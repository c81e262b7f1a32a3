"""Pascal Context and Pascal VOC, semantic ground truth only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.semantic import semantic_dataset

FOLDERS = {"train": "training", "val": "validation"}


def pascal_context_59(root: Path, *, name: str, split: str) -> Dataset:
    """Pascal Context with its 59 frequent classes."""
    return _context(root, name, split, 59)


def pascal_context_459(root: Path, *, name: str, split: str) -> Dataset:
    """Pascal Context with 459 classes, 16-bit label maps."""
    return _context(root, name, split, 459, ignore_label=65535, gt_ext="tif")


def pascal_voc_20(root: Path, *, name: str, split: str) -> Dataset:
    """Pascal VOC 2012; background pixels are ignored."""
    return _voc(root, name, split, 20, part_of="pascal_voc_21")


def pascal_voc_21(root: Path, *, name: str, split: str) -> Dataset:
    """Pascal VOC 2012 with background as a class."""
    return _voc(root, name, split, 21)


def _context(root: Path, name: str, split: str, num_classes: int, **facts: Any) -> Dataset:
    context = root / "pascal_ctx_d2"
    dataset = semantic_dataset(
        name=name,
        vocabulary=f"pascal_context_{num_classes}",
        image_root=context / "images" / FOLDERS[split],
        sem_seg_root=context / f"annotations_ctx{num_classes}" / FOLDERS[split],
        published_count={"train": 4_998, "val": 5_104}[split],
        published_vocabulary=f"pascal_ctx_{num_classes}_with_prompt_eng.txt",
        benchmark=f"PC-{num_classes}",
        **facts,
    )
    dataset.metadata["stuff_dataset_id_to_contiguous_id"] = {index: index for index in range(num_classes)}
    return dataset


def _voc(root: Path, name: str, split: str, num_classes: int, **facts: Any) -> Dataset:
    voc = root / "pascal_voc_d2"
    return semantic_dataset(
        name=name,
        vocabulary=f"pascal_voc_{num_classes}",
        image_root=voc / "images" / FOLDERS[split],
        sem_seg_root=voc / f"annotations_pascal{num_classes}" / FOLDERS[split],
        published_count={"train": 1_464, "val": 1_449}[split],
        published_vocabulary="pascal_voc_21_with_prompt_eng.txt",
        benchmark=f"PAS-{num_classes}",
        **facts,
    )
