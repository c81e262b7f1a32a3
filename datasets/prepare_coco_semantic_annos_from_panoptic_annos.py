"""COCO: semantic label maps from the panoptic annotations; mIoU on COCO needs them.

    python datasets/prepare_coco_semantic_annos_from_panoptic_annos.py [--root DIR] [--splits val] [--workers N]

Download from https://cocodataset.org/#download: train2017.zip and val2017.zip, annotations_trainval2017.zip, and
panoptic_annotations_trainval2017.zip, which holds panoptic_train2017.zip and panoptic_val2017.zip: unpack these too.

    coco/
      {train,val}2017/*.jpg                             118,287 and 5,000 images
      annotations/{panoptic,instances}_{train,val}2017.json
      panoptic_{train,val}2017/*.png                    segment ids
      panoptic_semseg_{train,val}2017/*.png             made here: 8 bits, 0..132 the class, 255 none

Each segment of the JSON file is painted with the position of its category among the 133, things first; crowds are
painted like any other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fcclip.data.images import read_id_map
from fcclip.errors import InputError, run_program
from fcclip.preparation.files import read_json, write_image
from fcclip.preparation.programs import Download, Preparation, Task, main_of
from fcclip.vocabulary import Vocabulary

IGNORE_LABEL = 255


def downloads(split: str) -> list[Download]:
    archive = "panoptic_annotations_trainval2017.zip (https://cocodataset.org/#download), unpacked into coco"
    inner = f"the archive panoptic_{split}2017.zip inside {archive.removesuffix(', unpacked into coco')}"
    return [
        Download(f"coco/annotations/panoptic_{split}2017.json", "panoptic annotations of COCO 2017", archive),
        Download(f"coco/panoptic_{split}2017", "segment ids of COCO 2017", f"{inner}, unpacked into coco"),
    ]


def plan(root: Path, split: str) -> list[Task]:
    coco = root / "coco"
    path = coco / "annotations" / f"panoptic_{split}2017.json"
    index_of = {entry.id: index for index, entry in enumerate(Vocabulary.builtin("coco_panoptic").classes)}
    try:
        listed = [
            (image["file_name"], [(segment["id"], segment["category_id"]) for segment in image["segments_info"]])
            for image in read_json(path)["annotations"]
        ]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: these are not panoptic annotations: {error!r}. Unpack the download again."
        ) from error
    tasks = []
    for name, segments in listed:
        unknown = [category for _, category in segments if category not in index_of]
        if unknown:
            raise InputError(f"{path}: {name} has category {unknown[0]}, which is not one of COCO's 133 panoptic ones.")
        tasks.append(
            Task(
                name=name.removesuffix(".png"),
                inputs=(coco / f"panoptic_{split}2017" / name,),
                outputs=(coco / f"panoptic_semseg_{split}2017" / name,),
                details=[(segment, index_of[category]) for segment, category in segments],
            )
        )
    return tasks


def make(task: Task) -> None:
    id_map = read_id_map(task.inputs[0])
    labels = np.full(id_map.shape, IGNORE_LABEL, np.uint8)
    for segment_id, index in task.details:
        labels[id_map == segment_id] = index
    write_image(task.outputs[0], labels)


PREPARATION = Preparation(
    title="COCO semantic from panoptic",
    dataset="openvocab_coco_2017_{split}_panoptic_with_sem_seg",
    downloads=downloads,
    plan=plan,
    make=make,
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
