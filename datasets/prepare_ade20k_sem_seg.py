"""ADE20K with 150 classes: semantic label maps.

    python datasets/prepare_ade20k_sem_seg.py [--root DIR] [--splits val] [--workers N]

Download ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu/.

    ADEChallengeData2016/
      images/{training,validation}/*.jpg                   20,210 and 2,000 images
      annotations/{training,validation}/*.png              0 other, 1..150 the class
      annotations_detectron2/{training,validation}/*.png   made here: 8 bits, 0..149 the class, 255 other
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fcclip.data.datasets.files import files_by_stem
from fcclip.errors import run_program
from fcclip.preparation.files import read_pixels, remap, write_image
from fcclip.preparation.programs import FOLDERS, Download, Preparation, Task, main_of

NUM_CLASSES = 150
IGNORE_LABEL = 255
NO_CLASS = 254  # in TABLE, of values that should not occur
TABLE = np.full(256, NO_CLASS, np.uint8)  # from a value of the download to the class
TABLE[: NUM_CLASSES + 1] = [IGNORE_LABEL, *range(NUM_CLASSES)]


def downloads(split: str) -> list[Download]:
    source = "ADEChallengeData2016.zip (http://sceneparsing.csail.mit.edu/)"
    return [Download(f"ADEChallengeData2016/annotations/{FOLDERS[split]}", "label maps of ADE20K", source)]


def plan(root: Path, split: str) -> list[Task]:
    ade = root / "ADEChallengeData2016"
    maps = files_by_stem(ade / "annotations" / FOLDERS[split], ".png")
    target = ade / "annotations_detectron2" / FOLDERS[split]
    return [Task(name, (path,), (target / path.name,)) for name, path in maps.items()]


def make(task: Task) -> None:
    (path,) = task.inputs
    write_image(task.outputs[0], remap(read_pixels(path), TABLE, path, invalid=NO_CLASS))


PREPARATION = Preparation(
    title="ADE20K-150 semantic",
    dataset="openvocab_ade20k_sem_seg_{split}",
    downloads=downloads,
    plan=plan,
    make=make,
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
