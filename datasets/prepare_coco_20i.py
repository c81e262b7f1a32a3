"""COCO-20^i: masks of the objects of COCO 2014, and the lists of its four folds.

    python datasets/prepare_coco_20i.py [--root DIR] [--splits val] [--workers N]

Download train2014.zip, val2014.zip and annotations_trainval2014.zip (https://cocodataset.org/#download) into the folder
of all data sets, COCO2014 or coco. Masks that are there, as others offer them, are used as they are; else they are
painted from the annotations, small objects over large ones.

    COCO2014/
      {train,val}2014/*.jpg
      annotations/instances_{train,val}2014.json
      annotations/{train,val}2014/*.png       masks: 0 background, 1 to 80 (or in annotation/)
    coco_20i/                                 made here
      {trn,val}/fold{0..3}.txt                a line <image>__<class> for each pair
      {train,val}.json                        pixels of each class in each mask
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fcclip.data.datasets.folds import COCO_20I
from fcclip.data.segmentations import fill_polygons, read_run_lengths
from fcclip.errors import run_program
from fcclip.preparation.files import check_size, has_content, read_json, read_pixels, stored_size, write_image
from fcclip.preparation.folds import LARGE_PX, class_pixels, first_that, pixel_file, prepare
from fcclip.preparation.programs import Preparation, Task, build_parser

FOLDERS = ("", "COCO2014", "coco")
ANNOTATIONS = ("annotation", "annotations")
SMALLEST = {"train": LARGE_PX, "val": LARGE_PX}  # pixels of a pair


def main(arguments: list[str] | None = None) -> int:
    return prepare(PREPARATION, build_parser(__doc__).parse_args(arguments), folds=COCO_20I, smallest=SMALLEST)


def plan(root: Path, split: str) -> list[Task]:
    places = [root / folder / f"{split}2014" for folder in FOLDERS]
    images = first_that(lambda place: any(place.glob("*.jpg")), places, f"the folder of images {split}2014")
    beside = [images.parent / name for name in ANNOTATIONS]
    source = next((place for place in beside if (place / f"instances_{split}2014.json").is_file()), None)
    if source is None:
        masks = [place / f"{split}2014" for place in beside]
        folder = first_that(lambda place: any(place.glob("*.png")), masks, "a folder of masks, or the annotations,")
        return [
            Task(name=path.stem, inputs=(images / f"{path.stem}.jpg", path)) for path in sorted(folder.glob("*.png"))
        ]
    objects = objects_of(source / f"instances_{split}2014.json")
    return [
        Task(
            name=name,
            inputs=(images / f"{name}.jpg",),
            outputs=(source / f"{split}2014" / f"{name}.png",),
            details=details,
        )
        for name, details in sorted(objects.items())
    ]


def objects_of(path: Path) -> dict[str, list]:
    """Image -> [mask value, segmentation] of its objects, the largest first; crowds too."""
    content = read_json(path)
    value_of = {number: value for value, number in enumerate(sorted(row["id"] for row in content["categories"]), 1)}
    names = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    objects: dict[str, list] = {}
    for row in sorted(content["annotations"], key=lambda row: (-row["area"], row["id"])):
        objects.setdefault(names[row["image_id"]], []).append([value_of[row["category_id"]], row["segmentation"]])
    return objects


def make(task: Task) -> dict:
    image = task.inputs[0]
    there = [path for path in (*task.inputs[1:], *task.outputs) if has_content(path)]
    if there:
        mask = read_pixels(there[0], modes=("P", "L"))
        check_size(there[0], mask, image)
        return class_pixels(mask, COCO_20I, there[0])
    size = stored_size(image)
    mask = np.zeros(size, np.uint8)
    for value, segmentation in task.details:
        mask[object_mask(segmentation, size)] = value
    write_image(task.outputs[0], mask)
    return class_pixels(mask, COCO_20I, task.outputs[0])


def object_mask(segmentation, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool of polygons or of a run-length code."""
    if isinstance(segmentation, dict):
        return read_run_lengths([segmentation], size)[0].astype(bool)
    mask = np.zeros(size, bool)
    fill_polygons([np.asarray(corners, np.float64).reshape(-1, 2) for corners in segmentation], mask)
    return mask


PREPARATION = Preparation(
    title="COCO-20^i",
    dataset="",  # lists of pairs are counted, not images
    downloads=lambda split: [],
    plan=plan,
    make=make,
    annotations=pixel_file(COCO_20I, "prepare_coco_20i"),
)

if __name__ == "__main__":
    sys.exit(run_program(main))
