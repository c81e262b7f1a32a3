"""The trainer of a config."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fcclip.comm import get_world_size
from fcclip.config import flatten
from fcclip.engine.checkpoint import Checkpointer, Saving
from fcclip.engine.evaluating import PeriodicEvaluation
from fcclip.engine.guards import max_skips
from fcclip.engine.metrics import (
    JsonWriter,
    LineWriter,
    TensorBoardWriter,
    WandbWriter,
    Writer,
    check_wandb,
)
from fcclip.engine.optimizer import StepSettings, build_gradient_clipping, build_optimizer
from fcclip.engine.progress_bar import build_progress_bar
from fcclip.engine.recording import Recorder
from fcclip.engine.schedule import build_lr_scheduler
from fcclip.engine.signals import StopRequest
from fcclip.engine.trainer import Batches, Trainer
from fcclip.errors import InputError
from fcclip.modeling import amp_dtype
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_notes, unnamed_parts, vocabulary_note

logger = logging.getLogger(__name__)


def build_trainer(
    cfg: CfgNode,
    model: nn.Module,
    *,
    batches: Batches,
    device: torch.device,
    vocabulary: Vocabulary,
    evaluation: PeriodicEvaluation | None = None,
    stop: StopRequest | None = None,
    notes: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
) -> Trainer:
    """The trainer of a config for a model that is already on its device.

    Args:
        vocabulary: the training classes; their number must be MODEL.SEM_SEG_HEAD.NUM_CLASSES.
        batches, evaluation, stop: as for `Trainer`.
        notes: entries of every checkpoint besides config, vocabulary, CLIP and seed.
        output_dir: checkpoints, metrics and the progress bar; None writes nothing.

    Raises:
        ValueError: a value of SOLVER.* or NUM_CLASSES that cannot work.
    """
    check_training(cfg, vocabulary, world_size=get_world_size())
    solver = cfg.SOLVER
    optimizer = build_optimizer(cfg, model)
    unnamed = unnamed_parts(model, cfg)
    for name in unnamed:
        logger.info("the config names no weights of the %s: checkpoints store it too", name)
    about = {"config": cfg.dump(), "vocabulary": vocabulary_note(vocabulary), **frozen_notes(model)}
    return Trainer(
        model=_distribute(model, device),
        optimizer=optimizer,
        scheduler=build_lr_scheduler(cfg, optimizer),
        batches=batches,
        max_iter=solver.MAX_ITER,
        device=device,
        step=StepSettings(
            gradient_clipping=build_gradient_clipping(cfg),
            amp_dtype=amp_dtype(cfg, device),
            accumulate=solver.ACCUMULATE,
            max_skips=max_skips(solver.NON_FINITE),
        ),
        saving=Saving(
            checkpointer=None if output_dir is None else Checkpointer(output_dir, keep=solver.CHECKPOINT_KEEP),
            period=solver.CHECKPOINT_PERIOD,
            notes={**about, "seed": cfg.SEED, **(notes or {})},
            full=solver.CHECKPOINT_FULL or bool(unnamed),
        ),
        evaluation=evaluation,
        recorder=None if output_dir is None else build_recorder(cfg, Path(output_dir)),
        stop=stop,
    )


def build_recorder(cfg: CfgNode, output_dir: Path) -> Recorder:
    """The writers that a config asks for, and a bar where there is a terminal."""
    max_iter, wandb = cfg.SOLVER.MAX_ITER, cfg.WANDB

    def writers(start: int) -> list[Writer]:
        built = [
            LineWriter(max_iter=max_iter),
            JsonWriter(output_dir / "metrics.json", start=start),
            TensorBoardWriter(output_dir, start=start),
        ]
        if wandb.PROJECT:
            names = {"project": wandb.PROJECT, "name": wandb.NAME, "entity": wandb.ENTITY}
            built.append(WandbWriter(output_dir, start=start, config=flatten(cfg), **names))
        return built

    return Recorder(writers=writers, progress=lambda start: build_progress_bar(max_iter=max_iter, start=start))


def check_training(cfg: CfgNode, vocabulary: Vocabulary, *, world_size: int) -> None:
    """Refuses a config that cannot train with these classes, in `world_size` processes that share a batch.

    Raises:
        ValueError: the number of classes is not NUM_CLASSES, a batch that cannot be shared, an unknown NON_FINITE.
    """
    solver, num_classes = cfg.SOLVER, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if len(vocabulary) != num_classes:
        raise InputError(
            f"the training vocabulary '{vocabulary.name}' has {len(vocabulary)} classes, but "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}. Set it to {len(vocabulary)}, or correct DATASETS.TRAIN "
            "or the class list."
        )
    if solver.ACCUMULATE < 1:
        raise InputError(f"SOLVER.ACCUMULATE must be at least 1, got {solver.ACCUMULATE}")
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % (world_size * solver.ACCUMULATE):
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be split evenly over {world_size} process(es) with "
            f"SOLVER.ACCUMULATE {solver.ACCUMULATE}"
        )
    max_skips(solver.NON_FINITE)
    check_wandb(cfg.WANDB.PROJECT)


def _distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with gradients averaged over the processes; frozen parameters take no part."""
    if get_world_size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    return DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # torch renamed the switch; off either way: the buffers are constants
        **{"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False},
    )
