"""Pascal Context and Pascal VOC, semantic ground truth only."""

from __future__ import annotations

from pathlib import Path

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.semantic import semantic_dataset

__all__ = ["pascal_context_59", "pascal_context_459", "pascal_voc_20", "pascal_voc_21"]

FOLDERS = {"train": "training", "val": "validation"}


def pascal_context_59(root: Path, *, name: str, split: str) -> Dataset:
    """Pascal Context with its 59 frequent classes."""
    return _context(root, name, split, "pascal_context_59", "annotations_ctx59")


def pascal_context_459(root: Path, *, name: str, split: str) -> Dataset:
    """Pascal Context with 459 classes, 16-bit label maps."""
    return _context(root, name, split, "pascal_context_459", "annotations_ctx459", ignore_label=65535, gt_ext="tif")


def pascal_voc_20(root: Path, *, name: str, split: str) -> Dataset:
    """Pascal VOC 2012; background pixels are ignored."""
    return _voc(root, name, split, "pascal_voc_20", "annotations_pascal20")


def pascal_voc_21(root: Path, *, name: str, split: str) -> Dataset:
    """Pascal VOC 2012 with background as a class."""
    return _voc(root, name, split, "pascal_voc_21", "annotations_pascal21")


def _context(root: Path, name: str, split: str, vocabulary: str, labels: str, **kinds: int | str) -> Dataset:
    dataset = _dataset(root / "pascal_ctx_d2", name, split, vocabulary, labels, **kinds)
    classes = range(len(dataset.metadata["stuff_classes"]))
    dataset.metadata["stuff_dataset_id_to_contiguous_id"] = {index: index for index in classes}  # as published
    return dataset


def _voc(root: Path, name: str, split: str, vocabulary: str, labels: str) -> Dataset:
    return _dataset(root / "pascal_voc_d2", name, split, vocabulary, labels)


def _dataset(folder: Path, name: str, split: str, vocabulary: str, labels: str, **kinds: int | str) -> Dataset:
    return semantic_dataset(
        name=name,
        vocabulary=vocabulary,
        image_root=folder / "images" / FOLDERS[split],
        sem_seg_root=folder / labels / FOLDERS[split],
        **kinds,
    )
