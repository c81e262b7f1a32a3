"""Class names and ids of a vocabulary under detectron2's metadata names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fcclip.vocabulary import Vocabulary


def class_metadata(vocabulary: Vocabulary, *, things: bool = True) -> dict[str, Any]:
    """What a data set with these classes says about them; a contiguous id is a position in the vocabulary.

    `stuff_classes` and `stuff_dataset_id_to_contiguous_id` hold every class, things included, as published: evaluators
    convert any predicted class through them. Names are canonical ones, never lists of synonyms. `stuff_colors` and
    `thing_colors` are there where they were published.

    Args:
        vocabulary: the classes.
        things: False for a data set that does not tell things from stuff: none of its classes counts as a thing.
    """
    names = list(vocabulary.class_names)
    ids = [entry.id for entry in vocabulary.classes]
    things = list(vocabulary.thing_classes) if things else []
    colors = {}
    if all(entry.color for entry in vocabulary.classes):
        every = [list(entry.color) for entry in vocabulary.classes]
        colors = {"stuff_colors": every, "thing_colors": [every[index] for index in things]}
    return {
        **colors,
        "contiguous_id_to_class_name": list(names),
        "stuff_classes": names,
        "thing_classes": [names[index] for index in things],
        "thing_dataset_id_to_contiguous_id": {ids[index]: index for index in things},
        "stuff_dataset_id_to_contiguous_id": {dataset_id: index for index, dataset_id in enumerate(ids)},
    }


def thing_vocabulary(vocabulary: Vocabulary) -> Vocabulary:
    """Its things alone, in their order, as `<name>_things`."""
    things = tuple(entry for entry in vocabulary.classes if entry.thing)
    return dataclasses.replace(vocabulary, name=f"{vocabulary.name}_things", classes=things)


class LateMetadata(Mapping):
    """Metadata of a data set whose classes stand in a file of the user, which is read when they are asked for.

    Args:
        known: what needs no file; class names among it are taken as they are.
        read_vocabulary: reads the vocabulary, with the category ids of the data set.
    """

    _CLASS_KEYS = (
        "stuff_classes",
        "thing_classes",
        "thing_dataset_id_to_contiguous_id",
        "stuff_dataset_id_to_contiguous_id",
    )

    def __init__(self, known: Mapping[str, Any], read_vocabulary: Callable[[], Vocabulary]) -> None:
        self._known = dict(known)
        self._read_vocabulary = read_vocabulary

    def __getitem__(self, key: str) -> Any:
        late = key in self._CLASS_KEYS and key not in self._known
        return class_metadata(self._read_vocabulary())[key] if late else self._known[key]

    def __contains__(self, key: object) -> bool:
        return key in self._CLASS_KEYS or key in self._known

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._CLASS_KEYS, *self._known))

    def __len__(self) -> int:
        return len({*self._CLASS_KEYS, *self._known})
