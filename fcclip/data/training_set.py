"""The data set that a config trains on, and its classes."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from fcclip.data.catalog import Dataset, get_dataset
from fcclip.data.dataset import joined
from fcclip.data.vocabularies import dataset_vocabulary
from fcclip.errors import InputError
from fcclip.vocabulary import Vocabulary

__all__ = ["training_set", "training_vocabulary"]


def training_set(cfg: CfgNode) -> Dataset:
    """The data set of DATASETS.TRAIN, or all of them one after the other.

    Raises:
        ValueError: none, an unknown one, or several with different classes.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError(
            "DATASETS.TRAIN is empty; its data set brings the training images and decides which classes are seen"
        )
    return joined([get_dataset(name) for name in cfg.DATASETS.TRAIN])


def training_vocabulary(cfg: CfgNode) -> Vocabulary:
    """The classes of DATASETS.TRAIN, which also decide which test classes count as seen."""
    return dataset_vocabulary(training_set(cfg), cfg.MODEL.FC_CLIP.VOCABULARIES)
