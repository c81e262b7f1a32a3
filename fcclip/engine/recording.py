"""What a training tells while it runs, and to whom: writers and a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from fcclip.comm import is_main_process
from fcclip.engine.metrics import Writer
from fcclip.engine.progress_bar import ProgressBar


class Recorder:
    """Writers and a bar for the time of a training; on other processes than the main one it does nothing.

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
        self._writers: Sequence[Writer] = ()
        self._bar: ProgressBar | None = None

    @contextlib.contextmanager
    def recording(self, start: int) -> Iterator[None]:
        """Opens writers and bar; they drop what an interrupted run has told of the iteration `start` and later ones."""
        if is_main_process():
            self._writers = self._build_writers(start)
            self._bar = self._build_bar(start)
        try:
            yield
        finally:
            self.close_bar()
            for writer in self._writers:
                writer.close()

    @property
    def shows_images(self) -> bool:
        """Whether there are writers for images."""
        return bool(self._writers)

    def write(
        self, iteration: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Hands scalars that belong to the 0-based `iteration`, and images by name, to every writer."""
        for writer in self._writers:
            writer.write(iteration, scalars)
        for writer in self._writers if images else ():
            writer.images(iteration, images)

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
