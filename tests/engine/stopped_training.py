"""A program that asks trainings to stop, or kills them, at points around an evaluation; run by
test_stopped_training.py.

    stopped_training.py CONFIG FOLDER

Every second iteration is followed by a checkpoint and an evaluation: two images in three modes, and two more that
choose best.pth.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from fcclip.data import TrainLoader
from fcclip.evaluation.semantic import SemanticEvaluator
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

term = functools.partial(send, signal.SIGTERM)
usr1 = functools.partial(send, signal.SIGUSR1)
IMAGES = 8  # evaluated each time, counting modes

POINTS: dict[str, Callable[[], None]] = {
    "SIGTERM while the first batch is loaded": lambda: at_call(TrainLoader, "__next__", 1, do=term),
    "SIGUSR1 in a step": lambda: at_call(SetCriterion, "forward", 3, do=usr1),
    "SIGTERM in the step before an evaluation": lambda: at_call(SetCriterion, "forward", 4, do=term),
    "SIGTERM in an evaluation": lambda: at_call(SemanticEvaluator, "keep", 3, do=term),
    "SIGUSR1 in the evaluation that chooses the best": lambda: at_call(SemanticEvaluator, "keep", 8, do=usr1),
    "SIGTERM in the last evaluation": lambda: at_call(SemanticEvaluator, "keep", 2 * IMAGES + 1, do=term),
    "SIGKILL in an evaluation": lambda: at_call(SemanticEvaluator, "keep", IMAGES + 1, do=kill_when_written),
    "SIGKILL in the write of best.pth": lambda: at_call(os, "replace", 1, when=ending("best.pth")),
    "SIGKILL between best.pth and the note": lambda: at_call(os, "replace", 1, when=ending("last_evaluation")),
    "SIGKILL after an evaluation": lambda: at_call(SetCriterion, "forward", 5),
}


def main() -> None:
    config, root = Path(sys.argv[1]), Path(sys.argv[2])
    untouched(config, root / "whole")
    works = []
    for index, (name, install) in enumerate(POINTS.items()):
        folder = root / f"run_{index}"

        def first(install=install, folder=folder) -> int:
            install()
            return train(config, folder)

        works.append(functools.partial(scenario, name, config, folder, root / "whole", first))
    side_by_side(works)


if __name__ == "__main__":
    main()
