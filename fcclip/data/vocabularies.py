"""Which words belong to a data set: the published prompt-engineered file where the user has it, else ours."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from fcclip.data.catalog import Dataset, get_dataset, root_folder
from fcclip.errors import InputError, MissingFileError
from fcclip.vocabulary import Vocabulary

__all__ = ["PUBLISHED_FILES", "dataset_vocabulary"]

logger = logging.getLogger(__name__)

# Vocabulary -> name of the published file with prompt-engineered synonyms.
PUBLISHED_FILES = {
    "coco_panoptic": "coco_panoptic_with_prompt_eng.txt",
    "coco_panoptic_things": "coco_panoptic_with_prompt_eng.txt",
    "coco_stuff_171": "coco_stuff_with_prompt_eng.txt",
    "ade20k_150": "ade20k_150_with_prompt_eng.txt",
    "ade20k_150_things": "ade20k_150_with_prompt_eng.txt",
    "ade20k_847": "ade20k_847_with_prompt_eng.txt",
    "cityscapes": "cityscapes_with_prompt_eng.txt",
    "mapillary_vistas": "mapillary_vistas_with_prompt_eng.txt",
    "pascal_context_59": "pascal_ctx_59_with_prompt_eng.txt",
    "pascal_context_459": "pascal_ctx_459_with_prompt_eng.txt",
    "pascal_voc_20": "pascal_voc_21_with_prompt_eng.txt",
    "pascal_voc_21": "pascal_voc_21_with_prompt_eng.txt",
    "lvis_1203": "lvis_1203_with_prompt_eng.txt",
}
# Vocabulary -> the built-in one whose classes, told by their ids, the file has.
_PART_OF = {
    "coco_panoptic_things": "coco_panoptic",
    "ade20k_150_things": "ade20k_150",
    "pascal_voc_20": "pascal_voc_21",
}


def dataset_vocabulary(
    dataset: str | Dataset, folder: str | Path = "", *, root: str | Path | None = None
) -> Vocabulary:
    """The vocabulary of a data set; a class's position is its contiguous index.

    Args:
        dataset: a data set or its name.
        folder: of published vocabulary files (MODEL.FC_CLIP.VOCABULARIES); "" takes `vocabularies` below the root of
            all data sets when it exists, and else the vocabularies of the package.
        root: of all data sets; see `get_dataset`.

    Raises:
        FileNotFoundError: `folder` is given but does not exist, or lacks the file of this data set; or a file of the
            data set that has its class names (LVIS) is missing.
        ValueError: the file has another number of classes than the data set.
    """
    dataset = get_dataset(dataset, root) if isinstance(dataset, str) else dataset
    ours = dataset.own_vocabulary()
    default = root_folder(root) / "vocabularies"
    place = Path(folder).expanduser() if folder else default if default.is_dir() else None
    file_name = PUBLISHED_FILES.get(dataset.vocabulary)
    if place is None or file_name is None:
        return _said(dataset, ours)
    path = place / file_name
    if not path.is_file():
        if not folder:
            return _said(dataset, ours)
        raise MissingFileError(
            f"MODEL.FC_CLIP.VOCABULARIES is '{folder}', but there is no {file_name} in it, the vocabulary of "
            f"'{dataset.name}'. Put the "
            "file there, or leave the key empty to use the vocabularies that come with fcclip."
        )
    published = Vocabulary.from_file(path)
    whole = Vocabulary.builtin(_PART_OF[dataset.vocabulary]) if dataset.vocabulary in _PART_OF else ours
    if len(published) != len(whole):
        chosen = "" if whole is ours else f" {len(ours)} of the"
        raise InputError(
            f"{path} has {len(published)} classes, but data set '{dataset.name}' has{chosen} {len(whole)} "
            f"({whole.class_names[0]}, …). "
            "Is it the file of another data set?"
        )
    # words of the file; ids and things of the data set
    words = {mine.id: theirs for mine, theirs in zip(whole.classes, published.classes)}
    classes = tuple(dataclasses.replace(words[mine.id], id=mine.id, thing=mine.thing) for mine in ours.classes)
    return _said(dataset, dataclasses.replace(published, classes=classes))


def _said(dataset: Dataset, vocabulary: Vocabulary) -> Vocabulary:
    described = dataset.metadata.get("yaml_file")
    ours = f"the classes of {described}" if described else "fcclip (not the published one)"
    logger.info(
        "data set '%s': vocabulary: %s, '%s', sha256 %s",
        *(dataset.name, "the published one" if vocabulary.is_published else ours),
        *(vocabulary.name, vocabulary.hash[:12]),
    )
    return vocabulary
