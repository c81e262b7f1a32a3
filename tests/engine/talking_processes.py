"""What two processes without a model do in test_processes.py.

As a program it runs one of these functions, also under torchrun:

    python talking_processes.py FUNCTION OPTIONS_OF_LAUNCH_AS_JSON [ARGUMENTS]
"""

from __future__ import annotations

import functools
import itertools
import json
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


if __name__ == "__main__":
    function, where, *words = sys.argv[1:]
    sys.exit(run_program(functools.partial(launch, globals()[function], *words, **json.loads(where))))
