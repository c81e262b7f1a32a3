"""What two processes without a model do in test_distributed.py.

As a program it runs one of these functions under the published command line, or under torchrun:

    python talking_processes.py FUNCTION [--num-gpus N] [--num-machines N] [--machine-rank K] [--dist-url URL] [WORDS]

It prints what `launch` returns, or `error: ` and what it raises.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch

from fcclip.comm import all_gather_object, barrier, broadcast_object, get_rank, get_world_size, mean_over_processes
from fcclip.engine.distributed import ProcessFailedError, launch, watch
from fcclip.engine.signals import REQUEUE_EXIT_CODE, StopRequest


def talk() -> list:
    """What the helper functions return, on both processes."""
    rank = get_rank()
    mean = mean_over_processes(torch.tensor([float(rank), 2.0])).tolist()
    return all_gather_object([all_gather_object(rank * 10), broadcast_object(f"from {rank}"), mean, get_world_size()])


def one_raises() -> None:
    """One process raises while the other waits for it."""
    if get_rank() == 1:
        raise ValueError("image 7 is broken")
    barrier()


def _two_steps() -> None:
    for step in range(11, 13):
        watch(step)
        barrier()
    time.sleep(0.6 * get_rank())  # longer than a beat of the short time-outs in the tests


def one_is_killed() -> None:
    """One process is killed some steps later, in the middle of a collective."""
    _two_steps()
    if get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier()


def one_sleeps() -> None:
    """One process talks first, then never comes back from a call."""
    talk()
    _two_steps()
    if get_rank() == 1:
        time.sleep(1000)
    barrier()


def one_is_stopped() -> None:
    """One process stands still with all its threads, as one does that holds Python's lock for ever."""
    _two_steps()
    if get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    barrier()


def one_leaves_early() -> list:
    """Three batches for two processes that talk after each: one of them then waits for a batch that nobody has."""
    seen = []
    for batch in range(3)[get_rank() :: get_world_size()]:
        watch(batch)
        seen.append(all_gather_object(batch))
    return seen


def uneven_batches() -> list:
    """Three batches for two processes that only talk at the end."""
    seen = []
    for batch in range(3)[get_rank() :: get_world_size()]:
        watch(batch)
        time.sleep(0.1)
        seen.append(batch)
    return all_gather_object(seen)


def talk_and_share() -> list:
    """Both of those that end well, in one start."""
    return [talk(), uneven_batches()]


def works_until_asked(folder: str, seconds_to_save: str) -> None:
    """Steps until any process was asked to stop; then all save, one of them slowly, and leave to be started again."""
    with StopRequest() as stop:
        for step in itertools.count():
            watch(step)
            Path(folder, f"pid_{get_rank()}").write_text(str(os.getpid()))
            if mean_over_processes(torch.tensor([float(stop.requested)])).item() > 0:
                time.sleep(float(seconds_to_save) * (get_rank() == 0))
                Path(folder, f"saved_{get_rank()}").touch()
                raise SystemExit(REQUEUE_EXIT_CODE)
            time.sleep(0.05)


def main() -> int:
    """The exit code is that of a training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url", default="auto")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    try:
        result = launch(
            globals()[args.function],
            *args.words,
            num_processes=args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
        )
    except ProcessFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
