"""Annotation files: what is wrong in them, and what is left of them without the entries that no reader takes.

A reader stops at the first thing that is wrong. Here everything wrong is told, and the rest of the file is kept, so
that the images can be looked at all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fcclip.checks.images import plural
from fcclip.checks.issue import NOTE, WARNING, Issues
from fcclip.checks.kinds import PUBLISHED_SO
from fcclip.checks.names import spelling
from fcclip.data.dataset import Dataset
from fcclip.data.own_categories import class_of
from fcclip.data.segmentations import compressed, has_area
from fcclip.files import listed
from fcclip.vocabulary import Vocabulary

_HIGHEST_ID = 2**24 - 1
_LONGEST_SIDE = 1_000_000  # of an image, pixels; more is a mistake


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

    @cached_property
    def spellings(self) -> dict[str, int]:
        """Spelling of a class name or synonym -> class."""
        entries = enumerate(self.vocabulary.classes)
        return {spelling(name): index for index, entry in entries for name in (entry.name, *entry.synonyms)}


def known_classes(dataset: Dataset, content: Mapping[str, Any]) -> Classes:
    """What the category ids of an annotation file mean."""
    vocabulary = dataset.own_vocabulary()
    things = frozenset(vocabulary.thing_classes)
    if "yaml_file" not in dataset.metadata:
        return Classes(vocabulary, dataset.metadata["stuff_dataset_id_to_contiguous_id"], things, by_name=False)
    index_of = {}
    for category in _objects(content.get("categories")):
        index = class_of(str(category.get("name", "")), vocabulary)
        if index is not None and _is_id(category.get("id")):
            index_of.setdefault(category["id"], index)
    return Classes(vocabulary, index_of, things, by_name=True)


# ---- categories ----


def check_categories(issues: Issues, path: Path, content: dict, classes: Classes) -> None:
    """The list of categories against the classes; entries that say nothing are taken out of it."""
    categories = content.get("categories")
    if not isinstance(categories, list):
        return
    kept: dict[Any, dict] = {}
    id_of: dict[str, Any] = {}
    for number, category in enumerate(categories):
        whole = isinstance(category, dict) and _is_id(category.get("id")) and isinstance(category.get("name"), str)
        if not whole:
            what = f"entry {number} of 'categories' has no id and name: {str(category)[:80]}"
            issues.add_kind("categories", path, what)
        elif category["id"] in kept:
            before = kept[category["id"]]["name"]
            issues.add_kind("categories", path, f"id {category['id']!r}: '{before}' and '{category['name']}'")
        else:
            kept[category["id"]] = category
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


# ---- panoptic ----


def usable_panoptic(issues: Issues, path: Path, content: dict, classes: Classes, *, as_published: bool) -> dict:
    """The content of a panoptic file without what its reader refuses.

    Args:
        content: `annotations` is a list.
        as_published: segments that share an id are known from the published files.

    Returns:
        The content; `left_out` in it has the ids of segments without a class: image_id as text -> ids.
    """
    images = _usable_images(issues, path, content.get("images") or [])
    categories = _Categories(issues, path, content, classes)
    kept, files, known = [], set(), set()
    left_out: dict[str, list[int]] = {}
    for number, annotation in enumerate(content["annotations"]):
        problem = _panoptic_problem(annotation)
        if problem:
            issues.add_kind("broken-entry", path, f"annotation {number}: {problem}")
            continue
        name, image_id = annotation["file_name"], str(annotation["image_id"])
        which = f"{name}, image_id {annotation['image_id']!r}"
        if image_id in known:
            issues.add_kind("duplicate-image-id", path, f"{which}: a second annotation")
            continue
        known.add(image_id)
        if name in files:
            issues.add_kind("duplicate-file", path, f"{which}: a second annotation")
            continue
        files.add(name)
        if images and image_id not in images:
            issues.add_kind("unlisted-image", path, f"{which}: its size is read from its header", level=WARNING)
        ids, segments, doubles = set(), [], []
        for segment in annotation["segments_info"]:
            problem = _segment_problem(segment)
            if problem:
                issues.add_kind("broken-entry", path, f"{name}: {problem}")
            elif not 1 <= segment["id"] <= _HIGHEST_ID:
                issues.add_kind("void-id", path, f"{name}: id {segment['id']}")
            elif categories.refuse(segment["category_id"], name):
                left_out.setdefault(image_id, []).append(segment["id"])
            elif segment["id"] in ids and not as_published:
                doubles.append(segment["id"])
            else:
                doubles += [segment["id"]] if segment["id"] in ids else []
                ids.add(segment["id"])
                segments.append(_without_nonsense(issues, path, f"{name}, segment {segment['id']}", segment))
        if doubles:
            published = {"remedy": PUBLISHED_SO, "level": NOTE} if as_published else {}
            issues.add_kind("duplicate-segment-id", path, f"{name}: {listed(doubles, 5)}", **published)
        kept.append({**annotation, "segments_info": segments})
    categories.tell("segment")
    for image_id, image in images.items():
        if image_id not in known:
            issues.add_kind("no-annotation", path, f"{image.get('file_name', 'image')} (id {image['id']!r})")
    return {**content, "images": list(images.values()), "annotations": kept, "left_out": left_out}


def _panoptic_problem(annotation: Any) -> str:
    if not isinstance(annotation, dict):
        return "not an object"
    missing = [key for key in ("image_id", "file_name", "segments_info") if key not in annotation]
    if missing:
        return f"no {', no '.join(missing)}"
    if not _is_id(annotation["image_id"]) or not isinstance(annotation["file_name"], str):
        return "image_id must be a number or a text, and file_name a text"
    return "" if isinstance(annotation["segments_info"], list) else "segments_info must be a list"


def _segment_problem(segment: Any) -> str:
    if not isinstance(segment, dict):
        return "a segment is not an object"
    number, category = segment.get("id"), segment.get("category_id")
    if isinstance(number, bool) or not isinstance(number, int) or not _is_id(category):
        return f"id {number!r} or category_id {category!r} of a segment is not a whole number"
    return ""


# ---- instances ----


def usable_instances(issues: Issues, path: Path, content: dict, classes: Classes) -> dict:
    """The content of an instance file, whose `images` and `annotations` are lists, without what its reader refuses."""
    images = _usable_images(issues, path, content["images"], needs_file=True)
    categories = _Categories(issues, path, content, classes)
    kept, ids = [], set()
    orphans: dict[Any, int] = {}
    for number, annotation in enumerate(content["annotations"]):
        whole = isinstance(annotation, dict) and all(_is_id(annotation.get(key)) for key in ("image_id", "category_id"))
        if not whole:
            issues.add_kind("broken-entry", path, f"annotation {number}: no image_id and category_id")
            continue
        image = images.get(str(annotation["image_id"]))
        if image is None:
            orphans[annotation["image_id"]] = orphans.get(annotation["image_id"], 0) + 1
            continue
        which = f"annotation {annotation.get('id', number)!r} of {_file_of(image)}"
        if _is_id(annotation.get("id")):
            if annotation["id"] in ids:
                issues.add_kind("duplicate-annotation-id", path, which)
            ids.add(annotation["id"])
        if categories.refuse(annotation["category_id"], which, things_only=True):
            continue
        if _has_usable_mask(issues, path, which, annotation):
            kept.append({**_without_nonsense(issues, path, which, annotation), "image_id": image["id"]})
    categories.tell("instance")
    for image_id, count in orphans.items():
        issues.add_kind("unlisted-image", path, f"image_id {image_id!r}: {plural(count, 'annotation')}")
    return {**content, "images": list(images.values()), "annotations": kept}


def _has_usable_mask(issues: Issues, path: Path, which: str, annotation: dict) -> bool:
    """Whether the reader keeps an annotation; says what it refuses or leaves out."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        try:
            _height, _width = compressed(segmentation)["size"]
        except (ValueError, TypeError) as error:
            issues.add_kind("bad-code", path, f"{which}: {error}")
            return False
        return True
    if not segmentation:
        if annotation.get("iscrowd", 0):
            return True
        issues.add_kind("no-mask", path, which)
        return False
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        what = f"{which}: segmentation is neither a list of polygons nor a run-length code"
        issues.add_kind("broken-entry", path, what)
        return False
    flat = sum(not has_area(polygon) for polygon in segmentation)
    if flat:
        left = "" if flat < len(segmentation) else ", and with them the instance"
        issues.add_kind("bad-polygon", path, f"{which}: {flat} of {len(segmentation)} polygons{left}")
    return flat < len(segmentation)


# ---- what both have ----


class _Categories:
    """Category ids that are not a class: told once each, with how often they are used."""

    def __init__(self, issues: Issues, path: Path, content: Mapping[str, Any], classes: Classes) -> None:
        self.issues, self.path, self.classes = issues, path, classes
        categories = _objects(content.get("categories"))
        self.names = {entry["id"]: entry.get("name") for entry in categories if _is_id(entry.get("id"))}
        self.uses: dict[tuple[str, Any], list] = {}  # (kind, id) -> [how often, where first]

    def refuse(self, category: Any, where: str, *, things_only: bool = False) -> bool:
        """Whether an entry of this category has to be left out; with `things_only` stuff has to."""
        index = self.classes.index_of.get(category)
        kind = "unknown-category" if index is None else "instance-of-stuff"
        if index is None or (things_only and index not in self.classes.things):
            self.uses.setdefault((kind, category), [0, where])[0] += 1
            return True
        return False

    def tell(self, entry: str) -> None:
        """Says what was refused of entries of this name."""
        names, classes = self.classes.vocabulary.class_names, self.classes
        for (kind, category), (count, where) in self.uses.items():
            known = kind != "unknown-category"
            name = names[classes.index_of[category]] if known else self.names.get(category)
            called = f" ('{name}')" if name is not None else ""
            what = f"category_id {category!r}{called}: {plural(count, entry)}, first in {where}"
            alike = None if known or name is None else classes.spellings.get(spelling(str(name)))
            remedy = None
            if alike is not None:
                ids = [identifier for identifier, index in classes.index_of.items() if index == alike]
                remedy = f"the id of '{names[alike]}' is {listed(ids)}"
                remedy = f"write '{names[alike]}' in both" if classes.by_name else remedy
            self.issues.add_kind(kind, self.path, what, remedy=remedy)


def _usable_images(issues: Issues, path: Path, images: Iterable[Any], *, needs_file: bool = False) -> dict[str, dict]:
    """Image id as text -> entry of `images`, without entries that say nothing and those that come again."""
    kept: dict[str, dict] = {}
    files: dict[str, Any] = {}
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not _is_id(image.get("id")) or (needs_file and not _file_of(image)):
            missing = "id and file_name" if needs_file else "id"
            issues.add_kind("broken-entry", path, f"entry {number} of 'images': no {missing}")
            continue
        image_id, name = str(image["id"]), _file_of(image)
        if image_id in kept:
            what = f"id {image['id']!r}: {_file_of(kept[image_id])} and {name}"
            issues.add_kind("duplicate-image-id", path, what)
            continue
        if name and name in files:
            issues.add_kind("duplicate-file", path, f"{name}: ids {files[name]!r} and {image['id']!r}")
        files.setdefault(name, image["id"])
        sides = [image.get(key) for key in ("height", "width")]
        if any(side is not None and (not isinstance(side, int) or not 1 <= side <= _LONGEST_SIDE) for side in sides):
            issues.add_kind("broken-entry", path, f"{name or image_id}: height {sides[0]!r}, width {sides[1]!r}")
            image = {key: value for key, value in image.items() if key not in ("height", "width")}
        kept[image_id] = image
    return kept


def _file_of(image: Mapping[str, Any]) -> str:
    """The file that an entry of `images` names; LVIS gives an address."""
    name = image.get("file_name", image.get("coco_url", ""))
    return name if isinstance(name, str) else ""


def _without_nonsense(issues: Issues, path: Path, which: str, entry: dict) -> dict:
    """An entry without an area or box that is not one."""
    area, box = entry.get("area", 0), entry.get("bbox", (0, 0, 0, 0))
    wrong = [] if _is_number(area) else ["area"]
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(_is_number, box)):
        wrong.append("bbox")
    for key in wrong:
        issues.add_kind("broken-entry", path, f"{which}: {key} {entry[key]!r:.60}")
    return {key: value for key, value in entry.items() if key not in wrong} if wrong else entry


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _objects(entries: Any) -> list[dict]:
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
