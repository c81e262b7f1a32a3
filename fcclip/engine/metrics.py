"""What a training tells while it runs: log.txt, metrics.json, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations between two lines of metrics.json, as published; also the window of the medians


class Writer(Protocol):
    """Receives the scalars of an iteration."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Takes the scalars that belong to the 0-based `iteration`."""

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


class JsonWriter:
    """`metrics.json`: one JSON object per line with sorted keys, appended, so that a resumed run continues the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"iteration": iteration, **numbers}, sort_keys=True) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Event files for TensorBoard, scalars under the names they have in metrics.json."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only this class needs it

        self._events = SummaryWriter(str(folder))

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._events.close()


class LineWriter:
    """One line for people in the log: time left, losses, times, learning rate, memory."""

    def __init__(self, *, max_iter: int) -> None:
        self.max_iter = max_iter

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        if "total_loss" not in scalars:  # evaluation results have their own table
            return
        parts = [f"iter: {iteration + 1}/{self.max_iter}"]
        if "eta_seconds" in scalars:
            parts.insert(0, f"eta: {duration(scalars['eta_seconds'])}")
        parts += [f"{name}: {scalars[name]:.4g}" for name in _losses(scalars)]
        parts += [f"{name}: {scalars[name]:.4f}" for name in ("time", "data_time") if name in scalars]
        parts += [f"{name}: {scalars[name]:.4g}" for name in ("lr", "grad_norm") if name in scalars]
        if "max_memory_mb" in scalars:
            parts.append(f"max_mem: {scalars['max_memory_mb']:.0f}M")
        logger.info("  ".join(parts))

    def close(self) -> None:
        """Nothing is buffered."""


class ProgressBar:
    """A live bar on a terminal with the losses and the time left; to be updated every iteration."""

    def __init__(self, *, max_iter: int, start: int, stream: TextIO) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._progress = Progress(*columns, console=Console(file=stream), refresh_per_second=4)
        self._task = self._progress.add_task("training", total=max_iter, completed=start, losses="")
        self._progress.start()

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        short = {name: name.removeprefix("loss_").removeprefix("total_") for name in _losses(scalars)}
        losses = "  ".join(f"{label} {scalars[name]:.3g}" for name, label in short.items())
        self._progress.update(self._task, completed=iteration + 1, **({"losses": losses} if losses else {}))

    def pause(self) -> None:
        """Gives the terminal to somebody else (an evaluation with its own bar)."""
        self._progress.stop()

    def resume(self) -> None:
        """Takes the terminal back."""
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()


def build_writers(output_dir: Path, *, max_iter: int) -> list[Writer]:
    """The writers of a run that are called every LOG_PERIOD iterations: log line, metrics.json, TensorBoard."""
    return [LineWriter(max_iter=max_iter), JsonWriter(output_dir / "metrics.json"), TensorBoardWriter(output_dir)]


def build_progress_bar(*, max_iter: int, start: int = 0) -> ProgressBar | None:
    """A progress bar where standard output is a terminal, else None: the log lines then say the same."""
    return ProgressBar(max_iter=max_iter, start=start, stream=sys.stdout) if sys.stdout.isatty() else None


def setup_logging(output_dir: Path, *, rank: int = 0) -> None:
    """Sends this package's log to `log.txt` (`log.txt.rank1`, … on other ranks) and, on rank 0, to standard output.

    Args:
        output_dir: where the file is; it is appended to.
        rank: this process's number.
    """
    package = logging.getLogger("fcclip")
    close_logging()
    package.setLevel(logging.INFO)
    package.propagate = False
    name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
    file = logging.FileHandler(output_dir / name, encoding="utf-8")
    file.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    package.addHandler(file)
    if rank == 0:
        console = _StdoutHandler()
        if sys.stdout.isatty():  # the progress bar shows what this module's lines say
            console.addFilter(lambda record: record.name != __name__)
        console.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
        package.addHandler(console)


def close_logging() -> None:
    """Closes what `setup_logging` opened."""
    package = logging.getLogger("fcclip")
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    package.propagate = True


def log_exception() -> None:
    """Writes the traceback of the exception that is being handled to log.txt, and not to the terminal."""
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "stopped by an error", (), sys.exc_info())
    for handler in logging.getLogger("fcclip").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
        >>> duration(3725.4)
        '1:02:05'
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class _StdoutHandler(logging.StreamHandler):
    """Writes to whatever sys.stdout is at that moment, so that lines appear above a live progress bar."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def _losses(scalars: Mapping[str, float]) -> Sequence[str]:
    """The total and the losses of the final prediction set; those of earlier layers only go to the files."""
    return [name for name in ("total_loss", "loss_ce", "loss_mask", "loss_dice") if name in scalars]
