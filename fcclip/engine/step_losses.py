"""The losses of one step, as every process sees them."""

from __future__ import annotations

from collections.abc import Mapping

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

    def send(self, *, stop: bool = False) -> None:
        """Averages over the processes and starts the copy to the host. `stop`: this process was asked to stop."""
        local = torch.cat([self._sum, self._sum.new_tensor([float(stop)])])
        vectors = torch.stack([mean_over_processes(local), local])
        self._host = vectors.to("cpu", non_blocking=True)
        if vectors.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(vectors.device))

    @property
    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop; all agree."""
        return self._read(0)[-1] > 0

    def mean(self) -> dict[str, float]:
        """The mean over the processes, and `total_loss`, their sum."""
        return self._named(self._read(0)[:-1])

    def local(self) -> dict[str, float]:
        """This process's own losses, and their sum."""
        return self._named(self._read(1)[:-1])

    def _named(self, values: list[float]) -> dict[str, float]:
        return {"total_loss": sum(values), **dict(zip(self._names, values))}

    def _read(self, row: int) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host[row].tolist()
