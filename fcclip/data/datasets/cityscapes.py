"""Cityscapes with the panoptic files that cityscapesScripts makes."""

from __future__ import annotations

from pathlib import Path

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.panoptic import panoptic_dataset

__all__ = ["cityscapes_panoptic"]


def cityscapes_panoptic(root: Path, *, name: str, split: str) -> Dataset:
    """Cityscapes fine panoptic, split train or val: 19 classes, 8 of them things; pictures lie in one folder a city."""
    city = root / "cityscapes"
    dataset = panoptic_dataset(
        name=name,
        vocabulary="cityscapes",
        evaluator_type="cityscapes_panoptic_seg",
        image_root=city / "leftImg8bit" / split,
        panoptic_root=city / "gtFine" / f"cityscapes_panoptic_{split}",
        panoptic_json=city / "gtFine" / f"cityscapes_panoptic_{split}.json",
        sem_seg_root=city / "gtFine" / split,
        json_file=None,
        image_file=lambda annotation: _in_city(annotation, "leftImg8bit.png"),
        sem_seg_file=lambda annotation: _in_city(annotation, "gtFine_labelTrainIds.png"),
    )
    dataset.metadata["gt_dir"] = str(city / "gtFine" / split)
    return dataset


def _in_city(annotation: dict, ending: str) -> str:
    image_id = annotation["image_id"]  # <city>_<sequence>_<frame>
    return f"{image_id.split('_')[0]}/{image_id}_{ending}"
