"""What the programs datasets/prepare_*.py share: command line, processes, whole files or none, restart.

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
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fcclip.data.catalog import get_dataset, root_folder
from fcclip.errors import InputError, MissingFileError
from fcclip.preparation.files import has_content, read_json, write_json

SPLITS = ("train", "val")
FOLDERS = {"train": "training", "val": "validation"}  # what ADE20K and the Pascal trees call the splits
MOST_FAILURES = 20  # after so many bad images it is not the images
SHOWN = 10  # of these
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
    """

    path: str
    info: Mapping[str, Any]
    assemble: Callable[[Sequence[Task], Sequence[Any]], dict[str, Any]]


@dataclass(frozen=True)
class Preparation:
    """How one kind of ground truth is made from a download.

    Args:
        title: of what is made, for the log.
        dataset: name of a registered data set of these images, {split} for the split; it knows how many there are.
            "": there is none.
        downloads: split -> what is needed.
        plan: (folder of all data sets, split) -> one task an image, in the order of the result.
        make: writes the outputs of one task whether or not they are there; returns what `annotations` needs.
            Deterministic. A function of a module, which processes find by its name.
        annotations: the JSON file that comes of it; None: there is none.
    """

    title: str
    dataset: str
    downloads: Callable[[str], Sequence[Download]]
    plan: Callable[[Path, str], list[Task]]
    make: Callable[[Task], Any]
    annotations: AnnotationFile | None = None


# ---- the command line ----


def build_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all programs take; `description` is the docstring of the program."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", help="folder of all data sets (default $DETECTRON2_DATASETS, else datasets)")
    add("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="which splits (default train and val)")
    add("--workers", type=int, default=default_processes(), help="processes; they change nothing but the time")
    return parser


def main_of(preparation: Preparation, description: str) -> Callable[..., int]:
    """The `main` of a program that prepares one thing; `description` is its docstring."""
    return lambda arguments=None: run(preparation, build_parser(description).parse_args(arguments))


def default_processes() -> int:
    """One a core that this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_PROCESSES, available)


def new_progress(**options: Any) -> Progress:
    """A bar on a terminal, on standard error; elsewhere nothing is shown."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, **options)


def run(preparation: Preparation, options: argparse.Namespace) -> int:
    """Prepares what the command line asks for; returns the exit status.

    Raises:
        ValueError, OSError: something is not downloaded, broken or cannot be written; see `fcclip.errors.run_program`.
    """
    if options.workers < 1:
        raise InputError(f"--workers must be at least 1, got {options.workers}")
    root = root_folder(options.root)
    splits = [split for split in SPLITS if split in options.splits]
    _check_downloads(preparation, root, splits)
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
    downloads = dict.fromkeys(download for split in splits for download in preparation.downloads(split))
    lines = [
        f"  {root / download.path}\n    is not there or empty: {download.what}. Get it from {download.source}."
        for download in downloads
        if _is_missing(root / download.path)
    ]
    if lines:
        last = "--splits val prepares one split alone, --help shows the whole tree."
        raise MissingFileError("\n".join([f"{preparation.title}: not everything is downloaded.", *lines, last]))


def _is_missing(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else not has_content(path)


# ---- preparing ----


def _prepare(preparation: Preparation, root: Path, split: str, *, workers: int) -> None:
    title = f"{preparation.title}, {split}"
    start = time.monotonic()
    tasks = preparation.plan(root, split)
    if not tasks:
        folders = ", ".join(str(root / download.path) for download in preparation.downloads(split))
        raise InputError(f"{title}: no images in {folders}. Unpack the download again.")
    annotations, is_collected = preparation.annotations, True
    if annotations is not None:
        path, info = root / annotations.path.format(split=split), {**annotations.info, "split": split}
        is_collected = _is_collected(path, info, tasks)
    pending = [task for task in tasks if not (is_collected and _is_finished(task))]
    if pending and len(pending) < len(tasks):
        print(f"{title}: {len(tasks) - len(pending)} of {len(tasks)} images are there already")
    results = _make_all(preparation.make, pending, workers=workers, title=title)
    if not is_collected:
        write_json(path, {"info": info, **annotations.assemble(tasks, results)})
    made = f"made {len(pending)} in {time.monotonic() - start:.0f} s" if pending else "all there already"
    print(f"{title}: {len(tasks)} images, {made}", flush=True)
    published = preparation.dataset and get_dataset(preparation.dataset.format(split=split)).published_count
    if preparation.dataset and len(tasks) != published:
        print(
            f"warning: {title} has {len(tasks)} images, the published set {published}; "
            "results on another set of images are not comparable",
            file=sys.stderr,
        )


def _is_finished(task: Task) -> bool:
    return all(map(has_content, task.outputs))


def _is_collected(path: Path, info: Mapping[str, Any], tasks: Sequence[Task]) -> bool:
    """Whether the JSON file is there and lists these images, so that only missing outputs have to be made.

    Raises:
        ValueError: the file was made with other options; or by another program, which gave segments other ids, and is
            not complete.
    """
    if not path.is_file():
        return False
    try:
        content = read_json(path)
        listed = sorted(str(image["id"]) for image in content["images"])
        info_there = content.get("info")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{path} cannot be used ({error}); it is made anew", file=sys.stderr)
        return False
    fits = listed == sorted(task.name for task in tasks)
    if info_there == info:
        return fits
    prepared_by = info_there.get("prepared_by") if isinstance(info_there, dict) else None
    if prepared_by != info["prepared_by"] and fits and all(map(_is_finished, tasks)):
        return True
    missing = "" if fits else f" and lists {len(listed)} images, where the download has {len(tasks)} or others"
    raise InputError(
        f"{path} was made by another program or with other options{missing}: expected info {info}, got {info_there}. "
        "Delete it to have it and its PNGs made anew."
    )


def _make_all(make: Callable[[Task], Any], tasks: Sequence[Task], *, workers: int, title: str) -> list[Any]:
    """What `make` returns for each task.

    Raises:
        ValueError: images that failed; the others are made.
    """
    results, failures = [], []
    with new_progress() as progress, processes(min(workers, len(tasks))) as run_each:
        attempts = run_each(partial(_attempt, make), tasks)
        for result, failure in progress.track(attempts, total=len(tasks), description=title):
            results.append(result)
            if failure is not None:
                failures.append(failure)
            if len(failures) >= MOST_FAILURES:
                break
    if failures:
        stopped = " and the rest was not tried" if len(failures) >= MOST_FAILURES else "; the others are made"
        lines = failures[:SHOWN] + [f"and {len(failures) - SHOWN} more"] * (len(failures) > SHOWN)
        raise InputError(
            f"{title}: {len(failures)} of {len(tasks)} images failed{stopped}.\n  "
            + "\n  ".join(lines)
            + "\nPut this right and start again: what is finished is kept."
        )
    return results


def _attempt(make: Callable[[Task], Any], task: Task) -> tuple[Any, str | None]:
    """Makes one image; what came of it, and what went wrong."""
    try:
        return make(task), None
    except (ValueError, OSError) as error:
        return None, str(error) if task.name in str(error) else f"{task.name}: {error}"


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over so many processes, in the order of its arguments; one or none: this process."""
    if workers <= 1:
        yield map
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])  # libraries are imported once, not in each process
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process)

    def run_each(function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterable[Any]:
        chunk = max(1, min(LARGEST_CHUNK, len(arguments) // (4 * workers)))  # all have something to do until the end
        return pool.map(function, arguments, chunksize=chunk)

    try:
        yield run_each
    except BrokenProcessPool as error:
        raise OSError(
            "a process was ended from outside, most likely for want of memory. Start again with fewer --workers: what "
            "is finished is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """What a process does first: Ctrl-C is its parent's affair, and without a parent it has nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
