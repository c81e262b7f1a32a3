"""ADE20K with 150 classes: instances of the 100 things, as a COCO JSON file.

    python datasets/prepare_ade20k_ins_seg.py [--root DIR] [--splits val] [--workers N]

Download ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu/, and annotations_instance.tar of the Places
Challenge 2017 from http://placeschallenge.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar, which belongs
into ADEChallengeData2016.

    ADEChallengeData2016/
      images/{training,validation}/*.jpg                 20,210 and 2,000 images
      annotations_instance/{training,validation}/*.png   red: thing 1..100, green: number of the instance, 0 none
      ade20k_instance_{train,val}.json                   made here
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from fcclip.data.datasets.files import files_by_stem
from fcclip.errors import InputError, run_program
from fcclip.preparation.files import COLOUR_MODES, box_and_area, check_size, pair_by_stem, read_pixels
from fcclip.preparation.programs import FOLDERS, AnnotationFile, Download, Preparation, Task, main_of
from fcclip.vocabulary import Vocabulary

VOCABULARY = Vocabulary.builtin("ade20k_150")
THINGS = VOCABULARY.thing_classes  # the k-th thing of the instance annotations, counted from 1, is the k-th of these


def downloads(split: str) -> list[Download]:
    challenge = "http://placeschallenge.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar"
    return [
        Download(
            f"ADEChallengeData2016/images/{FOLDERS[split]}",
            "images of ADE20K",
            "ADEChallengeData2016.zip (http://sceneparsing.csail.mit.edu/)",
        ),
        Download(
            f"ADEChallengeData2016/annotations_instance/{FOLDERS[split]}",
            "instances of ADE20K",
            f"{challenge}, unpacked into ADEChallengeData2016",
        ),
    ]


def plan(root: Path, split: str) -> list[Task]:
    ade = root / "ADEChallengeData2016"
    images = files_by_stem(ade / "images" / FOLDERS[split], ".jpg")
    instances = files_by_stem(ade / "annotations_instance" / FOLDERS[split], ".png")
    return [Task(name, files) for name, files in pair_by_stem(images, instances)]


def read_instances(path: Path, image: Path) -> tuple[tuple[int, int], list[tuple[int, np.ndarray]]]:
    """(height, width), and (class 0..149, (H, W) bool mask) of each instance, in the order of their numbers.

    Raises:
        ValueError: an instance of two classes, an unknown class, or another size than the image's.
    """
    pixels = read_pixels(path, modes=COLOUR_MODES)
    check_size(path, pixels, image)
    things, numbers = pixels[..., 0], pixels[..., 1]
    instances = []
    for number in np.unique(numbers[numbers > 0]).tolist():
        mask = numbers == number
        (thing, *others) = np.unique(things[mask]).tolist()
        if others:
            raise InputError(f"{path}: instance {number} is of two classes, {thing} and {others[0]}, expected one.")
        if not 1 <= thing <= len(THINGS):
            raise InputError(f"{path}: instance {number} has class {thing}, expected 1..{len(THINGS)}.")
        instances.append((THINGS[thing - 1], mask))
    return numbers.shape, instances


def make(task: Task) -> dict[str, Any]:
    image, path = task.inputs
    (height, width), instances = read_instances(path, image)
    annotations = []
    for category, mask in instances:
        box, area = box_and_area(mask)
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation = {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
        annotations.append({"category_id": category, "bbox": box, "segmentation": segmentation, "area": area})
    return {"height": height, "width": width, "annotations": annotations}


def assemble(tasks: Sequence[Task], parts: Sequence[Any]) -> dict[str, Any]:
    images, annotations = [], []
    for task, part in zip(tasks, parts, strict=True):
        size = {"width": part["width"], "height": part["height"]}
        images.append({"id": task.name, "file_name": task.inputs[0].name, **size})
        for annotation in part["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": task.name, "iscrowd": 0, **annotation})
    categories = [{"id": index, "name": VOCABULARY.class_names[index]} for index in THINGS]
    return {"images": images, "categories": categories, "annotations": annotations}


PREPARATION = Preparation(
    title="ADE20K-150 instances",
    dataset="openvocab_ade20k_instance_{split}",
    downloads=downloads,
    plan=plan,
    make=make,
    annotations=AnnotationFile(
        path="ADEChallengeData2016/ade20k_instance_{split}.json",
        info={"description": "ADE20K-150 instances", "version": "1", "prepared_by": "fcclip prepare_ade20k_ins_seg.py"},
        assemble=assemble,
    ),
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
