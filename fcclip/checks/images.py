"""The files of one image: image, id PNG, label map, instances. Runs in processes of its own.

Files are read by the functions that training and evaluation read them with, so that an issue is what these would do.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask

from fcclip.checks.issue import NOTE, Issues
from fcclip.checks.kinds import PUBLISHED_SO
from fcclip.data import read_id_map, read_label_map
from fcclip.data.images import Header, read_header, read_pil_image
from fcclip.data.segmentations import check_code, has_area, paint_classes, starts_of_runs
from fcclip.files import listed

Record = Mapping[str, Any]  # of a data set
_LOSSY = ("JPEG", "JPEG2000", "WEBP", "AVIF")
_MOST_DISAGREEMENT = 0.01  # of the pixels that label map and id PNG both give a class


@dataclass(frozen=True)
class Rules:
    """What holds for all images of a data set.

    Args:
        class_names: in order.
        ignore_label: value of unlabelled pixels in label maps; None: there are no label maps.
        stale_areas: areas and segments without a pixel are as published (ADE20K: measured before instances were painted
            over the stuff), so they are notes.
        has_label_maps: whether label maps of panoptic records are read.
    """

    class_names: tuple[str, ...]
    ignore_label: int | None
    stale_areas: bool = False
    has_label_maps: bool = True


@dataclass
class ImageReport:
    """What the files of one image hold, and what is wrong with them.

    Args:
        issues: about its files.
        classes: class -> [instances or segments, pixels].
    """

    issues: Issues = field(default_factory=Issues)
    classes: dict[int, list[int]] = field(default_factory=dict)

    def count(self, class_index: int, pixels: int) -> None:
        """Adds a segment or an instance."""
        entry = self.classes.setdefault(class_index, [0, 0])
        entry[0] += 1
        entry[1] += pixels


def check_image(rules: Rules, record: Record) -> ImageReport:
    """Everything that is wrong with the files of one record; raises nothing."""
    report = ImageReport()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on profiles, large images and the like
            size = _check_pixels(report.issues, record)
            if "segments_info" in record:
                _check_segments(report, record, rules, size)
            elif "sem_seg_file_name" in record:
                _check_label_map(report, record, rules, size)
            if "annotations" in record:
                _check_instances(report, record, rules, size)
    except Exception as error:  # one strange file does not end the check of a hundred thousand
        report.issues.add_kind("checker", record["file_name"], f"{type(error).__name__}: {error}")
    return report


# ---- the image ----


class _Sizes(NamedTuple):
    """(height, width) of an image: as the loader gives it and as it is stored; they differ where EXIF turns it."""

    upright: tuple[int, int]
    stored: tuple[int, int]


def _check_pixels(issues: Issues, record: Record) -> _Sizes | None:
    """The size of the image, or None if it has none."""
    path = record["file_name"]
    try:
        header = read_header(path)
        read_pil_image(path)
    except FileNotFoundError:
        return issues.add_kind("missing-image", path, "no such file")
    except (ValueError, OSError) as error:
        return issues.add_kind("unreadable-image", path, _reason(error, path))
    return _compare_sizes(issues, record, header)


def _compare_sizes(issues: Issues, record: Record, header: Header) -> _Sizes:
    """The image as the loader turns it against what the annotations say; and, where it is turned, its labels.

    Returns:
        The sizes that the labels should have: where the image is another one, what the annotations say.
    """
    path, upright, stored = record["file_name"], header.upright, header.stored
    stated = (record["height"], record["width"]) if "height" in record else None
    if header.orientation != 1 and upright == stored:
        what = f"orientation {header.orientation}, {_sized(upright)} before and after"
        issues.add_kind("turned-unclear", path, what)
    elif header.orientation != 1 and stored in (stated, _label_size(record)):
        what = f"orientation {header.orientation}: labelled as stored, {_sized(stored)}; turned to {_sized(upright)}"
        issues.add_kind("turned", path, what)
        return _Sizes(upright, stored)
    if stated in (None, upright):
        return _Sizes(upright, stored)
    issues.add_kind("image-size", path, f"{_sized(upright)}, its annotation says {_sized(stated)}")
    return _Sizes(stated, stated)


def _label_size(record: Record) -> tuple[int, int] | None:
    """(height, width) of the labels of an image, where they have one."""
    if "annotations" in record:
        codes = (instance.get("segmentation") for instance in record["annotations"])
        return next((tuple(code["size"]) for code in codes if isinstance(code, dict)), None)
    try:
        return read_header(record.get("pan_seg_file_name") or record["sem_seg_file_name"]).stored
    except (ValueError, OSError):
        return None  # what reads the file itself says so


# ---- segments ----


def _check_segments(report: ImageReport, record: Record, rules: Rules, size: _Sizes | None) -> None:
    segments = record["segments_info"]
    ids = _read_labels(report.issues, record["pan_seg_file_name"], rules, size, kind="ids")
    areas = {} if ids is None else areas_of(ids)
    for segment in segments:
        report.count(segment["category_id"], areas.get(segment["id"], 0))
    if not segments:
        report.issues.add_kind("empty", record["file_name"], "no segment")
    if ids is not None:
        _compare_segments(report.issues, record, rules, areas)
    if rules.has_label_maps and record.get("sem_seg_file_name"):
        labels = _check_label_map(report, record, rules, size)
        if labels is not None and ids is not None and labels.shape == ids.shape and not rules.stale_areas:
            _compare_classes(report.issues, record, rules, ids, labels)


def _compare_segments(issues: Issues, record: Record, rules: Rules, areas: Mapping[int, int]) -> None:
    """Ids and areas of the JSON against those of the PNG."""
    path, segments = record["pan_seg_file_name"], record["segments_info"]
    known = {segment["id"] for segment in segments}
    unknown = [number for number in areas if number and number not in known.union(record.get("left_out", ()))]
    if unknown:
        ids = f"{listed(unknown, 5)} ({plural(sum(areas[number] for number in unknown), 'pixel')})"
        issues.add_kind("unknown-id", path, f"{ids}; the JSON has {listed(sorted(known), 5) or 'no id'}")
    as_published = {"remedy": PUBLISHED_SO, "level": NOTE} if rules.stale_areas else {}
    empty = [segment["id"] for segment in segments if not areas.get(segment["id"])]
    if empty:
        issues.add_kind("empty-segment", path, f"id {listed(empty, 5)}", **as_published)
    wrong = [
        f"id {segment['id']}: {segment['area']} in the JSON, {areas[segment['id']]} in the PNG"
        for segment in segments
        if areas.get(segment["id"]) and segment.get("area", areas[segment["id"]]) != areas[segment["id"]]
    ]
    if wrong:
        issues.add_kind("area", path, _first(wrong), **as_published)


def _compare_classes(issues: Issues, record: Record, rules: Rules, ids: np.ndarray, labels: np.ndarray) -> None:
    """The label map against the classes of the segments."""
    classes = paint_classes(ids, record["segments_info"], rules.ignore_label)
    both = (classes != rules.ignore_label) & (labels != rules.ignore_label)
    different = both & (classes != labels)
    share = different.sum() / max(both.sum(), 1)
    if share > _MOST_DISAGREEMENT:
        first, names = np.unravel_index(different.argmax(), different.shape), dict(enumerate(rules.class_names))
        label, ours = (names.get(int(numbers[first]), int(numbers[first])) for numbers in (labels, classes))
        what = f"{share:.0%} of the pixels with a class, e.g. '{label}' where the id PNG has '{ours}'"
        issues.add_kind("labels-disagree", record["sem_seg_file_name"], what)


# ---- label maps ----


def _check_label_map(report: ImageReport, record: Record, rules: Rules, size: _Sizes | None) -> np.ndarray | None:
    """(H, W) labels of a map that is there and has the size of its image."""
    path = record["sem_seg_file_name"]
    labels = _read_labels(report.issues, path, rules, size, kind="labels")
    if labels is None:
        return None
    number = len(rules.class_names)
    areas = areas_of(labels)
    unknown = [value for value in areas if not 0 <= value < number and value != rules.ignore_label]
    if unknown:
        pixels = plural(sum(areas[value] for value in unknown), "pixel")
        what = f"{listed(unknown, 5)} ({pixels}); classes are 0..{number - 1}, unlabelled is {rules.ignore_label}"
        remedy = "prepare the label maps again"
        if unknown == [number]:
            remedy = "if labels begin at 1, subtract 1 from all"
        if len(unknown) == 1:
            remedy += f"; if {unknown[0]} means unlabelled, set ignore_label: {unknown[0]}"
        report.issues.add_kind("unknown-label", path, what, remedy=remedy)
    if "segments_info" not in record:
        for value in areas:
            if 0 <= value < number:
                report.count(value, areas[value])
        if not report.classes:
            report.issues.add_kind("empty", record["file_name"], f"all of {Path(path).name} is unlabelled or no class")
    return labels


def _read_labels(issues: Issues, path: str, rules: Rules, size: _Sizes | None, *, kind: str) -> np.ndarray | None:
    """The numbers of an id PNG (`kind` "ids") or a label map ("labels"); None: they are not read or do not fit."""
    try:
        header = read_header(path)
    except FileNotFoundError:
        return issues.add_kind(f"missing-{kind}", path, "no such file")
    except (ValueError, OSError) as error:
        return issues.add_kind("unreadable-labels", path, _reason(error, path))
    if header.format in _LOSSY:
        return issues.add_kind("lossy-labels", path, f"a {header.format} file, whatever its name says")
    fits = size is None or header.stored == size.upright
    if not fits and header.stored != size.stored:  # those that EXIF turns away are told with the image
        issues.add_kind("label-size", path, f"{_sized(header.stored)}, its image is {_sized(size.upright)}")
    try:
        values = read_id_map(path) if kind == "ids" else read_label_map(path)
    except (ValueError, OSError) as error:
        return issues.add_kind("unreadable-labels", path, _reason(error, path))
    return values if fits else None


# ---- instances ----


def _check_instances(report: ImageReport, record: Record, rules: Rules, size: _Sizes | None) -> None:
    path, instances = record["file_name"], record["annotations"]
    stated = (record["height"], record["width"]) if "height" in record else None
    shape = size.upright if size is not None else stated
    problems: list[str] = []
    for instance in instances:
        try:
            area = 0 if shape is None else _mask_area(instance.get("segmentation"), shape)
        except (ValueError, TypeError, IndexError) as error:
            area = 0
            problems.append(f"'{rules.class_names[instance['category_id']]}': {error}")
        report.count(instance["category_id"], area)
    if problems:
        report.issues.add_kind("bad-code", path, _first(problems))
    if not instances:
        report.issues.add_kind("empty", path, "no annotation")


def _mask_area(segmentation: dict | list | None, shape: tuple[int, int]) -> int:
    """Pixels of polygons or a run-length code in an image (height, width).

    Raises:
        ValueError, TypeError, IndexError: a code that is broken or of another size.
    """
    if not segmentation:
        return 0
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != shape:
            raise ValueError(f"{_sized(segmentation['size'])}, its image is {_sized(shape)}")
        check_code(segmentation)
        return int(pycocotools.mask.area(segmentation))
    polygons = [polygon for polygon in segmentation if has_area(polygon)]
    return int(pycocotools.mask.area(pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, *shape))))


def areas_of(numbers: np.ndarray) -> dict[int, int]:
    """Number -> its pixels in a map (H, W) of integers, from its runs: segments are few and large."""
    flat = numbers.ravel()
    starts = starts_of_runs(flat)
    values, which = np.unique(flat[starts], return_inverse=True)
    areas = np.bincount(which, weights=np.diff(starts, append=flat.size)).astype(np.int64)
    return dict(zip(values.tolist(), areas.tolist()))


# ---- texts ----


def _reason(error: Exception, path: str) -> str:
    """What an error says without the name of the file and without what to do."""
    text = str(error).removeprefix(f"{path}: ").removeprefix("cannot be read as an image: ")
    return text.removesuffix(" Copy or prepare the file again.").removesuffix(".")


def _sized(size: Any) -> str:
    return f"{size[0]} x {size[1]} (height x width)"


def _first(problems: list[str]) -> str:
    return problems[0] + (f"; and {len(problems) - 1} more in this image" if len(problems) > 1 else "")


def plural(count: int, word: str) -> str:
    """A number of things.

    Example:
        >>> plural(1200, "pixel"), plural(1, "pixel")
        ('1,200 pixels', '1 pixel')
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"
