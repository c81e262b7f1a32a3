"""What two processes without a model do in test_processes.py.

As a program it runs one of these functions under the published command line, or under torchrun:

    python talking_processes.py FUNCTION [--num-gpus N] [--num-machines N] [--machine-rank K] [--dist-url URL] [WORDS]
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
from fcclip.engine import REQUEUE_EXIT_CODE, StopRequest, launch
from fcclip.errors import InputError, run_program


def talk_and_share() -> list:
    """What the functions of fcclip.comm return on both processes; three batches, for two that only talk at the end."""
    rank = get_rank()
    mean = mean_over_processes(torch.tensor([float(rank), 2.0])).tolist()
    talked = all_gather_object([all_gather_object(rank * 10), broadcast_object(f"from {rank}"), mean])
    seen = []
    for batch in range(3)[rank :: get_world_size()]:
        time.sleep(0.1)
        seen.append(batch)
    return [talked, all_gather_object(seen)]


def one_raises() -> None:
    """One process raises while the other waits for it."""
    if get_rank() == 1:
        raise InputError("image 7 is broken")
    barrier()


def one_is_killed() -> None:
    """One process is killed in the middle of a collective."""
    barrier()
    if get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier()


def one_sleeps() -> None:
    """One process never comes back from a call."""
    barrier()
    if get_rank() == 1:
        time.sleep(1000)
    barrier()


def works_until_asked(folder: str) -> None:
    """Steps until any process was asked to stop; then all save, one of them slowly, and leave to be started again."""
    with StopRequest() as stop:
        for step in itertools.count():
            Path(folder, f"{get_rank()}.writing").write_text(str(os.getpid()))
            os.replace(Path(folder, f"{get_rank()}.writing"), Path(folder, f"pid_{get_rank()}"))
            if mean_over_processes(torch.tensor([float(stop.requested)])).item() > 0:
                time.sleep(1.5 * (get_rank() == 0))
                Path(folder, f"saved_{get_rank()}").write_text(str(step))
                raise SystemExit(REQUEUE_EXIT_CODE)
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url", default="auto")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    launch(
        globals()[args.function],
        *args.words,
        num_processes=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
