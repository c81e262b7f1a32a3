"""Whether the files of a data set are whole and fit together: before a GPU is taken.

    python tools/check_dataset.py NAME_OR_YAML [NAME_OR_YAML ...] [--fast] [--preview 12] [--output FILE] [--all]
        [--workers N] [--training NAME] [--vocabularies FOLDER]

Takes registered names (`openvocab_coco_2017_val_panoptic_with_sem_seg`, `shapes_val`, ...) and the YAML files of own
data. Looks at the annotation file, the classes, every image and its labels, as training and evaluation would read
them; --fast leaves the pixels alone. Nothing is written but what --output and --preview ask for.

    error    training or evaluation stops at it, or uses wrong labels
    warning  they run, but probably not as meant
    note     good to know

Leaves with 0, with 1 if there are errors, with 2 when the command line cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pycocotools.mask
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fcclip.checks.dataset import Finding, Report, check_dataset, choose_images
from fcclip.checks.findings import KINDS
from fcclip.data import dataset_vocabulary, get_dataset, read_id_map, read_image, read_label_map, root_folder
from fcclip.data.dataset import Dataset
from fcclip.data.own_description import is_own_data
from fcclip.data.segmentations import fill_polygons
from fcclip.structures import Segment
from fcclip.visualization import contact_sheet, draw_labels, draw_panoptic
from fcclip.vocabulary import Vocabulary

_MARKS = {"error": ("✗", "bold red"), "warning": ("!", "yellow"), "note": ("·", "dim")}
_PLAIN = {"error": "ERROR", "warning": "warn", "note": "note"}
_FEW = 3  # files of a group that are named without --all
_LINE_EVERY_S = 10  # of progress, where there is no terminal
_MOST_WORKERS = 16
_ENOUGH = 500  # images that tell something about the speed
_CELL = (768, 576)  # (width, height) of an image in the preview, pixels
_CAPTION_PX = 18
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the data sets of a command line and returns the exit code."""
    args = parse_arguments(arguments)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    reports = []
    try:
        datasets = [_dataset(name) for name in args.datasets]
        training = {name: _training(args.training, name, args.vocabularies) for name in args.datasets}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, dataset in zip(args.datasets, datasets):
        began = time.perf_counter()
        if isinstance(dataset, Report):
            report = dataset
        else:
            with _progress(name) as progress:
                report = check_dataset(
                    dataset,
                    fast=args.fast,
                    workers=args.workers,
                    progress=progress,
                    vocabularies=args.vocabularies,
                    training=training[name],
                )
        reports.append(report)
        print_report(report, console, seconds=time.perf_counter() - began, every=args.all)
        if args.preview and report.records is not None:
            path = _preview_path(args.output, report.dataset)
            number = write_preview(report, path, args.preview)
            console.print(Text(f"{number} images with their labels: {path}"))
        console.print()
    if args.output:
        content = {"schema": 1, "reports": [report.as_dict() for report in reports]}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        console.print(Text(f"every finding and every class: {args.output}"))
    return 1 if any(report.count("error") for report in reports) else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="NAME_OR_YAML", help="registered data sets, or YAML files")
    parser.add_argument("--fast", action="store_true", help="decode no pixels: annotation files, headers, existence")
    parser.add_argument("--preview", type=int, metavar="N", help="write a sheet of N images with their labels drawn")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write every finding and every class there, as JSON"
    )
    parser.add_argument("--all", action="store_true", help=f"print every finding, not the first {_FEW} of a kind")
    parser.add_argument(
        "--workers", type=int, default=_default_workers(), metavar="N", help="processes (default: one a core; 0: none)"
    )
    parser.add_argument(
        "--training",
        metavar="NAME",
        help="data set whose classes count as seen (default: shapes_train for the shapes, else COCO panoptic)",
    )
    parser.add_argument(
        "--vocabularies", default="", metavar="FOLDER", help="of published vocabulary files (see datasets/README.md)"
    )
    args = parser.parse_args(arguments)
    if args.workers < 0:
        parser.error(f"--workers must be 0 or more, got {args.workers}")
    if args.preview is not None and args.preview < 1:
        parser.error(f"--preview must be 1 or more, got {args.preview}")
    return args


def _default_workers() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, available)


def _dataset(name: str) -> Dataset | Report:
    """The data set of this name; a report of a YAML that is there and describes none.

    Raises:
        ValueError, FileNotFoundError: there is no such data set.
    """
    try:
        return get_dataset(name)
    except (ValueError, OSError) as error:
        if not is_own_data(name) or not Path(name).expanduser().is_file():
            raise
        report = Report(dataset=Path(name).stem, kind="own data", fast=False, source=name)
        report.findings.say("description", name, str(error).removeprefix(f"{name}: "))
        return report


def _training(training: str | None, name: str, vocabularies: str) -> Vocabulary:
    """The words by which classes of the data set `name` count as seen."""
    default = "shapes_train" if name.startswith("shapes_") else "openvocab_coco_2017_train_panoptic_with_sem_seg"
    return dataset_vocabulary(training or default, vocabularies)


# ---- while it runs ----


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """What is called with (images done, images in all): a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = [time.monotonic()]

        def line(done: int, total: int) -> None:
            if time.monotonic() - last[0] >= _LINE_EVERY_S:
                last[0] = time.monotonic()
                print(f"{name}: {done:,} of {total:,} images", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(f"{name}: annotations", total=None)
        yield lambda done, total: bar.update(task, description=name, completed=done, total=total)


# ---- printing ----


def print_report(report: Report, console: Console, *, seconds: float, every: bool) -> None:
    """A summary, the findings and a verdict; on a terminal with marks and colours."""
    marked = console.is_terminal and console.encoding.startswith("utf")
    console.print(Text(f"{report.dataset} ({report.kind})", style="bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in summary(report).items():
        if console.is_terminal:
            table.add_row(Text(f"  {name}", style="dim"), Text(value, overflow="fold"))
        else:
            console.print(Text(f"  {name:<11}{value}"))
    if console.is_terminal:
        console.print(table)
    for group in report.groups():
        _print_group(group, console, marked=marked, every=every)
    console.print(_verdict(report, seconds, marked=marked, coloured=console.is_terminal))


def summary(report: Report) -> dict[str, str]:
    """What the data set is, in lines: heading -> text."""
    root, short = root_folder(), _short(report.source)
    lines = {"files": f"{short} below {root}" if Path(report.source).is_relative_to(root) else short}
    words = report.vocabulary
    if words is not None:
        origin = "published" if words.is_published else "not published"
        count = sum(map(len, words.synonyms))
        of_words = f"{len(words)} classes, {count:,} words, sha256 {words.hash[:12]}"
        lines["vocabulary"] = f"'{words.name}' ({origin}), {of_words}"
    if report.records is not None:
        published = "" if report.num_published is None else f" (published: {report.num_published:,})"
        lines["images"] = f"{report.num_images:,}{published}"
    if report.classes:
        things = sum(one.thing is True for one in report.classes)
        kinds = f"{things} things, {len(report.classes) - things} stuff"
        kinds = "things and stuff are not told apart" if report.classes[0].thing is None else kinds
        used = sum(one.images > 0 for one in report.classes)
        use = f", {used} of them used" if report.knows_classes else ""
        lines["classes"] = f"{len(report.classes)}{use}; {kinds}"
        if report.training is not None:
            seen = sum(bool(one.seen) for one in report.classes)
            lines["seen"] = f"{seen} share a word with the training vocabulary '{report.training}', "
            lines["seen"] += f"{len(report.classes) - seen} are unseen"
    if report.knows_classes and report.kind != "semantic":
        total = sum(one.segments for one in report.classes)
        what = "segments" if report.kind == "panoptic" else "instances"
        lines[what] = f"{total:,}, {report.num_crowds:,} of them crowds"
    return lines


def _print_group(group: list[Finding], console: Console, *, marked: bool, every: bool) -> None:
    first = group[0]
    sign, style = _MARKS[first.severity] if marked else (f"{_PLAIN[first.severity]:<5}", "")
    shown = group if every else group[:_FEW]
    indent = " " * (len(sign) + 3)
    lines = [f"{_short(one.file)}: {one.what}" for one in shown]
    if len(shown) < len(group):
        lines.append(f"and {len(group) - len(shown):,} more (--all, --output)")
    if not first.remedy.startswith("nothing"):
        lines.append(f"{'→' if marked else '->'} {first.remedy}")
    bold = "" if not console.is_terminal else "dim" if first.severity == "note" else "bold"
    head = Text().append(f"  {sign} ", style=style if console.is_terminal else "")
    console.print(head.append(f"{KINDS[first.kind].title}: {len(group):,}", style=bold))
    for line in lines:
        text = Text(line, style="dim" if console.is_terminal and first.severity == "note" else "", overflow="fold")
        if console.is_terminal:
            grid = Table.grid()
            grid.add_row(Text(indent), text)
            console.print(grid)
        else:
            console.print(Text(indent).append(text))


def _verdict(report: Report, seconds: float, *, marked: bool, coloured: bool) -> Text:
    counts = {severity: report.count(severity) for severity in _PLAIN}
    words = [f"{count:,} {severity}{'s' if count != 1 else ''}" for severity, count in counts.items() if count]
    if counts["error"]:
        sign, state, style = "✗", "not fit for use", "bold red"
    elif counts["warning"]:
        sign, state, style = "!", "usable; look at the warnings", "yellow"
    else:
        sign, state, style = "✓", "in order", "bold green"
    enough = report.num_images >= _ENOUGH
    speed = f", {report.num_images / seconds:,.0f} images a second" if enough else ""
    how = "; pixels were not decoded" if report.fast else ""
    found = f" ({', '.join(words)})" if words else ""
    text = f"{sign + ' ' if marked else ''}{report.dataset}: {state}{found}; checked in {seconds:.1f} s{speed}{how}"
    return Text(text, style=style if coloured else "")


def _short(file: str) -> str:
    """A path below the folder of all data sets or the present one, without these."""
    for folder in (root_folder(), Path.cwd()):
        with contextlib.suppress(ValueError):
            return str(Path(file).relative_to(folder))
    return file


# ---- the preview ----


def _preview_path(output: Path | None, name: str) -> Path:
    return (output.parent if output else Path("output")) / f"{name}_preview.jpg"


def write_preview(report: Report, path: Path, number: int) -> int:
    """Writes a sheet of images with their labels; returns how many there are on it."""
    positions = choose_images(report, number)
    if not positions:
        return 0
    records = [report.records[position] for position in positions]
    drawn = [_fitted(report, record) for record in records]
    width = max(one.width for one in drawn if one is not None) if any(drawn) else _CELL[0]
    cells = [_cell(one, Path(record["file_name"]).name, width) for one, record in zip(drawn, records)]
    columns = min(4, math.ceil(math.sqrt(len(cells))))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    sheet = contact_sheet([cells[start : start + columns] for start in range(0, len(cells), columns)])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, quality=90)
    return len(positions)


def _fitted(report: Report, record: Mapping[str, Any]) -> Image.Image | None:
    """An image with its labels that fits into a cell; None if it cannot be read: with --fast nobody has tried."""
    try:
        drawn = Image.fromarray(_drawn(report, record))
    except (ValueError, OSError):
        return None
    factor = min(_CELL[0] / drawn.width, _CELL[1] / drawn.height)
    return drawn.resize((max(1, round(drawn.width * factor)), max(1, round(drawn.height * factor))))


def _cell(drawn: Image.Image | None, caption: str, width: int) -> np.ndarray:
    """(H, W, 3) uint8, an image above its name on a piece of paper of this width."""
    height = _CELL[1]
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), _CAPTION_PX)
    paper = Image.new("RGB", (width, height + 2 * _CAPTION_PX), _PAPER)
    pen = ImageDraw.Draw(paper)
    if drawn is None:
        pen.text((width // 2, height // 2), "cannot be read", _INK, font, anchor="mm")
    else:
        paper.paste(drawn, ((width - drawn.width) // 2, height - drawn.height))
    most = max(4, int(width / (0.7 * _CAPTION_PX)))  # letters, of which the last ones tell images apart
    caption = caption if len(caption) <= most else f"…{caption[1 - most :]}"
    pen.text((width // 2, height + _CAPTION_PX), caption, _INK, font, anchor="mm")
    return np.asarray(paper)


def _drawn(report: Report, record: Mapping[str, Any]) -> np.ndarray:
    """The image with its labels; first made as small as it will be shown, so that names stay readable."""
    image = read_image(record["file_name"])
    names = [one.name for one in report.classes]
    step = max(1, round(max(image.shape[1] / _CELL[0], image.shape[0] / _CELL[1])))
    size = (image.shape[1] // step, image.shape[0] // step)
    box = (0, 0, size[0] * step, size[1] * step)
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, box))

    def reduced(numbers: np.ndarray) -> np.ndarray:
        return numbers[step // 2 :: step, step // 2 :: step][: size[1], : size[0]]

    if report.kind == "semantic":
        labels = read_label_map(record["sem_seg_file_name"])
        return draw_labels(small, reduced(np.where(labels < len(names), labels, -1)), names, ignore_label=-1)
    if report.kind == "panoptic":
        ids, entries = read_id_map(record["pan_seg_file_name"]), record["segments_info"]
    else:
        ids, entries = _painted(record, image.shape[:2])
    ids = reduced(ids)
    segments = []
    for one in entries:
        thing = bool(report.classes[one["category_id"]].thing)
        category = one["category_id"] + (len(names) if one.get("iscrowd", 0) else 0)
        segments.append(Segment(one["id"], category, thing, 1.0, int((ids == one["id"]).sum())))
    return draw_panoptic(small, ids, segments, [*names, *(f"{name} (crowd)" for name in names)], scores=False)


def _painted(record: Mapping[str, Any], shape: tuple[int, int]) -> tuple[np.ndarray, list[dict]]:
    """Instances as an id map (height, width), small ones over large ones, and its segments."""
    masks = []
    for one in record["annotations"]:
        mask = np.zeros(shape, bool)
        if isinstance(one.get("segmentation"), dict):
            mask = pycocotools.mask.decode(one["segmentation"]).astype(bool)
        elif one.get("segmentation"):
            fill_polygons([np.reshape(polygon, (-1, 2)) for polygon in one["segmentation"]], mask)
        masks.append((int(mask.sum()), mask, one))
    ids, segments = np.zeros(shape, np.int32), []
    for number, (_, mask, one) in enumerate(sorted(masks, key=lambda item: -item[0]), start=1):
        ids[mask] = number
        segments.append({"id": number, "category_id": one["category_id"], "iscrowd": one.get("iscrowd", 0)})
    return ids, segments


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    sys.exit(main())
