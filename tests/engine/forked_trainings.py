"""Trainings in forked processes that something happens to, for the programs of killed_training.py and
stopped_training.py.

A program imports everything once. Each training is a child forked from there, before torch has started a thread.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # not needed here, but slow to import in every child

import fcclip.engine.checkpoint as checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
train_net = importlib.import_module("train_net")

# What may differ between two runs: how long things took.
_TIMES = ("time", "data_time", "forward_time", "backward_time", "step_time", "eta_seconds")


def send(number: signal.Signals) -> None:
    """To this process. After SIGKILL nothing is flushed and no handler runs, as after `kill -9`."""
    os.kill(os.getpid(), number)


def kill_when_written() -> None:
    """Kills this process as soon as no checkpoint is being written, however slow the disk is."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()
    send(signal.SIGKILL)


def at_call(
    owner: object,
    name: str,
    number: int,
    *,
    do: Callable[[], None] = lambda: send(signal.SIGKILL),
    after: bool = False,
    when: Callable[..., bool] = lambda *_: True,
) -> None:
    """Does something before the `number`-th call (from 1) of `owner.name`, or right after it.

    Args:
        when: called with the arguments; calls for which it is false do not count.
    """
    real, calls = getattr(owner, name), [0]

    def counting(*args: Any, **kwargs: Any) -> Any:
        is_it = False
        if when(*args):
            calls[0] += 1
            is_it = calls[0] == number
        if is_it and not after:
            do()
        result = real(*args, **kwargs)
        if is_it and after:
            do()
        return result

    setattr(owner, name, counting)


def ending(text: str) -> Callable[..., bool]:
    """For `at_call`: the last argument ends so."""
    return lambda *args: str(args[-1]).endswith(text)


def child(work: Callable[[], int], log: Path, *, kill_after: float | None = None) -> int:
    """Runs `work` in a forked process; its exit code, negative for a signal. What it prints is appended to `log`."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(config: Path, folder: Path, *overrides: str, resume: bool = False) -> int:
    """The exit code of the command line."""
    words = ["--config-file", str(config), *(["--resume"] if resume else []), "OUTPUT_DIR", str(folder), *overrides]
    return train_net.main(words)


def untouched(config: Path, folder: Path) -> float:
    """Trains a run that nothing happens to; returns how long it took."""
    folder.mkdir(parents=True)
    began = time.perf_counter()
    if child(lambda: train(config, folder), folder / "console.txt") != 0:
        sys.exit((folder / "console.txt").read_text())
    return time.perf_counter() - began


def scenario(
    name: str, config: Path, folder: Path, whole: Path, first: Callable[[], int], *, kill_after: float | None = None
) -> None:
    """Writes report.json: how the first run ended and what it left, how the resumed one differs from `whole`."""
    folder.mkdir()
    log, pointer = folder / "console.txt", folder / "last_checkpoint"
    report: dict[str, Any] = {"name": name, "ended": child(first, log, kill_after=kill_after)}
    report["unreadable"] = unreadable(folder)
    report["last"] = pointer.read_text() if pointer.is_file() else ""
    report["left"] = sorted(path.name for path in folder.iterdir())
    report["resumed"] = child(lambda: train(config, folder, resume=True), log)
    report["differences"] = differences(whole, folder) if report["resumed"] == 0 else [log.read_text()[-2000:]]
    report["half_written"] = sorted(path.name for path in folder.glob(".*.writing"))
    report["log"] = (folder / "log.txt").read_text()
    (folder / "report.json").write_text(json.dumps(report))


def side_by_side(works: Sequence[Callable[[], None]], *, at_once: int = 2) -> None:
    """Calls each of them in a forked process of its own, `at_once` at a time."""
    alive: set[int] = set()
    for work in works:
        if len(alive) == at_once:
            alive.discard(os.wait()[0])
        pid = os.fork()
        if pid == 0:
            try:
                work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        alive.add(pid)
    while alive:
        alive.discard(os.wait()[0])


def unreadable(folder: Path) -> list[str]:
    """Checkpoints that a reader would stumble over; temporary files do not count, since nothing names them."""
    bad = []
    for path in folder.glob("*.pth"):
        try:
            checkpoint.load_checkpoint(path)
        except ValueError:
            bad.append(path.name)
    pointer = folder / "last_checkpoint"
    if pointer.is_file() and not (folder / pointer.read_text()).is_file():
        bad.append("last_checkpoint")
    return bad


def differences(one: Path, other: Path) -> list[str]:
    """What differs in the final and in the best checkpoint, and in the records of two runs, apart from times."""
    found = []

    def compare(name: str, a: Any, b: Any) -> None:
        if isinstance(a, torch.Tensor):
            if not (isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)):
                found.append(name)
        elif isinstance(a, dict) and isinstance(b, dict):
            for key in a.keys() | b.keys():
                compare(f"{name}.{key}", a.get(key), b.get(key))
        elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            for index, (x, y) in enumerate(zip(a, b)):
                compare(f"{name}[{index}]", x, y)
        elif a != b:
            found.append(name)

    def files(folder: Path) -> dict[str, Any]:
        final = checkpoint.load_checkpoint(folder / "model_final.pth")
        names = ("model", "optimizer", "scheduler", "scaler", "iteration", "random", "best")
        best = folder / "best.pth"
        return {
            **{name: final[name] for name in names},
            "losses": {name: values for name, values in final["history"].items() if name not in _TIMES},
            "best.pth": checkpoint.load_checkpoint(best)["model"] if best.is_file() else None,
            "metrics": [
                {name: value for name, value in json.loads(line).items() if name not in _TIMES}
                for line in (folder / "metrics.json").read_text().splitlines()
            ],
        }

    compare("", files(one), files(other))
    return found
