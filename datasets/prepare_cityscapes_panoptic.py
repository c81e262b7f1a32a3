"""Cityscapes: panoptic id PNGs with their JSON file, and label maps of the 19 training classes.

    python datasets/prepare_cityscapes_panoptic.py [--root DIR] [--splits val] [--workers N]

Download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/ (with an
account).

    cityscapes/
      leftImg8bit/{train,val}/<city>/*_leftImg8bit.png           2,975 and 500 images
      gtFine/{train,val}/<city>/*_gtFine_{instanceIds,labelIds}.png
      gtFine/{train,val}/<city>/*_gtFine_labelTrainIds.png       made here: 8 bits, 0..18 the class, 255 none
      gtFine/cityscapes_panoptic_{train,val}/*_gtFine_panoptic.png   made here: segment ids, 0 void
      gtFine/cityscapes_panoptic_{train,val}.json                made here

What is made here equals what createPanopticImgs.py and createTrainIdLabelImgs.py of cityscapesScripts make, so a folder
that they have prepared is complete.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fcclip.data.datasets.files import files_by_stem
from fcclip.errors import InputError, run_program
from fcclip.preparation.files import box_and_area, check_size, id_colours, read_pixels, write_image
from fcclip.preparation.programs import AnnotationFile, Download, Preparation, Task, main_of, panoptic_content
from fcclip.vocabulary import Vocabulary

IGNORE_LABEL = 255
INSTANCES = 1000  # instance ids from here on are label * INSTANCES + number; smaller ones are labels
CLASSES = {entry.id: (index, entry.thing) for index, entry in enumerate(Vocabulary.builtin("cityscapes").classes)}
TRAIN_IDS = np.full(256, IGNORE_LABEL, np.uint8)  # from the label id to the class
TRAIN_IDS[list(CLASSES)] = [index for index, _ in CLASSES.values()]
CATEGORIES = (  # label id, official name, group, colour
    (7, "road", "flat", (128, 64, 128)),
    (8, "sidewalk", "flat", (244, 35, 232)),
    (11, "building", "construction", (70, 70, 70)),
    (12, "wall", "construction", (102, 102, 156)),
    (13, "fence", "construction", (190, 153, 153)),
    (17, "pole", "object", (153, 153, 153)),
    (19, "traffic light", "object", (250, 170, 30)),
    (20, "traffic sign", "object", (220, 220, 0)),
    (21, "vegetation", "nature", (107, 142, 35)),
    (22, "terrain", "nature", (152, 251, 152)),
    (23, "sky", "sky", (70, 130, 180)),
    (24, "person", "human", (220, 20, 60)),
    (25, "rider", "human", (255, 0, 0)),
    (26, "car", "vehicle", (0, 0, 142)),
    (27, "truck", "vehicle", (0, 0, 70)),
    (28, "bus", "vehicle", (0, 60, 100)),
    (31, "train", "vehicle", (0, 80, 100)),
    (32, "motorcycle", "vehicle", (0, 0, 230)),
    (33, "bicycle", "vehicle", (119, 11, 32)),
)


def downloads(split: str) -> list[Download]:
    site = "https://www.cityscapes-dataset.com/, unpacked into cityscapes"
    return [
        Download(f"cityscapes/leftImg8bit/{split}", "images", f"leftImg8bit_trainvaltest.zip ({site})"),
        Download(f"cityscapes/gtFine/{split}", "fine annotations", f"gtFine_trainvaltest.zip ({site})"),
    ]


def plan(root: Path, split: str) -> list[Task]:
    city_folders = sorted(path for path in (root / "cityscapes" / "gtFine" / split).iterdir() if path.is_dir())
    target = root / "cityscapes" / "gtFine" / f"cityscapes_panoptic_{split}"
    tasks = []
    for folder in city_folders:
        for name, instances in files_by_stem(folder, "_gtFine_instanceIds.png").items():
            image = root / "cityscapes" / "leftImg8bit" / split / folder.name / f"{name}_leftImg8bit.png"
            tasks.append(
                Task(
                    name=name,
                    inputs=(image, instances, folder / f"{name}_gtFine_labelIds.png"),
                    outputs=(target / f"{name}_gtFine_panoptic.png", folder / f"{name}_gtFine_labelTrainIds.png"),
                )
            )
    return tasks


def make(task: Task) -> dict[str, Any]:
    image, instances, labels = task.inputs
    instance_ids = read_pixels(instances).astype(np.int32)
    label_ids = read_pixels(labels)
    check_size(instances, instance_ids, image)
    check_size(labels, label_ids, image)
    if label_ids.dtype != np.uint8:
        raise InputError(f"{labels}: {label_ids.dtype} pixels, expected 8 bits. Unpack the download again.")
    id_map = np.zeros(instance_ids.shape, np.int32)
    segments = []
    for segment_id in np.unique(instance_ids).tolist():
        label = segment_id if segment_id < INSTANCES else segment_id // INSTANCES
        if label not in CLASSES:  # not evaluated: void
            continue
        _, thing = CLASSES[label]
        mask = instance_ids == segment_id
        id_map[mask] = segment_id
        box, area = box_and_area(mask)
        crowd = int(thing and segment_id < INSTANCES)
        segments.append({"id": segment_id, "category_id": label, "area": area, "bbox": box, "iscrowd": crowd})
    panoptic, train_ids = task.outputs
    write_image(panoptic, id_colours(id_map))
    write_image(train_ids, TRAIN_IDS[label_ids])
    return {"height": id_map.shape[0], "width": id_map.shape[1], "segments_info": segments}


def categories() -> list[dict[str, Any]]:
    return [
        {"id": label, "name": name, "color": list(colour), "supercategory": group, "isthing": int(CLASSES[label][1])}
        for label, name, group, colour in CATEGORIES
    ]


PREPARATION = Preparation(
    title="Cityscapes panoptic",
    dataset="openvocab_cityscapes_fine_panoptic_{split}",
    downloads=downloads,
    plan=plan,
    make=make,
    annotations=AnnotationFile(
        path="cityscapes/gtFine/cityscapes_panoptic_{split}.json",
        info={
            "description": "Cityscapes panoptic",
            "version": "1",
            "prepared_by": "fcclip prepare_cityscapes_panoptic.py",
        },
        assemble=partial(panoptic_content, categories=categories()),
    ),
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
