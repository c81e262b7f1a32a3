"""The machine: device, operators, output folder, disk."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn

from fcclip.checks.issue import ERROR, NOTE, OK, WARNING, Issues
from fcclip.config import lookup, resolve_device
from fcclip.errors import InputError
from fcclip.ops import build_advice, select_engine
from fcclip.ops.engines import automatic_engine
from fcclip.weights import unnamed_parts


def check_machine(issues: Issues, cfg: CfgNode) -> None:
    """The device that the config names is there, and can run deformable attention.

    Raises:
        ValueError: it is not.
    """
    try:
        device = resolve_device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise InputError(f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', which torch does not know: {error}") from error
    name = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    issues.add(OK, f"device {device}{name}, torch {torch.__version__}, open_clip {version('open_clip_torch')}")
    with issues.attempt():
        engine = select_engine(cfg.MODEL.MSDA_ENGINE, device)
        auto = engine == "auto"
        engine = automatic_engine(device.type) if auto else engine
        fastest = " (the fastest of those that can)" if auto else ""
        issues.add(OK, f"deformable attention runs on the engine '{engine}'{fastest}")
        if auto and (advice := build_advice(device)):
            issues.add(NOTE, advice)
    if cfg.FLOAT32_PRECISION:
        lookup("FLOAT32_PRECISION", cfg.FLOAT32_PRECISION, dict.fromkeys(("highest", "high", "medium")))


def check_output_folder(issues: Issues, cfg: CfgNode) -> None:
    """OUTPUT_DIR can be written; it is not made."""
    folder = Path(cfg.OUTPUT_DIR).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    remedy = "choose a folder that you may write: OUTPUT_DIR /some/folder"
    if not existing.is_dir():
        return issues.add(ERROR, f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' is not a folder: {existing} is a file", remedy)
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = error.strerror or error
        return issues.add(ERROR, f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' cannot be written ({reason})", remedy)
    issues.add(OK, f"OUTPUT_DIR {folder} can be written")
    if (folder / "last_checkpoint").is_file():
        remedy = "--resume continues it; else they are replaced"
        issues.add(NOTE, "OUTPUT_DIR holds the checkpoints of an earlier run", remedy)
    return None


def check_disk(issues: Issues, cfg: CfgNode, model: nn.Module) -> None:
    """Room for the checkpoints of the run: weights and both moments of the optimiser, in float32."""
    solver = cfg.SOLVER
    learning = sum(4 * weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(4 * weight.numel() for weight in model.parameters() if not weight.requires_grad)
    whole = solver.CHECKPOINT_FULL or unnamed_parts(model, cfg)
    each = 3 * learning + (frozen if whole else 0)
    periodic = solver.MAX_ITER // solver.CHECKPOINT_PERIOD if solver.CHECKPOINT_PERIOD > 0 else 0
    count = min(periodic, solver.CHECKPOINT_KEEP or periodic) + 2  # the final one, and one that is being written
    folder = Path(cfg.OUTPUT_DIR).absolute()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free
    level = OK if free > count * each else WARNING if free > each else ERROR
    text = f"{count} checkpoints of {sized(each)}; {sized(free)} are free in OUTPUT_DIR"
    issues.add(level, text, "" if level == OK else "free some, or lower SOLVER.CHECKPOINT_KEEP")


def sized(num_bytes: int) -> str:
    """Bytes for people.

    Example:
        >>> sized(3 * 2**20)
        '3.0 MiB'
    """
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
