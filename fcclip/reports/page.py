"""A page with the best, the median and the worst images of each data set: HTML without scripts, links within its
folder."""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcclip.data import Dataset, read_image
from fcclip.errors import InputError
from fcclip.evaluation.ground_truth import GroundTruth
from fcclip.evaluation.predictions import SavedPredictions
from fcclip.evaluation.results import format_value
from fcclip.files import read_json, write_atomically
from fcclip.reports.zero_shot import Report
from fcclip.structures import Segment
from fcclip.visualization import draw_labels, draw_panoptic

WIDTH_PX = 800  # of the stored images, at most
_NAMES = {"panoptic_seg": "PQ", "sem_seg": "mIoU"}  # task -> what an image alone is judged by
_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 1500px; padding: 24px; font: 15px/1.5 system-ui, sans-serif; }
pre { overflow-x: auto; }
figure { margin: 0 0 16px; }
figure div { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; }
figure img { width: 100%; height: auto; display: block; }
@media (max-width: 700px) { figure div { grid-template-columns: 1fr; } }
"""


def write_page(
    report: Report,
    sets: Sequence[tuple[Dataset, Path]],
    folder: str | os.PathLike,
    *,
    images: int,
    title: str = "Evaluation",
) -> Path:
    """Writes `index.html` and the images it shows.

    Args:
        report: its text stands on top.
        sets: data sets, each with the folder of its saved predictions and `per_image.json`.
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
    sections = [_section(dataset, saved, folder, images) for dataset, saved in sets]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n<pre>{_text(report.text())}</pre>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
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


def _section(dataset: Dataset, saved_folder: Path, folder: Path, number: int) -> str:
    judged = {
        task: {image_id: math.nan if value is None else value for image_id, value in values}
        for task, values in read_json(saved_folder / "per_image.json").items()
    }
    task = next((task for task in _NAMES if judged.get(task)), None)
    parts = [f"<h2>{_text(dataset.name)}</h2>"]
    if task is None:
        return "\n".join([*parts, "<p>Its metrics say nothing about a single image.</p>"])
    saved = SavedPredictions(saved_folder)
    records = {record["image_id"]: record for record in dataset.records()}
    place = re.sub(r"[^A-Za-z0-9_.-]", "_", dataset.name)  # below the page, and in its links
    (folder / place).mkdir(exist_ok=True)
    for kind, image_ids in choose_cases(judged[task], number).items():
        parts += [f"<h3>{kind.capitalize()}</h3>"] if image_ids else []
        for rank, image_id in enumerate(image_ids, start=1):
            figures = [
                f"{_NAMES[name]} <b>{format_value(judged[name].get(image_id, math.nan))}</b>"
                for name in sorted(judged, key=lambda name: name != task)
            ]
            caption = " &middot; ".join([_text(image_id), *figures])
            record, images = records[image_id], []
            drawings = _drawings(record, saved.read(image_id), dataset, panoptic=task == "panoptic_seg")
            for what, pixels in drawings.items():
                link = f"{place}/{kind}{rank}_{what.replace(' ', '_')}.jpg"
                _save(folder / link, pixels)
                alternative = _text(f"{what}: {Path(record['file_name']).name}")
                images.append(f'<a href="{link}"><img src="{link}" loading="lazy" alt="{alternative}">{what}</a>')
            parts.append(f"<figure><figcaption>{caption}</figcaption><div>{''.join(images)}</div></figure>")
    return "\n".join(parts)


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


def _save(path: Path, pixels: np.ndarray) -> None:
    """Writes a JPEG of at most `WIDTH_PX`."""
    image = Image.fromarray(pixels)
    image.thumbnail((WIDTH_PX, image.height), Image.Resampling.BOX)
    image.save(path, quality=88)


def _text(text: object) -> str:
    return html.escape(str(text), quote=True)
