"""Training: from losses to weights on disk.

optimizer.py    AdamW and SGD with the published parameter groups, gradient clipping
schedule.py     the learning rate as a function of the iteration; scaling to the number of processes
trainer.py      Trainer: the loop; build_trainer: the loop of a config
finetuning.py   begin_finetuning: what a fine-tuning starts from and must not forget
guards.py       numbers that are not finite, memory that is full
signals.py      SIGTERM and SIGUSR1: finish the step, save, leave
run_folder.py   what may change when a run is resumed
run_lock.py     one training at a time in a folder
checkpoint.py   checkpoints and weights: atomic writing, safe and strict reading
processes.py    launch: several processes, and which of them failed
metrics.py      log.txt, metrics.json, TensorBoard, progress bar
environment.py  versions and device; random seeds and states

Evaluation is handed in by the script on top (`train_net.py`), never imported.
"""

from fcclip.engine.checkpoint import Checkpointer, load_checkpoint, save_checkpoint
from fcclip.engine.environment import (
    apply_numeric_settings,
    draw_seed,
    environment_report,
    git_state,
    random_state,
    seed_everything,
    set_random_state,
)
from fcclip.engine.guards import NonFiniteError, OnNonFinite
from fcclip.engine.metrics import build_writers, close_logging, duration, log_exception, setup_logging
from fcclip.engine.optimizer import build_clip, build_optimizer, parameter_groups
from fcclip.engine.processes import ProcessFailedError, launch
from fcclip.engine.run_folder import check_resume, check_same_classes
from fcclip.engine.run_lock import RunLock
from fcclip.engine.schedule import build_lr_scheduler, build_multiplier, scale_to_world_size
from fcclip.engine.signals import REQUEUE_EXIT_CODE, StopRequest, StopRequested, shield_worker
from fcclip.engine.trainer import Trainer, build_trainer, check_training

__all__ = [
    "REQUEUE_EXIT_CODE",
    "Checkpointer",
    "NonFiniteError",
    "OnNonFinite",
    "ProcessFailedError",
    "RunLock",
    "StopRequest",
    "StopRequested",
    "Trainer",
    "apply_numeric_settings",
    "build_clip",
    "build_lr_scheduler",
    "build_multiplier",
    "build_optimizer",
    "build_trainer",
    "build_writers",
    "check_resume",
    "check_same_classes",
    "check_training",
    "close_logging",
    "draw_seed",
    "duration",
    "environment_report",
    "git_state",
    "launch",
    "load_checkpoint",
    "log_exception",
    "parameter_groups",
    "random_state",
    "save_checkpoint",
    "scale_to_world_size",
    "seed_everything",
    "set_random_state",
    "setup_logging",
    "shield_worker",
]
