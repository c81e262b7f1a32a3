"""Several processes, started and watched by torch's own launcher.

A program that `torchrun` has already started finds its rank in the environment and starts nothing. CUDA processes talk
over NCCL for tensors and gloo for objects, others over gloo. The launcher ends all processes when one of them fails.
One that hangs makes a collective of the others run out of time, which fails them.

    FCCLIP_TIMEOUT_SECONDS  how long a process may keep the others waiting in a collective (1800)
    FCCLIP_GRACE_SECONDS    how long processes may take to save and leave after SIGTERM or SIGUSR1 (600)
"""

from __future__ import annotations

import contextlib
import faulthandler
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
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.utils import store as elastic_store
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fcclip.engine.signals import REQUEUE_EXIT_CODE, STOP_SIGNALS
from fcclip.errors import InputError, NotReachableError, UserError, is_users
from fcclip.files import read_json, write_json

_DEFAULTS_S = {"FCCLIP_TIMEOUT_SECONDS": 1800.0, "FCCLIP_GRACE_SECONDS": 600.0}
_START_S = 300.0  # until all processes have imported everything, if that is more than the time-out
_PRECEDENCE_S = 1.0  # a failed process waits before it leaves: the death of another one may be the cause
# Torch's launcher ends everything at once on these; SIGTERM and SIGUSR1 are passed on.
_END_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if os.name == "posix" else (signal.SIGINT,)


class ProcessFailedError(RuntimeError):
    """One of several processes ended badly and took the others down; the text names it, with its error."""


class UserProcessFailedError(ProcessFailedError, UserError):
    """The same, where its error was one of the user's, or where it died without one."""


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
    leave with SystemExit(REQUEUE_EXIT_CODE).

    Args:
        entry: what every process runs; inside it the functions of fcclip.comm know its rank.
        args: its arguments; they are pickled.
        num_processes: processes on this machine; 0 means 1.
        num_machines: machines that run this same command.
        machine_rank: number of this machine, 0 for the one that `dist_url` names.
        dist_url: `tcp://host:port` of machine 0, or `auto` (a free port) for a single machine.
        device_type: "cuda": one GPU per process and NCCL; anything else: gloo.

    Returns:
        What `entry` returned on rank 0; None on the other machines.

    Raises:
        UserError: numbers and address that cannot work together, or machines that do not find each other.
        ProcessFailedError: a process of this machine raised, died or hung. Under torchrun the error itself is raised,
            and torchrun names the process.
        SystemExit: REQUEUE_EXIT_CODE when the processes left with it (torchrun itself makes a 1 of that); 128 + the
            signal's number when one ended them.
    """
    num_processes = max(num_processes, 1)
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        return _run_under_torchrun(entry, args, num_processes, device_type)
    host, port = _check(num_processes, num_machines, machine_rank, dist_url, device_type)
    if num_processes * num_machines == 1:
        return entry(*args)
    start_s, grace_s = max(_seconds("FCCLIP_TIMEOUT_SECONDS"), _START_S), _seconds("FCCLIP_GRACE_SECONDS")
    with tempfile.TemporaryDirectory(prefix="fcclip_launch_") as folder:
        config = LaunchConfig(
            min_nodes=num_machines,
            max_nodes=num_machines,
            nproc_per_node=num_processes,
            run_id="fcclip",
            rdzv_backend="static",
            rdzv_endpoint=f"{host}:{port}",
            rdzv_configs={"rank": machine_rank, "timeout": math.ceil(start_s)},
            local_addr="127.0.0.1" if num_machines == 1 else None,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=",".join(number.name for number in _END_SIGNALS),
        )
        with _environment(device_type, num_processes), _passing_signals_on(grace_s) as passed_on:
            results = _supervise(config, (entry, args, device_type), passed_on)
    if any(isinstance(result, _Left) for result in results.values()):
        raise SystemExit(REQUEUE_EXIT_CODE)
    return results.get(0)


# ---- in the launcher ----


def _supervise(config: LaunchConfig, work: tuple, passed_on: set[int]) -> dict[int, Any]:
    """What the processes of this machine returned, by their ranks."""
    try:
        return elastic_launch(config, _run_child)(multiprocessing.get_start_method(allow_none=True), *work)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if code - 128 in passed_on:  # it had nothing to save yet, or it was the second one
            raise SystemExit(code) from None
        failed, cause = _explain(rank, failure, config, was_asked=bool(passed_on))
        raise failed from cause
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise NotReachableError(
            f"{config.max_nodes} machines did not meet at tcp://{config.rdzv_endpoint} within "
            f"{config.rdzv_configs['timeout']} s; does the same command run on every machine? "
            f"{str(error).splitlines()[0]}"
        ) from error
    except SignalException as error:
        raise (KeyboardInterrupt if error.sigval == signal.SIGINT else SystemExit(128 + error.sigval)) from None


class _Traceback(Exception):
    """The traceback in another process, as the cause of an error in this one."""


def _explain(
    rank: int, failure: ProcessFailure, config: LaunchConfig, *, was_asked: bool
) -> tuple[ProcessFailedError, _Traceback | None]:
    """The error that came first, as far as the processes could tell, and its cause; torch saw `rank` end first."""
    text, notes = f"it left with exit code {failure.exitcode}", {"rank": rank, "users": True}
    if failure.exitcode < 0:
        grace = f", FCCLIP_GRACE_SECONDS is {_seconds('FCCLIP_GRACE_SECONDS'):g}" if was_asked else ""
        text = f"it was ended by {failure.signal_name()}{grace}"
    if isinstance(failure.message, dict):  # it has written torch's error file
        files = Path(config.logs_specs.root_log_dir).rglob("error.json")
        reports = [read_json(path)["message"] for path in files]
        first = min(reports, key=lambda report: report["extraInfo"]["time"])
        text, notes = first["message"], first["extraInfo"]
    machine = f" on {socket.gethostname()}" if config.max_nodes > 1 else ""
    text = f"process {notes['rank']} of {config.max_nodes * config.nproc_per_node}{machine} failed: {text}"
    if notes["users"]:
        return UserProcessFailedError(text), None
    return ProcessFailedError(text), _Traceback(f"\n{notes['py_callstack']}")


@contextlib.contextmanager
def _passing_signals_on(grace_s: float) -> Iterator[set[int]]:
    """Passes SIGTERM and SIGUSR1 on to the processes, and kills those that are still there `grace_s` seconds later.

    The value is filled with the signals that came. Handlers that torch's launcher replaces are put back at the end.
    """
    passed_on: set[int] = set()
    timers: list[threading.Timer] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        processes = [process.pid for process in multiprocessing.active_children()]
        if not processes and not passed_on:
            raise SystemExit(128 + number)
        if not timers:
            timers.append(threading.Timer(grace_s, _send, [processes, signal.SIGKILL]))
            timers[0].start()
        passed_on.add(number)
        _send(processes, number)

    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (*_END_SIGNALS, *STOP_SIGNALS)} if is_main else {}
    for number in STOP_SIGNALS if is_main else ():
        signal.signal(number, pass_on)
    try:
        yield passed_on
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _send(processes: list[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


@contextlib.contextmanager
def _environment(device_type: str, num_processes: int) -> Iterator[None]:
    """What the processes shall find in their environment, unless it is there already; and a launcher that is quiet."""
    variables = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // num_processes, 1))}  # else they take every core
    if device_type == "cuda":
        # Torch's own default, where its launcher would make it 1: after a failed collective ncclCommAbort can hang.
        variables["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    # The launcher reports a failure as a page of log records; ProcessFailedError says the same in a line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


# ---- in a process ----


class _Left:
    """What a process returns instead of leaving with REQUEUE_EXIT_CODE, at which torch would end the others at once."""


def _run_child(method: str | None, entry: Callable[..., Any], args: tuple, device_type: str) -> Any:
    """What the launcher starts."""
    # Loader processes are to start as they do without the launcher, which leaves its own, slower way behind.
    multiprocessing.set_start_method(method, force=True)
    try:
        code, result = _run_in_group(entry, args, device_type)
        return _Left() if code else result
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):  # which the end of the launcher sends
            _report(error)
        # The end of Python could wait for a process group, or for a loading process that hangs.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise another error
        _send([process.pid for process in multiprocessing.active_children()], signal.SIGKILL)
        sys.stdout.flush()
        os._exit(1)


def _run_under_torchrun(entry: Callable[..., Any], args: tuple, num_processes: int, device_type: str) -> Any:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if num_processes not in (1, local):
        raise InputError(
            f"torchrun has started {local} processes on this machine, but --num-gpus says {num_processes}; leave "
            "--num-gpus out"
        )
    if int(os.environ["WORLD_SIZE"]) == 1:
        return entry(*args)
    try:
        code, result = _run_in_group(entry, args, device_type)
    except BaseException as error:
        _report(error)
        faulthandler.dump_traceback_later(30, exit=True)  # the end of Python could wait for the others
        raise
    if code:
        raise SystemExit(code)
    return result


def _run_in_group(entry: Callable[..., Any], args: tuple, device_type: str) -> tuple[int, Any]:
    """Joins the group that the environment names, runs, leaves it; 0 or REQUEUE_EXIT_CODE, and what it returned."""
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    start_s, code, result = max(_seconds("FCCLIP_TIMEOUT_SECONDS"), _START_S), 0, None
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=start_s)))
    elastic_store.barrier(store, world_size, "fcclip/started", barrier_timeout=start_s, rank=rank)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    timeout = timedelta(seconds=_seconds("FCCLIP_TIMEOUT_SECONDS"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if os.name == "posix":  # the launcher ends a process that hangs with SIGTERM; a StopRequest dumps its stack later
        faulthandler.register(signal.SIGTERM, chain=True)
    try:
        result = entry(*args)
    except SystemExit as left:
        if left.code not in (None, 0, REQUEUE_EXIT_CODE):
            raise
        code = left.code or 0
    if code:  # torchrun ends the others when one leaves with a code; they may still be saving
        with contextlib.suppress(RuntimeError):
            elastic_store.barrier(store, world_size, "fcclip/left", barrier_timeout=_seconds("FCCLIP_GRACE_SECONDS"))
    dist.destroy_process_group()
    return code, result


def _report(error: BaseException) -> None:
    """Writes torch's error file, with what `_explain` wants to know, and gives way to an earlier failure."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    users, name = is_users(error), type(error).__name__
    text = (str(error) or name) if users else f"{name}: {error}"
    if isinstance(error, SystemExit):
        users, text = True, f"it left with exit code {error.code}"
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now, trace = time.time(), "".join(traceback.format_exception(error))
        notes = {"py_callstack": trace, "timestamp": str(int(now))}  # torch's own
        notes |= {"rank": int(os.environ["RANK"]), "users": users, "time": now}
        write_json(path, {"message": {"message": text, "extraInfo": notes}})
    if not users:  # such as a connection that broke
        time.sleep(_PRECEDENCE_S)


# ---- what was given ----


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
    if dist_url == "auto" and num_machines > 1:
        raise InputError(
            f"--num-machines {num_machines} needs --dist-url tcp://HOST:PORT, the same address of machine 0 everywhere"
        )
    if dist_url == "auto":
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return sock.getsockname()
    url = urlparse(dist_url)
    if url.scheme != "tcp" or not url.hostname or not url.port:
        raise InputError(f"--dist-url must be 'auto' or tcp://HOST:PORT, got '{dist_url}'")
    return url.hostname, url.port


def _seconds(name: str) -> float:
    """The value of an environment variable."""
    text = os.environ.get(name, "")
    try:
        seconds = float(text) if text else _DEFAULTS_S[name]
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"the environment variable {name} must be a positive number of seconds, got '{text}'")
    return seconds
