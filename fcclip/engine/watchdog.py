"""Several processes keep an eye on each other: one that died or hangs is named, and the others do not wait for ever.

A thread of every process reports to the store that all of them reach: the step it is at, where its main thread stands,
and for how long it has not moved from there. These reports say who is missing when a collective breaks or runs out of
time. They also find what no collective notices: a main thread that stands still for the whole time-out, be it in a
read from a dead file system or in a CUDA call that waits for a GPU elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_BEAT_S = 2.0  # between two reports of a process
_LOOKS = 10  # at the main thread, in a beat: one that works must not be found at the same place in every one of them
_MISSED_BEATS = 2.5  # without a report before a process counts as silent
_STORE_S = 30.0  # for an answer of the store
_FAREWELL_S = 10.0  # for a process to end by itself when another one has failed
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_LIBRARIES = tuple({str(Path(folder)) + os.sep for name, folder in sysconfig.get_paths().items() if "lib" in name})
# Where a main thread that waits for the others stands. Collectives of a GPU are waited for in the last three.
_WAITING = tuple(_TORCH + part for part in ("distributed", "cuda", "autograd", os.path.join("nn", "parallel")))
# gloo's, the store's and NCCL's ways to say that the other side is gone or late.
_LOST = re.compile(
    r"gloo/|Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting|wait timeout after"
    r"|Socket (Timeout|closed)|NCCL|because process \d+ failed"
)
_LATE = re.compile(r"(?i)timed out|timeout")


class ProcessFailedError(RuntimeError):
    """One of several processes ended badly, or was missing, and took the others down.

    Args:
        rank: which process.
        world_size: how many there were.
        kind: class name of the exception it raised, or "" when it died without one.
        reason: the exception's text, or how the process died.
        trace: its traceback, or "".
        host: the machine it ran on; "" when that is not known, or goes without saying.
        step: the step it last reported; None when it never did.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        kind: str = "",
        reason: str,
        trace: str = "",
        host: str = "",
        step: int | None = None,
    ) -> None:
        known = [f"host {host}"] * bool(host) + [f"last reported step {step}"] * (step is not None)
        place = f" ({', '.join(known)})" if known else ""
        super().__init__(f"process {rank} of {world_size}{place} failed: {reason}")
        self.rank, self.world_size, self.kind, self.reason, self.trace = rank, world_size, kind, reason, trace
        self.host, self.step = host, step

    def to_json(self) -> str:
        """What `from_json` reads."""
        names = ("rank", "world_size", "kind", "reason", "trace", "host", "step")
        return json.dumps({name: getattr(self, name) for name in names})

    @classmethod
    def from_json(cls, text: str | bytes) -> ProcessFailedError:
        """The same error in another process."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Report:
    """What a process says about itself with every beat."""

    rank: int
    beat: int  # counts its reports
    host: str
    step: int | None  # of the last `watch`
    where: str  # in which line the main thread stands
    waiting: bool  # whether that is a wait for other processes
    idle: float  # seconds for which it has not moved
    ended: bool = False  # it has left the group after its work

    def blamed(self, world_size: int, reason: str) -> ProcessFailedError:
        """The error that names this process."""
        return ProcessFailedError(rank=self.rank, world_size=world_size, reason=reason, host=self.host, step=self.step)


@dataclass(frozen=True)
class Seen:
    """A report, as another process sees it some time later."""

    report: Report
    silent: float  # seconds since the process has last been heard

    @property
    def idle(self) -> float:
        """Seconds for which its main thread has not moved, or cannot be known to have."""
        return self.report.idle + self.silent


def missing(others: Sequence[Seen], *, silent_after: float, late: bool) -> tuple[Report, str] | None:
    """Which of the others a broken collective broke for, and how that is told; None if it cannot be known.

    Args:
        others: all but the process that asks.
        silent_after: seconds without a report after which a process is taken for dead or frozen.
        late: the collective ran out of time; a connection that broke says nothing about those who still answer.
    """
    working = [one for one in others if not one.report.waiting]
    if (found := _absent(others, silent_after=silent_after)) or not (late and working):
        return found
    return _stands(max(working, key=lambda one: one.idle))


def stuck(everyone: Sequence[Seen], *, timeout: float, silent_after: float) -> tuple[Report, str] | None:
    """Which process holds the others up; None as long as this is not sure.

    That is one whose main thread has not moved for `timeout` seconds though it waits for nobody. When all of them wait
    for that long, it is one that does not answer or has left, else one with the lowest step.
    """
    running = [one for one in everyone if not one.report.ended]
    still = [one for one in running if one.idle >= timeout]
    culprits = [one for one in still if not one.report.waiting]
    if culprits:
        return _stands(max(culprits, key=lambda one: one.idle))
    if not still or len(still) < len(running):
        return None
    lowest = min(still, key=lambda one: -1 if one.report.step is None else one.report.step)
    return _absent(everyone, silent_after=silent_after) or _stands(lowest, "all wait for each other")


def _absent(processes: Sequence[Seen], *, silent_after: float) -> tuple[Report, str] | None:
    silent = [one for one in processes if one.silent >= silent_after and not one.report.ended]
    if silent:
        report = max(silent, key=lambda one: one.idle).report
        return report, f"it does not answer any more; it was last seen at {report.where}"
    left = [one.report for one in processes if one.report.ended]
    return (left[0], "it has already left, while others still wait for it") if left else None


def _stands(one: Seen, what: str = "the others wait for it") -> tuple[Report, str]:
    return one.report, f"{what}; it has been at {one.report.where} for {one.idle:.0f} s"


class Watchdog:
    """The thread of one process that reports, and ends the process when another one is lost.

    Args:
        store: reaches all processes; a connection that nobody else waits on.
        rank, world_size: this process and their number.
        timeout: seconds after which a process that does not move is stuck.
        tell: told the failure before the thread ends the process.
        parent: ends the process when this one is no longer its parent.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        timeout: float,
        tell: Callable[[ProcessFailedError], None],
        parent: int | None = None,
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.beat = min(_BEAT_S, timeout / 8)
        self.silent_after = _MISSED_BEATS * self.beat
        self.farewell = farewell(timedelta(seconds=timeout))
        self.step: int | None = None
        self._watched = 0  # how often
        self._store, self._tell, self._parent = store, tell, parent
        self._main = threading.main_thread().ident
        self._position, self._looked = 0, time.monotonic()  # what the main thread's stack looked like, when
        self._idle = 0.0  # seconds for which it has looked the same; not those in which this process was suspended
        self._beats = 0
        self._explaining = False
        self._ended = False
        self._observer = _Observer(self)
        self._disconnected = False
        self._unheard_since: float | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # for the beats
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    @property
    def host(self) -> str:
        """This machine; "" as long as it goes without saying."""
        several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
        return socket.gethostname() if several or self.step is not None else ""

    def start(self) -> None:
        """Reports for the first time, and from then on; `watch` speaks to it."""
        global _dog
        _dog = self
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        """No more reports; nothing can end the process any more."""
        global _dog
        _dog = None
        self._stopped.set()
        self._thread.join()

    def watch(self, step: int | None) -> None:
        """Notes a sign of life from the main thread."""
        self._watched += 1
        if step is not None:
            self.step = step

    def meet(self, timeout: float) -> None:
        """Returns when all processes have reported.

        Raises:
            ProcessFailedError: one did not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        for rank in range(self.world_size):
            while not self._store.check([_report_key(rank)]):
                if time.monotonic() > deadline:
                    raise ProcessFailedError(
                        rank=rank,
                        world_size=self.world_size,
                        reason=f"it did not start within {timeout:.0f} s; does the same command run on every machine?",
                    )
                time.sleep(min(0.05, self.beat))

    def leave(self) -> None:
        """Tells the others that this process needs them no more."""
        self._ended = True
        with contextlib.suppress(RuntimeError):  # the store is gone when the others have left
            self._publish()

    def wait_until_all_left(self, timeout: float) -> None:
        """Returns when all processes have left, or could not within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not all(one.report.ended for one in _Observer(self).look()):
                time.sleep(min(0.1, self.beat))

    def failure(self) -> ProcessFailedError | None:
        """The first one that was announced."""
        return announced(self._store)

    def announce(self, failure: ProcessFailedError) -> None:
        """Lets the others know, unless they know of another one already."""
        with contextlib.suppress(RuntimeError):
            announce(self._store, failure)

    def explain(self, error: BaseException) -> ProcessFailedError | None:
        """Which process an error of a collective speaks of; None if it is no such error, or cannot be known.

        Takes a few beats, in which the others can be heard.
        """
        if isinstance(error, ProcessFailedError):
            return error
        if not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error)))):
            return None
        self._explaining = True
        observer, deadline = _Observer(self), time.monotonic() + self.silent_after + self.beat
        try:
            while True:
                failure, others = self.failure(), [one for one in observer.look() if one.report.rank != self.rank]
                if failure is not None or time.monotonic() > deadline:
                    break
                time.sleep(self.beat / 4)
        except RuntimeError:
            return launcher_is_gone(os.environ.get("MASTER_ADDR", ""), self.world_size)
        if failure is not None:
            return failure
        late = _LATE.search(str(error)) is not None
        found = missing(others, silent_after=self.silent_after, late=late)
        if found is not None:
            return found[0].blamed(self.world_size, found[1])
        if late:
            places = "; ".join(f"process {one.report.rank} at {one.report.where}" for one in others)
            logger.error("process %d waits for others that wait themselves: %s", self.rank, places)
        return None

    # ---- the thread ----

    def _run(self) -> None:
        failure, ends_at = None, math.inf
        looks = 0
        while not self._stopped.wait(self.beat / _LOOKS):
            self._look()
            looks += 1
            if looks % _LOOKS:
                continue
            found = self._exchange()
            if failure is None and found is not None:
                failure = found
                self.announce(failure)
                hopeless = failure.rank == self.rank and self._idle >= self.timeout
                ends_at = time.monotonic() + (0.0 if hopeless else self.farewell)
            if failure is not None and time.monotonic() >= ends_at:
                self._end_process(failure)

    def _exchange(self) -> ProcessFailedError | None:
        """Reports, and finds out whether a process is lost."""
        if self._parent is not None and os.getppid() != self._parent:
            return self._report().blamed(self.world_size, "the program that started it is gone")
        try:
            if not self._disconnected:
                self._publish()
                self._unheard_since = None
                return self.failure() or self._find_stuck()
        except RuntimeError as error:
            self._disconnected = isinstance(error, dist.DistNetworkError)  # which never heals; a time-out may
            self._unheard_since = self._unheard_since or time.monotonic()
        if self._ended or time.monotonic() - self._unheard_since < self.farewell:
            return None
        return launcher_is_gone(os.environ.get("MASTER_ADDR", ""), self.world_size)

    def _find_stuck(self) -> ProcessFailedError | None:
        if self._idle < self.timeout / 2:
            return None
        # Later than a collective with this time-out, which can raise where it stands.
        patience = self.timeout + 2 * self.beat
        found = stuck(self._observer.look(), timeout=patience, silent_after=self.silent_after)
        return found and found[0].blamed(self.world_size, found[1])

    def _publish(self) -> None:
        with self._lock:
            self._beats += 1
            report = asdict(self._report())
            self._store.set(_report_key(self.rank), json.dumps(report))

    def _look(self) -> list[FrameType]:
        """Notes whether the main thread has moved since the last look. Returns its stack, innermost first."""
        stack = _stack(sys._current_frames().get(self._main))
        position = hash((self._watched, *((id(frame.f_code), frame.f_lasti) for frame in stack)))
        now = time.monotonic()
        self._idle = 0.0 if position != self._position else self._idle + min(now - self._looked, self.beat)
        self._position, self._looked = position, now
        return stack

    def _report(self) -> Report:
        stack = self._look()
        return Report(
            rank=self.rank,
            beat=self._beats,
            host=self.host,
            step=self.step,
            where=_place(stack),
            waiting=self._explaining or (bool(stack) and stack[0].f_code.co_filename.startswith(_WAITING)),
            idle=self._idle,
            ended=self._ended,
        )

    def _end_process(self, failure: ProcessFailedError) -> None:
        """The main thread cannot be relied on: it may stand in a call that never returns."""
        stack = traceback.format_stack(sys._current_frames().get(self._main))
        speaker = threading.Thread(
            target=logger.error, args=("%s\nThis process stood at:\n%s", failure, "".join(stack)), daemon=True
        )
        speaker.start()  # the main thread may hold the log
        speaker.join(self.farewell)
        self._tell(failure)
        os._exit(1)


class _Observer:
    """Sees when the reports of each process change, by this process's own clock."""

    def __init__(self, dog: Watchdog) -> None:
        self._dog = dog
        self._last: dict[int, tuple[int, float]] = {}  # rank -> its beat, when that was first seen

    def look(self) -> list[Seen]:
        """The processes in the order of their ranks."""
        now, seen = time.monotonic(), []
        for rank in range(self._dog.world_size):
            report = last_report(self._dog._store, rank)
            if report is None:  # it has not started yet
                continue
            beat, since = self._last.setdefault(rank, (report.beat, now))
            if beat != report.beat:
                self._last[rank] = report.beat, now
                since = now
            seen.append(Seen(report=report, silent=now - since))
        return seen


def farewell(timeout: timedelta) -> float:
    """Seconds that a process has to end by itself when another one has failed."""
    return min(_FAREWELL_S, timeout.total_seconds())


def connect(host: str, port: int, *, run: str, timeout: float = _STORE_S) -> dist.Store:
    """The store through which the processes of a run watch each other; a connection of its own.

    Raises:
        RuntimeError: nobody answers there within `timeout` seconds.
    """
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    return dist.PrefixStore(f"fcclip/{run}", store)


def last_report(store: dist.Store, rank: int) -> Report | None:
    """What a process last said about itself; None before it did."""
    key = _report_key(rank)
    return Report(**json.loads(store.get(key))) if store.check([key]) else None


def announce(store: dist.Store, failure: ProcessFailedError) -> None:
    """Keeps the first failure; the others follow from it."""
    store.compare_set("failure", "", failure.to_json())


def launcher_is_gone(host: str, world_size: int) -> ProcessFailedError:
    """The failure when the store cannot be reached, which lives in the launcher of machine 0."""
    reason = "its launcher cannot be reached any more"
    return ProcessFailedError(rank=0, world_size=world_size, reason=reason, host=host)


def announced(store: dist.Store) -> ProcessFailedError | None:
    """The first failure that was announced."""
    return ProcessFailedError.from_json(store.get("failure")) if store.check(["failure"]) else None


def watch(step: int | None = None) -> None:
    """Says that this process works, and at which step; to be called at each. Costs nothing, and waits for nobody.

    Args:
        step: None leaves it as it is.
    """
    if _dog is not None:
        _dog.watch(step)


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Turns an error of a collective inside it into one that names the process that is missing.

    `launch` does that too, but after `entry` has closed its log.

    Raises:
        ProcessFailedError: in place of an error that another process has caused.
    """
    try:
        yield
    except Exception as error:
        named = _dog.explain(error) if _dog is not None else None
        if named is None or named is error:
            raise
        raise named from error


def failure_of(error: BaseException, *, rank: int, world_size: int) -> ProcessFailedError:
    """An error of this process, as the others shall hear of it."""
    if isinstance(error, ProcessFailedError):
        return error
    left = isinstance(error, SystemExit)
    return ProcessFailedError(
        rank=rank,
        world_size=world_size,
        kind="" if left else type(error).__name__,
        reason=f"it left with exit code {error.code}" if left else str(error) or type(error).__name__,
        trace="" if left else "".join(traceback.format_exception(error)),
        host=_dog.host if _dog is not None else "",
        step=_dog.step if _dog is not None else None,
    )


_dog: Watchdog | None = None  # this process's


def _report_key(rank: int) -> str:
    return f"report/{rank}"


def _stack(frame: FrameType | None) -> list[FrameType]:
    """The frames of a thread, innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _place(stack: Sequence[FrameType]) -> str:
    """The line of this project or of its user that a thread is at."""
    own = (frame for frame in stack if _is_own(frame.f_code.co_filename))
    frame = next(own, stack[0] if stack else None)
    if frame is None:
        return "its end"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"


def _is_own(path: str) -> bool:
    return path.startswith(_PACKAGE) or not path.startswith((*_LIBRARIES, "<"))
