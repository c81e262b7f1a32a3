"""COCO-Stuff: label maps of 171 classes from the official ones.

    python datasets/prepare_coco_stuff_sem_seg.py [--root DIR] [--splits val] [--workers N]

Download the images of COCO 2017 (train2017.zip, val2017.zip) from https://cocodataset.org/#download, and
stuffthingmaps_trainval2017.zip from https://github.com/nightrome/cocostuff: unpack this into coco/stuffthingmaps.

    coco/
      {train,val}2017/*.jpg                             118,287 and 5,000 images
      stuffthingmaps/{train,val}2017/*.png              COCO-Stuff id - 1, 255 none
      stuffthingmaps_detectron2/{train,val}2017/*.png   made here: 8 bits, 0..170 the class, 255 none

Eleven of the ids 1..182 belong to no class and do not occur.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fcclip.data.datasets.files import files_by_stem
from fcclip.errors import run_program
from fcclip.preparation.files import read_pixels, remap, write_image
from fcclip.preparation.programs import Download, Preparation, Task, main_of
from fcclip.vocabulary import Vocabulary

IGNORE_LABEL = 255
NO_CLASS = 254  # in TABLE, of values that should not occur
TABLE = np.full(256, NO_CLASS, np.uint8)  # from the value of an official label map to the class
TABLE[IGNORE_LABEL] = IGNORE_LABEL
TABLE[[entry.id - 1 for entry in Vocabulary.builtin("coco_stuff_171").classes]] = range(171)


def downloads(split: str) -> list[Download]:
    source = (
        "stuffthingmaps_trainval2017.zip (https://github.com/nightrome/cocostuff), unpacked into coco/stuffthingmaps"
    )
    return [Download(f"coco/stuffthingmaps/{split}2017", "label maps of COCO-Stuff", source)]


def plan(root: Path, split: str) -> list[Task]:
    maps = files_by_stem(root / "coco" / "stuffthingmaps" / f"{split}2017", ".png")
    target = root / "coco" / "stuffthingmaps_detectron2" / f"{split}2017"
    return [Task(name, (path,), (target / path.name,)) for name, path in maps.items()]


def make(task: Task) -> None:
    (path,) = task.inputs
    write_image(task.outputs[0], remap(read_pixels(path), TABLE, path, invalid=NO_CLASS))


PREPARATION = Preparation(
    title="COCO-Stuff",
    dataset="openvocab_coco_2017_{split}",  # its images
    downloads=downloads,
    plan=plan,
    make=make,
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
