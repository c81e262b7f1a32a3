"""What outputs are made of: masks enlarged with their probabilities, and what heads ask of every pixel.

Plain PyTorch is the truth. On a CPU that has the engine 'cpp' of `fcclip.ops`, csrc/output_maps_cpu.cpp goes over the
maps once where PyTorch needs several passes; sums are rounded in another order, everything else is the same.

Legend: n maps of `pixels` fp32; `places` (n,) int64 are those that are looked at among more; None: all, in order.
"""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

from fcclip.ops import cpp_engine
from fcclip.ops.builder import load
from fcclip.ops.engines import automatic_engine

_CPP = "cpp"
_FEW, _GROUP = 1000, 32  # maps: of more, the highest is sought in groups of so many (5,000: 6 s instead of 20)


def library(maps: Tensor) -> ctypes.CDLL | None:
    """The compiled functions, if they serve these maps: fp32 on a CPU without autograd, and the engine 'cpp' is what
    deformable attention takes too (the variable FCCLIP_MSDA, else the fastest that is built)."""
    if maps.device.type != "cpu" or maps.dtype != torch.float32 or (maps.requires_grad and torch.is_grad_enabled()):
        return None
    name = os.environ.get("FCCLIP_MSDA", "auto")
    return load(cpp_engine.EXTENSION) if (automatic_engine("cpu") if name == "auto" else name) == _CPP else None


def enlarge(
    compiled: ctypes.CDLL, maps: Tensor, places: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Maps resized along both sides, and their sigmoids.

    Args:
        compiled: the library.
        maps: (., h, w) fp32.
        places: (n,) int64.
        rows: numbers (t, height) int32 and weights (t, height) fp32 of the t rows of a map, 2 or 4, that each row of
            the result is the weighted sum of.
        columns: the same of the columns.

    Returns:
        Two of (n, height, width) fp32.
    """
    (taps, height), width = rows[0].shape, columns[0].shape[1]
    logits, shares = (maps.new_empty(len(places), height, width) for _ in range(2))
    by_row = [tensor.T.contiguous() for tensor in rows]
    memory = (*by_row, width, *(tensor.contiguous() for tensor in columns), logits, shares)
    _call(compiled.fcclip_enlarge, len(places), places, maps.contiguous(), *maps.shape[1:], taps, height, *memory)
    return logits, shares


def winners(scores: Tensor, shares: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Which of n queries has each pixel.

    Args:
        scores: (n,) float, 0 or more.
        shares: (., height, width) float, 0..1.
        places: see above.

    Returns:
        (height, width) int64, the query with the highest score times share, the first of equal ones; (height, width)
        bool, whether the share of that one is at least a half; (n,) int64, in how many pixels the own share is.
    """
    if (compiled := library(shares)) is None:
        shares = shares if places is None else shares[places]
        inside = shares >= 0.5
        owner = (scores[:, None, None] * shares).max(0).indices
        return owner, inside.gather(0, owner[None])[0], count(inside)
    owner = torch.empty(shares.shape[1:], dtype=torch.int64)
    inside, areas = torch.empty_like(owner, dtype=torch.bool), torch.zeros(len(scores), dtype=torch.int64)
    outputs = (owner, inside, areas)
    _call(compiled.fcclip_win, len(scores), _all(places, shares), scores, shares.contiguous(), owner.numel(), *outputs)
    return outputs


def highest(maps: Tensor) -> Tensor:
    """(n, height, width) -> (height, width) int64: of each pixel the first of the highest maps."""
    if (compiled := library(maps)) is None:
        return _plain_highest(maps)
    index = torch.empty(maps.shape[1:], dtype=torch.int64)
    _call(compiled.fcclip_highest, len(maps), maps.contiguous(), index.numel(), index)
    return index


def _plain_highest(maps: Tensor) -> Tensor:
    if len(maps) <= _FEW:
        return maps.max(0).indices  # faster than argmax on a CPU
    groups = maps.split(_GROUP)  # `amax` is faster than `max` with indices, which then see few
    start = torch.stack([group.amax(0) for group in groups]).max(0).indices * _GROUP
    near = (start + torch.arange(_GROUP, device=maps.device)[:, None, None]).clamp_(max=len(maps) - 1)
    return near.gather(0, maps.gather(0, near).max(0, keepdim=True).indices)[0]


def measure(logits: Tensor, shares: Tensor, places: Tensor | None, inside: Tensor, areas: Tensor, sums: Tensor) -> None:
    """Where mask logits are positive.

    Args:
        logits, shares: (., height, width) float, mask logits and their probabilities.
        places: see above.
        inside: (n, height, width) bool, rows of larger maps: written.
        areas: (n,) int64, the pixels inside: added.
        sums: (n,) float as `shares`, of the probabilities inside: added.
    """
    if (compiled := library(shares)) is None:
        positive = (logits if places is None else logits[places]) > 0
        inside.copy_(positive)
        areas += count(positive)
        sums += ((shares if places is None else shares[places]) * positive).flatten(1).sum(1)
        return
    maps = (logits.contiguous(), shares.contiguous(), shares[0].numel())
    _call(compiled.fcclip_measure, len(sums), _all(places, shares), *maps, inside.stride(0), inside, areas, sums)


def count(inside: Tensor) -> Tensor:
    """(n, h, w) bool -> (n,) int64; as numbers, which a CPU adds faster than truth values."""
    return inside.flatten(1).view(torch.uint8).sum(1, dtype=torch.int32).long()


def _all(places: Tensor | None, maps: Tensor) -> Tensor:
    return torch.arange(len(maps)) if places is None else places


def _call(function: ctypes._CFuncPtr, *arguments: int | Tensor) -> None:
    values = [
        ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.c_int64(value) for value in arguments
    ]
    if function(*values):
        raise torch.OutOfMemoryError("not enough memory on the CPU for the maps of an image")
