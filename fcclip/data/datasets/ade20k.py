"""ADE20K: the 150 classes of the scene-parsing challenge, and the full set with 847."""

from __future__ import annotations

from pathlib import Path

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.instances import instance_dataset
from fcclip.data.datasets.panoptic import panoptic_dataset
from fcclip.data.datasets.semantic import semantic_dataset

FOLDERS = {"train": "training", "val": "validation"}
COUNTS = {"train": 20_210, "val": 2_000}
PUBLISHED_VOCABULARY = "ade20k_150_with_prompt_eng.txt"


def ade20k_panoptic(root: Path, *, name: str, split: str) -> Dataset:
    """ADE20K panoptic, split train or val: 150 classes, of which 100 things that are interleaved with the stuff."""
    ade = root / "ADEChallengeData2016"
    return panoptic_dataset(
        name=name,
        vocabulary="ade20k_150",
        evaluator_type="ade20k_panoptic_seg",
        image_root=ade / "images" / FOLDERS[split],
        panoptic_root=ade / f"ade20k_panoptic_{split}",
        panoptic_json=ade / f"ade20k_panoptic_{split}.json",
        sem_seg_root=ade / "annotations_detectron2" / FOLDERS[split],
        json_file=ade / f"ade20k_instance_{split}.json",
        published_count=COUNTS[split],
        published_vocabulary=PUBLISHED_VOCABULARY,
        benchmark="ADE20K",
    )


def ade20k_instances(root: Path, *, name: str, split: str) -> Dataset:
    """ADE20K instances, split train or val: the 100 things, numbered without gaps."""
    ade = root / "ADEChallengeData2016"
    return instance_dataset(
        name=name,
        vocabulary="ade20k_150",
        image_root=ade / "images" / FOLDERS[split],
        json_file=ade / f"ade20k_instance_{split}.json",
        published_count=COUNTS[split],
        published_vocabulary=PUBLISHED_VOCABULARY,
    )


def ade20k_sem_seg(root: Path, *, name: str, split: str) -> Dataset:
    """ADE20K semantic, split train or val: 150 classes."""
    ade = root / "ADEChallengeData2016"
    return semantic_dataset(
        name=name,
        vocabulary="ade20k_150",
        image_root=ade / "images" / FOLDERS[split],
        sem_seg_root=ade / "annotations_detectron2" / FOLDERS[split],
        published_count=COUNTS[split],
        published_vocabulary=PUBLISHED_VOCABULARY,
    )


def ade20k_full_sem_seg(root: Path, *, name: str, split: str) -> Dataset:
    """ADE20K-Full (2021-17-01), split train or val: 847 classes, 16-bit label maps."""
    ade = root / "ADE20K_2021_17_01"
    return semantic_dataset(
        name=name,
        vocabulary="ade20k_847",
        image_root=ade / "images_detectron2" / FOLDERS[split],
        sem_seg_root=ade / "annotations_detectron2" / FOLDERS[split],
        ignore_label=65535,
        gt_ext="tif",
        published_count={"train": 25_574, "val": 2_000}[split],
        published_vocabulary="ade20k_847_with_prompt_eng.txt",
        benchmark="A-847",
    )
