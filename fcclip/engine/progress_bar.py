"""A live bar on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from fcclip.engine.metrics import duration


class ProgressBar:
    """A live bar on a terminal: time left, loss, time of an iteration; to be updated every iteration."""

    def __init__(self, *, max_iter: int, start: int, stream: TextIO) -> None:
        self.max_iter = max_iter
        columns = (
            _text("training"),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
            _text("{task.completed}/{task.total}", style="progress.download"),
            _text("{task.fields[left]}", style="progress.remaining"),
            _text("{task.fields[pace]}"),
        )
        self._progress = Progress(*columns, console=Console(file=stream), refresh_per_second=4, expand=True)
        self._task = self._progress.add_task("training", total=max_iter, completed=start, pace="", left="eta -:--:--")
        self._progress.start()

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Moves it behind the 0-based `iteration`."""
        fields = {}
        if "time" in scalars:
            # Rich's own estimate counts evaluations, and forgets iterations that are longer than its window.
            fields["left"] = f"eta {duration(scalars['time'] * (self.max_iter - iteration - 1))}"
            fields["pace"] = f"loss {scalars['total_loss']:#.3g}, {scalars['time']:#.3g} s"
        if iteration + 1 >= self.max_iter:
            fields["left"] = f"took {duration(self._progress.tasks[0].elapsed or 0)}"
        self._progress.update(self._task, completed=iteration + 1, **fields)

    def pause(self) -> None:
        """Gives the terminal to somebody else (an evaluation with its own bar)."""
        self._stop(keep=False)

    def resume(self) -> None:
        """Takes the terminal back."""
        self._progress.start()

    def close(self) -> None:
        self._stop(keep=True)

    def _stop(self, *, keep: bool) -> None:
        self._progress.live.transient = not keep
        self._progress.stop()


def _text(content: str, style: str = "none") -> TextColumn:
    return TextColumn(content, style=style, table_column=Column(no_wrap=True))


def build_progress_bar(*, max_iter: int, start: int = 0) -> ProgressBar | None:
    """A progress bar where standard output is a terminal, else None: the log lines then say the same."""
    return ProgressBar(max_iter=max_iter, start=start, stream=sys.stdout) if has_room_for_a_bar() else None


def has_room_for_a_bar() -> bool:
    """Whether standard output is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
