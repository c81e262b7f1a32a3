"""What the programs that make the lists of PASCAL-5^i and COCO-20^i share.

Which classes an image of the lists has was found out from the published counts: every class of a mask in the training
set of PASCAL, and elsewhere those with at least 2 x 32 x 32 pixels.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcclip.data.catalog import root_folder
from fcclip.data.datasets.folds import IGNORE_LABEL, NUM_FOLDS, Folds
from fcclip.errors import InputError, MissingFileError
from fcclip.files import write_atomically
from fcclip.preparation.files import read_json
from fcclip.preparation.programs import AnnotationFile, Preparation, Task, run
from fcclip.vocabulary import Vocabulary

LARGE_PX = 2 * 32 * 32


def prepare(preparation: Preparation, options: Namespace, *, folds: Folds, smallest: Mapping[str, int]) -> int:
    """Masks where there are none, and the lists; returns the exit status.

    Args:
        preparation, options: of the masks, whose annotations are `pixel_file`; the command line.
        folds, smallest: the benchmark; kind -> pixels that a class needs in a mask.
    """
    status = run(preparation, options)
    if status:
        return status
    root = root_folder(options.root)
    for split in options.splits:
        content = read_json(root / preparation.annotations.path.format(split=split))
        counts = write_lists(folds, root, split, content["images"], smallest[split])
        print(f"{preparation.title}, {split}: pairs of the folds {', '.join(f'{count:,}' for count in counts)}")
        for fold, (count, published) in enumerate(zip(counts, folds.counts[split])):
            if count != published:
                print(
                    f"warning: {folds.name}: the list of fold {fold} ({split}) has {count:,} pairs, the published one "
                    f"{published:,}; results are not comparable",
                    file=sys.stderr,
                )
    return 0


def write_lists(folds: Folds, root: Path, kind: str, images: Sequence[Mapping[str, Any]], smallest: int) -> list[int]:
    """Writes the list of each fold; returns the number of pairs of each. `images` have an `id`, and `pixels`: position
    of a class -> its pixels, at least `smallest` of a pair."""
    lines: dict[int, list[str]] = {fold: [] for fold in range(NUM_FOLDS)}
    for image in sorted(images, key=lambda image: image["id"]):
        for index, pixels in sorted((int(key), pixels) for key, pixels in image["pixels"].items()):
            if pixels >= smallest:
                lines[folds.fold_of(index)].append(f"{image['id']}__{index + folds.first_class:02d}\n")
    for fold, own in lines.items():
        path = folds.list_file(root, kind, fold)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(own).encode()
        write_atomically(path, lambda file, content=content: file.write(content))
    return [len(own) for own in lines.values()]


def class_pixels(mask: np.ndarray, folds: Folds, path: Path) -> dict[str, Any]:
    """What a mask shows: `pixels`, position of a class -> number.

    Raises:
        InputError: a value that is neither background nor a class nor ignored.
    """
    num_classes = len(Vocabulary.builtin(folds.name))
    counts = dict(zip(*(column.tolist() for column in np.unique(mask, return_counts=True))))
    strange = [value for value in counts if value > num_classes and value != IGNORE_LABEL]
    if strange:
        raise InputError(
            f"{path}: value {strange[0]}; masks of {folds.name} have 0 for the background, 1 to {num_classes}, and "
            f"{IGNORE_LABEL} for ignored pixels"
        )
    return {"pixels": {str(value - 1): number for value, number in counts.items() if 0 < value <= num_classes}}


def pixel_file(folds: Folds, program: str) -> AnnotationFile:
    """The JSON file that keeps what each mask shows."""

    def assemble(tasks: Sequence[Task], results: Sequence[Any]) -> dict[str, Any]:
        return {"images": [{"id": task.name, **result} for task, result in zip(tasks, results, strict=True)]}

    path = f"{folds.name}/{{split}}.json"
    return AnnotationFile(path, {"prepared_by": program}, assemble=assemble)


def first_that(exists: Callable[[Path], bool], places: Sequence[Path], what: str) -> Path:
    """The first place that exists; if none does, a `MissingFileError` names all."""
    place = next(filter(exists, places), None)
    if place is None:
        raise MissingFileError(f"{what} is at none of these places: {', '.join(map(str, places))}")
    return place
