"""A program that kills trainings at named points and lets them go on; run by test_killed_training.py.

    killed_training.py CONFIG FOLDER

A batch is cut in two, so call 2 n + 1 of the criterion begins iteration n (from 0). Checkpoints are written every
second iteration, and one periodic checkpoint is kept.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fcclip.engine.checkpoint as checkpoint
from fcclip.losses import SetCriterion
from tests.engine.forked_trainings import (
    at_call,
    ending,
    kill_when_written,
    scenario,
    send,
    side_by_side,
    train,
    untouched,
)

_FOREVER_S = 60  # would be noticed: the checkpoint is whole then


def of_the_checkpoint_after_3(descriptor: int) -> bool:
    """Whether a descriptor is that of the half-written model_0000003.pth."""
    path = Path(os.environ["RUN"], ".model_0000003.pth.writing")
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def in_the_overlapped_write() -> None:
    """The writer stands still in the middle of a file; the training, two micro-batches later, dies."""
    real, in_the_middle = torch.save, threading.Event()

    def half(content: dict, file) -> None:
        if content["iteration"] == 3:
            file.write(b"PK\x03\x04" + bytes(10_000))
            file.flush()
            in_the_middle.set()
            time.sleep(_FOREVER_S)
        real(content, file)

    def die() -> None:
        if in_the_middle.wait(_FOREVER_S):
            send(signal.SIGKILL)

    torch.save = half
    at_call(SetCriterion, "forward", 10, do=die)


POINTS: dict[str, Callable[[], None]] = {
    "before the first checkpoint": lambda: at_call(SetCriterion, "forward", 3),
    "mid-forward": lambda: at_call(SetCriterion, "forward", 11, do=kill_when_written),
    "mid-accumulation": lambda: at_call(SetCriterion, "forward", 12, do=kill_when_written),
    "before the flush": lambda: at_call(os, "fsync", 1, when=of_the_checkpoint_after_3),
    "between write and rename": lambda: at_call(os, "replace", 1, when=ending("model_0000003.pth")),
    "between rename and last_checkpoint": lambda: at_call(os, "replace", 2, when=ending("last_checkpoint")),
    "in the purge": lambda: at_call(checkpoint, "_remove", 1, when=ending("model_0000001.pth")),
    "after the purge": lambda: at_call(checkpoint, "_remove", 1, after=True, when=ending("model_0000001.pth")),
    "in the overlapped write": in_the_overlapped_write,
}


def main() -> None:
    config, root = Path(sys.argv[1]), Path(sys.argv[2])
    spent = untouched(config, root / "whole")
    works = []

    def add(name: str, install: Callable[[], None], *overrides: str, kill_after: float | None = None) -> None:
        folder = root / f"run_{len(works)}"

        def first() -> int:
            os.environ["RUN"] = str(folder)
            install()
            return train(config, folder, *overrides)

        works.append(functools.partial(scenario, name, config, folder, root / "whole", first, kill_after=kill_after))

    for name, install in POINTS.items():
        add(name, install)
    for index in range(3):
        delay = random.uniform(0.2, 0.95) * spent
        add(f"random {index}, after {delay:.2f} s of {spent:.2f}", lambda: None, kill_after=delay)
    at_10 = functools.partial(at_call, SetCriterion, "forward", 10)
    add("other number of workers", at_10, "DATALOADER.NUM_WORKERS", "2")
    side_by_side(works)


if __name__ == "__main__":
    main()
