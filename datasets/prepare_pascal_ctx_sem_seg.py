"""Pascal Context with 59 classes: images and label maps.

    python datasets/prepare_pascal_ctx_sem_seg.py [--root DIR] [--splits val] [--workers N]

Download VOCtrainval_03-May-2010.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2010/, which unpacks into VOCdevkit,
and https://codalabuser.blob.core.windows.net/public/trainval_merged.json, the annotations of the PASCAL in Detail
challenge (https://sites.google.com/view/pasd/dataset), which belong into VOCdevkit/VOC2010.

    VOCdevkit/VOC2010/
      JPEGImages/*.jpg
      trainval_merged.json
    pascal_ctx_d2/                                     made here
      images/{training,validation}/*.jpg               4,998 (by the challenge) and 5,104 images
      annotations_ctx59/{training,validation}/*.png    8 bits, 0..58 the class, 255 none
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from fcclip.data.segmentations import compressed
from fcclip.errors import InputError, run_program
from fcclip.preparation.files import check_size, copy_file, read_json, stored_size, write_image
from fcclip.preparation.programs import FOLDERS, Download, Preparation, Task, main_of

IGNORE_LABEL = 255
CATEGORIES = (  # of the JSON file; none, then the 59 classes in their order
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
NUM_CLASSES = len(CATEGORIES) - 1


def downloads(split: str) -> list[Download]:
    voc = "VOCdevkit/VOC2010"
    return [
        Download(
            f"{voc}/JPEGImages",
            "images of VOC 2010",
            "VOCtrainval_03-May-2010.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2010/)",
        ),
        Download(
            f"{voc}/trainval_merged.json",
            "annotations of PASCAL in Detail",
            "https://codalabuser.blob.core.windows.net/public/trainval_merged.json, put into VOCdevkit/VOC2010",
        ),
    ]


def plan(root: Path, split: str) -> list[Task]:
    voc, target = root / "VOCdevkit" / "VOC2010", root / "pascal_ctx_d2"
    path = voc / "trainval_merged.json"
    content = read_json(path)
    try:
        names = {image["image_id"]: image["file_name"] for image in content["images"] if image["phase"] == split}
        painted = defaultdict(list)
        for mask in content["annos_segmentation"]:
            if mask["image_id"] in names:
                painted[mask["image_id"]].append((mask["category_id"], mask["segmentation"]))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: these are not annotations of PASCAL in Detail: {error!r}. Download the file again."
        ) from error
    tasks = []
    for image_id, file_name in names.items():
        stem = file_name.removesuffix(".jpg")
        outputs = (
            target / "images" / FOLDERS[split] / file_name,
            target / "annotations_ctx59" / FOLDERS[split] / f"{stem}.png",
        )
        tasks.append(Task(stem, (voc / "JPEGImages" / file_name,), outputs, details=painted[image_id]))
    return tasks


def make(task: Task) -> None:
    (image,) = task.inputs
    categories = np.zeros(stored_size(image), np.int64)
    for category, segmentation in task.details:
        mask = coco_mask.decode(compressed(segmentation)).astype(bool)
        check_size(Path(f"trainval_merged.json, {task.name}"), mask, image)
        categories[mask] = category
    labels = np.searchsorted(CATEGORIES, categories)
    wrong = np.take(CATEGORIES, labels, mode="clip") != categories
    if wrong.any():
        raise InputError(
            f"{task.name}: category {categories[wrong][0]} is neither 0 nor one of the {NUM_CLASSES} classes"
        )
    write_image(task.outputs[1], (labels - 1).astype(np.uint8))  # -1 wraps around to 255
    copy_file(image, task.outputs[0])


PREPARATION = Preparation(
    title="Pascal Context 59",
    dataset="openvocab_pascal_ctx59_sem_seg_{split}",
    downloads=downloads,
    plan=plan,
    make=make,
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
