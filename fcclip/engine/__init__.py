"""Training: from losses to weights on disk.

trainer.py      Trainer: the loop
build.py        build_trainer: the trainer of a config; check_training
optimizer.py    AdamW and SGD with the published parameter groups, gradient clipping, StepSettings
schedule.py     the learning rate as a function of the iteration; scaling to the number of processes
step.py         StepLosses, StepClock: losses of one step over parts and processes, and where its time went
guards.py       numbers that are not finite, memory that is full
checkpoint.py   checkpoints: atomic, overlapped writing; Saving: what is kept, and when
evaluating.py   PeriodicEvaluation: evaluations in the course of a training
best.py         best_choice: which data set and metric choose best.pth
recording.py    Recorder: writers and bar of a training
metrics.py      metrics.json, TensorBoard, wandb, lines of the log
progress_bar.py ProgressBar
logs.py         log.txt
dry_run.py      dry_run: one step that changes nothing
run.py          the beginning and the end of a run
signals.py      SIGTERM and SIGUSR1: finish the step, save, leave
run_folder.py   what may change when a run is resumed
run_lock.py     one training at a time in a folder
processes.py    launch: several processes, and which of them failed
environment.py  versions, device and memory; random seeds and states

Evaluation is handed in by the script on top (`train_net.py`), never imported.
"""

from fcclip.engine.best import best_choice, check_best
from fcclip.engine.build import amp_dtype, build_trainer, check_training
from fcclip.engine.checkpoint import Checkpointer, Saving, load_checkpoint, save_checkpoint
from fcclip.engine.dry_run import dry_run
from fcclip.engine.environment import (
    apply_numeric_settings,
    environment_report,
    log_parameters,
    peak_memory_mb,
    random_state,
    seed_everything,
    set_random_state,
)
from fcclip.engine.evaluating import PeriodicEvaluation
from fcclip.engine.guards import NonFiniteError
from fcclip.engine.logs import close_logging, log_exception, setup_logging
from fcclip.engine.metrics import duration
from fcclip.engine.optimizer import StepSettings, build_gradient_clipping, build_optimizer, parameter_groups
from fcclip.engine.processes import ProcessFailedError, launch
from fcclip.engine.recording import Recorder
from fcclip.engine.run import as_begun, begin_run, prepare_output_folder, run_in_folder
from fcclip.engine.run_lock import RunLock
from fcclip.engine.schedule import build_lr_scheduler, build_multiplier, scale_to_world_size
from fcclip.engine.signals import REQUEUE_EXIT_CODE, StopRequest, StopRequested, shield_worker
from fcclip.engine.trainer import Trainer

__all__ = [
    "REQUEUE_EXIT_CODE",
    "Checkpointer",
    "NonFiniteError",
    "PeriodicEvaluation",
    "ProcessFailedError",
    "Recorder",
    "RunLock",
    "Saving",
    "StepSettings",
    "StopRequest",
    "StopRequested",
    "Trainer",
    "amp_dtype",
    "apply_numeric_settings",
    "as_begun",
    "begin_run",
    "best_choice",
    "build_gradient_clipping",
    "build_lr_scheduler",
    "build_multiplier",
    "build_optimizer",
    "build_trainer",
    "check_best",
    "check_training",
    "close_logging",
    "dry_run",
    "duration",
    "environment_report",
    "launch",
    "load_checkpoint",
    "log_exception",
    "log_parameters",
    "parameter_groups",
    "peak_memory_mb",
    "prepare_output_folder",
    "random_state",
    "run_in_folder",
    "save_checkpoint",
    "scale_to_world_size",
    "seed_everything",
    "set_random_state",
    "setup_logging",
    "shield_worker",
]
