"""Reader of the COCO panoptic format: one JSON file, a folder of id PNGs, a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fcclip.data.annotations import panoptic_entries, settle
from fcclip.data.dataset import Dataset
from fcclip.data.datasets.files import AnnotationFile
from fcclip.data.datasets.metadata import class_metadata
from fcclip.vocabulary import Vocabulary

NOT_PANOPTIC = "Expected COCO panoptic annotations: image_id, file_name and segments_info with id and category_id."


def panoptic_dataset(
    *,
    name: str,
    vocabulary: str,
    evaluator_type: str,
    image_root: Path,
    panoptic_root: Path,
    panoptic_json: Path,
    sem_seg_root: Path | None,
    json_file: Path | None,
    ignore_label: int = 255,
    image_id: Callable[[Any], Any] = lambda value: value,
    image_file: Callable[[dict], str] = lambda annotation: f"{PurePosixPath(annotation['file_name']).stem}.jpg",
    sem_seg_file: Callable[[dict], str] = lambda annotation: annotation["file_name"],
    **facts: Any,
) -> Dataset:
    """A data set in the COCO panoptic format.

    Args:
        name: as registered.
        vocabulary: name of the built-in vocabulary that the category ids of the JSON belong to.
        evaluator_type: which evaluators run on it.
        image_root, panoptic_root, panoptic_json, sem_seg_root: images, id PNGs, annotations, semantic label maps; None:
            these are painted from the segments.
        json_file: instance annotations for average precision; None: the data set has none.
        ignore_label: value of unlabelled pixels in the semantic label maps.
        image_id: from the `image_id` of the JSON to that of the record.
        image_file: from an annotation to its image below `image_root`; default: the same stem, `.jpg`.
        sem_seg_file: from an annotation to its label map below `sem_seg_root`; default: the same file name.
        facts: further fields of `Dataset`.
    """
    classes = Vocabulary.builtin(vocabulary)
    metadata = {
        **class_metadata(classes),
        "ignore_label": ignore_label,
        "evaluator_type": evaluator_type,
        "image_root": str(image_root),
        "panoptic_root": str(panoptic_root),
        "panoptic_json": str(panoptic_json),
        "sem_seg_root": None if sem_seg_root is None else str(sem_seg_root),
        "json_file": None if json_file is None else str(json_file),
        "label_divisor": 1000,
    }

    def files(annotation: dict) -> dict[str, str]:
        labels = {} if sem_seg_root is None else {"sem_seg_file_name": f"{sem_seg_root}/{sem_seg_file(annotation)}"}
        return {
            "file_name": f"{image_root}/{image_file(annotation)}",
            "pan_seg_file_name": f"{panoptic_root}/{annotation['file_name']}",
            **labels,
        }

    source = AnnotationFile(f"data set '{name}'", panoptic_json, ("annotations",), NOT_PANOPTIC)
    parse = partial(panoptic_records, source.where, vocabulary=classes, image_id=image_id, files=files)
    load = partial(source.records, parse)
    return Dataset(name=name, metadata=metadata, load=load, parse=parse, vocabulary=vocabulary, **facts)


def panoptic_records(
    where: str,
    content: dict,
    *,
    vocabulary: Vocabulary,
    files: Callable[[dict], dict[str, str]],
    image_id: Callable[[Any], Any] = lambda value: value,
) -> list[dict]:
    """The records of panoptic annotations, in their order; looks for no file.

    Args:
        where: data set and file, for messages.
        content: of the file; `annotations` is a list.
        vocabulary: contiguous ids are positions in it.
        files: from an annotation to the record's file names.
        image_id: from the `image_id` of the JSON to that of the record.

    Returns:
        Dicts with the names of `files`, `image_id, segments_info`, and `height, width` where the JSON gives them. A
        segment keeps its fields (see `panoptic_entries`); `category_id` becomes contiguous, `isthing` is added.

    Raises:
        ValueError: something in the file cannot be used.
    """
    classes = {entry.id: index for index, entry in enumerate(vocabulary.classes)}
    images, annotations, problems = panoptic_entries(content, classes)
    settle(where, problems, expected=NOT_PANOPTIC)
    is_thing = [entry.thing for entry in vocabulary.classes]
    records = []
    for annotation in annotations:
        size = images.get(str(annotation["image_id"]), {})
        record = {**files(annotation), "image_id": image_id(annotation["image_id"])}
        record |= {key: size[key] for key in ("height", "width") if {"height", "width"} <= size.keys()}
        record["segments_info"] = annotation["segments_info"]
        for segment in annotation["segments_info"]:
            index = classes[segment["category_id"]]
            segment.update(category_id=index, isthing=is_thing[index])
        records.append(record)
    return records
