"""What a training tells while it runs, and to whom: writers and a progress bar."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from fcclip.comm import is_main_process
from fcclip.engine.metrics import Writer
from fcclip.engine.progress_bar import ProgressBar

logger = logging.getLogger(__name__)


class Recorder:
    """Writers and a bar for the time of a training; on other processes than the main one it does nothing.

    A writer that fails is told of in the log and called no more; the training goes on.

    Args:
        writers: builds, from the first iteration, those that receive scalars and images.
        progress: builds a bar from the first iteration, which is updated at every iteration. May return None.
    """

    def __init__(
        self,
        *,
        writers: Callable[[int], Sequence[Writer]] = lambda start: (),
        progress: Callable[[int], ProgressBar | None] = lambda start: None,
    ) -> None:
        self._build_writers = writers
        self._build_bar = progress
        self._writers: list[Writer] = []
        self._bar: ProgressBar | None = None

    @contextlib.contextmanager
    def recording(self, start: int) -> Iterator[None]:
        """Opens writers and bar; they drop what an interrupted run has told of the iteration `start` and later ones."""
        if is_main_process():
            self._writers = list(self._build_writers(start))
            self._bar = self._build_bar(start)
        try:
            yield
        finally:
            self.close_bar()
            self._tell(lambda writer: writer.close())

    @property
    def shows_images(self) -> bool:
        """Whether there are writers for images."""
        return bool(self._writers)

    def write(
        self, iteration: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Hands scalars that belong to the 0-based `iteration`, and images by name, to every writer."""
        self._tell(lambda writer: writer.write(iteration, scalars))
        if images:
            self._tell(lambda writer: writer.images(iteration, images))

    def _tell(self, call: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except writer.errors as error:
                self._writers.remove(writer)
                logger.error("%s failed (%s) and ends here; the training goes on", type(writer).__name__, error)

    def advance(self, iteration: int, scalars: Callable[[], Mapping[str, float]]) -> None:
        """Moves the bar, if there is one, behind the 0-based `iteration`."""
        if self._bar is not None:
            self._bar.write(iteration, scalars())

    @contextlib.contextmanager
    def bar_aside(self) -> Iterator[None]:
        """Gives the terminal to somebody else (an evaluation with its own bar)."""
        if self._bar is not None:
            self._bar.pause()
        yield
        if self._bar is not None:
            self._bar.resume()

    def close_bar(self) -> None:
        """Leaves the bar where it is."""
        if self._bar is not None:
            self._bar.close()
