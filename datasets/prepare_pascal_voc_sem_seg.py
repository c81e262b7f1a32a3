"""Pascal VOC 2012: images, and label maps of 20 classes, with and without background.

    python datasets/prepare_pascal_voc_sem_seg.py [--root DIR] [--splits val] [--workers N]

Download VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/, which unpacks into VOCdevkit.

    VOCdevkit/VOC2012/
      ImageSets/Segmentation/{train,val}.txt
      JPEGImages/*.jpg
      SegmentationClass/*.png                         palette: 0 background, 1..20 the class, 255 border
    pascal_voc_d2/                                    made here
      images/{training,validation}/*.jpg              1,464 and 1,449 images
      annotations_pascal21/{training,validation}/*.png   8 bits, 0 background, 1..20 the class, 255 border
      annotations_pascal20/{training,validation}/*.png   8 bits, 0..19 the class, 255 background and border
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fcclip.errors import run_program
from fcclip.preparation.files import check_size, copy_file, read_pixels, remap, write_image
from fcclip.preparation.programs import FOLDERS, Download, Preparation, Task, main_of

NUM_CLASSES = 20
IGNORE_LABEL = 255
NO_CLASS = 254  # in the tables, of values that should not occur
WITH_BACKGROUND = np.full(256, NO_CLASS, np.uint8)
WITH_BACKGROUND[[*range(NUM_CLASSES + 1), IGNORE_LABEL]] = [*range(NUM_CLASSES + 1), IGNORE_LABEL]
WITHOUT_BACKGROUND = np.full(256, NO_CLASS, np.uint8)
WITHOUT_BACKGROUND[[*range(NUM_CLASSES + 1), IGNORE_LABEL]] = [IGNORE_LABEL, *range(NUM_CLASSES), IGNORE_LABEL]


def downloads(split: str) -> list[Download]:
    source = "VOCtrainval_11-May-2012.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/)"
    voc = "VOCdevkit/VOC2012"
    return [
        Download(f"{voc}/ImageSets/Segmentation/{split}.txt", "the images of the split", source),
        Download(f"{voc}/JPEGImages", "images of VOC 2012", source),
        Download(f"{voc}/SegmentationClass", "label maps of VOC 2012", source),
    ]


def plan(root: Path, split: str) -> list[Task]:
    voc, target = root / "VOCdevkit" / "VOC2012", root / "pascal_voc_d2"
    kinds = (("images", ".jpg"), ("annotations_pascal21", ".png"), ("annotations_pascal20", ".png"))
    names = (voc / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(encoding="ascii").split()
    return [
        Task(
            name=name,
            inputs=(voc / "JPEGImages" / f"{name}.jpg", voc / "SegmentationClass" / f"{name}.png"),
            outputs=tuple(target / kind / FOLDERS[split] / f"{name}{ending}" for kind, ending in kinds),
        )
        for name in names
    ]


def make(task: Task) -> None:
    image, classes = task.inputs
    labels = read_pixels(classes, modes=("P", "L"))
    check_size(classes, labels, image)
    write_image(task.outputs[1], remap(labels, WITH_BACKGROUND, classes, invalid=NO_CLASS))
    write_image(task.outputs[2], remap(labels, WITHOUT_BACKGROUND, classes, invalid=NO_CLASS))
    copy_file(image, task.outputs[0])


PREPARATION = Preparation(
    title="Pascal VOC semantic",
    dataset="openvocab_pascal21_sem_seg_{split}",
    downloads=downloads,
    plan=plan,
    make=make,
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
