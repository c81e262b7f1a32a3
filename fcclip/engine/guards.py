"""What to do when a training goes wrong: numbers that are not finite, memory that is full."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fcclip.errors import InputError

__all__ = [
    "MAX_ROLLBACKS",
    "MAX_SCALER_SKIPS",
    "BrokenWeightsError",
    "NonFiniteError",
    "OnNonFinite",
    "explain_out_of_memory",
]

MAX_ROLLBACKS = 3  # to one checkpoint: then the weights in it are the problem, not the images after it
MAX_SCALER_SKIPS = 100  # steps in a row that the float16 loss scaler may leave out: it halves the scale at each


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a weight became infinite or not a number."""


class BrokenWeightsError(NonFiniteError):
    """Weights are not finite, which no policy can cure."""


@dataclass(frozen=True)
class OnNonFinite:
    """The policy of SOLVER.NON_FINITE.

    Args:
        kind: "raise" stops the training; "skip" leaves the step out; "rollback" goes back to the last checkpoint and
            leaves the step out when it comes again.
        limit: for "skip", steps in a row that may be left out.

    Example:
        >>> OnNonFinite.parse("skip:5")
        OnNonFinite(kind='skip', limit=5)
    """

    kind: str = "raise"
    limit: int = 0

    @classmethod
    def parse(cls, text: str) -> OnNonFinite:
        """The policy that SOLVER.NON_FINITE names.

        Raises:
            ValueError: anything but `raise`, `skip:N` with N of 1 or more, or `rollback`.
        """
        if match := re.fullmatch(r"skip:([1-9]\d*)", text):
            return cls("skip", int(match[1]))
        if text in ("raise", "rollback"):
            return cls(text)
        raise InputError(f"SOLVER.NON_FINITE must be 'raise', 'skip:N' (N of 1 or more) or 'rollback', got '{text}'")


def explain_out_of_memory(
    error: BaseException, *, iteration: int, model: nn.Module, shapes: Sequence[Sequence[int]], device: torch.device
) -> str:
    """What was resident when the memory of a device was full, and which keys make a step smaller.

    Args:
        error: torch's own; its first line is kept.
        iteration: 0-based.
        model: its parameters and gradients are counted.
        shapes: of the images of the step.
        device: that was full.
    """
    sizes = dict.fromkeys(("parameters", "of which frozen", "gradients"), 0)
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        sizes["parameters"] += size
        sizes["of which frozen"] += size * (not parameter.requires_grad)
        sizes["gradients"] += size * (parameter.grad is not None)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        sizes |= {
            "allocated by torch": torch.cuda.memory_allocated(device),
            "at most so far": torch.cuda.max_memory_allocated(device),
            "reserved by torch": torch.cuda.memory_reserved(device),
            "free on the device": free,
            "size of the device": total,
        }
    resident = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.items())
    images = ", ".join("x".join(map(str, shape)) for shape in shapes)
    first_line, *_ = str(error).splitlines() or [""]
    return (
        f"out of memory on {device} at iteration {iteration}: {first_line}\n"
        f"  resident: {resident}\n"
        f"  images of this step: {images}\n"
        "  to make a step smaller, in this order: SOLVER.ACCUMULATE larger (same result), SOLVER.AMP.ENABLED True, "
        "fewer images a process (SOLVER.IMS_PER_BATCH smaller, or more processes), INPUT.IMAGE_SIZE smaller, "
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS or NUM_OBJECT_QUERIES smaller. Is another program on this device?"
    )
