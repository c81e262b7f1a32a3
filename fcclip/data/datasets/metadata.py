"""Class names and ids of a vocabulary under detectron2's metadata names."""

from __future__ import annotations

from typing import Any

from fcclip.vocabulary import Vocabulary

__all__ = ["class_metadata"]


def class_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    """What a data set with these classes says about them; a contiguous id is a position in the vocabulary.

    `stuff_classes` and `stuff_dataset_id_to_contiguous_id` hold every class, things included, as published: evaluators
    convert any predicted class through them. Names are canonical ones, never lists of synonyms.
    """
    names = list(vocabulary.class_names)
    ids = [entry.id for entry in vocabulary.classes]
    things = list(vocabulary.thing_classes)
    return {
        "stuff_classes": names,
        "thing_classes": [names[index] for index in things],
        "thing_dataset_id_to_contiguous_id": {ids[index]: index for index in things},
        "stuff_dataset_id_to_contiguous_id": {dataset_id: index for index, dataset_id in enumerate(ids)},
    }
