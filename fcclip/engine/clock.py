"""Where the time of an iteration goes."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch


class StepClock:
    """Splits the time of an iteration; on CUDA by events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._finished: list[tuple[str, Any]] = []
        self._began = self._data = 0.0

    def start(self) -> None:
        """A new iteration; the marks of the one before can be read from now on."""
        self._finished, self._marks = self._marks, [("", self._now())]
        self._began = time.perf_counter()

    def mark(self, name: str) -> None:
        """What was done since the mark before is called `name`."""
        if name == "data_time":
            self._data = time.perf_counter() - self._began
        self._marks.append((name, self._now()))

    def split(self) -> dict[str, float]:
        """Seconds: `time` of this iteration, `data_time`, and the other names as they were on the device. On CUDA these
        are those of the iteration before, which is known to be over."""
        marks = self._finished if self._cuda else self._marks
        seconds: dict[str, float] = {}
        for (_, before), (name, after) in itertools.pairwise(marks):
            seconds[name] = seconds.get(name, 0.0) + self._between(before, after)
        return {**seconds, "time": time.perf_counter() - self._began, "data_time": self._data}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        if not self._cuda:
            return after - before
        after.synchronize()  # the gradient norm of a later step was on the host already
        return before.elapsed_time(after) / 1e3
