"""BDD100K with 40 classes: panoptic id PNGs and their JSON file.

    python datasets/prepare_bdd100k_panoptic.py [--root DIR] [--splits val] [--workers N]

Download "10K Images" and "Panoptic Segmentation" from https://dl.cv.ethz.ch/bdd100k/data/.

    bdd100k/
      images/10k/{train,val}/*.jpg                     7,000 and 1,000 images
      labels/pan_seg/bitmasks/{train,val}/*.png        red: class 1..40, green: attributes, blue and alpha: id
      labels/pan_seg/coco_pano/{train,val}/*.png       made here: segment ids, R + 256 G, 0 void
      labels/pan_seg/meta/coco_{train,val}.json        made here

A segment marked crowd is a crowd; what is marked ignore is void. The folders are those in which FrozenSeg looks.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fcclip.data.datasets.files import files_by_stem
from fcclip.errors import InputError, run_program
from fcclip.preparation.files import box_and_area, check_size, id_colours, pair_by_stem, read_pixels, write_image
from fcclip.preparation.programs import AnnotationFile, Download, Preparation, Task, main_of, panoptic_content
from fcclip.vocabulary import Vocabulary

CLASSES = {entry.id: entry for entry in Vocabulary.builtin("bdd100k_40").classes}
IGNORE, CROWD = 1, 2  # bits of green
IMAGES, BITMASKS = "bdd100k/images/10k/{}", "bdd100k/labels/pan_seg/bitmasks/{}"


def downloads(split: str) -> list[Download]:
    site = "of https://dl.cv.ethz.ch/bdd100k/data/"
    return [
        Download(IMAGES.format(split), "images", f'"10K Images" {site}'),
        Download(BITMASKS.format(split), "bitmasks", f'"Panoptic Segmentation" {site}'),
    ]


def plan(root: Path, split: str) -> list[Task]:
    images = files_by_stem(root / IMAGES.format(split), ".jpg")
    bitmasks = files_by_stem(root / BITMASKS.format(split), ".png")
    target = root / "bdd100k/labels/pan_seg/coco_pano" / split
    return [Task(name, files, (target / f"{name}.png",)) for name, files in pair_by_stem(images, bitmasks)]


def make(task: Task) -> dict[str, Any]:
    image, bitmask = task.inputs
    pixels = read_pixels(bitmask, modes=("RGBA",)).astype(np.int32)
    check_size(bitmask, pixels, image)
    category, attributes, high, low = np.moveaxis(pixels, -1, 0)
    ids = high << 8 | low
    labelled = (category > 0) & (attributes & IGNORE == 0)
    pairs = np.unique(np.stack([ids[labelled], category[labelled]]), axis=1).T.tolist()
    class_of = dict(pairs)
    if len(class_of) < len(pairs) or 0 in class_of or not CLASSES.keys() >= set(class_of.values()):
        raise InputError(f"{bitmask}: a segment has the id 0, several classes, or one that is not among 1..40")
    segments = []
    for segment_id, label in class_of.items():
        mask = labelled & (ids == segment_id)
        box, area = box_and_area(mask)
        crowd = int((attributes[mask] & CROWD).any())
        segments.append({"id": segment_id, "category_id": label, "area": area, "bbox": box, "iscrowd": crowd})
    write_image(task.outputs[0], id_colours(np.where(labelled, ids, 0)))
    return {"height": ids.shape[0], "width": ids.shape[1], "segments_info": segments}


def categories() -> list[dict[str, Any]]:
    return [{"id": key, "name": entry.name, "isthing": int(entry.thing)} for key, entry in CLASSES.items()]


PREPARATION = Preparation(
    title="BDD100K panoptic",
    dataset="bdd10k_40_panoptic_{split}",
    downloads=downloads,
    plan=plan,
    make=make,
    annotations=AnnotationFile(
        path="bdd100k/labels/pan_seg/meta/coco_{split}.json",
        info={"description": "BDD100K panoptic", "version": "1", "prepared_by": "fcclip prepare_bdd100k_panoptic.py"},
        assemble=partial(panoptic_content, categories=categories()),
    ),
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
