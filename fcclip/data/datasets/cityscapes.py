"""Cityscapes with the panoptic files that cityscapesScripts makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.panoptic import panoptic_dataset
from fcclip.errors import InputError

CITYSCAPES = "cityscapes_panoptic_seg"  # evaluator type


def cityscapes_panoptic(root: Path, *, name: str, split: str) -> Dataset:
    """Cityscapes fine panoptic, split train or val: 19 classes, 8 of them things; images lie in one folder a city."""
    city = root / "cityscapes"
    dataset = panoptic_dataset(
        name=name,
        vocabulary="cityscapes",
        evaluator_type=CITYSCAPES,
        image_root=city / "leftImg8bit" / split,
        panoptic_root=city / "gtFine" / f"cityscapes_panoptic_{split}",
        panoptic_json=city / "gtFine" / f"cityscapes_panoptic_{split}.json",
        sem_seg_root=city / "gtFine" / split,
        json_file=None,
        image_file=lambda annotation: _in_city(annotation, "leftImg8bit.png"),
        sem_seg_file=lambda annotation: _in_city(annotation, "gtFine_labelTrainIds.png"),
        published_count={"train": 2_975, "val": 500}[split],
        published_vocabulary="cityscapes_with_prompt_eng.txt",
        benchmark="Cityscapes",
        test_size=(1024, 2560),
    )
    dataset.metadata["gt_dir"] = str(city / "gtFine" / split)
    return dataset


def instance_ids_file(record: Mapping) -> str:
    """The file of instance ids that lies beside the label map of a record; Cityscapes' protocol reads it alone.

    Raises:
        ValueError: the label map is not named as those of Cityscapes are.
    """
    labels = record.get("sem_seg_file_name", "")
    stem = labels.removesuffix("_gtFine_labelTrainIds.png")
    if stem == labels:
        raise InputError(
            f"the label map '{labels}' of image {record['image_id']!r} is not named "
            "<city>_<sequence>_<frame>_gtFine_labelTrainIds.png; the Cityscapes protocol needs the instanceIds file "
            "beside it"
        )
    return f"{stem}_gtFine_instanceIds.png"


def _in_city(annotation: dict, ending: str) -> str:
    image_id = annotation["image_id"]  # <city>_<sequence>_<frame>
    return f"{image_id.split('_')[0]}/{image_id}_{ending}"
