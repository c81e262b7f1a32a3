"""What a process knows of the others: rank, number, barrier, gather, mean (detectron2's word)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def get_rank() -> int:
    """This process's number, 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """How many processes work together, over all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes the files that a run has once."""
    return get_rank() == 0


def barrier() -> None:
    """Returns when every process has called it."""
    if get_world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def all_gather_object(value: Any) -> list[Any]:
    """The `value` of every process, in rank order, on every process."""
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """The `value` of rank 0, on every process."""
    if get_world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of a float tensor over all processes; a new tensor, without gradient."""
    values = values.detach().clone()
    if get_world_size() > 1:
        dist.all_reduce(values)
        values /= get_world_size()
    return values
