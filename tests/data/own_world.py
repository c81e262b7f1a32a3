"""A data set of a user's own in each of the three types: five images, the last one without a label.

The classes are those of `CLASSES`, in this order; the JSON files number them with holes, and have a category more that
no annotation uses. Each labelled image shows grass, a car and a person in a quarter each; the fourth quarter has no
class. Nothing shows the sky.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import yaml
from PIL import Image

from tests.data.published_trees import quarters

CLASSES = ["grass:stuff", "car, automobile", "sky:stuff", "person"]
CATEGORIES = {40: "zebra", 7: "automobile", 90: "grass", 3: "person"}  # id in the JSON files -> name there
GRASS, CAR, PERSON = 0, 1, 3  # ids that they must become
CATEGORY_OF = {GRASS: 90, CAR: 7, PERSON: 3}
NUM_IMAGES, SIZES = 5, ((48, 64), (64, 48))


def write_own(folder: Path, kind: str, **keys: Any) -> Path:
    """Writes the data set of this type and its YAML, whose path it returns.

    Args:
        folder: to write to.
        kind: panoptic, instances or semantic.
        keys: of the YAML, in place of those that fit; None leaves a key out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"type": kind, "images": "images", **_WRITERS[kind](folder), **keys}
    path = folder / f"own_{kind}.yaml"
    write_yaml(path, {key: value for key, value in content.items() if value is not None})
    return path


def write_yaml(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def classes_of(number: int) -> np.ndarray:
    """(h, w) int, the class of each pixel of an image, 255 for none."""
    size = SIZES[number % 2]
    return np.full(size, 255) if number == NUM_IMAGES - 1 else quarters(*size, (GRASS, CAR, PERSON), 255)


def _write_images(folder: Path) -> list[dict]:
    (folder / "images").mkdir(exist_ok=True)
    images = []
    for number in range(NUM_IMAGES):
        labels = classes_of(number)
        noise = np.random.default_rng(number).integers(0, 40, (*labels.shape, 3))
        pixels = np.where(labels == 255, 0, 60 + 50 * labels)[..., None] + noise
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number} ä.jpg")
        height, width = labels.shape
        images.append({"id": 10 * number, "file_name": f"{number} ä.jpg", "height": height, "width": width})
    return images


def _write_panoptic(folder: Path) -> dict[str, Any]:
    images, annotations = _write_images(folder), []
    (folder / "labels").mkdir(exist_ok=True)
    for number, image in enumerate(images):
        labels, segments = classes_of(number), []
        ids = np.zeros((*labels.shape, 3), np.uint8)  # R + 256 G + 65536 B
        for index in sorted({*np.unique(labels).tolist()} - {255}):
            ids[labels == index] = (index, 2, 0)
            area = int((labels == index).sum())
            category = CATEGORY_OF[index]
            segments.append({"id": 512 + index, "category_id": category, "area": area, "iscrowd": 0, "bbox": [0] * 4})
        Image.fromarray(ids).save(folder / "labels" / f"{number}.png")
        annotations.append({"image_id": image["id"], "file_name": f"{number}.png", "segments_info": segments})
    _write_coco(folder / "labels.json", images, annotations)
    return {"annotations": "labels.json", "classes": CLASSES}


def _write_instances(folder: Path) -> dict[str, Any]:
    images, annotations = _write_images(folder), []
    for number, image in enumerate(images):
        for index in (CAR, PERSON):
            mask = classes_of(number) == index
            if not mask.any():
                continue
            code = pycocotools.mask.encode(np.asfortranarray(mask, np.uint8))
            left, top, width, height = box = pycocotools.mask.toBbox(code).tolist()
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            code["counts"] = code["counts"].decode()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": CATEGORY_OF[index],
                    "segmentation": code if index == CAR else [corners],
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    _write_coco(folder / "instances.json", images, annotations)
    return {"annotations": "instances.json", "classes": CLASSES}


def _write_semantic(folder: Path) -> dict[str, Any]:
    _write_images(folder)
    (folder / "masks").mkdir(exist_ok=True)
    for number in range(NUM_IMAGES):
        Image.fromarray(classes_of(number).astype(np.uint8)).save(folder / "masks" / f"{number} ä.png")
    return {"annotations": "masks", "classes": CLASSES}


def _write_coco(path: Path, images: list[dict], annotations: list[dict]) -> None:
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


_WRITERS = {"panoptic": _write_panoptic, "instances": _write_instances, "semantic": _write_semantic}
