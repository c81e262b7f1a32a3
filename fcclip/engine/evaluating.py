"""Evaluations in the course of a training, and which weights are the best so far."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from fcclip.comm import barrier
from fcclip.engine.environment import random_state, set_random_state
from fcclip.engine.signals import StopRequest
from fcclip.weights import unwrap

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], Mapping[str, float]]
Draw = Callable[[nn.Module], Mapping[str, np.ndarray]]


class PeriodicEvaluation:
    """Evaluates a model now and then and remembers the best result.

    Args:
        evaluate: called on every process with the bare model in eval mode, returns scalars to record; None: never.
        period: iterations between evaluations; 0: only at the end.
        best_metric: name of the scalar whose highest value decides which weights are the best; "": none are.
        draw: called after it where there are writers, returns images (H, W, 3) uint8 by name.

    Attributes:
        best: `value` and 0-based `iteration` of the best evaluation so far; {} before the first.
    """

    def __init__(
        self, *, evaluate: Evaluate | None = None, period: int = 0, best_metric: str = "", draw: Draw | None = None
    ) -> None:
        self.evaluate = evaluate
        self.period = period
        self.best_metric = best_metric
        self.draw = draw
        self.best: dict[str, float] = {}

    def is_due(self, iteration: int) -> bool:
        """Whether there is an evaluation after `iteration` steps."""
        return self.evaluate is not None and self.period > 0 and iteration % self.period == 0

    def run(
        self, model: nn.Module, *, draws: bool, stop: StopRequest | None
    ) -> tuple[Mapping[str, float], Mapping[str, np.ndarray]]:
        """Scalars, and drawings if `draws`. Random numbers are as they were afterwards, so a training goes on alike
        with and without it.

        Raises:
            StopRequested: `stop` came, which breaks an evaluation off.
        """
        random = random_state()
        try:
            with stop.interrupting() if stop is not None else contextlib.nullcontext(), torch.no_grad():
                model.eval()
                scalars = self.evaluate(unwrap(model))
                images = self.draw(unwrap(model)) if draws and self.draw is not None else {}
                barrier()
        finally:
            model.train()
            set_random_state(random)
        return scalars, images

    def is_best(self, scalars: Mapping[str, float], iteration: int) -> bool:
        """Whether these weights, after the 0-based `iteration`, are the best so far; remembers them if so."""
        value = scalars[self.best_metric] if self.best_metric else math.nan
        if not value > self.best.get("value", -math.inf):
            return False
        self.best = {"value": value, "iteration": iteration}
        logger.info("best so far: %s = %.4f after iteration %d", self.best_metric, value, iteration)
        return True
