"""A sheet of images of a data set with their labels drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from PIL import Image, ImageDraw, ImageOps

from fcclip.checks.issue import ERROR
from fcclip.checks.report import DatasetReport
from fcclip.data import read_id_map, read_image, read_label_map
from fcclip.data.segmentations import fill_polygons
from fcclip.structures import Segment
from fcclip.visualization import contact_sheet, draw_labels, draw_panoptic
from fcclip.visualization.draw import label_font

_CELL = (768, 576)  # (width, height) of an image, pixels
_CAPTION_PX = 18
_FILES = ("file_name", "pan_seg_file_name", "sem_seg_file_name")  # of a record
_LETTERS = 60  # of a caption, of which the last ones tell images apart


def write_preview(report: DatasetReport, path: Path, number: int) -> int:
    """Writes a sheet of at most so many images with their labels; returns how many there are on it."""
    records = chosen_records(report, number)
    if not records:
        return 0
    cells = [_cell(report, record) for record in records]
    columns = min(4, math.ceil(math.sqrt(len(cells))))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    sheet = contact_sheet([cells[start : start + columns] for start in range(0, len(cells), columns)])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, quality=90)
    return len(records)


def chosen_records(report: DatasetReport, number: int) -> list[Mapping[str, Any]]:
    """At most so many records to look at, evenly spread; none with an error. The same every time."""
    bad = {issue.file for issue in report.issues if issue.level == ERROR}
    records = (report.records[position] for position in range(len(report.records)))
    good = [record for record in records if bad.isdisjoint(record.get(key) for key in _FILES)]
    number = min(number, len(good))
    return [good[(2 * step + 1) * len(good) // (2 * number)] for step in range(number)]


def _cell(report: DatasetReport, record: Mapping[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8, an image with its labels above its name."""
    paper = Image.new("RGB", (_CELL[0], _CELL[1] + 2 * _CAPTION_PX), "white")
    paper.paste(ImageOps.pad(Image.fromarray(_drawn(report, record)), _CELL, color="white"))
    name = Path(record["file_name"]).name
    caption = name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"
    place = _CELL[0] // 2, _CELL[1] + _CAPTION_PX
    ImageDraw.Draw(paper).text(place, caption, "black", label_font(_CAPTION_PX), anchor="mm")
    return np.asarray(paper)


def _drawn(report: DatasetReport, record: Mapping[str, Any]) -> np.ndarray:
    """The image with its labels; first made as small as it will be shown, so that names stay readable."""
    image = read_image(record["file_name"])
    names = [entry.name for entry in report.classes]
    small = Image.fromarray(image)
    small.thumbnail(_CELL)

    def reduced(numbers: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(numbers.astype(np.int32)).resize(small.size, Image.Resampling.NEAREST))

    if report.kind == "semantic":
        labels = reduced(read_label_map(record["sem_seg_file_name"]))
        return draw_labels(np.asarray(small), np.where(labels < len(names), labels, -1), names, ignore_label=-1)
    if report.kind == "panoptic":
        ids, entries = read_id_map(record["pan_seg_file_name"]), record["segments_info"]
    else:
        ids, entries = _painted(record, image.shape[:2])
    ids = reduced(ids)
    segments = []
    for entry in entries:
        thing = bool(report.classes[entry["category_id"]].thing)
        category = entry["category_id"] + (len(names) if entry.get("iscrowd", 0) else 0)
        segments.append(Segment(entry["id"], category, thing, 1.0, int((ids == entry["id"]).sum())))
    crowds = [f"{name} (crowd)" for name in names]
    return draw_panoptic(np.asarray(small), ids, segments, [*names, *crowds], scores=False)


def _painted(record: Mapping[str, Any], shape: tuple[int, int]) -> tuple[np.ndarray, list[dict]]:
    """Instances as an id map (height, width), small ones over large ones, and its segments."""
    masks = []
    for instance in record["annotations"]:
        mask, segmentation = np.zeros(shape, bool), instance.get("segmentation")
        if isinstance(segmentation, dict):
            mask = pycocotools.mask.decode(segmentation).astype(bool)
        elif segmentation:
            fill_polygons([np.reshape(polygon, (-1, 2)) for polygon in segmentation], mask)
        masks.append((mask, instance))
    ids, segments = np.zeros(shape, np.int32), []
    for number, (mask, instance) in enumerate(sorted(masks, key=lambda pair: -pair[0].sum()), start=1):
        ids[mask] = number
        segments.append({**instance, "id": number})
    return ids, segments
