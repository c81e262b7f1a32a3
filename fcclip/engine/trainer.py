"""The training loop: fetch, forward, backward, clip, step, schedule; now and then a checkpoint and an evaluation."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fcclip.config import lookup
from fcclip.engine.checkpoint import (
    Checkpointer,
    clip_fingerprint,
    load_state,
    model_weights,
    read_weights,
    unwrap,
)
from fcclip.engine.distributed import (
    all_gather_object,
    barrier,
    get_rank,
    get_world_size,
    is_main_process,
    mean_over_processes,
)
from fcclip.engine.environment import random_state, set_random_state
from fcclip.engine.metrics import LOG_PERIOD, History, ProgressBar, Writer, build_progress_bar, build_writers, duration
from fcclip.engine.optimizer import Clip, build_clip, build_optimizer, trainable_parameters
from fcclip.engine.schedule import build_lr_scheduler
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Batch = list[dict]
Batches = Callable[[int], Iterator[Batch]]  # number of batches already consumed -> the batches after them
Evaluate = Callable[[nn.Module], Mapping[str, float]]


class NonFiniteError(RuntimeError):
    """A loss or a weight became infinite or not a number."""


class Trainer:
    """Trains a model for a number of iterations; one iteration is one optimiser step.

    Args:
        model: called with a batch (a list of samples) it returns a dict of weighted losses; may be wrapped by
            DistributedDataParallel.
        optimizer: over the trainable parameters.
        scheduler: stepped once per iteration.
        batches: given the number of batches this process has consumed, an endless iterator over the next ones.
        max_iter: iterations of the whole training.
        device: where the model is.
        clip: clips gradients before the step.
        amp_dtype: autocast type of the forward pass; None for full precision. float16 adds a loss scaler.
        accumulate: equal parts that a batch is cut into; their gradients are averaged before the step.
        checkpointer: where checkpoints go; None writes none.
        checkpoint_period: iterations between checkpoints; 0 only at the end.
        evaluate: called on every process with the bare model in eval mode; returns scalars to record.
        eval_period: iterations between evaluations; 0 only at the end.
        writers: receive the scalars of every LOG_PERIOD-th iteration on the main process.
        progress: builds a bar from the first iteration; the bar is updated every iteration. May return None.
        notes: entries that every checkpoint holds besides the training state (config, vocabulary).
        full_checkpoints: store the frozen CLIP too.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        batches: Batches,
        max_iter: int,
        device: torch.device,
        clip: Clip,
        amp_dtype: torch.dtype | None = None,
        accumulate: int = 1,
        checkpointer: Checkpointer | None = None,
        checkpoint_period: int = 0,
        evaluate: Evaluate | None = None,
        eval_period: int = 0,
        writers: Sequence[Writer] = (),
        progress: Callable[[int], ProgressBar | None] = lambda start: None,
        notes: Mapping[str, Any] | None = None,
        full_checkpoints: bool = False,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"SOLVER.ACCUMULATE must be at least 1, got {accumulate}")
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batches = batches
        self.max_iter = max_iter
        self.device = device
        self.clip = clip
        self.amp_dtype = amp_dtype
        self.accumulate = accumulate
        self.checkpointer = checkpointer
        self.checkpoint_period = checkpoint_period
        self.evaluate = evaluate
        self.eval_period = eval_period
        self.writers = list(writers)
        self.progress = progress
        self.notes = dict(notes or {})
        self.full_checkpoints = full_checkpoints

        self.iteration = 0  # steps taken, which is also the number of batches consumed and the next 0-based iteration
        self.history = History()
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
        self._parameters = trainable_parameters(optimizer)
        self._grad_norm: Tensor | None = None
        self._lr = 0.0
        self._bar: ProgressBar | None = None

    # ---- the loop ----

    def train(self) -> None:
        """Runs the iterations that are left, then evaluates.

        Raises:
            NonFiniteError: on every process, when a loss is infinite or not a number on any of them.
        """
        logger.info("training from iteration %d to %d", self.iteration, self.max_iter)
        if self.checkpointer is not None and is_main_process():
            self.checkpointer.remove_unfinished()
        began, first = time.perf_counter(), self.iteration
        self.model.train()
        self._bar = self.progress(self.iteration)
        try:
            batches = self.batches(self.iteration) if self.iteration < self.max_iter else iter(())
            while self.iteration < self.max_iter:
                self.step(batches)
                self._after_step()
            self._bar_do("close")
            spent = time.perf_counter() - began
            logger.info("trained %d iterations in %s", self.iteration - first, duration(spent))
            self._evaluate()
        finally:
            self._bar_do("close")
            for writer in self.writers:
                writer.close()

    def step(self, batches: Iterator[Batch]) -> None:
        """One iteration: a batch, its losses and gradients, one step of the optimiser and of the schedule."""
        began = time.perf_counter()
        batch = next(batches)
        fetched = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(batch)
        self._check_losses(losses, batch)
        self.scaler.unscale_(self.optimizer)
        self._grad_norm = self.clip(self._parameters)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.history.add(losses.mean())
        self.history.add({"time": time.perf_counter() - began, "data_time": fetched - began})
        self._lr = max(self.optimizer.param_groups, key=lambda group: len(group["params"]))["lr"]
        self.scheduler.step()
        self.iteration += 1

    def _backward(self, batch: Batch) -> _Losses:
        """Leaves the gradients of the mean over the micro-batches; the losses are on their way to the host."""
        losses = _Losses(device=self.device)
        size = math.ceil(len(batch) / self.accumulate)
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last or not hasattr(self.model, "no_sync") else self.model.no_sync():
                with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                    weighted = self.model(part)
                losses.add(weighted, share=1 / len(parts))
                if last:
                    losses.send()  # before the backward pass is queued, so that waiting for them never waits for it
                self.scaler.scale(sum(weighted.values()) / len(parts)).backward()
        return losses

    def _check_losses(self, losses: _Losses, batch: Batch) -> None:
        """Raises on every process when any process has a loss that is not finite; the weights are still good then."""
        if all(map(math.isfinite, losses.mean().values())):
            return
        bad = {
            name: value for name, value in losses.local().items() if not math.isfinite(value) and name != "total_loss"
        }
        reports = all_gather_object((get_rank(), bad, [str(sample.get("file_name", "?")) for sample in batch]))
        found = "; ".join(
            f"process {rank}: {', '.join(f'{name} = {value}' for name, value in terms.items())} (pictures: "
            f"{', '.join(files)})"
            for rank, terms, files in reports
            if terms
        )
        raise NonFiniteError(
            f"the loss is not finite at iteration {self.iteration}: {found}. The step was not taken. Usual causes: a "
            "learning rate that is too high (SOLVER.BASE_LR), overflow in float16 (SOLVER.AMP.DTYPE bfloat16), damaged "
            "labels of these pictures."
        )

    def _after_step(self) -> None:
        last = self.iteration == self.max_iter
        if is_main_process():
            if self._bar is not None:
                self._bar.write(self.iteration - 1, self.history.medians())
            if self.iteration % LOG_PERIOD == 0 or last:
                self._write(self._scalars())
        if self.checkpointer is not None and (last or _due(self.iteration, self.checkpoint_period)):
            self.save("model_final" if last else None)
        if not last and _due(self.iteration, self.eval_period):
            self._bar_do("pause")
            self._evaluate()
            self._bar_do("resume")

    def _scalars(self) -> dict[str, float]:
        scalars = self.history.medians()
        scalars["lr"] = self._lr
        scalars["eta_seconds"] = scalars["time"] * (self.max_iter - self.iteration)
        if self._grad_norm is not None:
            scalars["grad_norm"] = float(self._grad_norm)
        if self.device.type == "cuda":
            scalars["max_memory_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return scalars

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        with torch.no_grad():
            results = self.evaluate(unwrap(self.model))
        self.model.train()
        barrier()
        if is_main_process():
            self._write(results)

    def _write(self, scalars: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.write(self.iteration - 1, scalars)

    def _bar_do(self, action: str) -> None:
        if self._bar is not None:
            getattr(self._bar, action)()

    # ---- saving and resuming ----

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint holds; to be called on every process, because each has its own random numbers."""
        return {
            **self.notes,
            "model": model_weights(self.model, full=self.full_checkpoints),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.iteration - 1,  # 0-based number of the last step taken, as published
            "random": all_gather_object(random_state()),
        }

    def save(self, name: str | None = None) -> None:
        """Writes a checkpoint under `name`, or under the name of the last iteration.

        Raises:
            NonFiniteError: a weight is not finite; the checkpoints that exist stay as they are.
        """
        state = self.state_dict()
        self._check_weights(state["model"])
        if is_main_process():
            if name is None:
                self.checkpointer.save_periodic(self.iteration - 1, state)
            else:
                self.checkpointer.save(name, state)

    def _check_weights(self, weights: Mapping[str, Tensor]) -> None:
        names = [key for key, value in weights.items() if value.is_floating_point()]
        finite = torch.stack([weights[key].isfinite().all().to(self.device) for key in names]).tolist()
        bad = [key for key, good in zip(names, finite) if not good]
        if bad:
            raise NonFiniteError(
                f"{len(bad)} weights are not finite after iteration {self.iteration - 1} (first: {bad[0]}); no "
                "checkpoint is written. Resume from the last one, with a lower SOLVER.BASE_LR or SOLVER.AMP.DTYPE "
                "bfloat16."
            )

    def resume(self, path: str | Path) -> None:
        """Continues from a checkpoint: weights, optimiser, schedule, loss scaler, random numbers and position in the
        data.

        Raises:
            FileNotFoundError, ValueError: the file cannot be read, belongs to another model, or holds weights only.
        """
        weights, state = read_weights(Path(path))
        missing = [name for name in ("optimizer", "scheduler", "scaler", "iteration", "random") if name not in state]
        if missing:
            raise ValueError(
                f"'{path}' holds no state of a training (missing: {', '.join(missing)}); a training can start from its "
                "weights with MODEL.WEIGHTS, without --resume"
            )
        load_state(self.model, weights, source=str(path), fingerprint=state.get("clip"))
        self._check_groups(state["optimizer"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"] + 1
        if len(state["random"]) == get_world_size():
            set_random_state(state["random"][get_rank()])
        else:
            logger.warning(
                "%s was written by %d processes, now there are %d: random numbers start afresh, the order of the data "
                "goes on",
                path,
                len(state["random"]),
                get_world_size(),
            )
        logger.info("resumed from %s at iteration %d", path, self.iteration)

    def _check_groups(self, state: Mapping[str, Any], path: str | Path) -> None:
        here = [group["param_names"] for group in self.optimizer.state_dict()["param_groups"]]
        there = [group.get("param_names") for group in state["param_groups"]]
        if here != there:
            raise ValueError(
                f"the optimiser state in '{path}' belongs to other parameter groups "
                f"({[len(names or ()) for names in there]} parameters a group, here {[len(names) for names in here]}): "
                "SOLVER.OPTIMIZER, BASE_LR, the WEIGHT_DECAY keys and the frozen parts must be those of the run that "
                "is resumed"
            )


class _Losses:
    """The losses of one step, kept on the device and sent to the host without stopping it."""

    def __init__(self, *, device: torch.device) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._device = device
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def add(self, losses: Mapping[str, Tensor], *, share: float) -> None:
        """Adds a micro-batch that counts `share` of the step."""
        self._names = list(losses)
        vector = torch.stack([value.detach().float() for value in losses.values()]) * share
        self._sum = vector if self._sum is None else self._sum + vector

    def send(self) -> None:
        """Averages over the processes and starts the copy to the host."""
        vectors = torch.stack([mean_over_processes(self._sum), self._sum])
        self._host = vectors.to("cpu", non_blocking=True)
        if self._device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self._device))

    def mean(self) -> dict[str, float]:
        """The mean over the processes, and `total_loss`, their sum."""
        return self._read(0)

    def local(self) -> dict[str, float]:
        """This process's own losses, and their sum."""
        return self._read(1)

    def _read(self, row: int) -> dict[str, float]:
        if self._event is not None:
            self._event.synchronize()
        values = self._host[row].tolist()
        return {"total_loss": sum(values), **dict(zip(self._names, values))}


def build_trainer(
    cfg: CfgNode,
    model: nn.Module,
    *,
    batches: Batches,
    device: torch.device,
    vocabulary: Vocabulary,
    evaluate: Evaluate | None = None,
    output_dir: str | Path | None = None,
) -> Trainer:
    """The trainer of a config for a model that is already on its device.

    Args:
        vocabulary: the training classes; their number must be MODEL.SEM_SEG_HEAD.NUM_CLASSES.
        output_dir: checkpoints, metrics and the progress bar; None writes nothing.

    Raises:
        ValueError: a value of SOLVER.* or NUM_CLASSES that cannot work.
    """
    check_training(cfg, vocabulary, world_size=get_world_size())
    solver = cfg.SOLVER
    optimizer = build_optimizer(cfg, model)
    random_clip = not cfg.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS
    if random_clip:
        logger.info("the CLIP has random weights, which no other file holds: checkpoints store it too")
    writes = output_dir is not None and is_main_process()
    notes = {
        "config": cfg.dump(),
        "vocabulary": {
            "name": vocabulary.name,
            "sha256": vocabulary.hash,
            "classes": [list(words) for words in vocabulary.synonyms],
        },
        "clip": clip_fingerprint(model),
        "seed": cfg.SEED,
    }
    return Trainer(
        model=_distribute(model, device),
        optimizer=optimizer,
        scheduler=build_lr_scheduler(cfg, optimizer),
        batches=batches,
        max_iter=solver.MAX_ITER,
        device=device,
        clip=build_clip(cfg),
        amp_dtype=amp_dtype(cfg, device),
        accumulate=solver.ACCUMULATE,
        checkpointer=Checkpointer(output_dir, keep=solver.CHECKPOINT_KEEP) if output_dir is not None else None,
        checkpoint_period=solver.CHECKPOINT_PERIOD,
        evaluate=evaluate,
        eval_period=cfg.TEST.EVAL_PERIOD,
        writers=build_writers(Path(output_dir), max_iter=solver.MAX_ITER) if writes else (),
        progress=(lambda start: build_progress_bar(max_iter=solver.MAX_ITER, start=start))
        if writes
        else (lambda start: None),
        notes=notes,
        full_checkpoints=solver.CHECKPOINT_FULL or random_clip,
    )


def check_training(cfg: CfgNode, vocabulary: Vocabulary, *, world_size: int) -> None:
    """Refuses a config that cannot train; these checks do not belong to a model, which may be built for other words.

    Args:
        vocabulary: the training classes.
        world_size: processes that share a batch.

    Raises:
        ValueError: the number of classes is not NUM_CLASSES, a batch that cannot be shared, an unknown NON_FINITE.
    """
    solver, num_classes = cfg.SOLVER, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if len(vocabulary) != num_classes:
        raise ValueError(
            f"the training vocabulary '{vocabulary.name}' has {len(vocabulary)} classes, but "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}. Set it to {len(vocabulary)}, or correct DATASETS.TRAIN "
            "or the class list."
        )
    if solver.ACCUMULATE < 1:
        raise ValueError(f"SOLVER.ACCUMULATE must be at least 1, got {solver.ACCUMULATE}")
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % (world_size * solver.ACCUMULATE):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be split evenly over {world_size} process(es) with "
            f"SOLVER.ACCUMULATE {solver.ACCUMULATE}"
        )
    lookup("SOLVER.NON_FINITE", solver.NON_FINITE, {"raise": None})


def amp_dtype(cfg: CfgNode, device: torch.device) -> torch.dtype | None:
    """The autocast type of training: SOLVER.AMP.DTYPE on CUDA when AMP is enabled, else None (full precision).

    Raises:
        ValueError: unknown type, or one that this GPU lacks.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    dtype = lookup("SOLVER.AMP.DTYPE", cfg.SOLVER.AMP.DTYPE, {"float16": torch.float16, "bfloat16": torch.bfloat16})
    if device.type != "cuda":
        logger.info("SOLVER.AMP.ENABLED has no effect on %s: training in float32", device.type)
        return None
    if dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise ValueError("SOLVER.AMP.DTYPE is bfloat16, which this GPU does not support; use float16")
    return dtype


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


def _due(iteration: int, period: int) -> bool:
    return period > 0 and iteration % period == 0
