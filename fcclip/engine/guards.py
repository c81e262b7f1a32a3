"""What to do when a training goes wrong: numbers that are not finite, memory that is full."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcclip.comm import all_gather_object, get_rank
from fcclip.engine.step import StepLosses
from fcclip.errors import InputError, UserError
from fcclip.weights import unwrap

MAX_SCALER_SKIPS = 100  # steps in a row that the float16 loss scaler may leave out: it halves the scale at each

Batch = Sequence[Mapping[str, Any]]


class NonFiniteError(UserError, RuntimeError):
    """A loss, a gradient or a weight became infinite or not a number."""


class FullMemoryError(UserError, torch.OutOfMemoryError):
    """The memory of a device is full."""


def max_skips(policy: str) -> int:
    """How many steps in a row may be left out because they are not finite, as SOLVER.NON_FINITE says.

    Raises:
        ValueError: anything but `raise` or `skip:N` with N of 1 or more.

    Example:
        >>> max_skips("raise"), max_skips("skip:5")
        (0, 5)
    """
    if policy == "raise":
        return 0
    if match := re.fullmatch(r"skip:([1-9]\d*)", policy):
        return int(match[1])
    raise InputError(f"SOLVER.NON_FINITE must be 'raise' or 'skip:N' (N of 1 or more), got '{policy}'")


def check_losses(losses: StepLosses, batch: Batch, *, iteration: int) -> None:
    """Raises on every process when any process has a loss that is not finite.

    Raises:
        NonFiniteError: names process, losses and images.
    """
    if all(map(math.isfinite, losses.mean().values())):
        return
    terms = losses.local().items()
    bad = [f"{name} = {value}" for name, value in terms if not math.isfinite(value) and name != "total_loss"]
    reports = all_gather_object((get_rank(), bad, _file_names(batch)))
    broken = [
        f"process {rank}: {', '.join(terms)} (images: {', '.join(files)})" for rank, terms, files in reports if terms
    ]
    raise NonFiniteError(
        f"the loss is not finite at iteration {iteration}: {'; '.join(broken)}. The step was not taken. Usual causes: "
        "a learning rate that is too high (SOLVER.BASE_LR), overflow in float16 (SOLVER.AMP.DTYPE bfloat16), damaged "
        "labels of these images."
    )


def non_finite_gradient(norm: float, model: nn.Module, batch: Batch, *, iteration: int) -> NonFiniteError:
    """The error that names parameter and images; to be asked for on every process, which all have the same gradient."""
    files = [name for names in all_gather_object(_file_names(batch)) for name in names]
    gradients = ((name, parameter.grad) for name, parameter in unwrap(model).named_parameters())
    bad = [name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all()]
    return NonFiniteError(
        f"the gradient is not finite at iteration {iteration} although the losses are: norm {norm}, first in "
        f"{bad[0] if bad else 'the norm itself'} (images: {', '.join(files)}). The step was not taken. Usual causes: a "
        "learning rate that is too high (SOLVER.BASE_LR), overflow (SOLVER.AMP.DTYPE bfloat16, or SOLVER.AMP.ENABLED "
        "False)."
    )


def check_weights(weights: Mapping[str, Tensor], *, device: torch.device, iteration: int) -> None:
    """Refuses to save weights that are not finite.

    Raises:
        NonFiniteError: names the first one.
    """
    names = [key for key, value in weights.items() if value.is_floating_point()]
    finite = torch.stack([weights[key].isfinite().all().to(device) for key in names]).tolist()
    bad = [key for key, good in zip(names, finite) if not good]
    if bad:
        raise NonFiniteError(
            f"{len(bad)} weights are not finite after iteration {iteration} (first: {bad[0]}); no checkpoint is "
            "written. Resume from the last one, with a lower SOLVER.BASE_LR or SOLVER.AMP.DTYPE bfloat16."
        )


@contextlib.contextmanager
def explaining_full_memory(batch: Batch, model: nn.Module, *, device: torch.device, iteration: int) -> Iterator[None]:
    """Tells of full memory what was resident, and which keys make a step smaller.

    Raises:
        FullMemoryError: instead of torch's own error, whose first line is kept.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        images = ["x".join(map(str, sample["image"].shape)) for sample in batch if "image" in sample]
        first_line, *_ = str(error).splitlines() or [""]
        resident = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in _resident(model, device).items())
        raise FullMemoryError(
            f"out of memory on {device} at iteration {iteration}: {first_line}\n"
            f"  resident: {resident}\n"
            f"  images of this step: {', '.join(images)}\n"
            "  to make a step smaller, in this order: SOLVER.ACCUMULATE larger (same result), SOLVER.AMP.ENABLED True, "
            "fewer images a process (SOLVER.IMS_PER_BATCH smaller, or more processes), INPUT.IMAGE_SIZE smaller, "
            "MODEL.MASK_FORMER.TRAIN_NUM_POINTS or NUM_OBJECT_QUERIES smaller. Is another program on this device?"
        ) from error


def _resident(model: nn.Module, device: torch.device) -> dict[str, int]:
    """What is in the memory of a device, in bytes by name."""
    sizes = dict.fromkeys(("parameters", "of which frozen", "gradients"), 0)
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        sizes["parameters"] += size
        sizes["of which frozen"] += size * (not parameter.requires_grad)
        sizes["gradients"] += size * (parameter.grad is not None)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        sizes["allocated by torch"] = torch.cuda.memory_allocated(device)
        sizes["at most so far"] = torch.cuda.max_memory_allocated(device)
        sizes["reserved by torch"] = torch.cuda.memory_reserved(device)
        sizes |= {"free on the device": free, "size of the device": total}
    return sizes


def _file_names(batch: Batch) -> list[str]:
    return [str(sample.get("file_name", "?")) for sample in batch]
