"""What is looked at in annotation files, and what is left of them without the entries that no reader takes.

A reader stops at the first thing that is wrong. Here everything wrong is told, and the rest of the file is kept, so
that the images can be looked at all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcclip.checks.findings import PUBLISHED_SO, Findings, plural, some
from fcclip.data.dataset import Dataset
from fcclip.data.own_categories import class_of
from fcclip.data.segmentations import compressed, has_area
from fcclip.vocabulary import Vocabulary

__all__ = ["Classes", "check_categories", "known_classes", "spelling", "usable_instances", "usable_panoptic"]

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


def known_classes(dataset: Dataset, content: Mapping[str, Any]) -> Classes:
    """What the category ids of a file mean.

    Args:
        dataset: with classes that can be read.
        content: of its annotation file.
    """
    vocabulary = dataset.own_vocabulary()
    things = frozenset(vocabulary.thing_classes)
    if "yaml_file" not in dataset.metadata:
        return Classes(vocabulary, dataset.metadata["stuff_dataset_id_to_contiguous_id"], things, by_name=False)
    index_of = {}
    for category in _dicts(content.get("categories")):
        index = class_of(str(category.get("name", "")), vocabulary)
        if index is not None and _is_id(category.get("id")):
            index_of.setdefault(category["id"], index)
    return Classes(vocabulary, index_of, things, by_name=True)


# ---- categories ----


def check_categories(say: Findings, path: Path, content: dict, classes: Classes, *, names_stuff: bool) -> None:
    """The list of categories against the classes; entries that say nothing are taken out of it.

    Args:
        say: takes the findings.
        path, content: the annotation file.
        classes: of the data set.
        names_stuff: whether the list has `isthing`.
    """
    listed = content.get("categories")
    if not isinstance(listed, list) or not listed:
        if classes.by_name:
            return  # its reader needs the list and says so
        say.say("category-not-listed", path, "there is no list 'categories' or it is empty", severity="note")
        return
    kept: dict[Any, dict] = {}
    names: dict[str, Any] = {}
    for number, category in enumerate(listed):
        whole = isinstance(category, dict) and _is_id(category.get("id")) and isinstance(category.get("name"), str)
        if not whole:
            say.say("categories", path, f"entry {number} of 'categories' has no id and name: {str(category)[:80]}")
        elif category["id"] in kept:
            before = kept[category["id"]]["name"]
            say.say("categories", path, f"id {category['id']!r}: '{before}' and '{category['name']}'")
        else:
            kept[category["id"]] = category
            other = names.setdefault(category["name"], category["id"])
            if other != category["id"]:
                say.say("categories", path, f"'{category['name']}' has the ids {other} and {category['id']}")
    content["categories"] = list(kept.values())
    _compare_names(say, path, kept, classes)
    if names_stuff:
        _compare_things(say, path, kept, classes)
    listed_classes = {classes.index_of[one] for one in kept if one in classes.index_of}
    missing = [name for index, name in enumerate(classes.vocabulary.class_names) if index not in listed_classes]
    if missing:
        say.say("class-not-listed", path, some(missing))


def _compare_names(say: Findings, path: Path, categories: Mapping[Any, dict], classes: Classes) -> None:
    """Names in the file against the words of the class."""
    spellings = {spelling(word): index for index, words in _words(classes.vocabulary) for word in words}
    others = []
    for identifier, category in categories.items():
        name = category["name"]
        if identifier not in classes.index_of:
            index = spellings.get(spelling(name))
            if index is not None:
                ours = classes.vocabulary.class_names[index]
                say.say("category-spelling", path, f"'{name}' (id {identifier}); the class is '{ours}'")
            continue
        entry = classes.vocabulary.classes[classes.index_of[identifier]]
        words = {entry.name, *entry.synonyms}
        if name.strip() in words or name.replace("_", " ").strip() in words:
            continue
        if spelling(name) in map(spelling, words):
            say.say("category-spelling", path, f"'{name}' (id {identifier}); the class is '{entry.name}'")
        else:
            others.append(f"'{name}' for '{entry.name}'")
    if others:
        kind = "other-categories" if 2 * len(others) > len(categories) else "category-name"
        say.say(kind, path, f"{len(others)} of {len(categories)}: {some(others)}")


def _words(vocabulary: Vocabulary) -> Iterable[tuple[int, tuple[str, ...]]]:
    return ((index, (entry.name, *entry.synonyms)) for index, entry in enumerate(vocabulary.classes))


def _compare_things(say: Findings, path: Path, categories: Mapping[Any, dict], classes: Classes) -> None:
    """`isthing` of the file against the vocabulary."""
    for identifier, category in categories.items():
        index = classes.index_of.get(identifier)
        if index is None or "isthing" not in category:
            continue
        thing = index in classes.things
        if bool(category["isthing"]) != thing:
            there, here = ("stuff", "a thing") if thing else ("a thing", "stuff")
            what = f"'{category['name']}' (id {identifier}) is {there} in the JSON, {here} in the vocabulary"
            say.say("isthing", path, what)


# ---- panoptic ----


def usable_panoptic(say: Findings, path: Path, content: dict, classes: Classes, *, as_published: bool) -> dict:
    """The content without what its reader refuses.

    Args:
        say: takes the findings.
        path, content: the annotation file; its `annotations` is a list.
        classes: of the data set.
        as_published: segments that share an id are known from the published files.

    Returns:
        The content; `left_out` in it has the ids of segments without a class: image_id as text -> ids.
    """
    images = _usable_images(say, path, content.get("images") or [])
    strange = _Strange(say, path, content, classes)
    twice = {"remedy": PUBLISHED_SO, "severity": "note"} if as_published else {}
    kept, files, known = [], set(), set()
    left_out: dict[str, list[int]] = {}
    for number, annotation in enumerate(content["annotations"]):
        problem = _panoptic_problem(annotation)
        if problem:
            say.say("broken-entry", path, f"annotation {number}: {problem}")
            continue
        name, image_id = annotation["file_name"], str(annotation["image_id"])
        if image_id in known:
            say.say("duplicate-image-id", path, f"image_id {annotation['image_id']!r}: a second annotation, of {name}")
            continue
        known.add(image_id)
        if name in files:
            say.say("duplicate-file", path, f"{name}: listed again with image_id {annotation['image_id']!r}")
            continue
        files.add(name)
        if images and image_id not in images:
            what = f"image_id {annotation['image_id']!r}, {name}"
            say.say("unlisted-image", path, f"{what}: its size is read from its header", severity="warning")
        ids, segments, doubles = set(), [], []
        for segment in annotation["segments_info"]:
            problem = _segment_problem(segment)
            if problem:
                say.say("broken-entry", path, f"{name}: {problem}")
            elif not 1 <= segment["id"] <= _HIGHEST_ID:
                say.say("void-id", path, f"{name}: id {segment['id']}")
            elif strange.refuses(segment["category_id"], name):
                left_out.setdefault(image_id, []).append(segment["id"])
            else:
                if segment["id"] in ids:
                    doubles.append(segment["id"])
                    if not as_published:
                        continue
                ids.add(segment["id"])
                segments.append(_without_nonsense(say, path, f"{name}, segment {segment['id']}", segment))
        if doubles:
            say.say("duplicate-segment-id", path, f"{name}: {some(doubles)}", **twice)
        kept.append({**annotation, "segments_info": segments})
    strange.tell("segment")
    for image_id, image in images.items():
        if image_id not in known:
            say.say("no-annotation", path, f"{image.get('file_name', 'image')} (id {image['id']!r})")
    _tell_sizes(say, path, [images.get(str(one["image_id"]), {}) for one in kept])
    return {**content, "images": list(images.values()), "annotations": kept, "left_out": left_out}


def _panoptic_problem(annotation: Any) -> str:
    if not isinstance(annotation, dict):
        return "it is no object"
    missing = [key for key in ("image_id", "file_name", "segments_info") if key not in annotation]
    if missing:
        return f"no {', no '.join(missing)}"
    if not _is_id(annotation["image_id"]) or not isinstance(annotation["file_name"], str):
        return "image_id must be a number or a text, and file_name a text"
    return "" if isinstance(annotation["segments_info"], list) else "segments_info must be a list"


def _segment_problem(segment: Any) -> str:
    if not isinstance(segment, dict):
        return "a segment is no object"
    missing = [key for key in ("id", "category_id") if key not in segment]
    if missing:
        return f"a segment has no {' and no '.join(missing)}"
    if isinstance(segment["id"], bool) or not isinstance(segment["id"], int) or not _is_id(segment["category_id"]):
        return f"a segment's id {segment['id']!r} or category_id {segment['category_id']!r} is no whole number"
    return ""


# ---- instances ----


def usable_instances(say: Findings, path: Path, content: dict, classes: Classes) -> dict:
    """The content without what its reader refuses.

    Args:
        say: takes the findings.
        path, content: the annotation file; its `images` and `annotations` are lists.
        classes: of the data set.
    """
    images = _usable_images(say, path, content["images"], needs_file=True)
    strange = _Strange(say, path, content, classes)
    kept, ids = [], set()
    orphans: dict[Any, int] = {}
    for number, annotation in enumerate(content["annotations"]):
        whole = isinstance(annotation, dict) and all(_is_id(annotation.get(key)) for key in ("image_id", "category_id"))
        if not whole:
            say.say("broken-entry", path, f"annotation {number}: no image_id and category_id")
            continue
        image = images.get(str(annotation["image_id"]))
        if image is None:
            orphans[annotation["image_id"]] = orphans.get(annotation["image_id"], 0) + 1
            continue
        which = f"annotation {annotation.get('id', number)!r} of {_file_of(image)}"
        if _is_id(annotation.get("id")):
            if annotation["id"] in ids:
                say.say("duplicate-annotation-id", path, which)
            ids.add(annotation["id"])
        if strange.refuses(annotation["category_id"], which, things_only=True):
            continue
        if _segmentation_is_usable(say, path, which, annotation):
            kept.append({**_without_nonsense(say, path, which, annotation), "image_id": image["id"]})
    strange.tell("instance")
    for image_id, count in orphans.items():
        say.say("unlisted-image", path, f"image_id {image_id!r}: {plural(count, 'annotation')}")
    _tell_sizes(say, path, images.values())
    return {**content, "images": list(images.values()), "annotations": kept}


def _segmentation_is_usable(say: Findings, path: Path, which: str, annotation: dict) -> bool:
    """Whether the reader keeps an annotation; says what it refuses or leaves out."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        try:
            _height, _width = compressed(segmentation)["size"]
        except (ValueError, TypeError) as error:
            say.say("bad-code", path, f"{which}: {error}")
            return False
        return True
    if not segmentation:
        if annotation.get("iscrowd", 0):
            return True
        say.say("no-mask", path, which)
        return False
    if not isinstance(segmentation, list) or not all(isinstance(one, list) for one in segmentation):
        say.say("broken-entry", path, f"{which}: segmentation is neither a list of polygons nor a run-length code")
        return False
    flat = sum(not has_area(one) for one in segmentation)
    if flat:
        left = "" if flat < len(segmentation) else ", and with them the instance"
        say.say("bad-polygon", path, f"{which}: {flat} of {len(segmentation)} polygons{left}")
    return flat < len(segmentation)


# ---- what both have ----


class _Strange:
    """Category ids that are no class: told once each, with how often they are used."""

    def __init__(self, say: Findings, path: Path, content: Mapping[str, Any], classes: Classes) -> None:
        self.say, self.path, self.classes = say, path, classes
        categories = _dicts(content.get("categories"))
        self.names = {one["id"]: one.get("name") for one in categories if _is_id(one.get("id"))}
        self.unknown: dict[Any, list] = {}  # id -> [how often, where first]
        self.stuff: dict[Any, list] = {}
        self.unlisted: set[Any] = set()

    def refuses(self, category: Any, where: str, *, things_only: bool = False) -> bool:
        """Whether an entry of this category has to be left out; with `things_only` stuff has to."""
        if category not in self.classes.index_of:
            self.unknown.setdefault(category, [0, where])[0] += 1
            return True
        if things_only and self.classes.index_of[category] not in self.classes.things:
            self.stuff.setdefault(category, [0, where])[0] += 1
            return True
        if self.names and category not in self.names:
            self.unlisted.add(category)
        return False

    def tell(self, entry: str) -> None:
        """Says what was found in entries of this name."""
        spellings = {spelling(word): index for index, words in _words(self.classes.vocabulary) for word in words}
        for category, (count, where) in self.unknown.items():
            name = self.names.get(category)
            called = f" ('{name}')" if name is not None else ""
            what = f"category_id {category!r}{called}: {plural(count, entry)}, first in {where}"
            alike = spellings.get(spelling(str(name))) if name is not None else None
            if alike is None:
                self.say.say("unknown-category", self.path, what)
                continue
            ours = self.classes.vocabulary.class_names[alike]
            ids = [one for one, index in self.classes.index_of.items() if index == alike]
            remedy = f"write '{ours}' in both" if self.classes.by_name else f"the id of '{ours}' is {some(ids)}"
            self.say.say("unknown-category", self.path, what, remedy=remedy)
        for category, (count, where) in self.stuff.items():
            ours = self.classes.vocabulary.class_names[self.classes.index_of[category]]
            what = f"'{ours}' (category_id {category!r}): {plural(count, entry)}, first in {where}"
            self.say.say("instance-of-stuff", self.path, what)
        if self.unlisted:
            self.say.say("category-not-listed", self.path, some(sorted(self.unlisted, key=str)))


def _usable_images(say: Findings, path: Path, images: Iterable[Any], *, needs_file: bool = False) -> dict[str, dict]:
    """Image id as text -> entry of `images`, without entries that say nothing and those that come again."""
    kept: dict[str, dict] = {}
    files: dict[str, Any] = {}
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not _is_id(image.get("id")) or (needs_file and not _file_of(image)):
            wanted = "id and file_name" if needs_file else "id"
            say.say("broken-entry", path, f"entry {number} of 'images': no {wanted}")
            continue
        image_id, name = str(image["id"]), _file_of(image)
        if image_id in kept:
            say.say("duplicate-image-id", path, f"id {image['id']!r}: {_file_of(kept[image_id])} and {name}")
            continue
        if name and name in files:
            say.say("duplicate-file", path, f"{name}: ids {files[name]!r} and {image['id']!r}")
        files.setdefault(name, image["id"])
        sides = [image.get(key) for key in ("height", "width")]
        if any(side is not None and (not isinstance(side, int) or not 1 <= side <= _LONGEST_SIDE) for side in sides):
            say.say("broken-entry", path, f"{name or image_id}: height {sides[0]!r}, width {sides[1]!r}")
            image = {key: value for key, value in image.items() if key not in ("height", "width")}
        kept[image_id] = image
    return kept


def _file_of(image: Mapping[str, Any]) -> str:
    """The file that an entry of `images` names; LVIS gives an address."""
    name = image.get("file_name", image.get("coco_url", ""))
    return name if isinstance(name, str) else ""


def _tell_sizes(say: Findings, path: Path, images: Iterable[Mapping[str, Any]]) -> None:
    without = [_file_of(image) for image in images if not (image.get("height") and image.get("width"))]
    if without:
        say.say("size-not-told", path, f"{plural(len(without), 'image')}: {some(without)}")


def _without_nonsense(say: Findings, path: Path, which: str, entry: dict) -> dict:
    """An entry without an area or box that is none."""
    area, box = entry.get("area", 0), entry.get("bbox", (0, 0, 0, 0))
    wrong = [] if _is_number(area) else ["area"]
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(_is_number, box)):
        wrong.append("bbox")
    if not wrong:
        return entry
    for key in wrong:
        say.say("broken-entry", path, f"{which}: {key} {entry[key]!r:.60}")
    return {key: value for key, value in entry.items() if key not in wrong}


def spelling(word: str) -> str:
    """A word without case, spaces and punctuation."""
    return "".join(letter for letter in word.casefold() if letter.isalnum())


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _dicts(entries: Any) -> list[dict]:
    return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
