"""Reader of COCO instance annotations: one JSON file, a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fcclip.data.annotations import instance_entries, settle
from fcclip.data.dataset import Dataset
from fcclip.data.datasets.files import AnnotationFile
from fcclip.data.datasets.metadata import class_metadata, thing_vocabulary
from fcclip.vocabulary import Vocabulary

_KEPT = ("iscrowd", "category_id", "bbox", "segmentation")  # fields of an annotation
BOX_MODE = 1  # detectron2's number for boxes [x, y, width, height] in pixels
NOT_INSTANCES = (
    "Expected COCO instance annotations: lists 'images' (id, file_name, height, width) and 'annotations' (image_id, "
    "category_id, segmentation)."
)


def instance_dataset(
    *,
    name: str,
    vocabulary: str,
    image_root: Path,
    json_file: Path,
    image_id: Callable[[Any], Any] = lambda value: value,
    **facts: Any,
) -> Dataset:
    """A data set of instances in the COCO format, whose classes are the things of a vocabulary.

    Args:
        name: as registered.
        vocabulary: name of the built-in vocabulary with these things; the category ids of the JSON are theirs.
        image_root, json_file: images and annotations.
        image_id: from the `id` of an image in the JSON to the `image_id` of the record.
        facts: further fields of `Dataset`.
    """
    things = thing_vocabulary(Vocabulary.builtin(vocabulary))
    metadata = {
        **class_metadata(things),
        "evaluator_type": "coco",
        "image_root": str(image_root),
        "json_file": str(json_file),
    }

    def image_fields(image: dict) -> dict[str, Any]:
        return {"file_name": f"{image_root}/{image['file_name']}", "image_id": image_id(image["id"])}

    source = AnnotationFile(f"data set '{name}'", json_file, ("images", "annotations"), NOT_INSTANCES)
    parse = partial(instance_records, source.where, vocabulary=things, image_fields=image_fields)
    return Dataset(
        name=name,
        metadata=metadata,
        load=partial(source.records, parse),
        parse=parse,
        vocabulary=things.name,
        read_vocabulary=lambda: things,
        part_of=vocabulary,
        **facts,
    )


def instance_records(
    where: str, content: dict, *, vocabulary: Vocabulary, image_fields: Callable[[dict], dict[str, Any]]
) -> list[dict]:
    """The records of instance annotations, in the order of the ids of their images; looks for no file.

    Args:
        where: data set and file, for messages.
        content: of the file; `images` and `annotations` are lists.
        vocabulary: contiguous ids are positions in it.
        image_fields: from an entry of `images` to `file_name`, `image_id` and whatever else the record takes from it.

    Returns:
        Dicts with `file_name, image_id, annotations`, and `height, width` where the JSON gives them. An annotation has
        `iscrowd, category_id` (contiguous), `segmentation` (polygons or a compressed run-length code) and, where the
        JSON has it, `bbox` with `bbox_mode`.

    Raises:
        ValueError: something in the file cannot be used (see `instance_entries`).
    """
    classes = {entry.id: index for index, entry in enumerate(vocabulary.classes)}
    images, annotations, problems = instance_entries(content, classes, things=vocabulary.thing_classes)
    settle(where, problems, expected=NOT_INSTANCES)
    records: dict[Any, dict] = {}
    for image in sorted(images.values(), key=lambda image: (isinstance(image["id"], str), image["id"])):
        record = records[image["id"]] = {**image_fields(image), "annotations": []}
        if {"height", "width"} <= image.keys():
            record.update(height=image["height"], width=image["width"])
    for annotation in annotations:
        instance = {key: annotation[key] for key in _KEPT if key in annotation}
        instance["category_id"] = classes[annotation["category_id"]]
        if "bbox" in annotation:
            instance["bbox_mode"] = BOX_MODE
        records[annotation["image_id"]]["annotations"].append(instance)
    return list(records.values())
