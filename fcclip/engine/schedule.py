"""How the learning rate changes with the iteration: the published schedules as functions of an integer."""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from fvcore.common.config import CfgNode
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fcclip.config import lookup
from fcclip.errors import InputError

logger = logging.getLogger(__name__)

Multiplier = Callable[[int], float]
SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", "WarmupPolyLR", "FusionerLR")


def multi_step(*, max_iter: int, steps: Sequence[int], gamma: float) -> Multiplier:
    """`gamma` to the power of the number of steps reached; a step changes the rate at the iteration it names.

    Example:
        >>> rate = multi_step(max_iter=10, steps=(4, 8), gamma=0.5)
        >>> [rate(iteration) for iteration in (0, 3, 4, 7, 8, 9)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """
    if list(steps) != sorted(steps):
        raise InputError(f"SOLVER.STEPS must ascend, got {tuple(steps)}")
    reached = [step for step in steps if step < max_iter]
    if len(reached) < len(steps):
        logger.warning(
            "SOLVER.STEPS %s at or above SOLVER.MAX_ITER %d are ignored", tuple(steps)[len(reached) :], max_iter
        )
    return lambda iteration: float(gamma ** bisect.bisect_right(reached, iteration))


def fixed_gamma(*, max_iter: int, num_decays: int, gamma: float) -> Multiplier:
    """`gamma` to the power of the number of decays, of which there are `num_decays` at equal distances.

    Example:
        >>> rate = fixed_gamma(max_iter=8, num_decays=3, gamma=0.5)
        >>> [rate(iteration) for iteration in range(8)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    """
    return lambda iteration: float(gamma ** min(iteration * (num_decays + 1) // max_iter, num_decays))


def cosine(*, max_iter: int, end: float) -> Multiplier:
    """From 1 to `end` along half a cosine over `max_iter` iterations."""
    if not 0 <= end <= 1:
        raise InputError(f"SOLVER.BASE_LR_END must lie between 0 and SOLVER.BASE_LR, got {end} times BASE_LR")
    return lambda iteration: end + 0.5 * (1 - end) * (1 + math.cos(math.pi * min(iteration / max_iter, 1.0)))


def poly(*, max_iter: int, power: float) -> Multiplier:
    """(1 - iteration / max_iter) ** power."""
    return lambda iteration: max(1.0 - iteration / max_iter, 0.0) ** power


def fusioner(*, max_iter: int, warm_up: int, end: float) -> Multiplier:
    """Fusioner's: from 0 to 1 in `warm_up` iterations, the last of which has 1, as has the first of half a cosine over
    the others, which comes near to `end`; after `max_iter` the last value stays.

    Example:
        >>> rate = fusioner(max_iter=6, warm_up=3, end=0.0)
        >>> [round(rate(iteration), 3) for iteration in range(8)]
        [0.0, 0.5, 1.0, 1.0, 0.75, 0.25, 0.25, 0.25]
    """
    falling = cosine(max_iter=max(max_iter - warm_up, 1), end=end)

    def multiplier(iteration: int) -> float:
        iteration = min(iteration, max_iter - 1)
        return iteration / max(warm_up - 1, 1) if iteration < warm_up else falling(iteration - warm_up)

    return multiplier


def warm_up_to(
    schedule: Multiplier, *, max_iter: int, iters: int, factor: float, method: str, rescale_interval: bool = False
) -> Multiplier:
    """`schedule` with the first `iters` of its `max_iter` iterations replaced by a warm-up.

    Linear warm-up rises from `factor * schedule(0)` to the value that `schedule` has when the warm-up ends; constant
    warm-up stays at `factor * schedule(0)`. With `rescale_interval` the whole schedule is squeezed into the iterations
    after the warm-up instead of losing its beginning.
    """
    iters = min(iters, max_iter)
    shapes = {
        "linear": lambda start, end, share: end * share + start * (1 - share),
        "constant": lambda start, *_: start,
    }
    shape = lookup("SOLVER.WARMUP_METHOD", method, shapes)
    start, end = factor * schedule(0), schedule(0 if rescale_interval else iters)

    def multiplier(iteration: int) -> float:
        if iteration < iters:
            return shape(start, end, iteration / iters)
        if rescale_interval and iters < max_iter:
            return schedule((iteration - iters) * max_iter / (max_iter - iters))
        return schedule(iteration)

    return multiplier


def scaled_by_warm_up(
    schedule: Multiplier, *, iters: int, factor: float, method: str, constant_ending: float = 0.0
) -> Multiplier:
    """DeepLab's rule: the schedule runs from iteration 0 scaled by the warm-up, and never falls below the ending."""
    shapes = {"linear": lambda share: factor * (1 - share) + share, "constant": lambda share: factor}
    shape = lookup("SOLVER.WARMUP_METHOD", method, shapes)

    def multiplier(iteration: int) -> float:
        if iteration < iters:
            return shape(iteration / iters) * schedule(iteration)
        return max(schedule(iteration), constant_ending)

    return multiplier


def build_multiplier(cfg: CfgNode) -> Multiplier:
    """The factor on every group's learning rate at each iteration (0-based), by SOLVER.LR_SCHEDULER_NAME.

    Raises:
        ValueError: unknown schedule or warm-up method, MAX_ITER below 1, steps that do not ascend.
    """
    solver, length = cfg.SOLVER, cfg.SOLVER.MAX_ITER
    if length < 1:
        raise InputError(f"SOLVER.MAX_ITER must be at least 1, got {length}")
    warm_up = {"iters": solver.WARMUP_ITERS, "factor": solver.WARMUP_FACTOR, "method": solver.WARMUP_METHOD}
    name = solver.LR_SCHEDULER_NAME
    lookup("SOLVER.LR_SCHEDULER_NAME", name, dict.fromkeys(SCHEDULES))
    if name == "FusionerLR":
        return fusioner(max_iter=length, warm_up=solver.WARMUP_ITERS, end=solver.BASE_LR_END / solver.BASE_LR)
    if name == "WarmupPolyLR":
        schedule = poly(max_iter=length, power=solver.POLY_LR_POWER)
        return scaled_by_warm_up(schedule, **warm_up, constant_ending=solver.POLY_LR_CONSTANT_ENDING)
    if name == "WarmupCosineLR":
        schedule = cosine(max_iter=length, end=solver.BASE_LR_END / solver.BASE_LR)
    elif name == "WarmupStepWithFixedGammaLR":
        schedule = fixed_gamma(max_iter=length, num_decays=solver.NUM_DECAYS, gamma=solver.GAMMA)
    else:
        schedule = multi_step(max_iter=length, steps=solver.STEPS, gamma=solver.GAMMA)
    return warm_up_to(schedule, max_iter=length, **warm_up, rescale_interval=solver.RESCALE_INTERVAL)


class GroupLR(LambdaLR):
    """The schedule on the groups of an optimiser, but for those with `constant_lr`; call `step()` once per iteration.

    The weight decay of a group with `decays` = (start, end) moves from one to the other along half a cosine over
    `max_iter` iterations, after which the last value stays.
    """

    def __init__(self, optimizer: Optimizer, multiplier: Multiplier, *, max_iter: int) -> None:
        self._falling = fusioner(max_iter=max_iter, warm_up=0, end=0.0)
        constant = [group.get("constant_lr", False) for group in optimizer.param_groups]
        super().__init__(optimizer, [(lambda _: 1.0) if own else multiplier for own in constant])

    def step(self, *epoch: int) -> None:
        """The next iteration."""
        super().step(*epoch)
        for group in self.optimizer.param_groups:
            if "decays" in group:
                start, end = group["decays"]
                group["weight_decay"] = end + (start - end) * self._falling(self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; the schedules come from the config."""
        return {key: value for key, value in super().state_dict().items() if key != "_falling"}


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LambdaLR:
    """The schedule of the config on `optimizer`; call `step()` once per iteration."""
    return GroupLR(optimizer, build_multiplier(cfg), max_iter=cfg.SOLVER.MAX_ITER)


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """The config with batch, learning rate and lengths scaled from SOLVER.REFERENCE_WORLD_SIZE to `world_size`
    processes.

    With a reference of 0 (the default) or equal to `world_size` the config is returned as it is.

    Raises:
        ValueError: IMS_PER_BATCH is not divisible by the reference.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, world_size):
        return cfg
    cfg, scale = cfg.clone(), world_size / reference
    cfg.defrost()
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH % reference:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is not divisible by SOLVER.REFERENCE_WORLD_SIZE {reference}"
        )
    solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * scale)
    solver.BASE_LR *= scale
    solver.MAX_ITER = round(solver.MAX_ITER / scale)
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / scale)
    solver.STEPS = tuple(round(step / scale) for step in solver.STEPS)
    solver.CHECKPOINT_PERIOD = round(solver.CHECKPOINT_PERIOD / scale)
    solver.REFERENCE_WORLD_SIZE = world_size
    cfg.TEST.EVAL_PERIOD = round(cfg.TEST.EVAL_PERIOD / scale)
    cfg.freeze()
    logger.info(
        "scaled to %d processes: batch %d, learning rate %g, %d iterations",
        *(world_size, solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER),
    )
    return cfg
