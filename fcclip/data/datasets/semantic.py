"""Reader of semantic data sets: a folder of images and a folder of label maps, paired by file name."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.files import WHERE_DATA_IS, files_by_stem
from fcclip.data.datasets.metadata import class_metadata
from fcclip.errors import MissingFileError
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def semantic_dataset(
    *,
    name: str,
    vocabulary: str,
    image_root: Path,
    sem_seg_root: Path,
    ignore_label: int = 255,
    gt_ext: str = "png",
    **facts: Any,
) -> Dataset:
    """A data set whose label maps hold contiguous class ids; they do not tell things from stuff.

    Args:
        name: as registered.
        vocabulary: name of the built-in vocabulary.
        image_root, sem_seg_root: the two folders; sub-folders are not entered.
        ignore_label: value of unlabelled pixels.
        gt_ext: file-name ending of the label maps, without the dot; that of the images is jpg.
        facts: further fields of `Dataset`.
    """
    metadata = {
        **class_metadata(Vocabulary.builtin(vocabulary), things=False),
        "ignore_label": ignore_label,
        "evaluator_type": "sem_seg",
        "image_root": str(image_root),
        "sem_seg_root": str(sem_seg_root),
        "gt_ext": gt_ext,
    }
    load = partial(read_folder_pair, name, image_root, sem_seg_root, gt_ext=gt_ext)
    return Dataset(name=name, metadata=metadata, load=load, vocabulary=vocabulary, **facts)


def read_folder_pair(name: str, image_root: Path, sem_seg_root: Path, *, gt_ext: str) -> list[dict]:
    """Records `file_name, sem_seg_file_name, image_id` (the stem), sorted by stem.

    Hidden files are skipped. A file without a partner is left out, and a warning says how many there are.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    for folder in (image_root, sem_seg_root):
        if not folder.is_dir():
            raise MissingFileError(f"data set '{name}': the folder {folder} does not exist. {WHERE_DATA_IS}")
    images, labels = files_by_stem(image_root, ".jpg"), files_by_stem(sem_seg_root, f".{gt_ext}")
    stems = sorted(images.keys() & labels.keys())
    alone = len(images) + len(labels) - 2 * len(stems)
    if alone:
        logger.warning(
            "data set '%s': %d of %d images in %s and %d label maps in %s have no partner of the same name; left out",
            *(name, alone, len(images), image_root, len(labels), sem_seg_root),
        )
    return [
        {"file_name": str(images[stem]), "sem_seg_file_name": str(labels[stem]), "image_id": stem} for stem in stems
    ]
