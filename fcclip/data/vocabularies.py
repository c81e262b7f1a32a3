"""Which vocabulary belongs to a data set: the published prompt-engineered file where the user has it, else ours."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from fcclip.data.catalog import Dataset, get_dataset, root_folder
from fcclip.errors import InputError, MissingFileError
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


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
    vocabulary = dataset.own_vocabulary()
    if dataset.published_vocabulary:
        place = Path(folder).expanduser() if folder else root_folder(root) / "vocabularies"
        path = place / dataset.published_vocabulary
        if path.is_file():
            vocabulary = _published(path, dataset, vocabulary)
        elif folder:
            raise MissingFileError(
                f"MODEL.FC_CLIP.VOCABULARIES is '{folder}', but there is no {path.name} in it, the vocabulary of "
                f"'{dataset.name}'. Put the file there, or leave the key empty to use the vocabularies that come with "
                "fcclip."
            )
    yaml_file = dataset.metadata.get("yaml_file")
    ours = f"the classes of {yaml_file}" if yaml_file else "fcclip (not the published one)"
    logger.info(
        "data set '%s': vocabulary: %s, '%s', sha256 %s",
        *(dataset.name, "the published one" if vocabulary.is_published else ours),
        *(vocabulary.name, vocabulary.hash[:12]),
    )
    return vocabulary


def _published(path: Path, dataset: Dataset, ours: Vocabulary) -> Vocabulary:
    """The names and synonyms of a published file with the ids and things of the data set."""
    published = Vocabulary.from_file(path)
    whole = Vocabulary.builtin(dataset.part_of) if dataset.part_of else ours
    if len(published) != len(whole):
        part = f" {len(ours)} of the" if dataset.part_of else ""
        raise InputError(
            f"{path} has {len(published)} classes, but data set '{dataset.name}' has{part} {len(whole)} "
            f"({whole.class_names[0]}, …). Is it the file of another data set?"
        )
    of_id = {mine.id: theirs for mine, theirs in zip(whole.classes, published.classes)}
    classes = tuple(dataclasses.replace(of_id[mine.id], id=mine.id, thing=mine.thing) for mine in ours.classes)
    return dataclasses.replace(published, classes=classes)
