"""What the programs datasets/prepare_*.py share: command line, processes, whole files or none, restart and check.

A program says what has to be downloaded, which files become which (`plan`) and how the files of one image are made
(`make`); `run` does the rest:

- everything that is missing is told before anything is written;
- files appear under their names when they are complete, so whatever is there is finished and is not made again;
- images that fail are named together at the end, the others are made;
- the result does not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fcclip.data.catalog import get_dataset, root_folder
from fcclip.data.images import read_id_map
from fcclip.errors import InputError, MissingFileError
from fcclip.preparation.files import check_size, has_content, read_json, read_pixels, remove_leftovers, write_json

SPLITS = ("train", "val")
FOLDERS = {"train": "training", "val": "validation"}  # what ADE20K and the Pascal trees call the splits
MOST_FAILURES = 20  # after so many bad images it is not the images
SHOWN = 10  # of a long list
SAMPLES = 12  # images a split that --check opens
LARGEST_CHUNK = 16  # images handed to a process at a time
MOST_PROCESSES = 16  # by default; more than a disk keeps busy


@dataclass(frozen=True)
class Download:
    """A file or folder that the user has to get.

    Args:
        path: below the folder of all data sets.
        what: what it holds.
        source: which archive of which site it comes from and how it gets there.
    """

    path: str
    what: str
    source: str


@dataclass(frozen=True)
class Task:
    """The files of one image.

    Args:
        name: of the image, unique in its split.
        inputs: what is read.
        outputs: what is written; all of them together.
        details: what else `make` has to know.
    """

    name: str
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...] = ()
    details: Any = None


@dataclass(frozen=True)
class AnnotationFile:
    """A JSON file put together from what `make` returned for each image.

    Args:
        path: below the folder of all data sets, {split} for the split.
        info: how it is made, kept in the file with the split; JSON values, among them `prepared_by`, the program. A
            file with another `info` was made in another way.
        assemble: (tasks, one result a task) -> the content, with `images` whose `id` is the name of the task.
        inspect: (content, some tasks) -> what is wrong with them.
    """

    path: str
    info: Mapping[str, Any]
    assemble: Callable[[Sequence[Task], Sequence[Any]], dict[str, Any]]
    inspect: Callable[[Mapping[str, Any], Sequence[Task]], Iterable[str]]


@dataclass(frozen=True)
class Preparation:
    """How one kind of ground truth is made from a download.

    Args:
        title: of what is made, for the log.
        dataset: name of a registered data set of these images, {split} for the split; it knows how many there are.
        downloads: split -> what is needed.
        plan: (folder of all data sets, split) -> one task an image, in the order of the result.
        make: writes the outputs of one task whether or not they are there; returns what `annotations` needs.
            Deterministic. A function of a module, which processes find by its name.
        label_maps: number of an output that is a label map -> a registered data set that has it.
        image: task -> the image that label maps have the size of.
        annotations: the JSON file that comes of it; None: there is none.
    """

    title: str
    dataset: str
    downloads: Callable[[str], Sequence[Download]]
    plan: Callable[[Path, str], list[Task]]
    make: Callable[[Task], Any]
    label_maps: Mapping[int, str] = field(default_factory=dict)
    image: Callable[[Task], Path] = lambda task: task.inputs[0]
    annotations: AnnotationFile | None = None

    def published_count(self, split: str) -> int:
        """Images of the published set."""
        return get_dataset(self.dataset.format(split=split)).published_count


# ---- the command line ----


def build_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all programs take; `description` is the docstring of the program."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of all data sets (default $DETECTRON2_DATASETS, else datasets)")
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=SPLITS, help="which splits (default train and val)"
    )
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--workers",
        type=int,
        default=min(MOST_PROCESSES, available),
        help="processes; they change nothing but the time",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing: count the files, open some; leave with 1 if any is missing"
    )
    return parser


def run(preparation: Preparation, options: argparse.Namespace) -> int:
    """Prepares, or checks, what the command line asks for; returns the exit status.

    Raises:
        ValueError, OSError: something is not downloaded, broken or cannot be written; see `fcclip.errors.run_program`.
    """
    if options.workers < 1:
        raise InputError(f"--workers must be at least 1, got {options.workers}")
    root = root_folder(options.root)
    splits = [split for split in SPLITS if split in options.splits]
    _check_downloads(preparation, root, splits)
    if options.check:
        return 1 if sum(_check(preparation, root, split) for split in splits) else 0
    try:
        for split in splits:
            _prepare(preparation, root, split, workers=options.workers)
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _check_downloads(preparation: Preparation, root: Path, splits: Sequence[str]) -> None:
    if not root.is_dir():
        raise MissingFileError(
            f"the folder of all data sets, {root.absolute()}, does not exist. Make it, or name the right one with "
            "--root or $DETECTRON2_DATASETS."
        )
    missing = {
        split: [download for download in preparation.downloads(split) if _is_missing(root / download.path)]
        for split in splits
    }
    every = dict.fromkeys(download for downloads in missing.values() for download in downloads)
    if not every:
        return
    lines = [
        f"  {root / download.path}\n    is not there or empty: {download.what}. Get it from {download.source}."
        for download in every
    ]
    complete = [split for split, downloads in missing.items() if not downloads]
    if complete:
        lines.append(f"For what is there alone: --splits {complete[0]}")
    raise MissingFileError(
        "\n".join([f"{preparation.title}: not everything is downloaded.", *lines, "--help shows the whole tree."])
    )


def _is_missing(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else not has_content(path)


# ---- preparing ----


def _prepare(preparation: Preparation, root: Path, split: str, *, workers: int) -> None:
    title = f"{preparation.title}, {split}"
    start = time.monotonic()
    tasks = _planned(preparation, root, split)
    remove_leftovers({output.parent for task in tasks for output in task.outputs})
    parts = _Parts(preparation.annotations, root, split)
    complete = parts.are_collected(tasks)
    pending = [task for task in tasks if not (_is_finished(task) and (complete or parts.has(task)))]
    if complete:
        parts.check_maker(pending)
        jobs = [(task, None) for task in pending]
    else:
        parts.forget_others()  # their PNGs are written over
        jobs = [(task, parts.path_of(task)) for task in pending]
    if jobs:
        if len(jobs) < len(tasks):
            print(f"{title}: {len(tasks) - len(jobs)} of {len(tasks)} images are there already")
        _make_all(preparation.make, jobs, workers=workers, title=title)
    if not complete:
        parts.collect(tasks)
    seconds = time.monotonic() - start
    done = f"made {len(jobs)} in {seconds:.0f} s" if jobs or not complete else "all there already"
    print(f"{title}: {len(tasks)} images, {done}", flush=True)
    published = preparation.published_count(split)
    if len(tasks) != published:
        print(
            f"warning: {title} has {len(tasks)} images, the published set {published}; "
            "results on another set of images are not comparable",
            file=sys.stderr,
        )


def _planned(preparation: Preparation, root: Path, split: str) -> list[Task]:
    tasks = preparation.plan(root, split)
    twice = [name for name, number in Counter(task.name for task in tasks).items() if number > 1]
    if twice:
        raise InputError(
            f"{preparation.title}, {split}: images that are listed more than once: {len(twice)}, e.g. {twice[0]}. "
            "Unpack the download again."
        )
    if not tasks:
        folders = ", ".join(str(root / download.path) for download in preparation.downloads(split))
        raise InputError(f"{preparation.title}, {split}: no images in {folders}. Unpack the download again.")
    return tasks


def _is_finished(task: Task) -> bool:
    return all(map(has_content, task.outputs))


class _Parts:
    """The results of single images, each in a small file until all are there and become one JSON file.

    They lie in a hidden folder beside that file, one a recipe: an interrupted run goes on with its own parts only.
    """

    def __init__(self, annotations: AnnotationFile | None, root: Path, split: str) -> None:
        self.annotations = annotations
        if annotations is None:
            return
        self.target = root / annotations.path.format(split=split)
        self.info = {**annotations.info, "split": split}
        key = zlib.crc32(json.dumps(self.info, sort_keys=True).encode())
        self.folder = self.target.with_name(f".{self.target.name}.{key:08x}.parts")

    def path_of(self, task: Task) -> Path | None:
        return None if self.annotations is None else self.folder / f"{task.name}.json"

    def has(self, task: Task) -> bool:
        return self.annotations is None or self.path_of(task).is_file()

    def are_collected(self, tasks: Sequence[Task]) -> bool:
        """Whether the JSON file is there and lists these images.

        Raises:
            ValueError: the file is another program's and does not fit, or was made in another way.
        """
        if self.annotations is None:
            return True
        remove_leftovers({self.target.parent, self.folder})
        if not self.target.is_file():
            return False
        try:
            content = read_json(self.target)
            listed = [image["id"] for image in content["images"]]
            self.info_there = content.get("info")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{self.target} cannot be used ({error}); it is made anew", file=sys.stderr)
            return False
        fits = sorted(map(str, listed)) == sorted(task.name for task in tasks)
        if self.info_there == self.info:
            return fits
        if isinstance(self.info_there, dict) and self.info_there.get("prepared_by") == self.info["prepared_by"]:
            raise InputError(
                f"{self.target} was made with other options: expected {self.info}, got {self.info_there}. "
                "Delete it to have it and its PNGs made anew."
            )
        if not fits:
            raise InputError(
                f"{self.target} was not made by this program and lists {len(listed)} images, where the download has "
                f"{len(tasks)} or others. Delete it to have it and its PNGs made anew."
            )
        return True

    def check_maker(self, pending: Sequence[Task]) -> None:
        """Refuses to add images to what another program made: its segment ids are others."""
        if self.annotations is not None and pending and self.info_there != self.info:
            raise InputError(
                f"{self.target} was not made by this program, and files of images that it lists are missing: "
                f"{len(pending)}, the first of {pending[0].name}. Delete it to have it and its PNGs made anew."
            )

    def forget_others(self) -> None:
        """Removes the parts of other recipes."""
        for folder in self.target.parent.glob(f".{self.target.name}.*.parts"):
            if folder != self.folder:
                shutil.rmtree(folder)

    def collect(self, tasks: Sequence[Task]) -> None:
        """Writes the JSON file and removes the parts."""
        content = self.annotations.assemble(tasks, [read_json(self.path_of(task)) for task in tasks])
        write_json(self.target, {"info": self.info, **content})
        shutil.rmtree(self.folder)


def _make_all(
    make: Callable[[Task], Any], jobs: Sequence[tuple[Task, Path | None]], *, workers: int, title: str
) -> None:
    failures = []
    attempt = partial(_attempt, make)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress,
        processes(min(workers, len(jobs))) as run_each,
    ):
        for failure in progress.track(run_each(attempt, jobs), total=len(jobs), description=title):
            if failure is not None:
                failures.append(failure)
            if len(failures) >= MOST_FAILURES:
                break
    if failures:
        stopped = " and the rest was not tried" if len(failures) >= MOST_FAILURES else "; the others are made"
        raise InputError(
            "\n".join([
                f"{title}: {len(failures)} of {len(jobs)} images failed{stopped}.",
                *_shown(failures),
                "Put this right and start again: what is finished is kept.",
            ])
        )  # fmt: skip


def _attempt(make: Callable[[Task], Any], job: tuple[Task, Path | None]) -> str | None:
    """Makes one image; returns what went wrong."""
    task, part = job
    try:
        result = make(task)
        if part is not None:
            write_json(part, result)
    except (ValueError, OSError) as error:
        return str(error) if task.name in str(error) else f"{task.name}: {error}"
    return None


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over so many processes, in the order of its arguments; one: this process."""
    if workers == 1:
        yield map
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])  # libraries are imported once, not in each process
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process)
    try:
        yield lambda function, arguments: pool.map(function, arguments, chunksize=_chunk(len(arguments), workers))
    except BrokenProcessPool as error:
        raise OSError(
            "a process was ended from outside, most likely for want of memory. Start again with fewer --workers: what "
            "is finished is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunk(number: int, workers: int) -> int:
    """How many of `number` images a process gets at a time: all have something to do until the end."""
    return max(1, min(LARGEST_CHUNK, number // (4 * workers)))


def _start_process() -> None:
    """What a process does first: Ctrl-C is its parent's affair, and without a parent it has nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ---- checking ----


def _check(preparation: Preparation, root: Path, split: str) -> int:
    """Prints what is wrong with a split; returns the number of lines."""
    title = f"{preparation.title}, {split}"
    tasks = _planned(preparation, root, split)
    problems = []
    missing = [str(path) for task in tasks for path in task.outputs if not has_content(path)]
    if missing:
        problems.append(f"missing or empty files: {len(missing)}; run without --check to make them")
        problems += _shown(missing)
    published = preparation.published_count(split)
    if len(tasks) < published:
        problems.append(f"the download has {len(tasks)} images, the published set {published}")
    complete = [task for task in tasks if _is_finished(task)]
    samples = complete[:: -(-len(complete) // SAMPLES) or 1]
    for task in samples:
        for number, dataset in preparation.label_maps.items():
            problems += _label_problems(task.outputs[number], preparation.image(task), dataset)
    if preparation.annotations is not None:
        problems += _annotation_problems(preparation.annotations, root, split, tasks, samples)
    if problems:
        print("\n".join([f"{title}: not in order", *(f"  {problem}" for problem in problems)]), file=sys.stderr)
    else:
        print(f"{title}: {len(tasks)} images, all there; {len(samples)} opened and in order")
    return len(problems)


def _annotation_problems(
    annotations: AnnotationFile, root: Path, split: str, tasks: Sequence[Task], samples: Sequence[Task]
) -> list[str]:
    path = root / annotations.path.format(split=split)
    if not path.is_file():
        return [f"{path} is missing; run without --check to make it"]
    try:
        content = read_json(path)
        listed = {str(image["id"]) for image in content["images"]}
        unlisted = [task.name for task in tasks if task.name not in listed]
        if unlisted:
            return [f"{path} does not list {len(unlisted)} of {len(tasks)} images, e.g. {unlisted[0]}"]
        return list(annotations.inspect(content, samples))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path}: {error!r}; delete it and run without --check"]


def _label_problems(path: Path, image: Path, dataset: str) -> Iterator[str]:
    """What is wrong with a label map of a registered data set."""
    metadata = get_dataset(dataset).metadata
    num_classes, ignore_label = len(metadata["stuff_classes"]), metadata["ignore_label"]
    try:
        labels = read_pixels(path)
        check_size(path, labels, image)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    wrong = [value for value in np.unique(labels).tolist() if value >= num_classes and value != ignore_label]
    if wrong:
        yield f"{path}: value {wrong[0]} is neither a class (0..{num_classes - 1}) nor {ignore_label} (no class)"


def panoptic_content(
    tasks: Sequence[Task], parts: Sequence[Mapping[str, Any]], *, categories: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A COCO panoptic JSON file: the first input of a task is its image, the first output its id PNG, and its part
    holds `height`, `width` and `segments_info`."""
    images, annotations = [], []
    for task, part in zip(tasks, parts, strict=True):
        size = {"width": part["width"], "height": part["height"]}
        images.append({"id": task.name, "file_name": task.inputs[0].name, **size})
        segments = {"file_name": task.outputs[0].name, "segments_info": part["segments_info"]}
        annotations.append({"image_id": task.name, **segments})
    return {"images": images, "annotations": annotations, "categories": list(categories)}


def panoptic_problems(content: Mapping[str, Any], tasks: Sequence[Task]) -> Iterator[str]:
    """Compares the id PNG of each task, its first output, with its annotation."""
    annotations = {annotation["image_id"]: annotation for annotation in content["annotations"]}
    for task in tasks:
        path = task.outputs[0]
        if task.name not in annotations:
            yield f"{path}: the JSON file has no annotation of it"
            continue
        try:
            in_png = {*np.unique(read_id_map(path)).tolist()} - {0}
        except (ValueError, OSError) as error:
            yield str(error)
            continue
        unknown = sorted(in_png - {segment["id"] for segment in annotations[task.name]["segments_info"]})
        if unknown:
            yield f"{path}: id {unknown[0]} is not in the JSON file; they come from different runs, delete the JSON"


def _shown(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"  {line}" for line in lines[:SHOWN]] + more
