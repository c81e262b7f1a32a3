"""Work in processes that may die of a file: the file is named and the others go on.

A pool of `concurrent.futures` says only that one of its processes is gone. Here a process writes down which job it has
begun in a number that it shares with its parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

__all__ = ["Death", "map_in_processes"]

Job = TypeVar("Job")
Result = TypeVar("Result")
_NONE_BEGUN = -1
_MOST_FALSE_STARTS = 3  # processes that die before they begin a job: then none will ever begin one


@dataclass(frozen=True)
class Death:
    """Takes the place of a result: the process died of this job.

    Args:
        exit_code: of the process; minus the number of a signal.
    """

    exit_code: int | None

    def __str__(self) -> str:
        if self.exit_code is None or self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        number = -self.exit_code
        known = {one.value: one.name for one in signal.Signals}
        why = ", which the system sends when memory runs out" if number == getattr(signal, "SIGKILL", 9) else ""
        return f"signal {number} ({known.get(number, 'unknown')}){why}"


def map_in_processes(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    workers: int,
    chunk: int,
    preload: Iterable[str] = (),
) -> Iterator[tuple[int, Result | Death]]:
    """(position, function(job)) of every job, in the order in which they are done.

    Jobs are taken from `jobs` as processes ask for them, so there are never more than `workers` times `chunk` in
    memory.

    Args:
        function: can be pickled; should not raise.
        jobs: can be pickled.
        workers: processes; 0: this one does the work, and dies of what kills it.
        chunk: jobs that a process gets at a time.
        preload: modules that are imported once for all processes.

    Raises:
        RuntimeError: processes die before they begin.
    """
    if workers == 0:
        yield from ((position, function(job)) for position, job in enumerate(jobs))
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([*preload, __name__])
    numbered = enumerate(jobs)
    again: deque[list[tuple[int, Job]]] = deque()
    idle, busy = [_Worker(context, function) for _ in range(workers)], {}
    false_starts = 0
    try:
        while True:
            while idle:
                part = again.popleft() if again else list(islice(numbered, chunk))
                if not part:
                    break
                worker = idle.pop()
                worker.begin(part)
                busy[worker.connection] = worker
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy.pop(connection)
                results = worker.results()
                if results is not None:
                    yield from results
                    idle.append(worker)
                    continue
                killer, exit_code = worker.death()
                part = worker.part
                if killer == _NONE_BEGUN:
                    false_starts += 1
                    if false_starts == _MOST_FALSE_STARTS:
                        raise RuntimeError(
                            f"processes that check files die before they begin ({Death(exit_code)}). Use fewer "
                            "--workers; with 0 the program itself does the work."
                        )
                else:
                    yield killer, Death(exit_code)
                    part = [one for one in part if one[0] != killer]
                if part:
                    again.append(part)
                idle.append(_Worker(context, function))
    finally:
        for worker in (*idle, *busy.values()):
            worker.end()


class _Worker:
    """A process, the parent's end of its pipe, and the jobs that it has."""

    def __init__(self, context: Any, function: Callable) -> None:
        self.connection, theirs = context.Pipe()
        self._begun = context.RawValue("q", _NONE_BEGUN)
        self._process = context.Process(target=_work, args=(theirs, self._begun, function), daemon=True)
        self._process.start()
        theirs.close()
        self.part: list[tuple[int, Any]] = []

    def begin(self, part: list[tuple[int, Any]]) -> None:
        """Sends jobs; that the process is dead already is found when their results are asked for."""
        self.part, self._begun.value = part, _NONE_BEGUN
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(part)

    def results(self) -> list[tuple[int, Any]] | None:
        """Of the jobs that were sent; None: the process is dead."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def death(self) -> tuple[int, int | None]:
        """(the job that was begun last, exit code) of a dead process."""
        self._process.join()
        self.connection.close()
        return self._begun.value, self._process.exitcode

    def end(self) -> None:
        """Sends the process home; one that is at work is stopped."""
        self.connection.close()
        if self._process.is_alive() and self._begun.value != _NONE_BEGUN:
            self._process.terminate()
        self._process.join()


def _work(connection: Connection, begun: Any, function: Callable) -> None:
    """What a process does until its parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    while True:
        try:
            part = connection.recv()
        except (EOFError, OSError):
            return
        results = []
        for position, job in part:
            begun.value = position
            results.append((position, function(job)))
        begun.value = _NONE_BEGUN
        connection.send(results)
