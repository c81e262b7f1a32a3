"""What one step leaves: its losses, as every process sees them, and where its time went."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fcclip.comm import mean_over_processes


class StepLosses:
    """Sums the losses of the parts of a batch on the device and sends them to the host without stopping it."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds those of a part."""
        self._names = list(losses)
        vector = torch.stack([value.detach().float() for value in losses.values()])
        self._sum = vector if self._sum is None else self._sum + vector

    def send(self, *, stop: bool = False, failed: bool = False) -> None:
        """Averages over the processes and starts the copy to the host.

        Args:
            stop: this process was asked to stop.
            failed: this process has no batch, and the step must not be taken.
        """
        local = torch.cat([self._sum, self._sum.new_tensor([float(failed), float(stop)])])
        vectors = torch.stack([mean_over_processes(local), local])
        self._host = vectors.to("cpu", non_blocking=True)
        if vectors.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(vectors.device))

    @property
    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop; all agree."""
        return self._read(0)[-1] > 0

    @property
    def failed(self) -> bool:
        """Whether any process has no batch; all agree."""
        return self._read(0)[-2] > 0

    def mean(self) -> dict[str, float]:
        """The mean over the processes, and `total_loss`, their sum."""
        return self._named(self._read(0)[:-2])

    def local(self) -> dict[str, float]:
        """This process's own losses, and their sum."""
        return self._named(self._read(1)[:-2])

    def _named(self, values: list[float]) -> dict[str, float]:
        return {"total_loss": sum(values), **dict(zip(self._names, values))}

    def _read(self, row: int) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host[row].tolist()


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
