"""A page with the best, the median and the worst images of each data set: HTML without scripts, links within its
folder."""

from __future__ import annotations

import html
import io
import math
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fcclip.data import Dataset, read_image
from fcclip.errors import InputError
from fcclip.evaluation.ground_truth import GroundTruth
from fcclip.evaluation.predictions import SavedPredictions
from fcclip.evaluation.results import format_value, headlines
from fcclip.files import read_json, write_atomically
from fcclip.reports.zero_shot import FAIL, PASS, Report, columns_of_sets
from fcclip.structures import Segment
from fcclip.visualization import draw_labels, draw_panoptic

WIDTH_PX = 800  # of the stored images, at most
BINS = 20  # of the histogram over images
_NAMES = {"panoptic_seg": "PQ", "sem_seg": "mIoU"}  # task -> what an image alone is judged by
_CLASSES = {"panoptic_seg": "PQ-", "sem_seg": "IoU-"}  # task -> beginning of the metrics of single classes
_NUM_CLASSES = 6  # weakest and strongest classes that are named
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6570; --line: #d9dee3; --paper: #ffffff; --card: #f6f8fa;
  --bar: #3b7dd8; --best: #1f8a4c; --median: #8a6d1f; --worst: #b3402f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b0; --line: #333b43; --paper: #14181c;
  --card: #1d2329; --bar: #6aa5f0; --best: #5cc98a; --median: #d9b75c; --worst: #ee8474; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 8px; padding-top: 12px;
  border-top: 1px solid var(--line); } h3 { font-size: 15px; margin: 20px 0 8px; }
h3.best { color: var(--best); } h3.median { color: var(--median); } h3.worst { color: var(--worst); }
a { color: inherit; } nav a { margin-right: 14px; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 12px 0; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.first, th.first { border-left: 1px solid var(--line); }
td.fail { color: var(--worst); font-weight: 600; } td.pass { color: var(--best); }
.facts { display: flex; flex-wrap: wrap; gap: 24px; align-items: flex-end; }
.facts svg { display: block; } rect { fill: var(--bar); } .facts td, .facts th { border: 0; padding: 0 10px 0 0; }
figure { margin: 0 0 16px; padding: 10px; background: var(--card); border-radius: 8px; }
figure div { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; }
figure a { text-decoration: none; color: var(--soft); font-size: 13px; }
figure img { width: 100%; height: auto; display: block; border-radius: 4px; }
figcaption { margin-bottom: 6px; } figcaption b { font-variant-numeric: tabular-nums; }
@media (max-width: 700px) { figure div { grid-template-columns: 1fr; } }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; } dt { color: var(--soft); } dd { margin: 0;
  overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class PageSet:
    """A data set on the page.

    Args:
        dataset: the data set.
        folder: of its saved predictions and `per_image.json`.
        results: task -> metric -> percent.
    """

    dataset: Dataset
    folder: Path
    results: Mapping[str, Mapping[str, float]]


def write_page(
    report: Report, sets: Sequence[PageSet], folder: str | os.PathLike, *, images: int, title: str = "Evaluation"
) -> Path:
    """Writes `index.html` and the images it shows.

    Args:
        report: its row and notes stand on top.
        sets: the data sets.
        folder: made when missing; may be moved as a whole.
        images: how many of the best, of the median and of the worst ones, for each data set.
        title: the heading.

    Returns:
        The path of `index.html`.

    Raises:
        ValueError: `images` below 1, or saved predictions that are broken.
    """
    if images < 1:
        raise InputError(f"--images must be 1 or more, got {images}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    anchors = (f'<a href="#{_anchor(shown)}">{_text(shown.dataset.name)}</a>' for shown in sets)
    notes = (f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in report.notes.items())
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(report.notes.get("weights", ""))}</p>',
        f"<nav>{''.join(anchors)}</nav>",
        _table(report),
        *(_section(shown, folder, images) for shown in sets),
        f"<h2>With what it was evaluated</h2>\n<dl>{''.join(notes)}</dl>",
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )
    path = folder / "index.html"
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


def choose_cases(values: Mapping[Hashable, float], number: int) -> dict[str, list[Hashable]]:
    """Best, median and worst images, none of them twice; those for which nothing is defined are left out.

    Args:
        values: image id -> how good it is.
        number: of each kind, fewer where there are not enough.

    Example:
        >>> choose_cases({"a": 1.0, "b": 5.0, "c": 3.0, "d": float("nan")}, 1)
        {'best': ['b'], 'median': ['c'], 'worst': ['a']}
    """
    defined = [image_id for image_id, value in values.items() if not math.isnan(value)]
    ranked = sorted(defined, key=lambda image_id: (-values[image_id], str(image_id)))
    number = min(number, max(1, len(ranked) // 3))
    start = max(number, (len(ranked) - number) // 2)
    best, worst = ranked[:number], ranked[number:][-number:][::-1]
    median = [image_id for image_id in ranked[start : start + number] if image_id not in worst]
    return {"best": best, "median": median, "worst": worst}


def _section(shown: PageSet, folder: Path, number: int) -> str:
    judged = {
        task: {image_id: math.nan if value is None else value for image_id, value in values}
        for task, values in read_json(shown.folder / "per_image.json").items()
    }
    task = next((task for task in _NAMES if judged.get(task)), None)
    parts = [f'<h2 id="{_anchor(shown)}">{_text(shown.dataset.name)}</h2>']
    if task is None:
        return "\n".join([*parts, "<p>Its metrics say nothing about a single image.</p>"])
    parts.append(_facts(shown, task, judged[task]))
    saved = SavedPredictions(shown.folder)
    records = {record["image_id"]: record for record in shown.dataset.records()}
    (folder / _anchor(shown)).mkdir(exist_ok=True)
    for kind, image_ids in choose_cases(judged[task], number).items():
        parts += [f'<h3 class="{kind}">{kind.capitalize()}</h3>'] if image_ids else []
        for rank, image_id in enumerate(image_ids, start=1):
            drawings = _drawings(
                records[image_id], saved.read(image_id), shown.dataset, panoptic=task == "panoptic_seg"
            )
            figures = [
                f"{_NAMES[name]} <b>{format_value(judged[name].get(image_id, math.nan))}</b>"
                for name in sorted(judged, key=lambda name: name != task)
            ]
            caption = " &middot; ".join([_text(image_id), *figures])
            file_name = Path(records[image_id]["file_name"]).name
            images = []
            for what, pixels in drawings.items():
                link = f"{_anchor(shown)}/{kind}{rank}_{what.replace(' ', '_')}.jpg"
                height, width = _save(folder / link, pixels)
                images.append(
                    f'<a href="{link}"><img src="{link}" width="{width}" height="{height}" loading="lazy" '
                    f'alt="{_text(f"{what}: {file_name}")}">{what}</a>'
                )
            parts.append(f"<figure><figcaption>{caption}</figcaption><div>{''.join(images)}</div></figure>")
    return "\n".join(parts)


def _facts(shown: PageSet, task: str, values: Mapping[Hashable, float]) -> str:
    """Headline figures, how the images are distributed, the weakest and the strongest classes."""
    metrics = {name: groups for name, groups in headlines(shown.results).items() if not math.isnan(groups["all"])}
    rows = ["".join(f"<th>{name}</th>" for name in ("", *metrics))]
    for group, label in (("all", "all classes"), ("seen", "seen"), ("unseen", "unseen")):
        cells = [format_value(groups[group]) for groups in metrics.values()]
        if any(cell != "-" for cell in cells):
            rows.append("".join(f"<td>{cell}</td>" for cell in (label, *cells)))
    table = f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    prefix = _CLASSES[task]
    classes = sorted(
        (value, name.removeprefix(prefix))
        for name, value in shown.results.get(task, {}).items()
        if name.startswith(prefix) and not math.isnan(value)
    )
    number = min(_NUM_CLASSES, len(classes) // 2)
    lines = []
    for what, chosen in (("weakest classes", classes[:number]), ("strongest classes", classes[::-1][:number])):
        names = ", ".join(f"{_text(name)} {value:.0f}" for value, name in chosen)
        lines += [f'<div><span class="soft">{what} ({_NAMES[task]}):</span> {names}</div>'] if chosen else []
    return f'<div class="facts">{table}{_histogram(values.values(), _NAMES[task])}</div>{"".join(lines)}'


def _histogram(values: Iterable[float], name: str) -> str:
    """Number of images by how good they are, as an SVG."""
    defined = [value for value in values if not math.isnan(value)]
    counts = np.histogram(defined, bins=BINS, range=(0, 100))[0].tolist()
    highest, wide, high = max(counts) or 1, 14, 70
    bars = []
    for index, count in enumerate(counts):
        size = round(high * count / highest, 1)
        low, up = (100 * edge // BINS for edge in (index, index + 1))
        bars.append(
            f'<rect x="{index * wide + 1}" y="{high - size}" width="{wide - 2}" height="{size}">'
            f"<title>{name} {low} to {up}: {count} images</title></rect>"
        )
    for x, anchor, text in ((0, "start", "0"), (0.5, "middle", f"{name} of an image"), (1, "end", "100")):
        bars.append(
            f'<text x="{x * BINS * wide}" y="{high + 14}" font-size="11" fill="currentColor" text-anchor="{anchor}">'
            f"{text}</text>"
        )
    label = f"{len(defined)} images by {name}"
    return f'<svg role="img" aria-label="{label}" width="{BINS * wide}" height="{high + 18}">{"".join(bars)}</svg>'


def _table(report: Report) -> str:
    """The row with the published one."""
    columns = columns_of_sets(report.cells)
    first = {members[0] for members in columns}
    top = "".join(
        f'<th class="first" colspan="{len(members)}">{_text(report.cells[members[0]].label)}</th>'
        for members in columns
    )
    head = "".join(_cell("th", cell.column, index in first) for index, cell in enumerate(report.cells))
    lines = [f"<th></th>{top}", f"<th></th>{head}"]
    for name, values in report.rows():
        cells = []
        for index, (cell, value) in enumerate(zip(report.cells, values)):
            verdict = cell.verdict.lower() if name == "difference" and cell.verdict in (PASS, FAIL) else ""
            cells.append(_cell("td", value, index in first, verdict))
        lines.append(f"<td>{_text(name)}</td>{''.join(cells)}")
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _cell(tag: str, text: str, is_first: bool, verdict: str = "") -> str:
    classes = " ".join(filter(None, ["first" if is_first else "", verdict]))
    return f'<{tag} class="{classes}">{_text(text)}</{tag}>' if classes else f"<{tag}>{_text(text)}</{tag}>"


def _drawings(record: Mapping, output: Mapping[str, Any], dataset: Dataset, *, panoptic: bool) -> dict[str, np.ndarray]:
    """What -> (H, W, 3) uint8 RGB: the image, its ground truth and the prediction."""
    image, names = read_image(record["file_name"]), dataset.metadata["stuff_classes"]
    ground_truth = GroundTruth(record, dataset.metadata.get("ignore_label", 255))
    if panoptic:
        id_map, segments = output["panoptic_seg"]
        keys = ("id", "category_id", "isthing", "score", "area")
        truth = [Segment(**{key: {"score": 1.0, **segment}[key] for key in keys}) for segment in ground_truth.segments]
        predicted = [Segment(**{key: segment[key] for key in keys}) for segment in segments]
        return {
            "image": image,
            "ground truth": draw_panoptic(image, ground_truth.id_map, truth, names, scores=False),
            "prediction": draw_panoptic(image, id_map, predicted, names),
        }
    ignore_label = ground_truth.ignore_label
    labels = np.where(output["sem_seg"] == len(names), ignore_label, output["sem_seg"])
    return {
        "image": image,
        "ground truth": draw_labels(image, ground_truth.labels, names, ignore_label=ignore_label),
        "prediction": draw_labels(image, labels, names, ignore_label=ignore_label),
    }


def _save(path: Path, pixels: np.ndarray) -> tuple[int, int]:
    """Writes a JPEG of at most `WIDTH_PX`; its (height, width)."""
    height, width = pixels.shape[:2]
    if width > WIDTH_PX:
        height, width = max(1, round(height * WIDTH_PX / width)), WIDTH_PX
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="JPEG", quality=88)
    path.write_bytes(content.getvalue())
    return height, width


def _anchor(shown: PageSet) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", shown.dataset.name)


def _text(text: object) -> str:
    return html.escape(str(text), quote=True)
