"""What a training writes while it runs: metrics.json, TensorBoard, wandb and lines of the log.

A run that was interrupted at some iteration and goes on from an earlier checkpoint continues the same files: records of
iterations that it takes a second time are dropped first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import secrets
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcclip.errors import InputError, NotInstalledError
from fcclip.files import without_nan, write_atomically

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations between two lines of metrics.json, as published; also the window of the medians
_PARTS = {"data_time": "data", "forward_time": "forward", "backward_time": "backward", "step_time": "step"}
_GROUPS = (  # of TensorBoard, the first that matches; names with a group of their own keep it
    (re.compile(r"lr|grad_norm|loss_scale"), "optimizer"),
    (re.compile(r"loss_.*_\d+"), "loss_of_layers"),  # of the predictions before the final ones
    (re.compile(r"(total_)?loss(_.*)?"), "loss"),
    (re.compile(r"(.*_)?time|eta_seconds"), "time"),
    (re.compile(r".*memory.*"), "memory"),
)


class Writer:
    """Receives what a training has to tell about an iteration; what a subclass leaves out does nothing."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Takes the scalars that belong to the 0-based `iteration`."""

    def images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        """Takes images by name, each (H, W, 3) uint8, RGB."""

    def close(self) -> None:
        """Finishes what is buffered."""


class History:
    """The recent values of each scalar; what is written are medians over the window.

    Example:
        >>> history = History(window=3)
        >>> for value in (9.0, 1.0, 2.0, 3.0):
        ...     history.add({"loss": value})
        >>> history.medians()
        {'loss': 2.0}
    """

    def __init__(self, *, window: int = LOG_PERIOD) -> None:
        self.window = window
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, scalars: Mapping[str, float]) -> None:
        """Appends one iteration's values."""
        for name, value in scalars.items():
            values = self._values[name]
            values.append(float(value))
            del values[: -self.window]

    def medians(self) -> dict[str, float]:
        """The median of each scalar over the window."""
        return {name: statistics.median(values) for name, values in self._values.items()}

    def state_dict(self) -> dict[str, list[float]]:
        """The values in the window, for a checkpoint."""
        return {name: list(values) for name, values in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Goes on from a `state_dict`, so that medians after a resume are those of an uninterrupted run."""
        self._values = defaultdict(list, {name: list(values)[-self.window :] for name, values in state.items()})


class JsonWriter(Writer):
    """`metrics.json`: one JSON object per line with sorted keys, appended, so that a resumed run continues the file.

    What cannot be written now (a full disk) is kept and written with the next record; the training goes on.

    Args:
        path: the file. A half-written line at its end, of a process that was killed, is dropped.
        start: the iteration that the run goes on from: records of it and later ones are dropped. At 0 the file of an
            earlier run is moved aside. None keeps everything.
    """

    def __init__(self, path: Path, *, start: int | None = None) -> None:
        self.path = path
        if start == 0:
            _move_aside(path)
        else:
            _drop_records(path, math.inf if start is None else start)
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()  # of whole lines
        self._waiting: list[bytes] = []

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        line = json.dumps(without_nan({"iteration": iteration, **scalars}), sort_keys=True) + "\n"
        self._waiting.append(line.encode())
        try:
            self._write_waiting()
        except OSError as error:
            if len(self._waiting) == 1:
                logger.error("%s cannot be written (%s); its records wait in memory until it can be", self.path, error)

    def close(self) -> None:
        if self._waiting and not self._file.closed:
            with contextlib.suppress(OSError):
                self._write_waiting()
            if self._waiting:
                logger.error("%s lacks its last %d records, which could not be written", self.path, len(self._waiting))
        self._file.close()

    def _write_waiting(self) -> None:
        content = b"".join(self._waiting)
        if self._file.seek(0, os.SEEK_END) != self._size:
            self._file.truncate(self._size)  # half a line of a write that failed
        done = 0
        while done < len(content):
            done += self._file.write(content[done:])
        self._size += len(content)
        self._waiting.clear()


class TensorBoardWriter(Writer):
    """Event files for TensorBoard: scalars in groups, under the names they have in metrics.json; images.

    Args:
        folder: where the files go.
        start: the iteration that the run goes on from; TensorBoard then hides what earlier files of the folder hold of
            it and later ones. None hides nothing.
    """

    def __init__(self, folder: Path, *, start: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only this class needs it

        self._events = SummaryWriter(str(folder), purge_step=start)
        self._failed = False

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._add({_in_group(name): (self._events.add_scalar, (value, iteration)) for name, value in scalars.items()})

    def images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        add = self._events.add_image
        self._add({f"images/{name}": (add, (image, iteration, None, "HWC")) for name, image in _checked(images)})

    def close(self) -> None:
        with contextlib.suppress(*([OSError] if self._failed else [])):
            self._events.close()

    def _add(self, entries: Mapping[str, tuple]) -> None:
        if self._failed:
            return
        try:
            for name, (add, values) in entries.items():
                add(name, *values)
            self._events.flush()  # a process that is killed shall have written what it had to tell
        except OSError as error:
            self._failed = True
            logger.error("TensorBoard's events cannot be written (%s) and end here; metrics.json goes on", error)


class WandbWriter(Writer):
    """A run of Weights & Biases over `iteration`; its id is kept in the folder, so that a resumed training continues
    it. Iterations that are taken a second time after an interruption appear twice, with the same values.

    Args:
        folder: of the training.
        project, name, entity: where wandb files the run; "" leaves the choice to wandb.
        start: the iteration that the training goes on from; 0 begins a new run.
        config: the training's config, to be shown with the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str = "",
        entity: str = "",
        start: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_wandb(project)
        import wandb  # an extra, and slow to import

        path = folder / "wandb_id"
        known = path.read_text(encoding="utf-8").strip() if start != 0 and path.is_file() else ""
        identity = known or secrets.token_hex(4)
        if not known:
            write_atomically(path, lambda file: file.write(identity.encode()))
        self._image, self._errors = wandb.Image, (OSError, wandb.Error)
        place = {"project": project, "name": name or None, "entity": entity or None, "dir": str(folder)}
        self._run = wandb.init(id=identity, resume="allow", config=dict(config or {}), **place)
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._log({"iteration": iteration, **{_in_group(name): value for name, value in scalars.items()}})

    def images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        drawn = {f"images/{name}": self._image(image) for name, image in _checked(images)}
        self._log({"iteration": iteration, **drawn})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _log(self, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(values)
        except self._errors as error:
            self._run = None
            logger.error("wandb takes no more records (%s); metrics.json goes on", error)


class LineWriter(Writer):
    """One line for people in the log: time left, losses, where the time goes, learning rate, memory."""

    def __init__(self, *, max_iter: int) -> None:
        self.max_iter = max_iter

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        if "total_loss" not in scalars:  # evaluation results have their own table
            return
        parts = [f"eta: {duration(scalars['eta_seconds'])}"] if "eta_seconds" in scalars else []
        parts += [f"iter: {iteration + 1}/{self.max_iter}"]
        parts += [f"{name}: {scalars[name]:.4g}" for name in shown_losses(scalars)]
        if "time" in scalars:
            shares = ", ".join(time_shares(scalars))
            parts.append(f"time: {scalars['time']:.4g} s" + (f" ({shares})" if shares else ""))
        parts += [f"{name}: {scalars[name]:.4g}" for name in ("lr", "grad_norm") if name in scalars]
        if "max_memory_mb" in scalars:
            parts.append(f"max_mem: {scalars['max_memory_mb']:.0f}M")
        logger.info("  ".join(parts))

    def images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        logger.info("iter: %d/%d  images: %s", iteration + 1, self.max_iter, ", ".join(images))


def build_writers(
    output_dir: Path, *, max_iter: int, start: int | None = None, wandb: Mapping[str, Any] | None = None
) -> list[Writer]:
    """The writers of a run that are called every LOG_PERIOD iterations: log line, metrics.json, TensorBoard, wandb.

    Args:
        output_dir: where the files go.
        max_iter: iterations of the whole training.
        start: the iteration that the run goes on from; what an interrupted run had written about it and later ones is
            dropped. 0: a new run; None: keeps everything.
        wandb: arguments `project`, `name`, `entity`, `config` of WandbWriter; None: without.
    """
    writers: list[Writer] = [
        LineWriter(max_iter=max_iter),
        JsonWriter(output_dir / "metrics.json", start=start),
        TensorBoardWriter(output_dir, start=start),
    ]
    if wandb is not None:
        writers.append(WandbWriter(output_dir, start=start, **wandb))
    return writers


def check_wandb(project: str) -> None:
    """Refuses WANDB.PROJECT where the package is missing, before anything is computed.

    Raises:
        ImportError: says how to install it, or to do without.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise NotInstalledError(
            f"WANDB.PROJECT is '{project}', but the package wandb is not installed: pip install wandb, or do "
            'without: WANDB.PROJECT ""'
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
        >>> duration(3725.4)
        '1:02:05'
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def shown_losses(scalars: Mapping[str, float]) -> Sequence[str]:
    """The total and the losses of the final prediction set; those of earlier layers only go to the files."""
    return [name for name in ("total_loss", "loss_ce", "loss_mask", "loss_dice") if name in scalars]


def time_shares(scalars: Mapping[str, float], names: Sequence[str] = tuple(_PARTS)) -> list[str]:
    """Where the time of an iteration goes: "data 3 %", …"""
    if not scalars.get("time"):
        return []
    return [f"{_PARTS[name]} {scalars[name] / scalars['time']:.0%}" for name in names if name in scalars]


def _in_group(name: str) -> str:
    """A scalar's name in TensorBoard, which shows what stands before a slash as a section."""
    group = next((group for pattern, group in _GROUPS if pattern.fullmatch(name)), "")
    return f"{group}/{name}" if group else name


def _checked(images: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for name, image in images.items():
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise InputError(f"image '{name}' must be (height, width, 3) uint8, got {image.shape} {image.dtype}")
        yield name, image


def _move_aside(path: Path) -> None:
    """Keeps the records of an earlier run in a folder where a new one begins."""
    if not path.is_file() or not path.stat().st_size:
        return
    names = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(1))
    old = path.rename(next(name for name in names if not name.exists()))
    logger.info("the records of an earlier run in %s are now in %s", path, old.name)


def _drop_records(path: Path, start: float) -> None:
    """Leaves the whole lines of iterations before `start`."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if _is_before(line, start)]
    if len(kept) < len(lines):
        write_atomically(path, lambda file: file.writelines(kept))
        logger.info("dropped %d records of %s that the run is about to write again", len(lines) - len(kept), path)


def _is_before(line: bytes, start: float) -> bool:
    """Whether a line of metrics.json is whole and of an iteration before `start`."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(record, dict) and record.get("iteration", -1) < start
