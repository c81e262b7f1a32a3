"""One step that changes nothing: what it takes, and what the whole training would."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from fcclip.engine.environment import peak_memory_mb, random_state, set_random_state
from fcclip.engine.guards import explaining_full_memory
from fcclip.engine.metrics import duration
from fcclip.engine.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What came of it."""

    samples: list[str]  # a text for each sample of this process's batch
    data_time: float  # seconds from the start of the loader to the first batch
    time: float  # seconds of a step
    total_loss: float  # mean over the processes
    grad_norm: float  # 2-norm of all gradients
    memory_mb: float  # most memory used, with the state of the optimiser: of the GPU, or of the process on a CPU
    iterations: int  # that are left of the training
    device: str  # "cuda", "cpu", …

    def report(self, batch_size: int) -> str:
        """The lines for the log. `batch_size`: images of all processes."""
        lines = [
            f"first batch, {len(self.samples)} of {batch_size} images in this process:",
            *(f"  {sample}" for sample in self.samples),
            f"loss {self.total_loss:.4g}, gradient norm {self.grad_norm:.4g}",
            f"memory: {self.memory_mb:.0f} MiB at most, {'GPU' if self.device == 'cuda' else 'whole process'}",
            f"a step takes {self.time:.3g} s; starting to load and the first batch took {self.data_time:.3g} s",
            f"{self.iterations} iterations to go: about {duration(self.iterations * self.time)} without evaluations, "
            "if loading keeps up",
        ]
        return "\n  ".join(["dry run, nothing is changed:", *lines])


def dry_run(trainer: Trainer, *, steps: int = 2) -> DryRun:
    """Takes one batch through the model and back. Nothing is changed: neither weights nor optimiser, schedule, random
    numbers or files.

    Args:
        trainer: at its start, or resumed.
        steps: the last one is timed, the others warm up.

    Raises:
        NonFiniteError, torch.OutOfMemoryError: as `Trainer.train`.
    """
    model, device, optimizer = trainer.model, trainer.device, trainer.optimizer
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    random, began = random_state(), time.perf_counter()
    batch = next(trainer.batches(trainer.iteration))
    data_time = time.perf_counter() - began
    with explaining_full_memory(batch, model, device=device, iteration=trainer.iteration), _optimizer_kept(optimizer):
        for _ in range(steps):
            began = time.perf_counter()
            losses = trainer.compute_gradients(batch)
            grad_norm = trainer.clip_gradients() / trainer.scaler.get_scale()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            optimizer.step()
            step_time = time.perf_counter() - began
        optimizer.zero_grad(set_to_none=True)
    set_random_state(random)
    return DryRun(
        samples=[_describe(sample) for sample in batch],
        data_time=data_time,
        time=step_time,
        total_loss=losses.mean()["total_loss"],
        grad_norm=grad_norm,
        memory_mb=peak_memory_mb(device),
        iterations=trainer.max_iter - trainer.iteration,
        device=device.type,
    )


@contextlib.contextmanager
def _optimizer_kept(optimizer: Optimizer) -> Iterator[None]:
    """Steps inside change no weight, and the state of the optimiser is put back."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        optimizer.load_state_dict(state)


def _describe(sample: Mapping[str, Any]) -> str:
    """File, shape and segments of a training sample, as far as it has them."""
    parts = [Path(sample.get("file_name", "?")).name]
    if "image" in sample:
        parts.append("image " + "x".join(map(str, sample["image"].shape)))
    if "targets" in sample:
        targets = sample["targets"]
        parts.append(f"{len(targets)} segments on a grid of {'x'.join(map(str, targets.image_size))}")
    return ", ".join(parts)
