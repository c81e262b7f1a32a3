"""The one entry for COCO annotations, panoptic and instances: readers, evaluators and checks take them from here.

What can be used comes out in one form: ids as numbers or texts, flags 0 or 1, polygons as flat lists of coordinates,
run-length codes compressed and of the size of their image, areas and boxes where they can be true. Everything else is a
`Problem` and left out: of an error nothing is read (`settle`), the others are told in the log. Nothing here can come to
compiled code unchecked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fcclip.data.segmentations import check_code, compressed
from fcclip.errors import InputError
from fcclip.files import listed

logger = logging.getLogger(__name__)

NOTE, WARNING, ERROR = "note", "warning", "error"
HIGHEST_ID = 2**24 - 1  # of a segment: 24 bits of a PNG
LONGEST_SIDE_PX = 1_000_000  # of an image; more is a mistake
FARTHEST_PX = 100_000  # that a polygon may reach; the COCO tools take memory for all of it
_FAR_PX = 1e9  # that a box may reach


class Kind(NamedTuple):
    """What problems of one kind have in common.

    Args:
        level: "error": the file cannot be used; "warning": something is left out; "note": it is used otherwise.
        title: heading of such problems.
        remedy: what to do.
    """

    level: str
    title: str
    remedy: str


KINDS = {
    "broken-entry": Kind(ERROR, "entries without what they need", "complete or remove them"),
    "duplicate-image-id": Kind(ERROR, "image ids that stand for several images", "give each image an id of its own"),
    "duplicate-segment-id": Kind(
        ERROR,
        "segments of one image with the same id, which cannot be told apart",
        "give each an id of its own (of ADE20K: delete the files and run datasets/prepare_ade20k_pan_seg.py again)",
    ),
    "void-id": Kind(
        ERROR,
        "segment ids that no PNG can hold (1..16777215; 0 is unlabelled)",
        "prepare PNGs and JSON again, together",
    ),
    "unknown-category": Kind(
        ERROR,
        "categories that are no class of the data set",
        "check that the file belongs to this data set; leave out what has no class",
    ),
    "unlisted-image": Kind(
        ERROR, "annotations of images that are not in 'images'", "list the images, or leave the annotations out"
    ),
    "no-mask": Kind(
        ERROR,
        "instances without a segmentation: a box gives no mask",
        "draw the masks, leave these instances out, or mark them iscrowd",
    ),
    "bad-polygon": Kind(ERROR, "polygons that are not numbers within reason", "correct them, or leave them out"),
    "bad-code": Kind(ERROR, "run-length codes that do not fit their image", "encode the masks again"),
    "instance-of-stuff": Kind(
        ERROR,
        "instances of classes that are stuff",
        "mark the classes as things (`things`, or `:thing` at the end), or leave the instances out",
    ),
    "flat-polygon": Kind(
        WARNING,
        "polygons with fewer than three corners, or a corner without its y, are left out",
        "remove them, or draw at least three corners",
    ),
    "flat-instance": Kind(
        WARNING,
        "instances all of whose polygons have fewer than three corners, or a corner without its y, are left out",
        "remove them, or draw at least three corners",
    ),
    "crowd-without-mask": Kind(WARNING, "crowds without a segmentation are left out", "nothing, if that is meant"),
    "duplicate-file": Kind(WARNING, "files that are listed more than once: each counts", "list each file once"),
    "impossible-area": Kind(
        NOTE, "areas that cannot be true are counted from the pixels", "remove them, or count them again"
    ),
    "bad-box": Kind(NOTE, "boxes that are not four finite numbers are not used", "remove them, or compute them again"),
}


class Problem(NamedTuple):
    """What is wrong with an entry.

    Args:
        kind: key of `KINDS`.
        text: which entry, and what.
    """

    kind: str
    text: str


class Entries(NamedTuple):
    """What can be used of an annotation file.

    Args:
        images: id as text -> entry of `images`.
        annotations: those that can be used, in their order.
        problems: what is wrong with the others.
    """

    images: dict[str, dict]
    annotations: list[dict]
    problems: list[Problem]


def settle(where: str, problems: Sequence[Problem], *, expected: str = "") -> None:
    """Says in the log what was left out.

    Args:
        where: data set and file.
        problems: with the file.
        expected: sentence that tells what the file should be.

    Raises:
        ValueError: one of the problems is an error. The first is told, and how many more there are.
    """
    errors = [problem for problem in problems if KINDS[problem.kind].level == ERROR]
    if errors:
        kind, text = errors[0]
        remedy = KINDS[kind].remedy
        message = f"{where}: {text}. {remedy[0].upper()}{remedy[1:]}."
        message += f" {expected}" if kind == "broken-entry" and expected else ""
        message += f" There are {len(errors) - 1} more errors; tools/check_dataset.py lists them." if errors[1:] else ""
        raise InputError(message)
    texts: dict[str, list[str]] = {}
    for problem in problems:
        texts.setdefault(problem.kind, []).append(problem.text)
    for kind, of_kind in texts.items():
        logger.warning("%s: %d %s: %s", where, len(of_kind), KINDS[kind].title, listed(of_kind, 3, separator="; "))


# ---- images ----


def image_entries(images: Any, *, need_file: bool) -> tuple[dict[str, dict], list[Problem]]:
    """Id as text -> entry of `images`, and the problems with the others.

    `id` stays a number or a text, `height` and `width` are whole numbers or missing, and `file_name`, or LVIS'
    `coco_url`, has `/` between folders.

    Args:
        images: the list, or None where the format can do without.
        need_file: an image must name its file.
    """
    kept: dict[str, dict] = {}
    files: dict[str, Any] = {}
    problems: list[Problem] = []
    if images is not None and not isinstance(images, list):
        return kept, [Problem("broken-entry", "'images' is not a list")]
    for number, image in enumerate(images or ()):
        wrong = _image_problem(image, need_file)
        if wrong:
            problems.append(Problem("broken-entry", f"entry {number} of 'images': {wrong}"))
            continue
        image = {**image, "id": whole(image["id"])}
        for key in ("file_name", "coco_url"):
            if isinstance(image.get(key), str):
                image[key] = image[key].replace("\\", "/")
        for key in ("height", "width"):
            if image.get(key) is None:
                image.pop(key, None)
            else:
                image[key] = whole(image[key])
        before = kept.setdefault(str(image["id"]), image)
        if before is not image:
            files_of_both = f"{file_of(before) or '?'} and {file_of(image) or '?'}"
            problems.append(Problem("duplicate-image-id", f"two images have the id {image['id']!r}: {files_of_both}"))
            continue
        name = file_of(image)
        if name and files.setdefault(name, image["id"]) != image["id"]:
            problems.append(
                Problem("duplicate-file", f"{name} is the file of the images {files[name]!r} and {image['id']!r}")
            )
    return kept, problems


def _image_problem(image: Any, need_file: bool) -> str:
    if not isinstance(image, dict) or not is_id(image.get("id")):
        return "no id that is a whole number or a text"
    if need_file and not _is_name(image.get("file_name", image.get("coco_url"))):
        return f"image {image['id']!r} has no file_name that is a text"
    for key in ("height", "width"):
        side = whole(image[key]) if image.get(key) is not None else 1
        if not isinstance(side, int) or not 1 <= side <= LONGEST_SIDE_PX:
            return f"image {image['id']!r} ({file_of(image)}) has the {key} {image[key]!r:.60}"
    return ""


def file_of(image: Mapping[str, Any]) -> str:
    """The file that an entry of `images` names; LVIS gives an address. "": none."""
    name = image.get("file_name", image.get("coco_url", ""))
    return name if isinstance(name, str) else ""


# ---- panoptic ----


def panoptic_entries(content: Mapping[str, Any], classes: Mapping[Any, int]) -> Entries:
    """What can be used of COCO panoptic annotations.

    An annotation that comes out has `image_id`, `file_name` of its PNG, with `/` between folders, and `segments_info`.
    A segment has `id` (1..16777215, once an image), `category_id` and `iscrowd` (0 or 1), and keeps what else it has;
    `area`, in pixels, and `bbox` only where they can be true.

    Args:
        content: of the file; `annotations` is a list.
        classes: category id -> class.
    """
    images, problems = image_entries(content.get("images"), need_file=False)
    categories = _Categories(content, classes)
    kept, files, image_ids = [], set(), set()
    for number, annotation in enumerate(content["annotations"]):
        wrong = _panoptic_problem(annotation)
        if wrong:
            problems.append(Problem("broken-entry", f"annotation {number}: {wrong}"))
            continue
        image_id, name = whole(annotation["image_id"]), annotation["file_name"].replace("\\", "/")
        where = f"annotation {number} ({name}, image {image_id!r})"
        if str(image_id) in image_ids:
            problems.append(Problem("duplicate-image-id", f"{where} is the second annotation of this image"))
            continue
        if name in files:
            problems.append(Problem("duplicate-file", f"{where} is the second annotation with this file"))
        image_ids.add(str(image_id))
        files.add(name)
        largest = _pixels(images.get(str(image_id), {}))
        segments, segment_ids = [], set()
        for segment in annotation["segments_info"]:
            kind, wrong = _segment_problem(segment)
            if not wrong and segment["id"] in segment_ids:
                kind, wrong = "duplicate-segment-id", f"segment {segment['id']!r} comes twice"
            if wrong:
                problems.append(Problem(kind, f"{where}: {wrong}"))
                continue
            segment_ids.add(segment["id"])
            category = whole(segment["category_id"])
            if not categories.refuse(category, where):
                segment = {**segment, "id": whole(segment["id"]), "category_id": category}
                for kind, what in _make_plain(segment, largest):
                    problems.append(Problem(kind, f"{where}, segment {segment['id']}: {what}"))
                segments.append(segment)
        kept.append({**annotation, "image_id": image_id, "file_name": name, "segments_info": segments})
    return Entries(images, kept, problems + categories.problems("segments"))


def _panoptic_problem(annotation: Any) -> str:
    if not isinstance(annotation, dict):
        return "not an object"
    missing = [key for key in ("image_id", "file_name", "segments_info") if key not in annotation]
    if missing:
        return f"no {', no '.join(missing)}"
    if not is_id(annotation["image_id"]) or not _is_name(annotation["file_name"]):
        image_id, name = annotation["image_id"], annotation["file_name"]
        return f"image_id must be a whole number or a text, file_name a text, got {image_id!r:.60} and {name!r:.60}"
    return "" if isinstance(annotation["segments_info"], list) else "segments_info must be a list"


def _segment_problem(segment: Any) -> tuple[str, str]:
    """(kind, what is wrong); ("", "") for a segment that can be used, if its category can."""
    if not isinstance(segment, dict):
        return "broken-entry", "a segment is not an object"
    segment_id = whole(segment.get("id"))
    if not isinstance(segment_id, int) or isinstance(segment_id, bool):
        return "broken-entry", f"id {segment.get('id')!r:.60} of a segment is not a whole number"
    if not 1 <= segment_id <= HIGHEST_ID:
        return "void-id", f"a segment has the id {segment_id}; ids are 1..{HIGHEST_ID}, and 0 is unlabelled"
    wrong = _common_problem(segment)
    return ("broken-entry", f"segment {segment_id}: {wrong}") if wrong else ("", "")


# ---- instances ----


def instance_entries(
    content: Mapping[str, Any],
    classes: Mapping[Any, int],
    *,
    things: Iterable[int] | None = None,
    need_files: bool = True,
) -> Entries:
    """What can be used of COCO instance annotations.

    An annotation that comes out has `image_id` as its image has it, `category_id`, `iscrowd` (0 or 1) and
    `segmentation`: flat lists of coordinates x0, y0, x1, y1, ... in pixels, each with three corners or more, or a
    compressed run-length code of the size of the image. It keeps what else it has; `area`, in pixels, and `bbox` only
    where they can be true.

    Args:
        content: of the file; `images` and `annotations` are lists.
        classes: category id -> class.
        things: classes that instances can have; None: all.
        need_files: images must name their files.
    """
    images, problems = image_entries(content["images"], need_file=need_files)
    categories = _Categories(content, classes, None if things is None else frozenset(things))
    kept = []
    for number, annotation in enumerate(content["annotations"]):
        wrong = _instance_problem(annotation)
        if wrong:
            which = f" (id {annotation['id']!r:.60})" if isinstance(annotation, dict) and "id" in annotation else ""
            problems.append(Problem("broken-entry", f"annotation {number}{which}: {wrong}"))
            continue
        image_id, category = whole(annotation["image_id"]), whole(annotation["category_id"])
        image = images.get(str(image_id))
        where = f"annotation {annotation.get('id', number)!r}"
        if image is None:
            problems.append(Problem("unlisted-image", f"{where}: its image {image_id!r} is not in 'images'"))
            continue
        where = f"{where} of image {image['id']!r} ({file_of(image)})"
        if categories.refuse(category, where):
            continue
        segmentation = _segmentation(annotation, image, where, problems)
        if segmentation is not None:
            fields = {"image_id": image["id"], "category_id": category, "segmentation": segmentation}
            annotation = {**annotation, **fields}
            problems += [Problem(kind, f"{where}: {what}") for kind, what in _make_plain(annotation, _pixels(image))]
            kept.append(annotation)
    return Entries(images, kept, problems + categories.problems("instances"))


def _instance_problem(annotation: Any) -> str:
    if not isinstance(annotation, dict):
        return "not an object"
    if not is_id(annotation.get("image_id")):
        return _id_problem(annotation, "image_id")
    return _common_problem(annotation)


def _segmentation(annotation: dict, image: dict, where: str, problems: list[Problem]) -> list | dict | None:
    """The segmentation of an annotation in its one form; None, with a problem, if there is none that can be used."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        try:
            return _code(segmentation, image)
        except ValueError as error:
            problems.append(Problem("bad-code", f"{where}: {error}"))
            return None
    if segmentation is None or segmentation == []:
        kind = "crowd-without-mask" if flag(annotation.get("iscrowd")) else "no-mask"
        problems.append(Problem(kind, f"{where} has no segmentation, and its box alone gives no mask"))
        return None
    polygons = _flat_lists(segmentation)
    if polygons is None:
        what = "segmentation is neither a list of polygons nor a run-length code"
        problems.append(Problem("broken-entry", f"{where}: {what}: {segmentation!r:.60}"))
        return None
    for number, polygon in enumerate(polygons):
        if not _within_reason(polygon):
            strange = next(value for value in polygon if not _within_reason([value]))
            what = f"polygon {number} has the coordinate {strange!r:.60}; expected numbers of -{FARTHEST_PX} to "
            problems.append(Problem("bad-polygon", f"{where}: {what}{FARTHEST_PX}"))
            return None
    shaped = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if len(shaped) < len(polygons):
        what = f"{len(polygons) - len(shaped)} of {len(polygons)} polygons"
        problems.append(Problem("flat-polygon" if shaped else "flat-instance", f"{where}: {what}"))
    return shaped or None


def _flat_lists(segmentation: Any) -> list[list] | None:
    """Polygons as flat lists, whether they are given so, as lists of corners [x, y], or as a single one; None: they are
    neither."""
    if not isinstance(segmentation, list):
        return None
    if not any(isinstance(part, list) for part in segmentation):
        segmentation = [segmentation]  # a single polygon
    elif all(_is_corner(part) for part in segmentation):
        segmentation = [segmentation]  # one of corners
    polygons = []
    for polygon in segmentation:
        if not isinstance(polygon, list):
            return None
        if polygon and all(_is_corner(part) for part in polygon):
            polygon = [value for corner in polygon for value in corner]
        if any(isinstance(value, (list, dict)) for value in polygon):
            return None
        polygons.append(polygon)
    return polygons


def _is_corner(part: Any) -> bool:
    return isinstance(part, list) and len(part) == 2 and not any(isinstance(value, list) for value in part)


def _within_reason(polygon: Sequence[Any]) -> bool:
    try:
        return all(-FARTHEST_PX <= value <= FARTHEST_PX for value in polygon)  # NaN is not
    except TypeError:
        return False


def _code(segmentation: dict, image: Mapping[str, Any]) -> dict:
    """A compressed run-length code of the size of its image; raises ValueError where it is none."""
    size = segmentation.get("size")
    sides = [whole(side) for side in size] if isinstance(size, list) else []
    if len(sides) != 2 or not all(isinstance(side, int) and 1 <= side <= LONGEST_SIDE_PX for side in sides):
        raise InputError(f"a run-length code needs 'size' [height, width] and 'counts', its size is {size!r:.60}")
    stated = [image.get("height", sides[0]), image.get("width", sides[1])]
    if sides != stated:
        raise InputError(
            f"its run-length code is {sides[0]} x {sides[1]} pixels (height x width), "
            f"its image {stated[0]} x {stated[1]}"
        )
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        counts = [whole(count) for count in counts]
        if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != math.prod(sides):
            raise InputError(f"the runs of its code do not add up to its {sides[0]} x {sides[1]} pixels")
        return compressed({"size": sides, "counts": counts})
    if not isinstance(counts, (str, bytes)):
        raise InputError(f"'counts' of a run-length code must be a list or a text, got {counts!r:.60}")
    code = {"size": sides, "counts": counts}
    check_code(code)
    return code


# ---- what both have ----


class _Categories:
    """Category ids that cannot be used, told once each with how often they are.

    Args:
        content: of the file.
        classes: category id -> class.
        things: classes that can be used; None: all.
    """

    def __init__(
        self, content: Mapping[str, Any], classes: Mapping[Any, int], things: frozenset[int] | None = None
    ) -> None:
        self.content, self.classes, self.things = content, classes, things
        self.uses: dict[tuple[str, Any], list] = {}  # (kind, id) -> [how often, where first]

    def refuse(self, category: int | str, where: str) -> bool:
        """Whether an entry of this category has to be left out."""
        index = self.classes.get(category)
        if index is not None and (self.things is None or index in self.things):
            return False
        kind = "unknown-category" if index is None else "instance-of-stuff"
        self.uses.setdefault((kind, category), [0, where])[0] += 1
        return True

    def problems(self, entries: str) -> list[Problem]:
        """What was refused of entries of this name."""
        categories = self.content.get("categories")
        named = [entry for entry in categories if isinstance(entry, dict)] if isinstance(categories, list) else []
        names = {entry["id"]: entry.get("name") for entry in named if is_id(entry.get("id"))}
        numbers = sorted(key for key in self.classes if isinstance(key, int))
        known = f"{len(self.classes)} classes"
        known += f", ids {numbers[0]}..{numbers[-1]}" if numbers else ""
        problems = []
        for (kind, category), (count, where) in self.uses.items():
            name = f" ('{names[category]}')" if names.get(category) is not None else ""
            what = f"is not a class of the data set ({known})" if kind == "unknown-category" else "is stuff"
            text = f"category_id {category!r}{name} {what}: {count} {entries}, first in {where}"
            problems.append(Problem(kind, text))
        return problems


def _common_problem(entry: dict) -> str:
    """What is wrong with fields that segments and instances share."""
    if not is_id(entry.get("category_id")):
        return _id_problem(entry, "category_id")
    if flag(entry.get("iscrowd")) is None:
        return f"iscrowd must be 0 or 1, got {entry['iscrowd']!r:.60}"
    area = entry.get("area")
    if area is not None and not _is_number(area):
        return f"area must be a number, got {area!r:.60}"
    return ""


def _id_problem(entry: dict, key: str) -> str:
    return f"{key} must be a whole number or a text, got {entry[key]!r:.60}" if key in entry else f"no {key}"


def _make_plain(entry: dict, largest: float) -> list[tuple[str, str]]:
    """Sets `iscrowd` of an entry to 0 or 1 and removes an area or box that cannot be true: (kind, what) of each."""
    problems = []
    entry["iscrowd"] = flag(entry.get("iscrowd"))
    area, box = entry.get("area"), entry.get("bbox")
    if area is None or not 0 < area <= largest:
        entry.pop("area", None)
        if area is not None:
            problems.append(("impossible-area", f"area {area}"))
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) and abs(side) < _FAR_PX for side in box):
        entry.pop("bbox", None)
        if box is not None:
            problems.append(("bad-box", f"bbox {box!r:.60}"))
    return problems


def _pixels(image: Mapping[str, Any]) -> float:
    """How many pixels an image has; infinite where its entry does not say."""
    return image["height"] * image["width"] if "height" in image and "width" in image else math.inf


def whole(value: Any) -> Any:
    """A whole number that JSON gives as 7.0, as 7; everything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def flag(value: Any) -> int | None:
    """0 or 1 of a flag, which is 0 where it is missing or null; None: it is not a flag."""
    if value is None:
        return 0
    return int(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def is_id(value: Any) -> bool:
    """Whether a value can be an id: a whole number or a text."""
    return isinstance(whole(value), (int, str)) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.strip() not in ("", ".") and "\0" not in value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
