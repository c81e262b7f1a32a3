"""LVIS v1: instances of 1203 classes on the images of COCO; the class names come from the user's annotation file."""

from __future__ import annotations

import functools
import json
import mmap
from pathlib import Path
from typing import Any

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.files import read_json
from fcclip.data.datasets.instances import instance_records, read_instance_json
from fcclip.data.datasets.metadata import LateMetadata
from fcclip.errors import InputError
from fcclip.vocabulary import ClassEntry, Vocabulary

__all__ = ["lvis_instances", "lvis_vocabulary"]

VOCABULARY = "lvis_1203"
_EXPECTED = "Expected LVIS v1 annotations, e.g. lvis_v1_val.json: lists 'images', 'annotations' and 'categories'."
_ENOUGH = 16 * 2**20  # bytes; the categories of LVIS v1 take 0.5 MB


def lvis_instances(root: Path, *, name: str, split: str) -> Dataset:
    """LVIS v1, split train or val; images of both splits lie in both of COCO's folders.

    A record also has `not_exhaustive_category_ids` and `neg_category_ids`, which federated evaluation needs.
    """
    coco, path = root / "coco", root / "lvis" / f"lvis_v1_{split}.json"

    def words() -> Vocabulary:
        return lvis_vocabulary(name, path)

    def image_file(image: dict) -> dict[str, Any]:
        folder, file = image["coco_url"].split("/")[-2:]  # http://images.cocodataset.org/train2017/000000391895.jpg
        lists = {key: image[key] for key in ("not_exhaustive_category_ids", "neg_category_ids") if key in image}
        return {"file_name": f"{coco}/{folder}/{file}", "image_id": image["id"], **lists}

    def load() -> list[dict]:
        return read_instance_json(name, path, vocabulary=words(), image_file=image_file)

    def parse(content: dict) -> list[dict]:
        return instance_records(f"data set '{name}': {path}", content, vocabulary=words(), image_file=image_file)

    known = {"evaluator_type": "lvis", "image_root": str(coco), "json_file": str(path)}
    metadata = LateMetadata(known, words)
    return Dataset(name=name, metadata=metadata, load=load, parse=parse, vocabulary=VOCABULARY, words=words)


def lvis_vocabulary(name: str, path: Path) -> Vocabulary:
    """The classes of an LVIS annotation file, in the order of their ids; all are things.

    Underscores in names and synonyms become spaces. The file is read once while it does not change.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON, or has no categories with `id` and `name`.
    """
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return _vocabulary(name, path, changed)


@functools.lru_cache(maxsize=8)
def _vocabulary(name: str, path: Path, changed: int) -> Vocabulary:
    where = f"data set '{name}': {path}"
    categories = _end_of_file(path) or read_json(where, path, ("categories",), _EXPECTED)["categories"]
    try:
        classes = tuple(map(_class, sorted(categories, key=lambda category: category["id"])))
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: a category has no {error}. {_EXPECTED}") from error
    except AttributeError as error:
        raise InputError(f"{where}: a name or synonym of a category is no text ({error}). {_EXPECTED}") from error
    if not classes:
        raise InputError(f"{where} has no categories. {_EXPECTED}")
    return Vocabulary(VOCABULARY, classes)


def _class(category: dict) -> ClassEntry:
    words = [category["name"], *category.get("synonyms", ())]
    words = tuple(dict.fromkeys(word.replace("_", " ").strip() for word in words))
    return ClassEntry(category["id"], words[0], words)


def _end_of_file(path: Path) -> list[dict] | None:
    """The list `categories`, found from the end of the file without reading the million annotations before it; None if
    there is none in reach."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = content.rfind(b'"categories"')
            text = content[begin : begin + _ENOUGH].decode(errors="ignore") if begin >= 0 else ""
        found, _ = json.JSONDecoder().raw_decode(text.partition(":")[2].lstrip())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) else None
