"""Every data set by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fcclip.config import lookup
from fcclip.data.dataset import Dataset
from fcclip.data.datasets.ade20k import ade20k_full_sem_seg, ade20k_instances, ade20k_panoptic, ade20k_sem_seg
from fcclip.data.datasets.cityscapes import cityscapes_panoptic
from fcclip.data.datasets.coco import coco_instances, coco_panoptic, coco_stuff_sem_seg
from fcclip.data.datasets.lvis import lvis_instances
from fcclip.data.datasets.mapillary_vistas import mapillary_vistas_panoptic
from fcclip.data.datasets.pascal import pascal_context_59, pascal_context_459, pascal_voc_20, pascal_voc_21
from fcclip.data.datasets.shapes import shapes_panoptic

__all__ = ["DATASETS", "Dataset", "get_dataset", "root_folder"]


def _splits(template: str, build: Callable[..., Dataset], *splits: str) -> dict[str, Callable[[Path], Dataset]]:
    """`template` with each split in place of {}: the function that builds it from the root folder."""
    names = {template.format(split): split for split in splits or ("train", "val")}
    return {name: partial(build, name=name, split=split) for name, split in names.items()}


DATASETS: dict[str, Callable[[Path], Dataset]] = {
    **_splits("openvocab_coco_2017_{}_panoptic_with_sem_seg", coco_panoptic),
    **_splits("openvocab_coco_2017_{}_panoptic", coco_panoptic),  # published as metadata alone, here the same data
    **_splits("openvocab_coco_2017_{}", coco_instances),
    **_splits("openvocab_coco_2017_{}_stuff_sem_seg", coco_stuff_sem_seg, "train", "test"),
    **_splits("openvocab_lvis_v1_{}", lvis_instances),
    **_splits("openvocab_ade20k_panoptic_{}", ade20k_panoptic),
    **_splits("openvocab_ade20k_instance_{}", ade20k_instances),
    **_splits("openvocab_ade20k_sem_seg_{}", ade20k_sem_seg),
    **_splits("openvocab_cityscapes_fine_panoptic_{}", cityscapes_panoptic),
    **_splits("openvocab_mapillary_vistas_panoptic_{}", mapillary_vistas_panoptic),
    **_splits("openvocab_ade20k_full_sem_seg_{}", ade20k_full_sem_seg),
    **_splits("openvocab_pascal_ctx59_sem_seg_{}", pascal_context_59),
    **_splits("openvocab_pascal_ctx459_sem_seg_{}", pascal_context_459),
    **_splits("openvocab_pascal20_sem_seg_{}", pascal_voc_20),
    **_splits("openvocab_pascal21_sem_seg_{}", pascal_voc_21),
    **_splits("shapes_{}", shapes_panoptic, "train", "tune", "val", "val_seen", "val_unseen"),
}


def get_dataset(name: str, root: str | Path | None = None) -> Dataset:
    """The data set registered as `name`; no file of it is read or looked for.

    Args:
        name: a key of `DATASETS`.
        root: folder of all data sets; None: $DETECTRON2_DATASETS, else "datasets". A leading `~` is expanded.

    Raises:
        ValueError: no such name; the message gives the nearest one.
    """
    return lookup("data set", name, DATASETS)(root_folder(root))


def root_folder(root: str | Path | None = None) -> Path:
    """The folder of all data sets: `root`, else $DETECTRON2_DATASETS, else "datasets"; `~` is expanded."""
    return Path(root or os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()
