"""A data set of the user's own: a YAML file says where its images and labels are and what its classes are.

type: panoptic             # or instances, or semantic
images: images             # folder; paths are relative to the YAML, `~` is expanded
annotations: labels.json   # COCO JSON; with type semantic the folder of label maps
masks: labels              # type panoptic: folder of the id PNGs; by default the path of the JSON without `.json`
classes:                   # or a file; the order is the class id
  - car, automobile        # a class and its synonyms
  - grass
things: [car]              # or `:thing` and `:stuff` at the end of a class
ignore_label: 255          # of unlabelled pixels
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.files import AnnotationFile
from fcclip.data.datasets.instances import NOT_INSTANCES, instance_records
from fcclip.data.datasets.metadata import LateMetadata, class_metadata
from fcclip.data.datasets.panoptic import NOT_PANOPTIC, panoptic_records
from fcclip.data.own_categories import CategoryMatch
from fcclip.data.own_description import Description
from fcclip.errors import InputError
from fcclip.files import listed, visible_files
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".pgm")
LABEL_ENDINGS = (".png", ".tif", ".tiff", ".bmp")  # lossless ones


def own_dataset(path: str | Path) -> Dataset:
    """The data set that a YAML file describes; its name is the file's without the ending.

    The YAML and the file of classes, if it names one, are read here; images and labels when records are asked for,
    and the categories of a JSON when records or category ids are asked for. These are matched to the classes by
    name: a contiguous id is a position in `classes`, whatever the ids in the JSON.

    Raises:
        FileNotFoundError: the YAML or its file of classes does not exist.
        ValueError: the YAML is broken or not plain, or has an unknown, missing or wrong key. The message names the file
            and the key.
    """
    description = Description.read(Path(path).expanduser())
    build = {"panoptic": _panoptic, "instances": _instances, "semantic": _semantic}[description.kind]
    return build(description, description.vocabulary())


def _panoptic(description: Description, classes: Vocabulary) -> Dataset:
    source = _annotation_file(description, ("annotations",), NOT_PANOPTIC)
    images = description.place("images")
    default = source.path.parent / source.path.name.removesuffix(".json")
    masks = description.place("masks") if "masks" in description.content else default

    def parse(match: CategoryMatch, content: dict) -> list[dict]:
        listed_images = [image for image in content.get("images") or () if isinstance(image, dict)]
        names = {str(i.get("id")): i["file_name"] for i in listed_images if isinstance(i.get("file_name"), str)}

        def files(annotation: dict) -> dict[str, str]:
            name = names.get(str(annotation["image_id"]), f"{PurePosixPath(annotation['file_name']).stem}.jpg")
            return {"file_name": str(images / name), "pan_seg_file_name": str(masks / annotation["file_name"])}

        records = panoptic_records(source.where, content, vocabulary=match.vocabulary(content), files=files)
        total = len({str(image.get("id")) for image in listed_images})
        if total > len(records):
            logger.info("%s: %d of %d images have no annotation; left out", source.where, total - len(records), total)
        return records

    metadata = {
        "ignore_label": description.ignore_label(len(classes)),
        "evaluator_type": "coco_panoptic_seg",
        "panoptic_root": str(masks),
        "panoptic_json": str(source.path),
        "sem_seg_root": None,
        "json_file": None,
        "label_divisor": 1000,
    }
    return _coco_dataset(description, classes, source, parse, metadata, {"images": images, "masks": masks})


def _instances(description: Description, classes: Vocabulary) -> Dataset:
    source = _annotation_file(description, ("images", "annotations"), NOT_INSTANCES)
    images = description.place("images")

    def image_fields(image: dict) -> dict[str, Any]:
        return {"file_name": str(images / image["file_name"]), "image_id": image["id"]}

    def parse(match: CategoryMatch, content: dict) -> list[dict]:
        vocabulary = match.vocabulary(content)
        records = instance_records(source.where, content, vocabulary=vocabulary, image_fields=image_fields)
        _check_sizes(source.where, records)
        return records

    metadata = {"evaluator_type": "coco", "json_file": str(source.path)}
    return _coco_dataset(description, classes, source, parse, metadata, {"images": images})


def _annotation_file(description: Description, lists: tuple[str, ...], expected: str) -> AnnotationFile:
    return AnnotationFile(
        f"{description.path}: key 'annotations'",
        description.place("annotations"),
        ("categories", *lists),
        f"{expected} Label maps with one number a pixel have type semantic.",
        description.remedy,
    )


def _coco_dataset(
    description: Description,
    classes: Vocabulary,
    source: AnnotationFile,
    parse: Callable[[CategoryMatch, dict], list[dict]],
    metadata: Mapping[str, Any],
    folders: Mapping[str, Path],
) -> Dataset:
    """A data set with a COCO JSON.

    Args:
        description, classes: the YAML and its classes.
        source: the JSON.
        parse: (match of its categories, its content) -> records.
        metadata: of its kind.
        folders: key -> folder that must be there.
    """
    match = CategoryMatch(source, classes, description.path)

    def load() -> list[dict]:
        for key, folder in folders.items():
            description.check_folder(key, folder)
        return source.records(functools.partial(parse, match))

    names = classes.class_names
    known = {
        "stuff_classes": list(names),
        "thing_classes": [names[index] for index in classes.thing_classes],
        "image_root": str(folders["images"]),
        **metadata,
        "yaml_file": str(description.path),
    }
    return _dataset(description, classes, LateMetadata(known, match.vocabulary), load, functools.partial(parse, match))


def _check_sizes(where: str, records: Iterable[dict]) -> None:
    """Refuses images without a size, which evaluation needs before an image is opened."""
    unsized = [record["image_id"] for record in records if "height" not in record]
    if unsized:
        raise InputError(
            f"{where} does not say the size of image {listed(map(repr, unsized))}: it needs height and width in "
            f"'images'. {NOT_INSTANCES}"
        )


def _semantic(description: Description, classes: Vocabulary) -> Dataset:
    images, labels = description.place("images"), description.place("annotations")

    def load() -> list[dict]:
        description.check_folder("images", images)
        description.check_folder("annotations", labels)
        if images.resolve() == labels.resolve():
            raise description.wrong(
                "annotations", f"{labels} is the folder of the images too. Move the label maps into one of their own"
            )
        return _paired(description, images, labels)

    metadata = {
        **class_metadata(classes, things=False),
        "ignore_label": description.ignore_label(len(classes)),
        "evaluator_type": "sem_seg",
        "image_root": str(images),
        "sem_seg_root": str(labels),
        "yaml_file": str(description.path),
    }
    return _dataset(description, classes, metadata, load)


def _dataset(
    description: Description,
    classes: Vocabulary,
    metadata: Mapping[str, Any],
    load: Callable[[], list[dict]],
    parse: Callable[[dict], list[dict]] | None = None,
) -> Dataset:
    return Dataset(
        name=description.name,
        metadata=metadata,
        load=load,
        parse=parse,
        vocabulary=f"own-{classes.hash[:12]}",  # data sets with the same classes share it
        read_vocabulary=lambda: classes,
    )


def _paired(description: Description, images: Path, labels: Path) -> list[dict]:
    """Records `file_name, sem_seg_file_name, image_id` of the images and label maps whose paths below the two folders
    are the same but for the ending, sorted by them. A file without a partner is left out, which the log says."""
    image_files = _by_name(description, "images", images, IMAGE_ENDINGS)
    maps = _by_name(description, "annotations", labels, LABEL_ENDINGS)
    names = sorted(image_files.keys() & maps.keys())
    alone = sorted(str(files[name]) for files in (image_files, maps) for name in files.keys() - set(names))
    if not names:
        raise InputError(
            f"{description.path}: no image in {images} has a label map of the same name in {labels}: there are "
            f"{alone[0]} and {sorted(map(str, maps.values()))[0]}. Names must be the same but for the ending."
        )
    if alone:
        logger.warning(
            "%s: %d of %d images in %s and %d label maps in %s have no partner of the same name: %s; left out",
            *(description.path, len(alone), len(image_files), images, len(maps), labels, listed(alone, 5)),
        )
    return [
        {"file_name": str(image_files[name]), "sem_seg_file_name": str(maps[name]), "image_id": name} for name in names
    ]


def _by_name(description: Description, key: str, folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The files in a folder and below it by their path below it without the ending; hidden ones are skipped."""
    files: dict[str, Path] = {}
    for path in visible_files(folder, endings):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise description.wrong(key, f"{files[name]} and {path} have the same name but for the ending")
        files[name] = path
    if not files:
        raise description.wrong(key, f"no file in {folder} ends in {', '.join(endings)}")
    return files
