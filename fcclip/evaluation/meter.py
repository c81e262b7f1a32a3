"""Progress of an evaluation, and where the time goes."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_LINE_SECONDS = 10  # between two lines of progress where there is no terminal


class Meter:
    """Progress, and where the time goes: waiting for data, the network, the evaluators."""

    def __init__(self, name: str, num_images: int, world_size: int, *, show: bool) -> None:
        self.name, self.num_images, self.world_size, self.show = name, num_images, world_size, show
        self.seconds = {"data": 0.0, "network": 0.0, "evaluation": 0.0}
        self.done = 0
        self.start = self.last_line = time.perf_counter()
        self.bar: Progress | None = None

    def __enter__(self) -> Meter:
        if self.show and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[speed]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(f"evaluate {self.name}", total=self.num_images, speed="")
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.show and error_type is None:
            seconds = time.perf_counter() - self.start
            logger.info("evaluated %s: %d images in %.1f s, %s", self.name, self._all_done(), seconds, self._split())

    @contextlib.contextmanager
    def time(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    def timed(self, what: str, items: Iterable) -> Iterator:
        iterator = iter(items)
        while True:
            with self.time(what):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def advance(self, images: int) -> None:
        self.done += images
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.task, completed=self._all_done(), speed=self._speed())
        elif self.show and now - self.last_line >= _LINE_SECONDS:
            self.last_line = now
            logger.info("evaluate %s: %d/%d images, %s", self.name, self._all_done(), self.num_images, self._split())

    def _all_done(self) -> int:
        return min(self.done * self.world_size, self.num_images)  # the others are about as far

    def _speed(self) -> str:
        return f"{self._all_done() / max(time.perf_counter() - self.start, 1e-9):.1f} images/s"

    def _split(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        shares = ", ".join(f"{what} {100 * spent / total:.0f} %" for what, spent in self.seconds.items())
        return f"{self._speed()} ({shares})"
