"""What a training writes while it runs: metrics.json, TensorBoard, wandb and lines of the log.

A run that was interrupted at some iteration and goes on from an earlier checkpoint continues the same files: records of
iterations that it takes a second time are dropped first.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import secrets
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcclip.errors import NotInstalledError
from fcclip.files import without_nan, write_atomically

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations between two lines of metrics.json, as published; also the window of the medians
_SHOWN_LOSSES = ("total_loss", "loss_ce", "loss_mask", "loss_dice")  # those of earlier layers only go to the files
_PARTS = {"data_time": "data", "forward_time": "forward", "backward_time": "backward", "step_time": "step"}
_WAITING_BYTES = 2**20  # records of metrics.json that a full disk can make wait


class Writer:
    """Receives what a training has to tell about an iteration; what a subclass leaves out does nothing.

    Attributes:
        errors: what ends the writer and not the training.
    """

    errors: tuple[type[Exception], ...] = (OSError,)

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

    Args:
        path: the file. A half-written line at its end, of a process that was killed, is dropped.
        start: the iteration that the run goes on from: records of it and later ones are dropped. At 0 the file of an
            earlier run is moved aside.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        if start == 0:
            _move_aside(path)
        else:
            _drop_records(path, start)
        self._file = path.open("ab", buffering=_WAITING_BYTES)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        line = json.dumps(without_nan({"iteration": iteration, **scalars}), sort_keys=True) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:  # the buffer keeps what could not be written, for the next flush
            logger.error("%s cannot be written (%s); its records wait in memory until it can be", self.path, error)

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter(Writer):
    """Event files for TensorBoard: scalars under the names they have in metrics.json; images.

    Args:
        folder: where the files go.
        start: the iteration that the run goes on from; TensorBoard then hides what earlier files of the folder hold of
            it and later ones.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only this class needs it

        self._events = SummaryWriter(str(folder), purge_step=start)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, value, iteration)
        self._events.flush()  # a process that is killed shall have written what it had to tell

    def images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._events.add_image(f"images/{name}", image, iteration, dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WandbWriter(Writer):
    """A run of Weights & Biases over `iteration`; its id is kept in the folder, so that a resumed training continues
    it. Iterations that are taken a second time after an interruption appear twice, with the same values.

    Args:
        folder: of the training.
        start: the iteration that the training goes on from; 0 begins a new run.
        project, name, entity: where wandb files the run; "" leaves the choice to wandb.
        config: the training's config, to be shown with the run.
    """

    def __init__(
        self, folder: Path, *, start: int, project: str, name: str, entity: str, config: Mapping[str, Any]
    ) -> None:
        import wandb  # an extra, and slow to import

        path = folder / "wandb_id"
        known = path.read_text(encoding="utf-8").strip() if start and path.is_file() else ""
        identity = known or secrets.token_hex(4)
        if not known:
            write_atomically(path, lambda file: file.write(identity.encode()))
        self._image, self.errors = wandb.Image, (OSError, wandb.Error)
        place = {"project": project, "name": name or None, "entity": entity or None, "dir": str(folder)}
        self._run = wandb.init(id=identity, resume="allow", config=dict(config), **place)
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **scalars})

    def images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        drawn = {f"images/{name}": self._image(image) for name, image in images.items()}
        self._run.log({"iteration": iteration, **drawn})

    def close(self) -> None:
        self._run.finish()


class LineWriter(Writer):
    """One line for people in the log: time left, losses, where the time goes, learning rate, memory."""

    def __init__(self, *, max_iter: int) -> None:
        self.max_iter = max_iter

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        if "total_loss" not in scalars:  # evaluation results have their own table
            return
        parts = [f"eta: {duration(scalars['eta_seconds'])}"] if "eta_seconds" in scalars else []
        parts += [f"iter: {iteration + 1}/{self.max_iter}"]
        parts += [f"{name}: {scalars[name]:.4g}" for name in _SHOWN_LOSSES if name in scalars]
        if "time" in scalars:
            parts.append(f"time: {scalars['time']:.4g} s{_shares(scalars)}")
        parts += [f"{name}: {scalars[name]:.4g}" for name in ("lr", "grad_norm") if name in scalars]
        if "max_memory_mb" in scalars:
            parts.append(f"max_mem: {scalars['max_memory_mb']:.0f}M")
        logger.info("  ".join(parts))


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


def _shares(scalars: Mapping[str, float]) -> str:
    """Where the time of an iteration goes: " (data 3%, …)"; "" where that is not known."""
    if not scalars["time"]:
        return ""
    shares = [f"{part} {scalars[name] / scalars['time']:.0%}" for name, part in _PARTS.items() if name in scalars]
    return f" ({', '.join(shares)})" if shares else ""


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
