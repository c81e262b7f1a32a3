"""What is looked at in the files of one image; runs in processes of its own, so it knows a record and nothing else.

Files are read by the functions that training and evaluation read them with, so that a finding is what these would do.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
from PIL import Image

from fcclip.checks.findings import PUBLISHED_SO, Findings, plural, some
from fcclip.data.images import Header, read_header, read_id_map, read_label_map, read_pil_image
from fcclip.data.segmentations import check_code, has_area

__all__ = ["Looked", "Rules", "look", "regions"]

_LOSSY = ("JPEG", "JPEG2000", "WEBP", "AVIF")
_TAILS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what stands at the end of a whole file
_TAIL_BYTES = 1024  # some programs write more behind it
_OUTSIDE_PX = 1.0  # boxes may reach so far out of the image: published ones are rounded
_SMALLEST_OVERLAP = 0.5  # of the box in the JSON and the one of the mask, intersection over union
_AREA_SHARE, _AREA_PX = 0.25, 64  # an instance's area in the JSON may differ so much: polygons are not pixels
_MOST_DISAGREEMENT = 0.01  # of the pixels that label map and id PNG both give a class
_DARK = 32  # brightest value of 255 of an image of 16 bits of which little is left


@dataclass(frozen=True)
class Rules:
    """What holds for all images of a data set.

    Args:
        class_names: in order.
        ignore_label: value of unlabelled pixels in label maps; None: there are no label maps.
        fast: pixels are not decoded.
        stale_areas: areas, boxes and segments without a pixel are as published (ADE20K: measured before instances were
            painted over the stuff), so they are notes.
        has_label_maps: whether label maps of panoptic records are looked at.
    """

    class_names: tuple[str, ...]
    ignore_label: int | None
    fast: bool
    stale_areas: bool = False
    has_label_maps: bool = True


@dataclass
class Looked:
    """What was found in one image.

    Args:
        findings: about its files.
        classes: class -> [instances or segments, pixels].
        num_crowds: segments or instances that are crowds.
    """

    findings: Findings = field(default_factory=Findings)
    classes: dict[int, list[int]] = field(default_factory=dict)
    num_crowds: int = 0

    def say(self, kind: str, file: object, what: str, **changes: str) -> None:
        """Adds a finding; see `Findings.say`."""
        self.findings.say(kind, file, what, **changes)

    def count(self, class_index: int, pixels: int) -> None:
        """Adds a segment or an instance."""
        entry = self.classes.setdefault(class_index, [0, 0])
        entry[0] += 1
        entry[1] += pixels


def look(rules: Rules, record: Mapping[str, Any]) -> Looked:
    """Everything that is wrong with the files of one record; raises nothing."""
    looked = Looked()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on profiles, large images and the like
            size = _look_at_image(looked, record, rules)
            if "segments_info" in record:
                _look_at_segments(looked, record, rules, size)
            elif "sem_seg_file_name" in record:
                _look_at_labels(looked, record, rules, size)
            if "annotations" in record:
                _look_at_instances(looked, record, rules, size)
    except Exception as error:  # one strange file does not end the check of a hundred thousand
        looked.say("checker", record["file_name"], f"{type(error).__name__}: {error}")
    return looked


# ---- the image ----


class _Sizes(NamedTuple):
    """(height, width) of an image: as the loader gives it and as it is stored; they differ where EXIF turns it."""

    upright: tuple[int, int]
    stored: tuple[int, int]


def _look_at_image(looked: Looked, record: Mapping[str, Any], rules: Rules) -> _Sizes | None:
    """The size of the image, or None if it has none."""
    path = record["file_name"]
    try:
        header = read_header(path)
        if not rules.fast:
            brightest, opaque = _decoded(path, header)
    except FileNotFoundError:
        return looked.say("missing-image", path, "no such file")
    except (ValueError, OSError) as error:
        return looked.say("unreadable-image", path, _reason(error, path))
    if header.mode == "F" or (header.mode == "I" and header.format != "PNG"):  # as read_pil_image says with the pixels
        return looked.say("unreadable-image", path, "numbers of which nothing says what is black and what is white")
    if rules.fast and not _has_tail(path, header.format):
        looked.say("cut-off", path, f"no end of a {header.format} file in its last {_TAIL_BYTES} bytes")
    if header.mode in ("L", "1"):
        looked.say("grey", path, "one channel")
    elif header.mode == "CMYK":
        looked.say("cmyk", path, "four inks")
    if header.is_deep:
        dark = "" if rules.fast else f"; the brightest value that is left is {brightest} of 255"
        if dark and brightest < _DARK:
            dark += ": nearly black, it was not stored in the full range"
        looked.say("deep", path, f"16 bits a channel{dark}")
    if header.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        if rules.fast or opaque:
            looked.say("alpha", path, "an alpha channel" if rules.fast else "an alpha channel, opaque everywhere")
        else:
            looked.say("transparent", path, "some pixels are not opaque")
    return _compare_sizes(looked, record, header)


def _decoded(path: str, header: Header) -> tuple[int, bool]:
    """(brightest value, whether it is opaque) of an image whose pixels can be read; for others an error is raised."""
    image = read_pil_image(path)
    brightest = max(high for _, high in image.getextrema()) if header.is_deep else 255
    if header.mode not in ("RGBA", "LA", "PA", "RGBa", "La"):
        return brightest, True
    with Image.open(path) as stored:
        return brightest, stored.convert("RGBA").getextrema()[3][0] == 255


def _compare_sizes(looked: Looked, record: Mapping[str, Any], header: Header) -> _Sizes:
    """The image as the loader turns it against what the annotations say; and, where it is turned, its labels.

    Returns:
        The sizes that the labels should have: where the image is another one, what the annotations say.
    """
    path, upright, stored = record["file_name"], header.upright, header.stored
    stated = (record["height"], record["width"]) if "height" in record else None
    sizes = _Sizes(upright, stored)
    if header.orientation != 1 and upright == stored:
        what = f"orientation {header.orientation}, {_sized(upright)} before and after"
        looked.say("turned-unclear", path, what)
    elif header.orientation != 1:
        turn = f"orientation {header.orientation}"
        if stored in (stated, _label_size(record)):
            what = f"{turn}: stored and labelled as {_sized(stored)}, turned to {_sized(upright)}"
            looked.say("turned", path, what)
            return sizes
        if stated in (None, upright):
            looked.say("turned-right", path, f"{turn}: stored as {_sized(stored)}, turned to {_sized(upright)}")
    if stated in (None, upright):
        return sizes
    looked.say("image-size", path, f"{_sized(upright)}, its annotation says {_sized(stated)}")
    return _Sizes(stated, stated)


def _label_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the labels of an image, where they have one."""
    if "annotations" in record:
        codes = (one.get("segmentation") for one in record["annotations"])
        return next((tuple(code["size"]) for code in codes if isinstance(code, dict)), None)
    return _stored_size(record.get("pan_seg_file_name") or record["sem_seg_file_name"])


def _stored_size(path: str) -> tuple[int, int] | None:
    try:
        return read_header(path).stored
    except (ValueError, OSError):
        return None  # what reads the file itself says so


# ---- segments ----


def _look_at_segments(looked: Looked, record: Mapping[str, Any], rules: Rules, size: _Sizes | None) -> None:
    segments = record["segments_info"]
    id_map = _read_labels(looked, record["pan_seg_file_name"], rules, size, kind="ids")
    found = None if id_map is None else regions(id_map)
    areas = {} if found is None else dict(zip(found.values.tolist(), found.areas.tolist()))
    for one in segments:
        crowd = bool(one.get("iscrowd", 0))
        looked.num_crowds += crowd
        area = one.get("area", 0) if found is None else areas.get(one["id"], 0)
        looked.count(one["category_id"], int(area) if isinstance(area, (int, float)) else 0)
    if not segments:
        looked.say("empty", record["file_name"], "no segment")
    elif all(one.get("iscrowd", 0) for one in segments):
        looked.say("crowd-only", record["file_name"], plural(len(segments), "crowd segment"))
    if found is not None:
        _compare_segments(looked, record, rules, found, areas)
    if rules.has_label_maps and record.get("sem_seg_file_name"):
        labels = _look_at_labels(looked, record, rules, size)
        if labels is not None and found is not None and labels.shape == id_map.shape and not rules.stale_areas:
            _compare_classes(looked, record, rules, found, labels)


def _compare_segments(
    looked: Looked, record: Mapping[str, Any], rules: Rules, found: Regions, areas: Mapping[int, int]
) -> None:
    """Ids, areas and boxes of the JSON against those of the PNG."""
    path, segments = record["pan_seg_file_name"], record["segments_info"]
    known = {one["id"] for one in segments}
    told = known.union(record.get("left_out", ()))
    unknown = [one for one in areas if one and one not in told]
    if unknown:
        pixels = sum(areas[one] for one in unknown)
        ids = f"{some(unknown)} ({plural(pixels, 'pixel')})"
        looked.say("unknown-id", path, f"{ids}; the JSON has {some(sorted(known)) or 'no id'}{_shift(unknown, known)}")
    as_published = {"remedy": PUBLISHED_SO, "severity": "note"} if rules.stale_areas else {}
    empty = [one["id"] for one in segments if not areas.get(one["id"])]
    if empty:
        looked.say("empty-segment", path, f"id {some(empty)}", **as_published)
    wrong = [
        f"id {one['id']}: {one['area']} in the JSON, {areas[one['id']]} in the PNG"
        for one in segments
        if areas.get(one["id"]) and "area" in one and one["area"] != areas[one["id"]]
    ]
    if wrong:
        looked.say("area", path, _first(wrong), **as_published)
    boxes = dict(zip(found.values.tolist(), found.boxes.tolist()))
    strange = [
        f"id {one['id']}: {_box(one['bbox'])} in the JSON, {_box(boxes[one['id']])} around its pixels"
        for one in segments
        if areas.get(one["id"]) and "bbox" in one and not _is_around(one["bbox"], boxes[one["id"]])
    ]
    if strange:
        looked.say("box-of-segment", path, _first(strange), **({"remedy": PUBLISHED_SO} if rules.stale_areas else {}))


def _shift(unknown: list[int], known: set[int]) -> str:
    """Says so where all ids are the same number away from those of the JSON."""
    for step in (1, -1):
        if {one - step for one in unknown} <= known:
            return f": every id is {'higher' if step > 0 else 'lower'} by one"
    return ""


def _compare_classes(
    looked: Looked, record: Mapping[str, Any], rules: Rules, found: Regions, labels: np.ndarray
) -> None:
    """The label map against the classes of the segments, at the middle of each run of equal ids."""
    class_of = {one["id"]: one["category_id"] for one in record["segments_info"]}
    classes = np.array([class_of.get(value, -1) for value in found.values.tolist()], np.int64)[found.which]
    there = labels.ravel()[found.starts + found.lengths // 2]
    both = (classes >= 0) & (there != rules.ignore_label)
    total = int(found.lengths[both].sum())
    different = both & (classes != there)
    pixels = int(found.lengths[different].sum())
    if total and pixels > _MOST_DISAGREEMENT * total:
        first = int(np.argmax(np.where(different, found.lengths, 0)))
        pair = [_class_name(rules, int(value)) for value in (there[first], classes[first])]
        looked.say(
            "labels-disagree",
            record["sem_seg_file_name"],
            f"{pixels / total:.0%} of the pixels with a class, e.g. {pair[0]} where the id PNG has {pair[1]}",
        )


# ---- label maps ----


def _look_at_labels(looked: Looked, record: Mapping[str, Any], rules: Rules, size: _Sizes | None) -> np.ndarray | None:
    """(H, W) labels of a map that is there and has the size of its image."""
    path, is_truth = record["sem_seg_file_name"], "segments_info" not in record
    labels = _read_labels(looked, path, rules, size, kind="labels")
    if labels is None:
        return None
    found = regions(labels)
    names = range(len(rules.class_names))
    areas = dict(zip(found.values.tolist(), found.areas.tolist()))
    unknown = [value for value in areas if value not in names and value != rules.ignore_label]
    known = [value for value in areas if value in names]
    if unknown:
        pixels = sum(areas[value] for value in unknown)
        looked.say(
            "unknown-label",
            path,
            f"{some(unknown)} ({plural(pixels, 'pixel')}); classes are 0..{names[-1]}, unlabelled is "
            f"{rules.ignore_label}",
            remedy=_label_remedy(unknown, rules),
        )
    if is_truth:
        for value in known:
            looked.count(value, areas[value])
        if not known:
            looked.say("empty", record["file_name"], f"all of {Path(path).name} is unlabelled or no class")
    return labels


def _label_remedy(unknown: list[int], rules: Rules) -> str:
    """What to do about values that are no class."""
    number = len(rules.class_names)
    if unknown == [number]:
        return f"if labels begin at 1, subtract 1 from all; if {number} means unlabelled, set ignore_label: {number}"
    if len(unknown) == 1:
        return f"prepare the label maps again; if {unknown[0]} means unlabelled, set ignore_label: {unknown[0]}"
    return "prepare the label maps again: they hold numbers of other classes"


def _read_labels(looked: Looked, path: str, rules: Rules, size: _Sizes | None, *, kind: str) -> np.ndarray | None:
    """The numbers of an id PNG (`kind` "ids") or a label map ("labels"); None: they are not read or do not fit."""
    try:
        header = read_header(path)
    except FileNotFoundError:
        return looked.say(f"missing-{kind}", path, "no such file")
    except (ValueError, OSError) as error:
        return looked.say("unreadable-labels", path, _reason(error, path))
    if header.format in _LOSSY:
        return looked.say("lossy-labels", path, f"a {header.format} file, whatever its name says")
    fits = size is None or header.stored == size.upright
    if not fits and header.stored != size.stored:  # those that EXIF turns away are told with the image
        looked.say("label-size", path, f"{_sized(header.stored)}, its image is {_sized(size.upright)}")
    numbers = header.mode in ("L", "P", "I") or header.mode.startswith("I;16")
    if kind == "labels" and not numbers:
        return looked.say("coloured-labels", path, _pixels_of(header.mode))
    if kind == "ids" and header.is_deep:
        return looked.say("unreadable-labels", path, "16 bits a channel; an id PNG has 8")
    if rules.fast:
        if not _has_tail(path, header.format):
            looked.say("cut-off", path, f"no end of a {header.format} file in its last {_TAIL_BYTES} bytes")
        return None
    try:
        values = read_id_map(path) if kind == "ids" else read_label_map(path)
    except (ValueError, OSError) as error:
        return looked.say("unreadable-labels", path, _reason(error, path))
    return values if fits else None


def _pixels_of(mode: str) -> str:
    kinds = {"RGB": "three channels, probably colours of classes", "1": "one bit a pixel", "F": "fractions"}
    kinds |= {"RGBA": "four channels, probably colours of classes", "LA": "grey with alpha", "PA": "palette with alpha"}
    return f"{kinds.get(mode, 'several channels')} (Pillow's mode '{mode}')"


# ---- instances ----


def _look_at_instances(looked: Looked, record: Mapping[str, Any], rules: Rules, size: _Sizes | None) -> None:
    path, instances = record["file_name"], record["annotations"]
    stated = (record["height"], record["width"]) if "height" in record else None
    shape = size.upright if size is not None else stated
    boxes, areas, empty, codes = [], [], [], []
    for one in instances:
        which = f"annotation {one['id']}" if "id" in one else f"an annotation of class {one['category_id']}"
        looked.num_crowds += bool(one.get("iscrowd", 0))
        area = one.get("area", 0)
        if shape is not None:
            boxes += [f"{which}: {problem}" for problem in _box_problems(one.get("bbox"), shape)]
            code = one["segmentation"] if isinstance(one.get("segmentation"), dict) else None
            if code is not None and tuple(code["size"]) != shape:
                codes.append(f"{which}: {_sized(code['size'])}, its image is {_sized(shape)}")
            elif not rules.fast and one.get("segmentation"):
                try:
                    area, around = _mask_area(one["segmentation"], shape)
                except (ValueError, TypeError, IndexError) as error:
                    codes.append(f"{which}: {error}")
                else:
                    if area == 0:
                        empty.append(which)
                    elif abs(area - one.get("area", area)) > max(_AREA_PX, _AREA_SHARE * area):
                        areas.append(f"{which}: {one['area']:g} in the JSON, {area} pixels")
                    box = one.get("bbox")
                    if area and box and not _box_problems(box, shape) and _overlap(box, around) < _SMALLEST_OVERLAP:
                        boxes.append(f"{which}: {_box(box)}, its mask lies in {_box(around)}")
        looked.count(one["category_id"], int(area))
    for kind, what in (("box", boxes), ("instance-area", areas), ("empty-mask", empty), ("bad-code", codes)):
        if what:
            looked.say(kind, path, _first(what))
    if not instances:
        looked.say("empty", path, "no annotation")
    elif all(one.get("iscrowd", 0) for one in instances):
        looked.say("crowd-only", path, plural(len(instances), "crowd"))


def _box_problems(box: Any, shape: tuple[int, int]) -> list[str]:
    """What is wrong with a box [x, y, width, height] in an image (height, width); None: there is no box."""
    if box is None:
        return []
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return [f"{_box(box)} has no size"]
    beyond = max(-x, -y, x + width - shape[1], y + height - shape[0])
    return [] if beyond <= _OUTSIDE_PX else [f"{_box(box)} reaches out of an image of {_sized(shape)}"]


def _overlap(box: list[float], other: list[float]) -> float:
    """Intersection over union of two boxes [x, y, width, height]."""
    return float(pycocotools.mask.iou(np.array([box], np.float64), np.array([other], np.float64), [0])[0, 0])


def _is_around(box: list[float], tight: list[int]) -> bool:
    """Whether no side of a box [x, y, width, height] is more than a pixel away from where it should be."""
    sides = [(one[0], one[1], one[0] + one[2], one[1] + one[3]) for one in (box, tight)]
    return all(abs(here - there) <= 1 for here, there in zip(*sides))


def _mask_area(segmentation: dict | list, shape: tuple[int, int]) -> tuple[int, list[float]]:
    """(pixels, box around them) of polygons or a run-length code.

    Raises:
        ValueError: the code is broken.
    """
    code = segmentation
    if isinstance(segmentation, list):
        polygons = [one for one in segmentation if has_area(one)]
        code = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, *shape))
    else:
        check_code(code)
    return int(pycocotools.mask.area(code)), pycocotools.mask.toBbox(code).tolist()


# ---- regions of equal numbers ----


@dataclass(frozen=True)
class Regions:
    """The pixels of each number in a map.

    Args:
        values: (n,) the numbers, ascending.
        areas: (n,) int64, pixels of each.
        boxes: (n, 4) int64, [x, y, width, height] around them.
        starts, lengths: (r,) runs of equal numbers in a row: index of the first pixel in the flat map, and pixels.
        which: (r,) index into `values`.
    """

    values: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    which: np.ndarray


def regions(numbers: np.ndarray) -> Regions:
    """What a map (H, W) of integers is made of, from its runs: segments are few and large."""
    height, width = numbers.shape
    flat = numbers.ravel()
    begins = np.empty(flat.size, bool)
    begins[:1] = True
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[::width] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=flat.size)
    values, which = np.unique(flat[starts], return_inverse=True)
    left, right = np.full(len(values), width), np.zeros(len(values), np.int64)
    top, bottom = np.full(len(values), height), np.zeros(len(values), np.int64)
    rows, columns = np.divmod(starts, width)
    np.minimum.at(left, which, columns)
    np.maximum.at(right, which, columns + lengths)
    np.minimum.at(top, which, rows)
    np.maximum.at(bottom, which, rows + 1)
    areas = np.bincount(which, weights=lengths, minlength=len(values)).astype(np.int64)
    return Regions(values, areas, np.stack([left, top, right - left, bottom - top], 1), starts, lengths, which)


# ---- words ----


def _has_tail(path: str, file_format: str) -> bool:
    """Whether a file ends as its format does; True for formats of which nothing is known."""
    tail = _TAILS.get(file_format)
    if tail is None:
        return True
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        return tail in file.read()


def _reason(error: Exception, path: str) -> str:
    """What an error says without the name of the file and without what to do."""
    text = str(error).removeprefix(f"{path}: ").removeprefix("cannot be read as an image: ")
    return text.removesuffix(" Copy or prepare the file again.").removesuffix(".")


def _sized(size: Any) -> str:
    return f"{size[0]} x {size[1]} (height x width)"


def _box(box: Any) -> str:
    return f"[{', '.join(f'{side:g}' for side in box)}]"


def _class_name(rules: Rules, index: int) -> str:
    return f"'{rules.class_names[index]}'" if 0 <= index < len(rules.class_names) else str(index)


def _first(problems: list[str]) -> str:
    return problems[0] + (f"; and {len(problems) - 1} more in this image" if len(problems) > 1 else "")
