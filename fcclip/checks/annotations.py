"""Annotation files: what is wrong in them, and what is left of them without the entries that no reader takes.

A reader stops at the first thing that is wrong. Here everything wrong is told, and the rest of the file is kept, so
that the images can be looked at all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcclip.checks.issue import Issues
from fcclip.checks.names import spelling
from fcclip.data.annotations import file_of, instance_entries, is_id, panoptic_entries, whole
from fcclip.data.dataset import Dataset
from fcclip.data.own_categories import class_of
from fcclip.files import listed
from fcclip.vocabulary import Vocabulary


@dataclass(frozen=True)
class Classes:
    """The classes of a data set as its annotation file numbers them.

    Args:
        vocabulary: of the data set.
        index_of: category id -> class.
        things: classes that are things.
        by_name: ids belong to classes by the names in the file's `categories` (own data), not by themselves.
    """

    vocabulary: Vocabulary
    index_of: Mapping[Any, int]
    things: frozenset[int]
    by_name: bool


def known_classes(dataset: Dataset, content: Mapping[str, Any]) -> Classes:
    """What the category ids of an annotation file mean."""
    vocabulary = dataset.own_vocabulary()
    things = frozenset(vocabulary.thing_classes)
    if "yaml_file" not in dataset.metadata:
        return Classes(vocabulary, dataset.metadata["stuff_dataset_id_to_contiguous_id"], things, by_name=False)
    index_of = {}
    for category in _objects(content.get("categories")):
        index = class_of(str(category.get("name", "")), vocabulary)
        if index is not None and is_id(category.get("id")):
            index_of.setdefault(category["id"], index)
    return Classes(vocabulary, index_of, things, by_name=True)


# ---- categories ----


def check_categories(issues: Issues, path: Path, content: dict, classes: Classes) -> None:
    """The list of categories against the classes; entries that say nothing are taken out of it."""
    categories = content.get("categories")
    if not isinstance(categories, list):
        return
    names = {spelling(name): name for name in classes.vocabulary.class_names}
    kept: dict[Any, dict] = {}
    id_of: dict[str, Any] = {}
    for number, category in enumerate(categories):
        whole = isinstance(category, dict) and is_id(category.get("id")) and isinstance(category.get("name"), str)
        if not whole:
            what = f"entry {number} of 'categories' has no id and name: {str(category)[:80]}"
            issues.add_kind("categories", path, what)
        elif category["id"] in kept:
            before = kept[category["id"]]["name"]
            issues.add_kind("categories", path, f"id {category['id']!r}: '{before}' and '{category['name']}'")
        else:
            kept[category["id"]] = category
            alike = names.get(spelling(category["name"])) if classes.by_name else None
            if alike is not None and category["id"] not in classes.index_of:
                what = f"'{category['name']}' is spelled otherwise than the class '{alike}'"
                issues.add_kind("categories", path, what, remedy=f"write '{alike}' in both")
            other = id_of.setdefault(category["name"], category["id"])
            if other != category["id"]:
                issues.add_kind("categories", path, f"'{category['name']}' has the ids {other} and {category['id']}")
    content["categories"] = list(kept.values())
    different = []
    for identifier, category in kept.items():
        if identifier in classes.index_of:
            entry = classes.vocabulary.classes[classes.index_of[identifier]]
            if spelling(category["name"]) not in map(spelling, (entry.name, *entry.synonyms)):
                different.append(f"'{category['name']}' for '{entry.name}'")
    if 2 * len(different) > len(kept):
        issues.add_kind("other-categories", path, f"{len(different)} of {len(kept)}: {listed(different, 5)}")


# ---- entries ----


def usable(issues: Issues, path: Path, content: dict, classes: Classes, kind: str) -> dict:
    """The content of an annotation file without what its reader leaves out or refuses, which becomes issues.

    Args:
        content: its lists are lists.
        kind: "panoptic" or "instances".

    Returns:
        The content; of panoptic annotations `left_out` in it has the ids of segments that the PNGs have all the same:
        image id as text -> ids.
    """
    if kind == "panoptic":
        images, annotations, problems = panoptic_entries(content, classes.index_of)
    else:
        images, annotations, problems = instance_entries(content, classes.index_of, things=classes.things)
    for problem in problems:
        issues.add_kind(problem.kind, path, problem.text)
    left_out = _left_out(content, annotations) if kind == "panoptic" else {}
    known = {str(annotation["image_id"]) for annotation in annotations}
    if kind == "panoptic":
        for image_id, image in images.items():
            if image_id not in known:
                issues.add_kind("no-annotation", path, f"{file_of(image) or 'image'} (id {image['id']!r})")
        for image_id in sorted(known - images.keys()) if images else ():
            issues.add_kind("unknown-size", path, f"image {image_id}")
    return {**content, "images": list(images.values()), "annotations": annotations, "left_out": left_out}


def _left_out(content: dict, annotations: list[dict]) -> dict[str, list[int]]:
    kept = {str(entry["image_id"]): {segment["id"] for segment in entry["segments_info"]} for entry in annotations}
    left_out: dict[str, list[int]] = {}
    for annotation in _objects(content["annotations"]):
        ids = kept.get(str(annotation.get("image_id")))
        if ids is not None:
            others = [whole(segment.get("id")) for segment in _objects(annotation.get("segments_info"))]
            left_out[str(annotation["image_id"])] = [number for number in others if is_id(number) and number not in ids]
    return left_out


def _objects(entries: Any) -> list[dict]:
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
