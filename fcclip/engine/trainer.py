"""The training loop: fetch, forward, backward, clip, step, schedule; now and then a checkpoint and an evaluation.

At the boundary of two iterations everything that the rest of the training depends on is in `state_dict`, so a run that
is stopped anywhere and resumed from its last checkpoint ends with the same weights.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fcclip.comm import (
    all_gather_object,
    barrier,
    broadcast_object,
    get_rank,
    get_world_size,
    is_main_process,
    mean_over_processes,
)
from fcclip.config import lookup
from fcclip.engine.checkpoint import Checkpointer, load_checkpoint
from fcclip.engine.environment import random_state, set_random_state
from fcclip.engine.guards import (
    MAX_ROLLBACKS,
    MAX_SCALER_SKIPS,
    BrokenWeightsError,
    NonFiniteError,
    OnNonFinite,
    explain_out_of_memory,
)
from fcclip.engine.metrics import (
    LOG_PERIOD,
    History,
    ProgressBar,
    Writer,
    build_progress_bar,
    build_writers,
    check_wandb,
    duration,
)
from fcclip.engine.optimizer import Clip, build_clip, build_optimizer, trainable_parameters
from fcclip.engine.schedule import build_lr_scheduler
from fcclip.engine.signals import StopRequest, StopRequested
from fcclip.errors import InputError
from fcclip.modeling.backbones.fingerprint import clip_fingerprint
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_state, model_weights, unwrap, vocabulary_note

logger = logging.getLogger(__name__)

try:
    import resource
except ImportError:  # not on Windows
    resource = None

Batch = list[dict]
Batches = Callable[[int], Iterator[Batch]]  # number of batches already consumed -> the batches after them
Evaluate = Callable[[nn.Module], Mapping[str, float]]
Draw = Callable[[nn.Module], Mapping[str, np.ndarray]]


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
        accumulate: equal parts that a batch is cut into, one after the other through the model.
        whole_batch: for a batch, the keyword arguments that tell the model of the whole batch when it is called with a
            part of it; the losses of the parts then add up. None: they are averaged.
        on_non_finite: what happens when a loss or a gradient is not finite; None: it is raised.
        checkpointer: where checkpoints go; None writes none.
        checkpoint_period: iterations between checkpoints; 0 only at the end.
        evaluate: called on every process with the bare model in eval mode; returns scalars to record.
        eval_period: iterations between evaluations; 0 only at the end.
        best_metric: name of the scalar of `evaluate` whose highest value decides which weights stay as `best.pth`; "":
            none are kept.
        draw: called after an evaluation on the main process with the bare model; returns images (H, W, 3) uint8 by
            name, for the writers.
        writers: builds, from the first iteration, those that receive the scalars of every LOG_PERIOD-th iteration on
            the main process.
        progress: builds a bar from the first iteration; the bar is updated every iteration. May return None.
        stop: a request to save and leave, asked at every iteration.
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
        whole_batch: Callable[[Batch], Mapping[str, Any]] | None = None,
        on_non_finite: OnNonFinite | None = None,
        checkpointer: Checkpointer | None = None,
        checkpoint_period: int = 0,
        evaluate: Evaluate | None = None,
        eval_period: int = 0,
        best_metric: str = "",
        draw: Draw | None = None,
        writers: Callable[[int], Sequence[Writer]] = lambda start: (),
        progress: Callable[[int], ProgressBar | None] = lambda start: None,
        stop: StopRequest | None = None,
        notes: Mapping[str, Any] | None = None,
        full_checkpoints: bool = False,
    ) -> None:
        if accumulate < 1:
            raise InputError(f"SOLVER.ACCUMULATE must be at least 1, got {accumulate}")
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batches = batches
        self.max_iter = max_iter
        self.device = device
        self.clip = clip
        self.amp_dtype = amp_dtype
        self.accumulate = accumulate
        self.whole_batch = whole_batch
        self.on_non_finite = on_non_finite or OnNonFinite()
        self.checkpointer = checkpointer
        self.checkpoint_period = checkpoint_period
        self.evaluate = evaluate
        self.eval_period = eval_period
        self.best_metric = best_metric
        self.draw = draw
        self.writers = writers
        self.progress = progress
        self.stop = stop
        self.notes = dict(notes or {})
        self.full_checkpoints = full_checkpoints

        self.iteration = 0  # steps taken, which is also the number of batches consumed and the next 0-based iteration
        self.best: dict[str, float] = {}  # value and 0-based iteration of the best evaluation so far
        self.left_out: set[int] = set()  # iterations whose step was not taken, or is not to be taken
        self.history = History()
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
        self._parameters = trainable_parameters(optimizer)
        self._clock = _Clock(device)
        self._grad_norm = math.nan
        self._lr = 0.0
        self._bar: ProgressBar | None = None
        self._writers: list[Writer] = []
        self._asked_to_stop = False
        self._skips_in_a_row = 0
        self._scaler_skips_in_a_row = 0
        self._rollbacks: Counter[Path] = Counter()
        self._resumed_from: Path | None = None

    # ---- the loop ----

    def train(self) -> bool:
        """Runs the iterations that are left, then evaluates.

        Returns:
            True at the end; False when it was asked to stop: then a checkpoint holds all that was done.

        Raises:
            NonFiniteError: on every process, when a loss or a gradient is not finite and the policy says so.
            torch.OutOfMemoryError: with what was resident, and the keys that make a step smaller.
        """
        logger.info("training from iteration %d to %d", self.iteration, self.max_iter)
        if self.checkpointer is not None and is_main_process():
            self.checkpointer.remove_unfinished()
            if self.iteration == 0:  # of another training in the folder
                self.checkpointer.forget_evaluation()
        self.model.train()
        finished = False
        with self.checkpointer or contextlib.nullcontext(), self._telling(), contextlib.suppress(_StoppedError):
            self._iterate()
            self._bar_do("close")
            self._evaluate()
            finished = True
        if not finished:
            logger.info("stopped after iteration %d; go on with --resume", self.iteration - 1)
        return finished

    def _iterate(self) -> None:
        if self.iteration >= self.max_iter:
            return
        began, first = time.perf_counter(), self.iteration
        if self.iteration and self._evaluation_is_missing():
            logger.info("the evaluation after iteration %d was not finished; doing it now", self.iteration - 1)
            self._evaluate_and_go_on()
        batches = self.batches(self.iteration)
        while self.iteration < self.max_iter:
            try:
                self.step(batches)
            except NonFiniteError as error:
                if self.on_non_finite.kind == "rollback":
                    batches = self._go_back(error)
                    continue
                self._leave_out(error)
            self._after_step()
        logger.info("trained %d iterations in %s", self.iteration - first, duration(time.perf_counter() - began))

    def step(self, batches: Iterator[Batch]) -> None:
        """One iteration: a batch, its losses and gradients, one step of the optimiser and of the schedule."""
        self._clock.start()
        batch = next(batches)
        self._clock.mark("data_time")
        if self.iteration in self.left_out:
            logger.warning("iteration %d is left out, as decided before the rollback", self.iteration)
            self._advance()
            return
        self.optimizer.zero_grad(set_to_none=True)
        with self._explaining_full_memory(batch):
            losses = self._backward(batch)
            self._check_losses(losses, batch)
            self.scaler.unscale_(self.optimizer)
            self._check_gradients(self._clip_gradients(), batch)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self._clock.mark("step_time")
        self._asked_to_stop = losses.asked_to_stop
        self._skips_in_a_row = 0
        self.history.add(losses.mean())
        self.history.add(self._clock.split())
        self._advance()

    def _advance(self) -> None:
        self._lr = max(self.optimizer.param_groups, key=lambda group: len(group["params"]))["lr"]
        with warnings.catch_warnings():  # when the very first step is left out, the schedule still goes on
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            self.scheduler.step()
        self.iteration += 1

    def _backward(self, batch: Batch) -> _Losses:
        """Leaves the gradients of the whole batch; the losses are on their way to the host."""
        losses = _Losses(device=self.device)
        size = math.ceil(len(batch) / self.accumulate)
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        adds_up = len(parts) > 1 and self.whole_batch is not None
        whole = self.whole_batch(batch) if adds_up else {}
        share = 1.0 if adds_up else 1 / len(parts)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last or not hasattr(self.model, "no_sync") else self.model.no_sync():
                with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                    weighted = self.model(part, **whole)
                losses.add(weighted, share=share)
                self._clock.mark("forward_time")
                if last:  # before the backward pass is queued, so that waiting for them never waits for it
                    losses.send(stop=self.stop is not None and self.stop.requested)
                self.scaler.scale(sum(weighted.values()) * share).backward()
                self._clock.mark("backward_time")
        return losses

    def _clip_gradients(self) -> float:
        """Clips, and returns the 2-norm of all gradients before that."""
        norm = self.clip(self._parameters)
        if norm is None:
            norm = torch.nn.utils.get_total_norm([one.grad for one in self._parameters if one.grad is not None])
        self._grad_norm = float(norm)
        return self._grad_norm

    # ---- guards ----

    @contextlib.contextmanager
    def _explaining_full_memory(self, batch: Batch) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            text = explain_out_of_memory(
                error,
                iteration=self.iteration,
                model=self.model,
                shapes=[sample["image"].shape for sample in batch if "image" in sample],
                device=self.device,
            )
            raise torch.OutOfMemoryError(text) from error

    def _check_losses(self, losses: _Losses, batch: Batch) -> None:
        """Raises on every process when any process has a loss that is not finite; the weights are still good then."""
        if all(map(math.isfinite, losses.mean().values())):
            return
        bad = {
            name: value for name, value in losses.local().items() if not math.isfinite(value) and name != "total_loss"
        }
        reports = all_gather_object((get_rank(), bad, _file_names(batch)))
        found = "; ".join(
            f"process {rank}: {', '.join(f'{name} = {value}' for name, value in terms.items())} (images: "
            f"{', '.join(files)})"
            for rank, terms, files in reports
            if terms
        )
        raise NonFiniteError(
            f"the loss is not finite at iteration {self.iteration}: {found}. The step was not taken. Usual causes: a "
            "learning rate that is too high (SOLVER.BASE_LR), overflow in float16 (SOLVER.AMP.DTYPE bfloat16), damaged "
            "labels of these images."
        )

    def _check_gradients(self, norm: float, batch: Batch) -> None:
        """Raises on every process, since gradients are the same on all; overflow in float16 is the scaler's work."""
        if math.isfinite(norm):
            self._scaler_skips_in_a_row = 0
            return
        if self.scaler.is_enabled():
            self._scaler_skips_in_a_row += 1
            if self._scaler_skips_in_a_row <= MAX_SCALER_SKIPS:
                return
            self.scaler.update()  # else it would refuse the next step, should the policy go on
        files = [name for names in all_gather_object(_file_names(batch)) for name in names]
        bad = [
            name
            for name, parameter in unwrap(self.model).named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        raise NonFiniteError(
            f"the gradient is not finite at iteration {self.iteration} although the losses are: norm {norm}, first in "
            f"{bad[0] if bad else 'the norm itself'} (images: {', '.join(files)}). The step was not taken. Usual "
            "causes: a learning rate that is too high (SOLVER.BASE_LR), overflow (SOLVER.AMP.DTYPE bfloat16, or "
            "SOLVER.AMP.ENABLED False)."
        )

    def _leave_out(self, error: NonFiniteError) -> None:
        """Goes on behind a step that was not taken, as far as SOLVER.NON_FINITE skip:N allows."""
        policy = self.on_non_finite
        if policy.kind != "skip":
            raise error
        self._skips_in_a_row += 1
        if self._skips_in_a_row > policy.limit:
            raise NonFiniteError(
                f"{error} SOLVER.NON_FINITE is skip:{policy.limit}, and this is number {self._skips_in_a_row} in a row."
            ) from error
        logger.warning(
            "%s SOLVER.NON_FINITE is skip:%d: left out (%d in a row)", error, policy.limit, self._skips_in_a_row
        )
        self.left_out.add(self.iteration)
        self._advance()

    def _go_back(self, error: NonFiniteError) -> Iterator[Batch]:
        """To the newest checkpoint, for SOLVER.NON_FINITE rollback, the same on every process; the batches after it.
        The step that was not taken will be left out."""
        path = self._last_checkpoint()
        if path is None or self._rollbacks[path] >= MAX_ROLLBACKS:
            why = f"{path.name} was gone back to {MAX_ROLLBACKS} times" if path else "there is no checkpoint yet"
            raise NonFiniteError(f"{error} SOLVER.NON_FINITE is rollback, but {why}.") from error
        self._rollbacks[path] += 1
        logger.warning("%s SOLVER.NON_FINITE is rollback: going back to %s", error, path.name)
        left_out, best = self.left_out | {self.iteration}, self.best
        self.resume(path)
        self.left_out |= left_out
        self.best = best  # that of best.pth
        self._scaler_skips_in_a_row = 0
        if is_main_process():
            self.checkpointer.forget_evaluation()
        self._close_writers()
        self._open_writers()
        return self.batches(self.iteration)

    def _last_checkpoint(self) -> Path | None:
        """This training's newest complete checkpoint, or the one it was resumed from; the same on every process."""
        if self.checkpointer is None:
            return None
        self.checkpointer.settle()
        return broadcast_object(self.checkpointer.newest) or self._resumed_from

    # ---- between iterations ----

    def _after_step(self) -> None:
        last = self.iteration == self.max_iter
        if self._bar is not None:
            self._bar.write(self.iteration - 1, self.history.medians() | self._memory())
        if self.iteration % LOG_PERIOD == 0 or last:
            self._write(self._scalars())
        if self.checkpointer is not None:
            self.checkpointer.check()
        saves = self.checkpointer is not None and (last or _due(self.iteration, self.checkpoint_period))
        if saves:
            self.save("model_final" if last else None)
        if self._asked_to_stop and not last:
            if self.checkpointer is not None and not saves:
                self.save()
            raise _StoppedError
        if not last and _due(self.iteration, self.eval_period):
            self._evaluate_and_go_on()

    def _scalars(self) -> dict[str, float]:
        scalars = self.history.medians()
        scalars["lr"] = self._lr
        scalars["grad_norm"] = self._grad_norm
        if "time" in scalars:  # unless no step was taken yet
            scalars["eta_seconds"] = scalars["time"] * (self.max_iter - self.iteration)
        return scalars | self._memory()

    def _memory(self) -> dict[str, float]:
        return {"max_memory_mb": peak_memory_mb(self.device)} if self.device.type == "cuda" else {}

    def _evaluate_and_go_on(self) -> None:
        self._bar_do("pause")
        self._evaluate()
        self._bar_do("resume")

    def _evaluate(self) -> None:
        """Evaluates, keeps the best weights, records. A request to stop interrupts it, since it has no state: even the
        random numbers are as they were afterwards, so a run that is resumed behind it goes on alike."""
        if self.evaluate is None:
            return
        state = self.state_dict() if self.stop is not None and self.checkpointer is not None else None
        random = random_state()
        try:
            with self.stop.interrupting() if self.stop is not None else contextlib.nullcontext():
                results, images = self._results()
        except StopRequested:
            if state is not None and self.iteration < self.max_iter:
                self._hand_over(state)
            raise _StoppedError from None
        finally:
            set_random_state(random)
        if is_main_process():
            # Noted before it is recorded: one that is killed in between is not recorded twice.
            self._keep_best(results)
            self._write(results)
            if images:
                for writer in self._writers:
                    writer.images(self.iteration - 1, images)

    def _results(self) -> tuple[Mapping[str, float], Mapping[str, np.ndarray]]:
        """Scalars, and drawings where there are writers for them."""
        self.model.eval()
        try:
            with torch.no_grad():
                results = self.evaluate(unwrap(self.model))
                images = self.draw(unwrap(self.model)) if self.draw is not None and self._writers else {}
        finally:
            self.model.train()
        barrier()
        return results, images

    def _keep_best(self, results: Mapping[str, float]) -> None:
        """Returns when `best.pth` is written, if these weights are the best so far, and the evaluation is noted."""
        if self.checkpointer is None:
            return
        value, best = results[self.best_metric] if self.best_metric else math.nan, None
        if value > self.best.get("value", -math.inf):
            self.best = {"value": value, "iteration": self.iteration - 1}
            logger.info("best so far: %s = %.4f after iteration %d", self.best_metric, value, self.iteration - 1)
            best = {
                **self.notes,
                "model": model_weights(self.model, full=self.full_checkpoints),
                "iteration": self.iteration - 1,
                "best": {"metric": self.best_metric, **self.best},
            }
        self.checkpointer.save_evaluation({"iteration": self.iteration - 1, "best": self.best}, best=best)
        self.checkpointer.settle()

    def _evaluation_is_missing(self) -> bool:
        """Whether a run that is resumed was ended between a checkpoint and the end of the evaluation after it."""
        if self.evaluate is None or self.checkpointer is None or not _due(self.iteration, self.eval_period):
            return False
        noted = broadcast_object(self.checkpointer.noted_evaluation() if is_main_process() else None)
        if noted.get("iteration") == self.iteration - 1:
            self.best = dict(noted["best"])
            return False
        return True

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Writers and a bar for the time of the training, on the main process."""
        self._open_writers()
        self._bar = self.progress(self.iteration) if is_main_process() else None
        try:
            yield
        finally:
            self._bar_do("close")
            self._close_writers()

    def _open_writers(self) -> None:
        """They drop what an interrupted run has told them of iterations to come."""
        self._writers = list(self.writers(self.iteration)) if is_main_process() else []

    def _close_writers(self) -> None:
        for writer in self._writers:
            writer.close()

    def _write(self, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
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
            "history": self.history.state_dict(),
            "left_out": sorted(self.left_out),
            "best": dict(self.best),
        }

    def save(self, name: str | None = None) -> None:
        """Hands a checkpoint to the checkpointer under `name`, or under the name of the last iteration; to be called on
        every process.

        Raises:
            NonFiniteError: a weight is not finite; the checkpoints that exist stay as they are.
        """
        self._hand_over(self.state_dict(), name)

    def _hand_over(self, state: Mapping[str, Any], name: str | None = None) -> None:
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
            raise BrokenWeightsError(
                f"{len(bad)} weights are not finite after iteration {self.iteration - 1} (first: {bad[0]}); no "
                "checkpoint is written. Resume from the last one, with a lower SOLVER.BASE_LR or SOLVER.AMP.DTYPE "
                "bfloat16."
            )

    def resume(self, path: str | Path) -> None:
        """Continues from a checkpoint: weights, optimiser, schedule, loss scaler, random numbers and position in the
        data.

        Raises:
            FileNotFoundError, ValueError: the file cannot be read, belongs to another model or another config, or holds
                weights only.
        """
        state = load_checkpoint(path)
        needed = ("model", "optimizer", "scheduler", "scaler", "iteration", "random")
        missing = [name for name in needed if name not in state]
        if missing:
            raise InputError(
                f"'{path}' holds no state of a training (missing: {', '.join(missing)}); a training can start from its "
                "weights with MODEL.WEIGHTS, without --resume"
            )
        load_state(self.model, state["model"], source=str(path), fingerprint=state.get("clip"))
        self._check_groups(state["optimizer"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self._resumed_from = Path(path)
        self.iteration = state["iteration"] + 1
        self.history.load_state_dict(state.get("history", {}))
        self.left_out = set(state.get("left_out", ()))
        self.best = dict(state.get("best", {}))
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
            raise InputError(
                f"the optimiser state in '{path}' belongs to other parameter groups "
                f"({[len(names or ()) for names in there]} parameters a group, here {[len(names) for names in here]}): "
                "SOLVER.OPTIMIZER, BASE_LR, the WEIGHT_DECAY keys and the frozen parts must be those of the run that "
                "is resumed"
            )

    # ---- trying out ----

    def dry_run(self, *, steps: int = 2) -> dict[str, Any]:
        """Takes one batch through the model and back. Nothing is changed: neither weights nor optimiser, schedule,
        random numbers or files.

        Args:
            steps: how often; the last one is timed, the others warm up.

        Returns:
            images, a text for each sample of this process's batch (`batch`); seconds of loading it, from the start of
            the loader (`data_time`), and of one step (`time`); `total_loss`, `grad_norm`; and the most memory used in
            MiB (`memory_mb`), with the state of the optimiser: of the GPU, or of the whole process on a CPU.

        Raises:
            NonFiniteError, torch.OutOfMemoryError: as `train`.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.model.train()
        random, began = random_state(), time.perf_counter()
        batch = next(self.batches(self.iteration))
        found: dict[str, Any] = {"batch": list(map(_describe, batch)), "data_time": time.perf_counter() - began}
        with self._explaining_full_memory(batch), self._optimizer_kept():
            for _ in range(steps):
                began = time.perf_counter()
                self.optimizer.zero_grad(set_to_none=True)
                losses = self._backward(batch)
                self._check_losses(losses, batch)
                found["grad_norm"] = self._clip_gradients() / self.scaler.get_scale()
                for parameter in self._parameters:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
                self.optimizer.step()
                found["time"] = time.perf_counter() - began
            self.optimizer.zero_grad(set_to_none=True)
        set_random_state(random)
        return {**found, "total_loss": losses.mean()["total_loss"], "memory_mb": peak_memory_mb(self.device)}

    @contextlib.contextmanager
    def _optimizer_kept(self) -> Iterator[None]:
        """Steps inside change no weight, and the state of the optimiser is put back."""
        state = copy.deepcopy(self.optimizer.state_dict())
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        try:
            yield
        finally:
            self.optimizer.load_state_dict(state)


class _StoppedError(Exception):
    """The training was asked to stop, and everything is saved."""


class _Clock:
    """Where the time of an iteration goes; on CUDA by events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._finished: list[tuple[str, Any]] = []
        self._began = self._data = 0.0

    def start(self) -> None:
        """A new iteration; the marks of the one before can be read from now on."""
        self._finished, self._marks = self._marks, [("", self._now())]
        self._began = time.perf_counter()

    def mark(self, name: str) -> None:
        """What was done since the mark before is called `name`."""
        if name == "data_time":
            self._data = time.perf_counter() - self._began
        self._marks.append((name, self._now()))

    def split(self) -> dict[str, float]:
        """Seconds: `time` of this iteration, `data_time`, and the other names as they were on the device. On CUDA these
        are those of the iteration before, which is known to be over."""
        marks = self._finished if self._cuda else self._marks
        spent: dict[str, float] = {}
        for (_, before), (name, after) in itertools.pairwise(marks):
            spent[name] = spent.get(name, 0.0) + self._between(before, after)
        return {**spent, "time": time.perf_counter() - self._began, "data_time": self._data}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        if not self._cuda:
            return after - before
        after.synchronize()  # the gradient norm of a later step was on the host already
        return before.elapsed_time(after) / 1e3


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

    def send(self, *, stop: bool = False) -> None:
        """Averages over the processes and starts the copy to the host. `stop`: this process was asked to stop."""
        local = torch.cat([self._sum, self._sum.new_tensor([float(stop)])])
        vectors = torch.stack([mean_over_processes(local), local])
        self._host = vectors.to("cpu", non_blocking=True)
        if self._device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self._device))

    @property
    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop; all agree."""
        return self._read(0)[-1] > 0

    def mean(self) -> dict[str, float]:
        """The mean over the processes, and `total_loss`, their sum."""
        return self._named(self._read(0)[:-1])

    def local(self) -> dict[str, float]:
        """This process's own losses, and their sum."""
        return self._named(self._read(1)[:-1])

    def _named(self, values: list[float]) -> dict[str, float]:
        return {"total_loss": sum(values), **dict(zip(self._names, values))}

    def _read(self, row: int) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host[row].tolist()


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far, MiB: by tensors on a GPU, by this process on a CPU (0 where it is not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _describe(sample: Mapping[str, Any]) -> str:
    """File, shape and segments of a training sample, as far as it has them."""
    parts = [Path(sample.get("file_name", "?")).name]
    if "image" in sample:
        parts.append("image " + "x".join(map(str, sample["image"].shape)))
    if "targets" in sample:
        targets = sample["targets"]
        parts.append(f"{len(targets)} segments on a grid of {'x'.join(map(str, targets.image_size))}")
    return ", ".join(parts)


def _file_names(batch: Batch) -> list[str]:
    return [str(sample.get("file_name", "?")) for sample in batch]


def build_trainer(
    cfg: CfgNode,
    model: nn.Module,
    *,
    batches: Batches,
    device: torch.device,
    vocabulary: Vocabulary,
    evaluate: Evaluate | None = None,
    best_metric: str = "",
    draw: Draw | None = None,
    stop: StopRequest | None = None,
    notes: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
) -> Trainer:
    """The trainer of a config for a model that is already on its device.

    Args:
        vocabulary: the training classes; their number must be MODEL.SEM_SEG_HEAD.NUM_CLASSES.
        evaluate, best_metric, draw, stop: as for `Trainer`.
        notes: entries of every checkpoint besides config, vocabulary, CLIP and seed.
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
    writes = output_dir is not None
    notes = {
        "config": cfg.dump(),
        "vocabulary": vocabulary_note(vocabulary),
        "clip": clip_fingerprint(model),
        "seed": cfg.SEED,
        **(notes or {}),
    }

    def writers(start: int) -> list[Writer]:
        wandb = {name.lower(): value for name, value in cfg.WANDB.items()} | {"config": notes["config"]}
        return build_writers(
            Path(output_dir), max_iter=solver.MAX_ITER, start=start, wandb=wandb if cfg.WANDB.PROJECT else None
        )

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
        whole_batch=lambda batch: {"segment_counts": [len(sample["targets"]) for sample in batch]},
        on_non_finite=OnNonFinite.parse(solver.NON_FINITE),
        checkpointer=Checkpointer(output_dir, keep=solver.CHECKPOINT_KEEP) if output_dir is not None else None,
        checkpoint_period=solver.CHECKPOINT_PERIOD,
        evaluate=evaluate,
        eval_period=cfg.TEST.EVAL_PERIOD,
        best_metric=best_metric,
        draw=draw,
        writers=writers if writes else (lambda start: ()),
        progress=(lambda start: build_progress_bar(max_iter=solver.MAX_ITER, start=start))
        if writes
        else (lambda start: None),
        stop=stop,
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
    OnNonFinite.parse(solver.NON_FINITE)
    check_wandb(cfg.WANDB.PROJECT)


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
        raise InputError("SOLVER.AMP.DTYPE is bfloat16, which this GPU does not support; use float16")
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
