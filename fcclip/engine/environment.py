"""The machine and the dice: what a run ran on, and its random numbers."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from fcclip import allocator
from fcclip.comm import get_rank, get_world_size
from fcclip.errors import InputError
from fcclip.version import __version__

try:
    import resource
except ImportError:  # not on Windows
    resource = None

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "timm", "fvcore", "numpy", "scipy", "Pillow", "safetensors")


def environment_report(device: torch.device) -> dict[str, str]:
    """Versions, device and git commit, by name; for the log and for recorded results."""
    report = {
        "fcclip": __version__,
        "git": git_state(Path(__file__).resolve().parent),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "command": " ".join(sys.argv),
    }
    for name in _LIBRARIES:
        try:
            report[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            report[name] = "not installed"
    report["device"] = str(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        report["GPU"] = f"{properties.name}, {memory}, {torch.cuda.device_count()} in this machine"
        report["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    report["CPU"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads a process"
    report["allocator"] = allocator.described()
    return report


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far, MiB: by tensors on a GPU, by this process on a CPU (0 where it is not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def log_parameters(model: nn.Module) -> None:
    """Says how many parameters there are, and how many of them learn."""
    sizes = [(parameter.numel() / 1e6, parameter.requires_grad) for parameter in model.parameters()]
    total, trainable = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    logger.info("parameters: %.2f M, trainable %.2f M, frozen %.2f M", total, trainable, total - trainable)


def git_state(folder: Path) -> str:
    """The commit of the checkout that `folder` lies in, marked when files differ from it; "none" outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        if not (root / "fcclip" / "engine").is_dir():  # installed below somebody else's checkout
            return "none"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "none"


def draw_seed() -> int:
    """A fresh seed for a run that asks for none; takes nothing from any generator."""
    return int.from_bytes(os.urandom(4), "little") & 0x7FFFFFFF


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def apply_numeric_settings(cfg: CfgNode, *, training: bool) -> None:
    """Sets what the config says about precision and determinism of torch's own kernels.

    Raises:
        ValueError: unknown FLOAT32_PRECISION.
    """
    if cfg.FLOAT32_PRECISION:
        if cfg.FLOAT32_PRECISION not in ("highest", "high", "medium"):
            raise InputError(f"FLOAT32_PRECISION must be '', highest, high or medium, got '{cfg.FLOAT32_PRECISION}'")
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    torch.backends.cudnn.benchmark = training and cfg.CUDNN_BENCHMARK
    if cfg.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process, as plain data and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts every random generator back to a state of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def set_random_states(states: Sequence[dict[str, Any]], *, source: str | Path) -> None:
    """Gives each process its own state of those in a checkpoint, `source`; none when there were more or fewer."""
    if len(states) == get_world_size():
        set_random_state(states[get_rank()])
        return
    logger.warning(
        "%s was written by %d processes, now there are %d: random numbers start afresh, the order of the data goes on",
        *(source, len(states), get_world_size()),
    )
