"""The engines of multi-scale deformable attention, and which of them runs."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from types import ModuleType

import torch

from fcclip.config import lookup
from fcclip.errors import InputError
from fcclip.ops import cpp_engine, cuda_engine, gather_engine, torch_engine, triton_engine
from fcclip.ops.builder import COMMAND, BuildError

logger = logging.getLogger(__name__)

KIND = "engine of multi-scale deformable attention (MODEL.MSDA_ENGINE)"
ENGINES: dict[str, ModuleType] = {
    "torch": torch_engine,
    "cpp": cpp_engine,
    "cuda": cuda_engine,
    "triton": triton_engine,
    "gather": gather_engine,
}
PLAIN = ("torch", "gather")  # plain operations, which exports show and autograd differentiates
AUTO = ("cpp", "cuda", "triton", "torch")  # fastest first; those that have no business on a device say so


def select_engine(name: str = "auto", device: torch.device | str = "cpu") -> str:
    """What to hand the operator as `engine`, checked and said in the log. The variable FCCLIP_MSDA wins over `name`.

    Args:
        name: a key of `ENGINES`, or "auto": the fastest that is already built or needs no building.
        device: where the model will run.

    Returns:
        The name. "auto" stays "auto", so that the engine follows a model that is moved to another kind of device; the
        choice for one kind is made once in a process.

    Raises:
        ValueError: an engine that does not exist or cannot run on this device; the message says why.
    """
    device = torch.device(device)
    variable = os.environ.get("FCCLIP_MSDA")
    chosen = variable or name
    if chosen == "auto":
        automatic_engine(device.type)
        return chosen
    engine = lookup(KIND, chosen, ENGINES)
    if device.type == "meta":  # shapes only: nothing is computed
        return chosen
    availability = engine.available(device)
    if not availability:
        source = "the variable FCCLIP_MSDA" if variable else "MODEL.MSDA_ENGINE"
        raise InputError(
            f"{source} asks for the engine '{chosen}' of multi-scale deformable attention, which cannot run on "
            f"{device}: {availability.reason}. 'auto' takes the fastest that can."
        )
    logger.info("multi-scale deformable attention: engine '%s', asked for", chosen)
    return chosen


def build_advice(device: torch.device | str) -> str:
    """One line for the user of a device that would have a faster engine if it were built, and could be; else ""."""
    device = torch.device(device)
    for name in AUTO:
        engine = ENGINES[name]
        if engine.DEVICES and device.type not in engine.DEVICES:
            continue
        if engine.available(device):
            return ""
        if (extension := getattr(engine, "EXTENSION", None)) is not None:
            with contextlib.suppress(BuildError):
                extension.compiler()
                return (
                    f"`{COMMAND} {name}` (or `make build`) builds a faster engine of deformable attention for this "
                    f"machine, once and in under a minute"
                )
    return ""


@torch.compiler.assume_constant_result
def automatic_engine(device_type: str) -> str:
    """The engine that "auto" means on this kind of device: chosen once, said in the log, the same ever after."""
    return _choose(device_type)


@functools.cache
def _choose(device_type: str) -> str:
    passed_over = []
    for name in AUTO:
        engine = ENGINES[name]
        if engine.DEVICES and device_type not in engine.DEVICES:
            continue
        availability = engine.available(torch.device(device_type))
        if availability:
            logger.info(
                "multi-scale deformable attention: engine '%s' on %s (auto%s)",
                name,
                device_type,
                "".join(f"; not '{other}': {reason}" for other, reason in passed_over),
            )
            return name
        if availability.broken:
            logger.warning("multi-scale deformable attention: engine '%s' is broken: %s", name, availability.reason)
        passed_over.append((name, "broken" if availability.broken else availability.reason))
    raise AssertionError("the engine 'torch' runs everywhere")
