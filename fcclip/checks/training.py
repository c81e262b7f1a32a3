"""What SOLVER, INPUT and DATALOADER ask of a training, and TEST of an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from fcclip.checks.issue import ERROR, NOTE, OK, Issues
from fcclip.config import lookup, resolve_device
from fcclip.data import build_test_mapper, build_train_mapper
from fcclip.data.samplers import SAMPLERS
from fcclip.engine import (
    amp_dtype,
    build_gradient_clipping,
    build_multiplier,
    build_optimizer,
    check_training,
    scale_to_world_size,
)
from fcclip.modeling import build_variants, test_modes
from fcclip.vocabulary import Vocabulary


def check_settings(
    issues: Issues, cfg: CfgNode, *, model: nn.Module | None, vocabulary: Vocabulary | None, world_size: int
) -> None:
    """What a training is asked for exists and goes together, as far as model and training classes are known."""
    scaled = cfg
    with issues.attempt():
        scaled = scale_to_world_size(cfg, world_size)
    checks: list[Callable[[], Any]] = [
        lambda: build_multiplier(scaled),
        lambda: build_gradient_clipping(cfg),
        lambda: build_train_mapper(cfg),
        lambda: lookup("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, SAMPLERS),
    ]
    with contextlib.suppress(ValueError, RuntimeError):  # the section on the machine says so
        device = resolve_device(cfg.MODEL.DEVICE)
        checks.append(lambda: amp_dtype(cfg, device))
    if model is not None:
        checks.append(lambda: build_optimizer(cfg, model))
    if vocabulary is not None:
        checks.append(lambda: check_training(scaled, vocabulary, world_size=world_size))
    before = issues.count(ERROR)
    for check in checks:
        with issues.attempt():
            check()
    if issues.count(ERROR) == before:
        solver = scaled.SOLVER
        issues.add(
            OK,
            f"{solver.MAX_ITER:,} iterations of {solver.IMS_PER_BATCH} images on {world_size} process(es), "
            f"{solver.OPTIMIZER}, learning rate {solver.BASE_LR:g}, {cfg.INPUT.DATASET_MAPPER_NAME}",
        )


def check_evaluation(issues: Issues, cfg: CfgNode, *, training: bool) -> None:
    """What TEST asks for."""
    if not cfg.DATASETS.TEST:
        level = NOTE if training else ERROR
        return issues.add(level, "DATASETS.TEST is empty: nothing is evaluated", "name data sets")
    with issues.attempt():
        build_test_mapper(cfg)
    if cfg.TEST.BATCH_SIZE < 1:
        issues.add(ERROR, f"TEST.BATCH_SIZE must be at least 1, got {cfg.TEST.BATCH_SIZE}", "TEST.BATCH_SIZE 1")
    wrong = [row for row in cfg.TEST.EXPECTED_RESULTS if not isinstance(row, (list, tuple)) or len(row) != 4]
    if wrong:
        issues.add(ERROR, f"TEST.EXPECTED_RESULTS: {wrong[0]!r}", "a row is [task, metric, value, tolerance]")
    if cfg.TEST.AUG.ENABLED:
        variants = build_variants(cfg)
        issues.add(OK, f"TEST.AUG: a second evaluation with {len(variants)} variants of each image")
        if training:
            issues.add(NOTE, "TEST.AUG.ENABLED has an effect with --eval-only alone")
    issues.add(
        OK,
        f"shorter side {cfg.INPUT.MIN_SIZE_TEST}, longer at most {cfg.INPUT.MAX_SIZE_TEST}; {cfg.TEST.MODE}, "
        f"{test_modes(cfg)['ensemble']}",
    )
    return None
