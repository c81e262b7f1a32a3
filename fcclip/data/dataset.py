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

# detectron2's `evaluator_type` -> what such a data set has ground truth for, as far as {PANOPTIC,INSTANCE,SEMANTIC}_ON
# of a config ask for it.
EVALUATORS: dict[str, tuple[str, ...]] = {
    "coco_panoptic_seg": ("panoptic", "instance", "semantic"),
    "ade20k_panoptic_seg": ("panoptic", "instance", "semantic"),
    "cityscapes_panoptic_seg": ("panoptic", "instance", "semantic"),
    "mapillary_vistas_panoptic_seg": ("panoptic", "instance", "semantic"),
    "sem_seg": ("semantic",),
    "one_class_pairs": ("panoptic",),  # of an image one class is asked for, its pixels against all others
    "novel_classes": ("panoptic",),  # of a fold, all at once
    "coco": ("instance",),
    "lvis": ("instance",),
}


@dataclass(frozen=True)
class Dataset:
    """Everything that is known of a data set; nothing is read before `records`.

    Args:
        name: the name it is registered under.
        metadata: detectron2's names: `stuff_classes` (every class, canonical names), `thing_classes`,
            `thing_dataset_id_to_contiguous_id`, `stuff_dataset_id_to_contiguous_id` (every id), `ignore_label` (where
            there are label maps), `evaluator_type`, and the folders and files of its kind (`image_root`,
            `sem_seg_root`, `panoptic_root`, `panoptic_json`, `json_file`).
        load: reads the list of records from the disk.
        vocabulary: name of its vocabulary, which data sets with the same classes share; a contiguous class id is a
            position in it.
        read_vocabulary: makes that vocabulary; None: it is the built-in one of that name.
        parse: makes the same records of the content of the annotation file, looking for no file; None: they do not
            come from one file, or only `load` knows how.
        published_count: images of the published set; None: unknown.
        published_vocabulary: name of the published file with prompt-engineered synonyms; None: there is none, and what
            was published had its own class names.
        part_of: name of the built-in vocabulary whose classes that file has, where they are more than those of the
            data set; None: they are the same.
        benchmark: what tables call it.
        test_size: published INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST.
    """

    name: str
    metadata: Mapping[str, Any]
    load: Callable[[], list[dict]]
    vocabulary: str
    read_vocabulary: Callable[[], Vocabulary] | None = None
    parse: Callable[[dict], list[dict]] | None = None
    published_count: int | None = None
    published_vocabulary: str | None = None
    part_of: str | None = None
    benchmark: str = ""
    test_size: tuple[int, int] = (800, 1333)

    @property
    def evaluators(self) -> tuple[str, ...]:
        """What it can be evaluated for: "panoptic", "instance", "semantic"; () for an unknown `evaluator_type`."""
        return EVALUATORS.get(self.metadata["evaluator_type"], ())

    def own_vocabulary(self) -> Vocabulary:
        """Its classes in order, with the synonyms of the package or of its own files.

        Raises:
            FileNotFoundError, ValueError: its classes stand in a file of the user, which is missing or broken.
        """
        return Vocabulary.builtin(self.vocabulary) if self.read_vocabulary is None else self.read_vocabulary()

    def annotations(self) -> list[dict]:
        """The records as the annotations give them: sizes may be missing, and there may be none."""
        with collector_paused():
            return self.load()

    def records(self) -> list[dict]:
        """One dict an image: `file_name, image_id, height, width` and the ground truth of its kind.

        Sizes that the annotation file does not give are read from the headers of the images.

        Raises:
            FileNotFoundError: a folder, file or image is not where it should be.
            ValueError: an annotation file is broken, or there are no records.
        """
        records = self.annotations()
        if not records:
            places = [self.metadata.get(key) for key in ("panoptic_json", "json_file", "image_root")]
            source = next(filter(None, places), "its source")
            raise InputError(f"data set '{self.name}' has no records: {source} lists no image.")
        unsized = [record for record in records if "height" not in record]
        with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
            for record, (height, width) in zip(unsized, pool.map(image_size, [r["file_name"] for r in unsized])):
                record.update(height=height, width=width)
        return records


def joined(datasets: Sequence[Dataset]) -> Dataset:
    """One or more data sets, one after the other, as one to train on; the metadata are those of the first.

    Raises:
        ValueError: they have different classes, so that a label would mean several, or different ignore labels.
    """
    first = datasets[0]
    for other in datasets[1:]:
        if other.vocabulary != first.vocabulary and other.own_vocabulary().hash != first.own_vocabulary().hash:
            raise InputError(
                "the data sets of DATASETS.TRAIN have different classes, so a label would mean several: "
                f"{_difference(first, other)}. Train on data sets with the same list of classes."
            )
        labels = [dataset.metadata.get("ignore_label") for dataset in (first, other)]
        if None not in labels and labels[0] != labels[1]:
            raise InputError(
                f"the data sets '{first.name}' and '{other.name}' of DATASETS.TRAIN have the ignore labels {labels[0]} "
                f"and {labels[1]}; give unlabelled pixels the same value in both"
            )
    if len(datasets) == 1:
        return first
    return dataclasses.replace(
        first,
        name="+".join(dataset.name for dataset in datasets),
        load=lambda: [record for dataset in datasets for record in dataset.records()],
        parse=None,
        published_count=None,
    )


def _difference(first: Dataset, second: Dataset) -> str:
    vocabularies = first.own_vocabulary(), second.own_vocabulary()
    sizes = " and ".join(f"'{dataset.name}' has {len(v)}" for dataset, v in zip((first, second), vocabularies))
    for index, entries in enumerate(zip(*(vocabulary.classes for vocabulary in vocabularies))):
        before, after = (f"'{', '.join(e.synonyms)}:{'thing' if e.thing else 'stuff'}'" for e in entries)
        if before != after:
            return f"{sizes}, and class {index} is {before} there and {after} here"
    return sizes


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without garbage collection: annotations are millions of small objects without a cycle among them, which the
    collector would walk again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
