"""Every data set by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from fcclip.config import lookup
from fcclip.data.dataset import Dataset
from fcclip.data.datasets.ade20k import ade20k_full_sem_seg, ade20k_instances, ade20k_panoptic, ade20k_sem_seg
from fcclip.data.datasets.bdd100k import bdd100k_panoptic, bdd100k_sem_seg
from fcclip.data.datasets.cityscapes import cityscapes_panoptic
from fcclip.data.datasets.coco import coco_instances, coco_panoptic, coco_stuff_sem_seg
from fcclip.data.datasets.folds import COCO_20I, NUM_FOLDS, PASCAL_5I, SPLITS, fold_dataset, transfer_dataset
from fcclip.data.datasets.lvis import lvis_instances
from fcclip.data.datasets.mapillary_vistas import mapillary_vistas_panoptic
from fcclip.data.datasets.pascal import pascal_context_59, pascal_context_459, pascal_voc_20, pascal_voc_21
from fcclip.data.datasets.shapes import shapes_panoptic
from fcclip.data.own_data import own_dataset
from fcclip.data.own_description import is_own_data
from fcclip.errors import InputError


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
    **_splits("bdd10k_40_panoptic_{}", bdd100k_panoptic),
    **_splits("bdd10k_{}_sem_seg", bdd100k_sem_seg),
    **_splits("openvocab_ade20k_full_sem_seg_{}", ade20k_full_sem_seg),
    **_splits("openvocab_pascal_ctx59_sem_seg_{}", pascal_context_59),
    **_splits("openvocab_pascal_ctx459_sem_seg_{}", pascal_context_459),
    **_splits("openvocab_pascal20_sem_seg_{}", pascal_voc_20),
    **_splits("openvocab_pascal21_sem_seg_{}", pascal_voc_21),
    **_splits("shapes_{}", shapes_panoptic, "train", "tune", "val", "val_seen", "val_unseen"),
}


# Pairs of an image and one of its classes, for Fusioner alone.
PAIRS: dict[str, Callable[[Path], Dataset]] = {
    **{
        name: partial(fold_dataset, name=name, split=split, folds=folds, fold=fold, names=names)
        for folds in (PASCAL_5I, COCO_20I)
        for names in ("", "_readable")  # published names, and those with spaces
        for fold in range(NUM_FOLDS)
        for split in SPLITS
        for name in (f"{folds.name}{names}_fold{fold}_{split}",)
    },
    **{
        name: partial(transfer_dataset, name=name, fold=fold)
        for fold in range(NUM_FOLDS)
        for name in (f"pascal_voc_of_coco_20i_fold{fold}_val",)
    },
}


def get_dataset(name: str, root: str | Path | None = None) -> Dataset:
    """The data set registered as `name`, or the one that a YAML file describes (`own_data.own_dataset`).

    No file of a registered data set is read or looked for.

    Args:
        name: a key of `DATASETS` or `PAIRS`, or the path of a YAML file (.yaml, .yml).
        root: folder of all registered data sets; None: $DETECTRON2_DATASETS, else "datasets". A leading `~` is
            expanded.

    Raises:
        ValueError: no such name, where the message gives the nearest one; or a YAML that does not describe a data set.
        FileNotFoundError: the YAML does not exist.
    """
    if is_own_data(name):
        return own_dataset(name)
    known = {**DATASETS, **PAIRS}
    if name not in known and Path(name).expanduser().exists():
        raise InputError(
            f"data set '{name}' is a path, but not of a YAML file. Write one that describes the data set (see "
            'GETTING_STARTED.md, "Your own data"), and give its path.'
        )
    return lookup("data set", name, known)(root_folder(root))


def distinct_datasets(names: Iterable[str]) -> list[Dataset]:
    """The data sets to evaluate on (DATASETS.TEST), whose results are stored by `Dataset.name`.

    Raises:
        ValueError: two have the same name; and what `get_dataset` refuses.
        FileNotFoundError: as `get_dataset`.
    """
    datasets: dict[str, tuple[str, Dataset]] = {}
    for name in names:
        dataset = get_dataset(name)
        if dataset.name in datasets:
            raise InputError(
                f"two data sets of DATASETS.TEST, '{datasets[dataset.name][0]}' and '{name}', are named "
                f"'{dataset.name}', the name that results are stored by. Leave one out, or rename its YAML."
            )
        datasets[dataset.name] = (name, dataset)
    return [dataset for _, dataset in datasets.values()]


def root_folder(root: str | Path | None = None) -> Path:
    """The folder of all data sets: `root`, else $DETECTRON2_DATASETS, else "datasets"; `~` is expanded."""
    return Path(root or os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()
