"""What two CPU processes do with a toy model in test_two_trainings.py; each leaves files in the folder."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from fcclip.comm import all_gather_object, get_rank
from fcclip.engine import StopRequest, Trainer
from fcclip.errors import InputError
from tests.engine import training_processes
from tests.engine.toys import ToyModel, make_batch, make_trainer

SIZE = 2  # images a process


def batches(start: int) -> Iterator[list[dict]]:
    """This process's half of each batch of four, with noise from its own random numbers."""
    for position in itertools.count(start):
        mine = make_batch(position)[get_rank() * SIZE : (get_rank() + 1) * SIZE]
        yield [sample | {"x": sample["x"] + 0.1 * torch.randn(6)} for sample in mine]


def broken_on_process_1(start: int) -> Iterator[list[dict]]:
    """The same, but for one broken image at position 3."""
    for position, batch in enumerate(batches(start), start):
        if position == 3 and get_rank() == 1:
            batch[0]["y"] = torch.tensor(math.nan)
        yield batch


def trainer_in(folder: Path, **changes) -> Trainer:
    """The same weights in both processes, other random numbers in each."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = DistributedDataParallel(ToyModel())
    torch.manual_seed(10 + get_rank())
    return make_trainer(model, folder=folder, **({"batches": batches} | changes))


def tell(folder: Path, trainer: Trainer, **more) -> None:
    """What this process ends with."""
    content = {"model": trainer.model.module.state_dict(), **more}
    torch.save(content, folder / f"of_{get_rank()}.pth")


def meet_a_broken_loss(folder: Path) -> None:
    """A loss of process 1 is not a number."""
    trainer = trainer_in(folder, batches=broken_on_process_1, max_skips=1)
    trainer.train()
    tell(folder, trainer)


def meet_an_unreadable_image(folder: Path) -> None:
    """Process 1 has no batch in iteration 3."""

    def unreadable(start: int) -> Iterator[list[dict]]:
        for position, batch in enumerate(batches(start), start):
            if position == 3 and get_rank() == 1:
                raise InputError("150.jpg cannot be read")
            yield batch

    trainer = trainer_in(folder, batches=unreadable, checkpoint_period=0)
    try:
        trainer.train()
    except InputError as error:
        tell(folder, trainer, error=str(error), iteration=trainer.iteration)


def stop_and_resume(folder: Path, *, asked: int) -> None:
    """One process gets SIGTERM in iteration 2; both stop, and a resumed run goes on."""

    def interrupted(start: int) -> Iterator[list[dict]]:
        for position, batch in enumerate(batches(start), start):
            if position == 2 and get_rank() == asked:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with StopRequest() as stop:
        trainer = trainer_in(folder, batches=interrupted, stop=stop, checkpoint_period=0)
        finished = trainer.train()
    stopped_at = all_gather_object(trainer.iteration)
    trainer = trainer_in(folder)
    trainer.resume(folder / "model_0000002.pth")
    trainer.train()
    tell(folder, trainer, finished=finished, stopped_at=stopped_at)


def stop_in_an_evaluation(folder: Path) -> None:
    """Both processes get SIGTERM while they evaluate, process 1 a moment later."""

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        time.sleep(0.2 * get_rank())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        raise AssertionError("nobody broke the evaluation off")

    with StopRequest() as stop:
        trainer = trainer_in(folder, evaluate=evaluate, eval_period=2, checkpoint_period=0, stop=stop)
        finished = trainer.train()
    all_gather_object(None)
    seen = []
    trainer = trainer_in(folder, evaluate=lambda model: seen.append(trainer.iteration) or {}, eval_period=2)
    trainer.resume(folder / "model_0000001.pth")
    trainer.train()
    tell(folder, trainer, finished=finished, seen=seen)


def everything(folder: str) -> None:
    """All of it in one start of two processes."""
    root = Path(folder)
    whole = trainer_in(root / "whole")
    whole.train()
    tell(root / "whole", whole)
    meet_a_broken_loss(root / "skip")
    meet_an_unreadable_image(root / "unreadable")
    stop_and_resume(root / "stop_0", asked=0)
    stop_and_resume(root / "stop_1", asked=1)
    stop_in_an_evaluation(root / "stop_evaluation")
    (root / "with_model").mkdir(exist_ok=True)
    training_processes.everything(str(root / "with_model"))
