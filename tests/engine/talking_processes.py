"""What two processes without a model do in test_distributed.py."""

from __future__ import annotations

import os
import signal

import torch

from fcclip.engine import all_gather_object, barrier, broadcast_object, get_rank, get_world_size, mean_over_processes


def talk() -> list:
    """What the helper functions return, on both processes."""
    rank = get_rank()
    mean = mean_over_processes(torch.tensor([float(rank), 2.0])).tolist()
    return all_gather_object([all_gather_object(rank * 10), broadcast_object(f"from {rank}"), mean, get_world_size()])


def one_raises() -> None:
    """One process raises while the other waits for it."""
    if get_rank() == 1:
        raise ValueError("picture 7 is broken")
    barrier()


def one_dies() -> None:
    """One process dies without a word while the other waits for it."""
    if get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier()
