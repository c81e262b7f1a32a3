"""Several processes: starting them, stopping them, and what each needs to know about the others.

Processes are started by torch's own launcher. A program that `torchrun` (or SLURM through it) has already started finds
its rank in the environment and starts nothing. CUDA processes talk over NCCL for tensors and gloo for objects, others
over gloo. A process that dies or hangs ends the others with its name (watchdog.py).

    FCCLIP_TIMEOUT_SECONDS  how long a process may keep the others waiting (1800)
    FCCLIP_GRACE_SECONDS    how long processes may take to save and leave after SIGTERM or SIGUSR1 (600)
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fcclip.engine import signals
from fcclip.engine.signals import REQUEUE_EXIT_CODE
from fcclip.engine.warden import END_S, Warden
from fcclip.engine.watchdog import (
    ProcessFailedError,
    Watchdog,
    announce,
    announced,
    connect,
    failure_of,
    farewell,
    last_report,
    lost_processes_named,
    watch,
)
from fcclip.errors import InputError

__all__ = [
    "GRACE",
    "TIMEOUT",
    "ProcessFailedError",
    "launch",
    "lost_processes_named",
    "started_by_torchrun",
    "watch",
]

TIMEOUT = timedelta(minutes=30)  # a process that keeps the others waiting longer ends the run; FCCLIP_TIMEOUT_SECONDS
GRACE = timedelta(minutes=10)  # for saving and leaving after a signal; FCCLIP_GRACE_SECONDS
_START = timedelta(minutes=5)  # until all processes have imported everything, if that is more than the time-out
_NCCL_MARGIN = timedelta(minutes=1)  # NCCL can only abort the process, so the watchdog shall come first
_STORE_S = 3.0  # for the launcher to hear from the others why its processes failed
_RUN_ID = "fcclip"
_RUN = f"{_RUN_ID}/0"  # with torch's count of restarts, which never happen
# Torch's launcher ends everything at once on these; SIGTERM and SIGUSR1 are passed on (warden.py).
_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if os.name == "posix" else (signal.SIGINT,)


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
    module). SIGTERM and SIGUSR1 are passed on to the processes, which may take FCCLIP_GRACE_SECONDS to save and to
    leave with SystemExit(REQUEUE_EXIT_CODE); a second one is passed on too, and they must leave then.

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
        ProcessFailedError: a process raised, died or hung; the others were ended.
        SystemExit: REQUEUE_EXIT_CODE when the processes left with it (torchrun itself makes a 1 of that); 128 + the
            signal's number when one ended them.
    """
    num_processes = max(num_processes, 1)
    if started_by_torchrun():
        return _run_under_torchrun(entry, args, num_processes, device_type)
    endpoint = _check(num_processes, num_machines, machine_rank, dist_url, device_type)
    if num_processes * num_machines == 1:
        return entry(*args)
    timeout = _timeout()
    with (
        tempfile.TemporaryDirectory(prefix="fcclip_launch_") as folder,
        _environment(device_type, num_processes),
        Warden(
            Path(folder),
            grace=_grace().total_seconds(),
            farewell=1.2 * farewell(timeout),  # most processes end by themselves before
            world_size=num_processes * num_machines,
            store=(*endpoint, _RUN) if num_machines > 1 else None,
            handled=_SIGNALS,
        ) as warden,
    ):
        config = LaunchConfig(
            min_nodes=num_machines,
            max_nodes=num_machines,
            nproc_per_node=num_processes,
            run_id=_RUN_ID,
            rdzv_backend="static",
            rdzv_endpoint=f"{endpoint[0]}:{endpoint[1]}",
            rdzv_configs={"rank": machine_rank, "timeout": math.ceil(_start_time(timeout).total_seconds())},
            local_addr="127.0.0.1" if num_machines == 1 else None,
            max_restarts=0,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=os.path.join(folder, "torch")),
            signals_to_handle=",".join(one.name for one in _SIGNALS),
        )
        _quieten_torch()
        try:
            method = multiprocessing.get_start_method(allow_none=True)
            results = elastic_launch(config, _start_child)(method, entry, device_type, args, folder)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            ended = failure.exitcode if failure.exitcode > 128 else 128 - failure.exitcode
            if ended - 128 in warden.signals:
                raise SystemExit(ended) from None
            # The store of machine 0 lives as long as this exception, which refers to the launcher's frames.
            raise _explain(
                rank,
                failure,
                warden,
                endpoint=endpoint,
                num_processes=num_processes,
                num_machines=num_machines,
                machine_rank=machine_rank,
            ) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
    if any(isinstance(result, _Left) for result in results.values()):
        raise SystemExit(REQUEUE_EXIT_CODE)
    return results.get(0)


# ---- in a process ----


class _Left:
    """What a process returns instead of leaving with REQUEUE_EXIT_CODE, at which torch would end the others at once."""


def _run_under_torchrun(entry: Callable[..., Any], args: tuple, num_processes: int, device_type: str) -> Any:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if num_processes not in (1, local):
        raise InputError(
            f"torchrun has started {local} processes on this machine, but --num-gpus says {num_processes}; leave "
            "--num-gpus out"
        )
    if int(os.environ["WORLD_SIZE"]) == 1:
        return entry(*args)
    return _start(
        entry, device_type, args, tell=lambda failure: print(f"error: {failure}", file=sys.stderr, flush=True)
    )


def _start_child(method: str | None, entry: Callable[..., Any], device_type: str, args: tuple, folder: str) -> Any:
    """What the launcher starts. Files in the folder tell the launcher how this process fares."""
    rank, parent = os.environ["RANK"], os.getppid()
    # StopRequest logs the first signal that it hears, before it can be left.
    logging.getLogger(signals.__name__).addFilter(lambda _: Path(folder, f"{rank}.heard").touch() or True)
    Path(folder, f"{rank}.pid").write_text(str(os.getpid()))
    # Loader processes are to start as they do without the launcher, which leaves its own, slower way behind.
    multiprocessing.set_start_method(method, force=True)

    def tell(failure: ProcessFailedError) -> None:
        Path(folder, f"{rank}.telling").write_text(failure.to_json())
        os.replace(Path(folder, f"{rank}.telling"), Path(folder, f"{rank}.failed"))

    try:
        result = _start(entry, device_type, args, tell=tell, parent=parent)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == REQUEUE_EXIT_CODE:
            result = _Left()
        else:
            tell(failure_of(error, rank=int(rank), world_size=int(os.environ["WORLD_SIZE"])))
            raise
    Path(folder, f"{rank}.done").touch()
    return result


def _start(
    entry: Callable[..., Any],
    device_type: str,
    args: tuple,
    *,
    tell: Callable[[ProcessFailedError], None],
    parent: int | None = None,
) -> Any:
    """Joins the group that the environment names, runs, leaves it.

    Args:
        tell: told why, when the watchdog must end the process.
        parent: the launcher, without which this process ends.
    """
    cuda = device_type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = _timeout()
    store, rank, world_size = next(dist.rendezvous("env://", timeout=_start_time(timeout)))
    run = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    dog = Watchdog(
        connect(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), run=run),
        rank=rank,
        world_size=world_size,
        timeout=timeout.total_seconds(),
        tell=tell,
        parent=parent,
    )
    dog.start()
    try:
        dog.meet(_start_time(timeout).total_seconds())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout + _NCCL_MARGIN if cuda else timeout,
        )
        code, result = _result_or_code(entry, args)
        dog.leave()
        if code and parent is None:  # torchrun ends the others when one leaves with a code; they may still be saving
            dog.wait_until_all_left(_grace().total_seconds())
        dist.destroy_process_group()
    except BaseException as error:
        # The group is not left: that could wait for processes that wait for this one, as could the end of the process.
        if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(END_S)
        named = dog.explain(error)
        dog.announce(named or failure_of(error, rank=rank, world_size=world_size))
        if named is None or named is error:
            raise
        raise named from error
    dog.stop()
    if code:
        raise SystemExit(code)
    return result


def _result_or_code(entry: Callable[..., Any], args: tuple) -> tuple[int, Any]:
    """What `entry` returned, and the exit code if it left instead to be started again."""
    try:
        return 0, entry(*args)
    except SystemExit as left:
        if left.code not in (None, 0, REQUEUE_EXIT_CODE):
            raise
        return left.code or 0, None


# ---- in the launcher ----


@contextlib.contextmanager
def _environment(device_type: str, num_processes: int) -> Iterator[None]:
    """What the processes shall find in their environment, unless it is there already."""
    # Processes that each take every core are slower than one.
    wanted = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // num_processes, 1))}
    if device_type == "cuda":
        # When a collective fails, the process ends without ncclCommAbort, which can hang (3, torch's own default; its
        # launcher would make it 1). Waiting stays asynchronous: blocking would stop the CPU from running ahead.
        wanted["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _quieten_torch() -> None:
    """The launcher reports a failure as a page of log records; ProcessFailedError says the same in a line."""
    launcher_log = logging.getLogger("torch.distributed.elastic")
    launcher_log.addHandler(logging.NullHandler())
    launcher_log.propagate = False
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)


def _explain(
    rank: int,
    failure: ProcessFailure,
    warden: Warden,
    *,
    endpoint: tuple[str, int],
    num_processes: int,
    num_machines: int,
    machine_rank: int,
) -> ProcessFailedError:
    """The failure that came first; the others follow from it. The other machines hear of it too."""
    world_size = num_processes * num_machines
    store, report, elsewhere = warden.store, None, None
    with contextlib.suppress(RuntimeError):
        store = store or connect(*endpoint, run=_RUN, timeout=_STORE_S)
        report, elsewhere = last_report(store, rank), announced(store)
    told = warden.failures()
    own = [one for teller, one in told if teller == one.rank]
    of_others = [one for _, one in told] + [one for one in (warden.elsewhere, elsewhere) if one is not None]
    killed = failure.exitcode < 0 and rank not in warden.killed
    # NCCL aborts a process that has lost another one.
    aborted = -failure.exitcode == signal.SIGABRT and any(one.rank != rank for one in of_others)
    if own:
        found = own[0]
    elif of_others and (aborted or not killed):
        found = of_others[0]
    else:
        how = f"was ended by {failure.signal_name()}" if killed else f"left with exit code {failure.exitcode}"
        found = ProcessFailedError(
            rank=rank,
            world_size=world_size,
            reason=warden.killed.get(rank, f"it {how}"),
            host=report.host if report is not None else "",
            step=report.step if report is not None else None,
        )
    if num_machines > 1 and store is not None:
        with contextlib.suppress(RuntimeError):
            announce(store, found)
            if machine_rank > 0:
                store.add("machines_told", 1)
            else:  # the store goes with this process
                deadline = time.monotonic() + 2 * farewell(_timeout())
                while store.add("machines_told", 0) < num_machines - 1 and time.monotonic() < deadline:
                    time.sleep(0.1)
    return found


def _check(
    num_processes: int, num_machines: int, machine_rank: int, dist_url: str, device_type: str
) -> tuple[str, int]:
    """Host and port where the processes meet, after refusing what cannot work."""
    if device_type == "cuda" and num_processes > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus {num_processes}, but this machine has {torch.cuda.device_count()} GPU(s). "
            "Give at most that many, or MODEL.DEVICE cpu to run the processes on the CPU."
        )
    if num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise InputError(
            f"--machine-rank must lie in 0..{num_machines - 1} for --num-machines {num_machines}, got {machine_rank}"
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise InputError(
                f"--num-machines {num_machines} needs --dist-url tcp://HOST:PORT, the same address of machine 0 on "
                "every machine"
            )
        return "127.0.0.1", _free_port()
    url = urlparse(dist_url)
    if url.scheme != "tcp" or not url.hostname or not url.port:
        raise InputError(f"--dist-url must be 'auto' or tcp://HOST:PORT, got '{dist_url}'")
    return url.hostname, url.port


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _timeout() -> timedelta:
    return timedelta(seconds=_seconds("FCCLIP_TIMEOUT_SECONDS", TIMEOUT))


def _grace() -> timedelta:
    return timedelta(seconds=_seconds("FCCLIP_GRACE_SECONDS", GRACE))


def _start_time(timeout: timedelta) -> timedelta:
    return max(timeout, _START)


def _seconds(name: str, default: timedelta) -> float:
    """The value of an environment variable.

    Raises:
        ValueError: it is no positive number.
    """
    text = os.environ.get(name, "")
    try:
        seconds = float(text) if text else default.total_seconds()
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"the environment variable {name} must be a positive number of seconds, got '{text}'")
    return seconds
