"""Several processes: starting them, and what each needs to know about the others.

Processes are started by torch's own launcher. A program that `torchrun` (or SLURM through it) has already started finds
its rank in the environment and starts nothing. CUDA processes talk over NCCL for tensors and gloo for objects, others
over gloo.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

TIMEOUT = timedelta(minutes=30)  # a collective that waits longer ends the process
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if os.name == "posix" else (signal.SIGINT,)


class ProcessFailedError(RuntimeError):
    """One of several processes ended badly and took the others down.

    Args:
        rank: which process.
        world_size: how many there were.
        kind: class name of the exception it raised, or "" when it died without one.
        reason: the exception's text, or how the process died.
        trace: its traceback, or "".
    """

    def __init__(self, *, rank: int, world_size: int, kind: str, reason: str, trace: str) -> None:
        super().__init__(f"process {rank} of {world_size} failed: {reason}")
        self.rank, self.kind, self.reason, self.trace = rank, kind, reason, trace


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


def started_by_torchrun() -> bool:
    """Whether the environment already names this process's rank."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def launch(
    entry: Callable[..., Any],
    *args: Any,
    num_processes: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device_type: str = "cpu",
) -> Any:
    """Runs `entry(*args)` in `num_processes` processes on this machine, joined with those of the other machines.

    With one process in all, `entry` runs in this one. Otherwise it must be importable (a function at the top of a
    module).

    Args:
        entry: what every process runs; inside it the functions of this module know its rank.
        args: its arguments; they are pickled.
        num_processes: processes on this machine; 0 means 1.
        num_machines: machines that run this same command.
        machine_rank: number of this machine, 0 for the one that `dist_url` names.
        dist_url: `tcp://host:port` of machine 0, or `auto` (a free port) for a single machine.
        device_type: "cuda": one GPU per process and NCCL; anything else: gloo.

    Returns:
        What `entry` returned on rank 0; None on the other machines.

    Raises:
        ValueError: more processes than GPUs, or numbers and address that cannot work together.
        ProcessFailedError: a process raised or died; the others were ended.
    """
    num_processes = max(num_processes, 1)
    if started_by_torchrun():
        return _run_under_torchrun(entry, args, num_processes, device_type)
    endpoint = _check(num_processes, num_machines, machine_rank, dist_url, device_type)
    if num_processes * num_machines == 1:
        return entry(*args)
    config = LaunchConfig(
        min_nodes=num_machines,
        max_nodes=num_machines,
        nproc_per_node=num_processes,
        run_id=f"fcclip-{os.getpid()}" if num_machines == 1 else "fcclip",
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": machine_rank, "timeout": TIMEOUT.seconds},
        local_addr="127.0.0.1" if num_machines == 1 else None,
        max_restarts=0,
        start_method="spawn",
        signals_to_handle=",".join(one.name for one in _SIGNALS),
    )
    # The launcher reports a failure as a page of log records; ProcessFailedError says the same in a line.
    launcher_log = logging.getLogger("torch.distributed.elastic")
    launcher_log.addHandler(logging.NullHandler())
    launcher_log.propagate = False
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    handlers = {one: signal.getsignal(one) for one in _SIGNALS}
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:  # processes that each take every core are slower than one
        os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // num_processes, 1))
    with tempfile.TemporaryDirectory(prefix="fcclip_launch_") as failures:
        try:
            method = multiprocessing.get_start_method(allow_none=True)
            results = elastic_launch(config, _start_child)(method, entry, device_type, args, failures)
        except ChildFailedError as error:
            raise _explain(*error.get_first_failure(), num_processes * num_machines, Path(failures)) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            for one, handler in handlers.items():
                signal.signal(one, handler)
    return results.get(0)


def _run_under_torchrun(entry: Callable[..., Any], args: tuple, num_processes: int, device_type: str) -> Any:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if num_processes not in (1, local):
        raise ValueError(
            f"torchrun has started {local} processes on this machine, but --num-gpus says {num_processes}; leave "
            "--num-gpus out"
        )
    return _start(entry, device_type, args) if int(os.environ["WORLD_SIZE"]) > 1 else entry(*args)


def _start_child(method: str | None, *rest: Any) -> Any:
    """Loader processes are to start as they do without the launcher, which leaves its own, slower way behind."""
    multiprocessing.set_start_method(method, force=True)
    return _start(*rest)


def _start(entry: Callable[..., Any], device_type: str, args: tuple, failures: str = "") -> Any:
    """Joins the group that the environment names, runs, leaves it; an exception is noted below the folder
    `failures`."""
    cuda = device_type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        result = entry(*args)
    except Exception as error:
        # Noted before the connections close: the others then fail too, later and for no reason of their own.
        if failures:
            note = {"time": time.time(), "rank": get_rank(), "kind": type(error).__name__, "reason": str(error)}
            Path(failures, f"{get_rank()}.json").write_text(json.dumps(note | {"trace": traceback.format_exc()}))
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                time.sleep(1)  # a lost connection: the launcher shall see the process that died first
        raise  # without leaving the group, which could wait for processes that wait for this one
    dist.destroy_process_group()
    return result


def _check(num_processes: int, num_machines: int, machine_rank: int, dist_url: str, device_type: str) -> str:
    """The endpoint `host:port`, after refusing what cannot work."""
    if device_type == "cuda" and num_processes > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus {num_processes}, but this machine has {torch.cuda.device_count()} GPU(s). "
            "Give at most that many, or MODEL.DEVICE cpu to run the processes on the CPU."
        )
    if num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank must lie in 0..{num_machines - 1} for --num-machines {num_machines}, got {machine_rank}"
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError(
                f"--num-machines {num_machines} needs --dist-url tcp://HOST:PORT, the same address of machine 0 on "
                "every machine"
            )
        return f"127.0.0.1:{_free_port()}"
    url = urlparse(dist_url)
    if url.scheme != "tcp" or not url.hostname or not url.port:
        raise ValueError(f"--dist-url must be 'auto' or tcp://HOST:PORT, got '{dist_url}'")
    return f"{url.hostname}:{url.port}"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _explain(rank: int, failure: ProcessFailure, world_size: int, failures: Path) -> ProcessFailedError:
    """The failure that came first; the others follow from it."""
    notes = [json.loads(path.read_text()) for path in failures.glob("*.json")]
    if failure.exitcode < 0 or not notes:
        how = (
            f"was ended by {failure.signal_name()}"
            if failure.exitcode < 0
            else f"left with exit code {failure.exitcode}"
        )
        return ProcessFailedError(rank=rank, world_size=world_size, kind="", reason=f"it {how}", trace="")
    first = min(notes, key=lambda note: note["time"])
    return ProcessFailedError(
        rank=first["rank"], world_size=world_size, kind=first["kind"], reason=first["reason"], trace=first["trace"]
    )
