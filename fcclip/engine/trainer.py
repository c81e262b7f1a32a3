"""The training loop: fetch, forward, backward, clip, step, schedule; now and then a checkpoint and an evaluation.

At the boundary of two iterations everything that the rest of the training depends on is in `state_dict`, so a run that
is stopped anywhere and resumed from its last checkpoint ends with the same weights.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fcclip.comm import all_gather_object, broadcast_object, get_rank, get_world_size, is_main_process
from fcclip.engine import guards
from fcclip.engine.checkpoint import Saving, load_training_state
from fcclip.engine.environment import peak_memory_mb, random_state, set_random_states
from fcclip.engine.evaluating import PeriodicEvaluation
from fcclip.engine.guards import NonFiniteError
from fcclip.engine.metrics import LOG_PERIOD, History, duration
from fcclip.engine.optimizer import StepSettings, check_same_groups, trainable_parameters
from fcclip.engine.recording import Recorder
from fcclip.engine.signals import StopRequest, StopRequested
from fcclip.engine.step import StepClock, StepLosses
from fcclip.errors import InputError
from fcclip.structures import TrainingBatch
from fcclip.weights import load_state

logger = logging.getLogger(__name__)

Batch = Sequence[dict]
Batches = Callable[[int], Iterator[Batch]]  # number of batches already consumed -> the batches after them


class Trainer:
    """Trains a model for a number of iterations; one iteration is one optimiser step.

    Args:
        model: called with a `TrainingBatch` it returns a dict of weighted losses, and those of the parts of a batch add
            up; may be wrapped by DistributedDataParallel.
        optimizer: over the trainable parameters.
        scheduler: stepped once per iteration.
        batches: given the number of batches this process has consumed, an endless iterator over the next ones.
        max_iter: iterations of the whole training.
        device: where the model is.
        step: how a step is taken.
        saving: what is kept, and when.
        evaluation: what is done with the model in between and at the end.
        recorder: who is told.
        stop: a request to save and leave, asked at every iteration.
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
        step: StepSettings,
        saving: Saving | None = None,
        evaluation: PeriodicEvaluation | None = None,
        recorder: Recorder | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batches = batches
        self.max_iter = max_iter
        self.device = device
        self.settings = step
        self.saving = saving or Saving()
        self.checkpointer = self.saving.checkpointer
        self.evaluation = evaluation or PeriodicEvaluation()
        self.recorder = recorder or Recorder()
        self.stop = stop

        self.iteration = 0  # steps taken, which is also the number of batches consumed and the next 0-based iteration
        self.history = History()
        self.scaler = torch.amp.GradScaler(device.type, enabled=step.amp_dtype is torch.float16)
        self._parameters = trainable_parameters(optimizer)
        self._clock = StepClock(device)
        self._grad_norm = math.nan
        self._lr = 0.0
        self._asked_to_stop = False
        self._is_between_steps = True
        self._batch: Batch | None = None  # the last one
        self._failure: Exception | None = None  # why there is no next one
        self._skips_in_a_row = 0
        self._scaler_skips_in_a_row = 0

    # ---- the loop ----

    def train(self) -> bool:
        """Runs the iterations that are left, then evaluates.

        Returns:
            True at the end; False when it was asked to stop: then a checkpoint holds all that was done.

        Raises:
            NonFiniteError: on every process, when a loss or a gradient is not finite and the policy says so.
            torch.OutOfMemoryError: with the keys that make a step smaller.
        """
        logger.info("training from iteration %d to %d", self.iteration, self.max_iter)
        if self.checkpointer is not None and is_main_process():
            self.checkpointer.remove_unfinished()
            if self.iteration == 0:  # of another training in the folder
                self.checkpointer.forget_evaluation()
        self.model.train()
        writing = self.checkpointer or contextlib.nullcontext()
        with writing, self.recorder.recording(self.iteration), contextlib.suppress(_StoppedError):
            with self._saving_on_error():
                self._iterate()
                self.recorder.close_bar()
                self._evaluate()
            return True
        logger.info("stopped after iteration %d; go on with --resume", self.iteration - 1)
        return False

    def _iterate(self) -> None:
        if self.iteration >= self.max_iter:
            return
        began, first = time.perf_counter(), self.iteration
        if self.iteration and self._evaluation_is_missing():
            logger.info("the evaluation after iteration %d was not finished; doing it now", self.iteration - 1)
            with self.recorder.bar_aside():
                self._evaluate()
        batches = self.batches(self.iteration)
        while self.iteration < self.max_iter:
            try:
                self.step(batches)
            except NonFiniteError as error:
                self._leave_out(error)
            self._after_step()
        logger.info("trained %d iterations in %s", self.iteration - first, duration(time.perf_counter() - began))

    def step(self, batches: Iterator[Batch]) -> None:
        """One iteration: a batch, its losses and gradients, one step of the optimiser and of the schedule."""
        self._clock.start()
        batch = self._next(batches)
        self._clock.mark("data_time")
        with guards.explaining_full_memory(batch, self.model, device=self.device, iteration=self.iteration):
            losses = self.compute_gradients(batch)
            if losses.failed:
                self._leave()
            self.scaler.unscale_(self.optimizer)
            self._grad_norm = self.clip_gradients()
            self._check_gradients(batch)
            self._is_between_steps = False
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
        self._is_between_steps = True

    def compute_gradients(self, batch: Batch) -> StepLosses:
        """Leaves the gradients of a whole batch, times the scale of the loss scaler, and returns its losses.

        Raises:
            NonFiniteError: on every process, when a loss of any is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses, settings = StepLosses(), self.settings
        *first, last = TrainingBatch(batch).split(settings.accumulate)
        for part in (*first, last):
            alone = part is last or not hasattr(self.model, "no_sync")
            with contextlib.nullcontext() if alone else self.model.no_sync():
                with torch.autocast(self.device.type, dtype=settings.amp_dtype, enabled=settings.amp_dtype is not None):
                    weighted = self.model(part)
                losses.add(weighted)
                self._clock.mark("forward_time")
                if part is last:  # before the backward pass is queued, so that waiting for them never waits for it
                    stop = self.stop is not None and self.stop.requested
                    losses.send(stop=stop, failed=self._failure is not None)
                self.scaler.scale(sum(weighted.values())).backward()
                self._clock.mark("backward_time")
        guards.check_losses(losses, batch, iteration=self.iteration)
        return losses

    def clip_gradients(self) -> float:
        """Clips, and returns the 2-norm of all gradients before that."""
        norm = self.settings.gradient_clipping(self._parameters)
        if norm is None:
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        return float(norm)

    def _after_step(self) -> None:
        last = self.iteration == self.max_iter
        self.recorder.advance(self.iteration - 1, self._scalars)
        if self.iteration % LOG_PERIOD == 0 or last:
            self.recorder.write(self.iteration - 1, self._scalars())
        if self.checkpointer is not None:
            self.checkpointer.check()
            stops = self._asked_to_stop and not last
            if last or stops or self.saving.is_due(self.iteration):
                self.save("model_final" if last else None)
        if self._asked_to_stop and not last:
            raise _StoppedError
        if not last and self.evaluation.is_due(self.iteration):
            with self.recorder.bar_aside():
                self._evaluate()

    def _scalars(self) -> dict[str, float]:
        scalars = self.history.medians() | {"lr": self._lr, "grad_norm": self._grad_norm}
        if "time" in scalars:  # unless no step was taken yet
            scalars["eta_seconds"] = scalars["time"] * (self.max_iter - self.iteration)
        if self.device.type == "cuda":
            scalars["max_memory_mb"] = peak_memory_mb(self.device)
        return scalars

    # ---- errors that leave the weights good ----

    @contextlib.contextmanager
    def _saving_on_error(self) -> Iterator[None]:
        """Saves what was trained before an error ends it. With several processes the others may be anywhere then, so
        that only errors of which all know are saved after (`_leave`); one after which numbers are not finite never is.
        """
        began = self.iteration
        try:
            yield
        except (NonFiniteError, _StoppedError):
            raise
        except Exception:
            alone = self.checkpointer is not None and get_world_size() == 1
            if alone and self._is_between_steps and self.iteration > began:
                self._save_and_say()
            raise

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. A process of several that has none takes part with the last one in a step that is not taken,
        so that all know of it."""
        try:
            self._batch = next(batches)
        except Exception as error:
            if self._batch is None or get_world_size() == 1:
                raise
            self._failure = error
        return self._batch

    def _leave(self) -> None:
        """Saves, and raises on every process, because one of them has no batch."""
        failures = all_gather_object(f"process {get_rank()}: {self._failure}" if self._failure else "")
        if self.checkpointer is not None:
            self._save_and_say()
        raise self._failure or InputError("; ".join(filter(None, failures)))

    def _save_and_say(self) -> None:
        self.save()
        logger.info("saved what was trained up to iteration %d; go on with --resume", self.iteration - 1)

    # ---- numbers that are not finite ----

    def _check_gradients(self, batch: Batch) -> None:
        """Raises on every process, since gradients are the same on all; overflow in float16 is the scaler's work."""
        if math.isfinite(self._grad_norm):
            self._scaler_skips_in_a_row = 0
            return
        if self.scaler.is_enabled():
            self._scaler_skips_in_a_row += 1
            if self._scaler_skips_in_a_row <= guards.MAX_SCALER_SKIPS:
                return
            self.scaler.update()  # else it would refuse the next step, should the policy go on
        raise guards.non_finite_gradient(self._grad_norm, self.model, batch, iteration=self.iteration)

    def _leave_out(self, error: NonFiniteError) -> None:
        """Goes on behind a step that was not taken, unless SOLVER.NON_FINITE allows no more of them in a row."""
        self._skips_in_a_row += 1
        limit = self.settings.max_skips
        if not limit:
            raise error
        if self._skips_in_a_row > limit:
            raise NonFiniteError(
                f"{error} SOLVER.NON_FINITE is skip:{limit}, and this is number {self._skips_in_a_row} in a row."
            ) from error
        logger.warning("%s Left out, as SOLVER.NON_FINITE says (%d in a row)", error, self._skips_in_a_row)
        self._advance()

    # ---- evaluation ----

    def _evaluate(self) -> None:
        """Evaluates, keeps the best weights, records. A request to stop interrupts it, since it has no state."""
        if self.evaluation.evaluate is None:
            return
        state = self.state_dict() if self.stop is not None and self.checkpointer is not None else None
        try:
            scalars, images = self.evaluation.run(self.model, draws=self.recorder.shows_images, stop=self.stop)
        except StopRequested:
            if state is not None and self.iteration < self.max_iter:
                self.save(state=state)
            raise _StoppedError from None
        if is_main_process():
            # Noted before it is recorded: one that is killed in between is not recorded twice.
            self._keep_best(scalars)
            self.recorder.write(self.iteration - 1, scalars, images)

    def _keep_best(self, scalars: Mapping[str, float]) -> None:
        """Writes `best.pth`, if these weights are the best so far, and notes the evaluation."""
        if self.checkpointer is None:
            return
        best, iteration = None, self.iteration - 1
        if self.evaluation.is_best(scalars, iteration):
            about = {"metric": self.evaluation.best_metric, **self.evaluation.best}
            best = {**self.saving.weights(self.model), "iteration": iteration, "best": about}
        self.checkpointer.save_evaluation({"iteration": iteration, "best": self.evaluation.best}, best=best)

    def _evaluation_is_missing(self) -> bool:
        """Whether a run that is resumed was ended between a checkpoint and the end of the evaluation after it."""
        if self.checkpointer is None or not self.evaluation.is_due(self.iteration):
            return False
        noted = broadcast_object(self.checkpointer.noted_evaluation() if is_main_process() else None)
        if noted.get("iteration") == self.iteration - 1:
            self.evaluation.best = dict(noted["best"])
            return False
        return True

    # ---- saving and resuming ----

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint holds; to be called on every process, because each has its own random numbers."""
        return {
            **self.saving.weights(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.iteration - 1,  # 0-based number of the last step taken, as published
            "random": all_gather_object(random_state()),
            "history": self.history.state_dict(),
            "best": dict(self.evaluation.best),
        }

    def save(self, name: str | None = None, *, state: Mapping[str, Any] | None = None) -> None:
        """Hands a checkpoint to the checkpointer; to be called on every process.

        Args:
            name: of the file; None: that of the last iteration.
            state: an earlier `state_dict`; None: the present one.

        Raises:
            NonFiniteError: a weight is not finite; the checkpoints that exist stay as they are.
        """
        state = self.state_dict() if state is None else state
        guards.check_weights(state["model"], device=self.device, iteration=self.iteration - 1)
        if is_main_process():
            self.checkpointer.save(name or f"model_{self.iteration - 1:07d}", state)

    def resume(self, path: str | Path) -> None:
        """Continues from a checkpoint: weights, optimiser, schedule, loss scaler, random numbers and position in the
        data.

        Raises:
            FileNotFoundError, ValueError: the file cannot be read, belongs to another model or another config, or holds
                weights only.
        """
        state = load_training_state(path)
        load_state(self.model, state["model"], source=str(path), notes=state)
        check_same_groups(self.optimizer, state["optimizer"], source=path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"] + 1
        self.history.load_state_dict(state.get("history", {}))
        self.evaluation.best = dict(state.get("best", {}))
        set_random_states(state["random"], source=path)
        logger.info("resumed from %s at iteration %d", path, self.iteration)


class _StoppedError(Exception):
    """The training was asked to stop, and everything is saved."""
