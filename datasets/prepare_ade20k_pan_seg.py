"""ADE20K with 150 classes: panoptic id PNGs and their JSON file.

    python datasets/prepare_ade20k_pan_seg.py [--root DIR] [--splits val] [--workers N] [--corrected]

Download ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu/, and annotations_instance.tar of the Places
Challenge 2017 from http://placeschallenge.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar, which belongs
into ADEChallengeData2016.

    ADEChallengeData2016/
      images/{training,validation}/*.jpg                 20,210 and 2,000 images
      annotations/{training,validation}/*.png            0 other, 1..150 the class
      annotations_instance/{training,validation}/*.png   red: thing 1..100, green: number of the instance, 0 none
      ade20k_panoptic_{train,val}/*.png                  made here: segment ids, R + 256 G + 65536 B, 0 void
      ade20k_panoptic_{train,val}.json                   made here

Stuff comes first, then each instance over it; pixels of a thing that belong to no instance stay void.

As published, and as published PQ needs it, the area and box of a segment are those it had when it was painted, though
later ones may cover it. With --corrected areas and boxes are those of the PNG, and segments without a pixel are left
out; PQ is then not comparable with published numbers.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ade20k_tables import PALETTE
from prepare_ade20k_ins_seg import THINGS, VOCABULARY, read_instances
from prepare_ade20k_ins_seg import downloads as instance_downloads
from prepare_ade20k_sem_seg import IGNORE_LABEL, NO_CLASS, TABLE
from prepare_ade20k_sem_seg import downloads as semantic_downloads

from fcclip.data.datasets.files import files_by_stem
from fcclip.errors import run_program
from fcclip.preparation.files import box_and_area, check_size, id_colours, pair_by_stem, read_pixels, remap, write_image
from fcclip.preparation.programs import (
    FOLDERS,
    AnnotationFile,
    Download,
    Preparation,
    Task,
    build_parser,
    panoptic_content,
    run,
)

COLOUR_DISTANCE = 30  # a channel, of later instances of a class from its colour


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--corrected", action="store_true", help="areas that are true, instead of the published ones (above)"
    )
    options = parser.parse_args(arguments)
    return run(preparation(corrected=options.corrected), options)


def downloads(split: str) -> list[Download]:
    return [*instance_downloads(split), *semantic_downloads(split)]


def plan(root: Path, split: str) -> list[Task]:
    ade, folder = root / "ADEChallengeData2016", FOLDERS[split]
    images = files_by_stem(ade / "images" / folder, ".jpg")
    classes = files_by_stem(ade / "annotations" / folder, ".png")
    instances = files_by_stem(ade / "annotations_instance" / folder, ".png")
    target = ade / f"ade20k_panoptic_{split}"
    pairs = pair_by_stem(images, classes, instances)
    return [Task(name, files, (target / f"{name}.png",)) for name, files in pairs]


def make(task: Task, *, corrected: bool) -> dict[str, Any]:
    image, classes, instances = task.inputs
    labels = remap(read_pixels(classes), TABLE, classes, invalid=NO_CLASS)
    check_size(classes, labels, image)
    _, things = read_instances(instances, image)
    stuff = [index for index in np.unique(labels).tolist() if index != IGNORE_LABEL and index not in THINGS]
    new_id = _ids(task.name)
    id_map = np.zeros(labels.shape, np.int32)
    segments = []
    for category, mask in [*((index, labels == index) for index in stuff), *things]:
        box, area = box_and_area(mask)
        segment_id = new_id(category)
        id_map[mask] = segment_id
        segments.append({"id": segment_id, "category_id": category, "area": area, "bbox": box, "iscrowd": 0})
    if corrected:
        segments = [segment for segment in segments if _measured_again(segment, id_map)]
    write_image(task.outputs[0], id_colours(id_map))
    return {"height": labels.shape[0], "width": labels.shape[1], "segments_info": segments}


def _measured_again(segment: dict[str, Any], id_map: np.ndarray) -> bool:
    """Sets box and area to what the finished id map shows; False where it shows nothing."""
    mask = id_map == segment["id"]
    if mask.any():
        segment["bbox"], segment["area"] = box_and_area(mask)
        return True
    return False


def _ids(name: str) -> Callable[[int], int]:
    """category -> id of its next segment in the image `name`, the same on every run, never 0.

    It is made of the colour of the category, for further segments of a colour near it.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    reserved = {(0, 0, 0), *PALETTE}
    taken: set[tuple[int, int, int]] = set()

    def new_id(category: int) -> int:
        colour = PALETTE[category]
        while colour in taken or (colour in reserved and colour != PALETTE[category]):
            shift = rng.integers(-COLOUR_DISTANCE, COLOUR_DISTANCE + 1, 3)
            colour = tuple(np.clip(np.array(PALETTE[category]) + shift, 0, 255).tolist())
        taken.add(colour)
        red, green, blue = colour
        return red + 256 * green + 65536 * blue

    return new_id


def categories() -> list[dict[str, Any]]:
    return [
        {"id": index, "name": name, "isthing": int(index in THINGS), "color": list(PALETTE[index])}
        for index, name in enumerate(VOCABULARY.class_names)
    ]


def preparation(*, corrected: bool) -> Preparation:
    return Preparation(
        title="ADE20K-150 panoptic",
        dataset="openvocab_ade20k_panoptic_{split}",
        downloads=downloads,
        plan=plan,
        make=partial(make, corrected=corrected),
        annotations=AnnotationFile(
            path="ADEChallengeData2016/ade20k_panoptic_{split}.json",
            info={
                "description": "ADE20K-150 panoptic",
                "version": "2",
                "prepared_by": "fcclip prepare_ade20k_pan_seg.py",
                "corrected": corrected,
            },
            assemble=partial(panoptic_content, categories=categories()),
        ),
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
