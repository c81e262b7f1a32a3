"""LVIS v1: instances of 1203 classes on the images of COCO; the class names come from the user's annotation file."""

from __future__ import annotations

import functools
import json
import mmap
from pathlib import Path
from typing import Any

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.files import AnnotationFile
from fcclip.data.datasets.instances import instance_records
from fcclip.data.datasets.metadata import LateMetadata
from fcclip.errors import InputError
from fcclip.vocabulary import ClassEntry, Vocabulary

VOCABULARY = "lvis_1203"
_EXPECTED = "Expected LVIS v1 annotations, e.g. lvis_v1_val.json: lists 'images', 'annotations' and 'categories'."
_ENOUGH = 16 * 2**20  # bytes; the categories of LVIS v1 take 0.5 MB


def lvis_instances(root: Path, *, name: str, split: str) -> Dataset:
    """LVIS v1, split train or val; images of both splits lie in both of COCO's folders.

    A record also has `not_exhaustive_category_ids` and `neg_category_ids`, which federated evaluation needs.
    """
    coco = root / "coco"
    source = _source(name, root / "lvis" / f"lvis_v1_{split}.json")

    def image_fields(image: dict) -> dict[str, Any]:
        folder, file = image["coco_url"].split("/")[-2:]  # http://images.cocodataset.org/train2017/000000391895.jpg
        lists = {key: image[key] for key in ("not_exhaustive_category_ids", "neg_category_ids") if key in image}
        return {"file_name": f"{coco}/{folder}/{file}", "image_id": image["id"], **lists}

    def read_vocabulary() -> Vocabulary:
        return lvis_vocabulary(name, source.path)

    def parse(content: dict) -> list[dict]:
        return instance_records(source.where, content, vocabulary=read_vocabulary(), image_fields=image_fields)

    known = {"evaluator_type": "lvis", "image_root": str(coco), "json_file": str(source.path)}
    return Dataset(
        name=name,
        metadata=LateMetadata(known, read_vocabulary),
        load=functools.partial(source.records, parse),
        parse=parse,
        vocabulary=VOCABULARY,
        read_vocabulary=read_vocabulary,
        published_count={"train": 100_170, "val": 19_809}[split],
        published_vocabulary="lvis_1203_with_prompt_eng.txt",
    )


def lvis_vocabulary(name: str, path: Path) -> Vocabulary:
    """The classes of an LVIS annotation file, in the order of their ids; all are things.

    Underscores in names and synonyms become spaces. The file is read once while it does not change.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON, or has no categories with `id` and `name`.
    """
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return _vocabulary(name, path, changed)


def _source(name: str, path: Path) -> AnnotationFile:
    return AnnotationFile(f"data set '{name}'", path, ("images", "annotations", "categories"), _EXPECTED)


@functools.lru_cache(maxsize=8)
def _vocabulary(name: str, path: Path, changed: int) -> Vocabulary:
    source = _source(name, path)
    where, categories = source.where, _end_of_file(path) or source.read()["categories"]
    try:
        classes = tuple(map(_class, sorted(categories, key=lambda category: category["id"])))
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: a category has no {error}. {_EXPECTED}") from error
    except AttributeError as error:
        raise InputError(f"{where}: a name or synonym of a category is not a text ({error}). {_EXPECTED}") from error
    if not classes:
        raise InputError(f"{where} has no categories. {_EXPECTED}")
    return Vocabulary(VOCABULARY, classes)


def _class(category: dict) -> ClassEntry:
    names = [category["name"], *category.get("synonyms", ())]
    names = tuple(dict.fromkeys(name.replace("_", " ").strip() for name in names))
    return ClassEntry(category["id"], names[0], names)


def _end_of_file(path: Path) -> list[dict] | None:
    """The list `categories`, found from the end of the file without reading the million annotations before it; None if
    there is none in reach."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = content.rfind(b'"categories"')
            text = content[begin : begin + _ENOUGH].decode(errors="ignore") if begin >= 0 else ""
        categories, _ = json.JSONDecoder().raw_decode(text.partition(":")[2].lstrip())
    except (OSError, ValueError):
        return None
    return categories if isinstance(categories, list) else None
