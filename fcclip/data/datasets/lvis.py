"""LVIS v1: instances of 1203 classes on the images of COCO; the class names come from the user's annotation file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fcclip.data.dataset import Dataset, collector_paused
from fcclip.data.datasets.files import AnnotationFile
from fcclip.data.datasets.instances import instance_records
from fcclip.data.datasets.metadata import LateMetadata
from fcclip.errors import InputError
from fcclip.vocabulary import ClassEntry, Vocabulary

VOCABULARY = "lvis_1203"
_EXPECTED = "Expected LVIS v1 annotations, e.g. lvis_v1_val.json: lists 'images', 'annotations' and 'categories'."


def lvis_instances(root: Path, *, name: str, split: str) -> Dataset:
    """LVIS v1, split train or val; images of both splits lie in both of COCO's folders.

    A record also has `not_exhaustive_category_ids` and `neg_category_ids`, which federated evaluation needs.
    """
    coco = root / "coco"
    lists = ("images", "annotations", "categories")
    source = AnnotationFile(f"data set '{name}'", root / "lvis" / f"lvis_v1_{split}.json", lists, _EXPECTED)

    def image_fields(image: dict) -> dict[str, Any]:
        folder, file = image["coco_url"].split("/")[-2:]  # http://images.cocodataset.org/train2017/000000391895.jpg
        lists = {key: image[key] for key in ("not_exhaustive_category_ids", "neg_category_ids") if key in image}
        return {"file_name": f"{coco}/{folder}/{file}", "image_id": image["id"], **lists}

    def read_vocabulary() -> Vocabulary:
        changed = source.path.stat().st_mtime_ns if source.path.is_file() else 0
        return _read_vocabulary(source, changed)

    def parse(content: dict) -> list[dict]:
        vocabulary = _vocabulary(source, content)
        return instance_records(source.where, content, vocabulary=vocabulary, image_fields=image_fields)

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


@functools.lru_cache(maxsize=8)
def _read_vocabulary(source: AnnotationFile, changed: int) -> Vocabulary:
    """As `_vocabulary`; the file is read once while it does not change."""
    with collector_paused():
        return _vocabulary(source, source.read())


def _vocabulary(source: AnnotationFile, content: dict) -> Vocabulary:
    """The classes of an LVIS annotation file, in the order of their ids; all are things.

    Underscores in names and synonyms become spaces.

    Raises:
        ValueError: it has no categories with `id` and `name`.
    """
    try:
        classes = tuple(map(_class, sorted(content["categories"], key=lambda category: category["id"])))
    except (KeyError, TypeError) as error:
        raise InputError(f"{source.where}: a category has no {error}. {_EXPECTED}") from error
    except AttributeError as error:
        raise InputError(
            f"{source.where}: a name or synonym of a category is not a text ({error}). {_EXPECTED}"
        ) from error
    if not classes:
        raise InputError(f"{source.where} has no categories. {_EXPECTED}")
    return Vocabulary(VOCABULARY, classes)


def _class(category: dict) -> ClassEntry:
    names = [category["name"], *category.get("synonyms", ())]
    names = tuple(dict.fromkeys(name.replace("_", " ").strip() for name in names))
    return ClassEntry(category["id"], names[0], names)
