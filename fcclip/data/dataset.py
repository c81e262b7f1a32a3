"""What the catalog holds: a named data set whose files are read only when its records are asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fcclip.data.images import image_size
from fcclip.errors import InputError
from fcclip.vocabulary import Vocabulary

__all__ = ["Dataset", "joined"]


@dataclass(frozen=True)
class Dataset:
    """A data set: what its classes are and where its files should be; nothing is read before `records`.

    Args:
        name: the name it is registered under.
        metadata: detectron2's names: `stuff_classes` (every class, canonical names), `thing_classes`,
            `thing_dataset_id_to_contiguous_id`, `stuff_dataset_id_to_contiguous_id` (every id), `ignore_label` (where
            there are label maps), `evaluator_type`, and the folders and files of its kind (`image_root`,
            `sem_seg_root`, `panoptic_root`, `panoptic_json`, `json_file`).
        load: reads the list of records from the disk.
        vocabulary: name of its vocabulary, which data sets with the same classes share; a contiguous class id is a
            position in it.
        words: makes that vocabulary; None: it is the built-in one of that name.
        parse: makes the same records of the content of the annotation file, looking for no file; None: they do not
            come from one file, or only `load` knows how.
    """

    name: str
    metadata: Mapping[str, Any]
    load: Callable[[], list[dict]]
    vocabulary: str
    words: Callable[[], Vocabulary] | None = None
    parse: Callable[[dict], list[dict]] | None = None

    def own_vocabulary(self) -> Vocabulary:
        """Its classes in order, with the words of the package or of its own files.

        Raises:
            FileNotFoundError, ValueError: its classes stand in a file of the user, which is missing or broken.
        """
        return Vocabulary.builtin(self.vocabulary) if self.words is None else self.words()

    def annotations(self) -> list[dict]:
        """The records as the annotations give them: sizes may be missing, and there may be none."""
        with _garbage_left_alone():
            return self.load()

    def records(self) -> list[dict]:
        """One dict an image: `file_name, image_id, height, width` and the ground truth of its kind.

        Sizes that the annotation file does not give are read from the headers of the images.

        Raises:
            FileNotFoundError: a folder, file or image is not where it should be.
            ValueError: an annotation file is broken, or there is not one record.
        """
        records = self.annotations()
        if not records:
            raise InputError(f"data set '{self.name}' has no records: {self._source()} lists no image.")
        unsized = [record for record in records if "height" not in record]
        with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
            for record, (height, width) in zip(unsized, pool.map(image_size, [r["file_name"] for r in unsized])):
                record.update(height=height, width=width)
        return records

    def _source(self) -> str:
        places = (self.metadata.get(key) for key in ("panoptic_json", "json_file", "image_root"))
        return next(filter(None, places), "its source")


def joined(datasets: Sequence[Dataset]) -> Dataset:
    """Several data sets, one after the other, as one to train on; the metadata are those of the first.

    Args:
        datasets: one or more.

    Raises:
        ValueError: they have different classes, so that a label would mean several, or other ignore labels.
    """
    first = datasets[0]
    for other in datasets[1:]:
        if other.vocabulary != first.vocabulary and other.own_vocabulary().hash != first.own_vocabulary().hash:
            raise InputError(
                "the data sets of DATASETS.TRAIN have different classes, so a label would mean several: "
                f"{_difference(first, other)}. Train on data sets with the same list of classes."
            )
        labels = [one.metadata["ignore_label"] for one in (first, other) if "ignore_label" in one.metadata]
        if len(set(labels)) > 1:
            raise InputError(
                f"the data sets '{first.name}' and '{other.name}' of DATASETS.TRAIN have the ignore labels {labels[0]} "
                f"and {labels[1]}; give unlabelled pixels the same value in both"
            )
    if len(datasets) == 1:
        return first
    return dataclasses.replace(
        first,
        name="+".join(one.name for one in datasets),
        load=lambda: [record for one in datasets for record in one.records()],
        parse=None,
    )


def _difference(one: Dataset, other: Dataset) -> str:
    vocabularies = one.own_vocabulary(), other.own_vocabulary()
    sizes = [f"'{dataset.name}' has {len(words)}" for dataset, words in zip((one, other), vocabularies)]
    entries = zip(*(words.classes for words in vocabularies))
    for index, (mine, theirs) in enumerate(entries):
        if (mine.synonyms, mine.thing) != (theirs.synonyms, theirs.thing):
            told = [f"'{', '.join(entry.synonyms)}:{'thing' if entry.thing else 'stuff'}'" for entry in (mine, theirs)]
            return f"{' and '.join(sizes)}, and class {index} is {told[0]} there and {told[1]} here"
    return " and ".join(sizes)


@contextlib.contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """Millions of small objects without a cycle among them: the collector would walk them again and again, which
    makes 22 s of the 4 that COCO's training set takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
