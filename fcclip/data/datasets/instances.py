"""Reader of COCO instance annotations: one JSON file, a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.files import AnnotationFile
from fcclip.data.datasets.metadata import class_metadata, thing_vocabulary
from fcclip.data.segmentations import compressed, has_area
from fcclip.errors import InputError
from fcclip.vocabulary import Vocabulary

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
        JSON has it, `bbox` with `bbox_mode`. Polygons without an area are left out, and instances with none left.

    Raises:
        ValueError: these are not complete instance annotations, two images have one id, an annotation is of an image
            that is not listed, or a category id is not in the vocabulary.
    """
    classes = {entry.id: index for index, entry in enumerate(vocabulary.classes)}
    records: dict[Any, dict] = {}
    try:
        for image in sorted(content["images"], key=lambda image: image["id"]):
            if image["id"] in records:
                raise InputError(f"{where} lists two images with the id {image['id']!r}. Give each an id of its own.")
            record = records[image["id"]] = {**image_fields(image), "annotations": []}
            if image.get("height") and image.get("width"):
                record.update(height=image["height"], width=image["width"])
        for annotation in content["annotations"]:
            if annotation["image_id"] not in records:
                raise InputError(
                    f"{where}: annotation {annotation.get('id')!r} belongs to the image {annotation['image_id']!r}, "
                    "which is not in 'images'. Leave both out, or list the image."
                )
            instance = _instance(where, annotation, classes, vocabulary)
            if instance is not None:
                records[annotation["image_id"]]["annotations"].append(instance)
    except (KeyError, TypeError) as error:
        problem = f"an entry has no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{where}: {problem}. {NOT_INSTANCES}") from error
    return list(records.values())


def _instance(where: str, annotation: dict, classes: dict[int, int], vocabulary: Vocabulary) -> dict | None:
    category = annotation["category_id"]
    if category not in classes:
        raise InputError(
            f"{where}: annotation {annotation.get('id')!r} of image {annotation['image_id']!r} has category_id "
            f"{category}, which is not in vocabulary '{vocabulary.name}' ({len(classes)} classes, ids "
            f"{min(classes)}..{max(classes)}). Check that this JSON belongs to this data set."
        )
    instance = {"iscrowd": annotation.get("iscrowd", 0), "category_id": classes[category]}
    if "bbox" in annotation:
        instance |= {"bbox": annotation["bbox"], "bbox_mode": BOX_MODE}
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        try:
            instance["segmentation"] = compressed(segmentation)
        except ValueError as error:
            raise InputError(f"{where}: annotation {annotation.get('id')!r}: {error}") from error
    elif segmentation:
        kept = [polygon for polygon in segmentation if has_area(polygon)]
        if not kept:
            return None
        instance["segmentation"] = kept
    return instance
