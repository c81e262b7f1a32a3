"""Work in processes that may die of a file: the file is named and the others are done."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

from fcclip.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")
DIED = "the process that read it died"  # takes the place of a result


def map_in_processes(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    workers: int,
    chunk: int,
    preload: Iterable[str] = (),
) -> Iterator[tuple[int, Result | str]]:
    """(position, function(job)) of every job as they are done; `DIED` for one that ends its process.

    Args:
        function: can be pickled; should not raise.
        jobs: can be pickled; taken as processes ask for them, so that few are in memory.
        workers: processes; 0: this one does the work, and dies of what kills it.
        chunk: jobs that a process gets at a time.
        preload: modules that are imported once for all processes.

    Raises:
        ValueError: processes die before they begin.
    """
    if workers == 0:
        yield from ((position, function(job)) for position, job in enumerate(jobs))
        return
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload([*preload, __name__])
    numbered = enumerate(jobs)
    parts = iter(lambda: list(islice(numbered, chunk)), [])
    until_one_dies = partial(_until_one_dies, partial(_work, function), context)
    while True:
        unfinished: list[list[tuple[int, Job]]] = []
        yield from until_one_dies(parts, unfinished, workers)
        if not unfinished:
            return
        alone = iter([[job] for part in unfinished for job in part])  # the one that kills is among them
        for part in alone:
            died: list[list[tuple[int, Job]]] = []
            yield from until_one_dies(chain([part], alone), died, 1)
            yield from ((position, DIED) for [(position, _)] in died)


def _until_one_dies(
    work: Callable[[list], list], context: Any, parts: Iterator[list], unfinished: list[list], workers: int
) -> Iterator[tuple[int, Any]]:
    """Results of the parts; after a death no more parts are taken, and those that were begun are `unfinished`."""
    begun: dict[Future, list] = {}
    ignore_interrupt = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(workers, context, **ignore_interrupt) as pool:
        try:
            pool.submit(int).result()
        except BrokenProcessPool as error:
            raise InputError("processes that check files die before they begin; use fewer, or --workers 0") from error
        try:
            while True:
                # a part more than processes, so that none waits; a process alone gets no second one to die with
                while not unfinished and len(begun) < workers + (workers > 1) and (part := next(parts, None)):
                    try:
                        begun[pool.submit(work, part)] = part
                    except BrokenProcessPool:
                        unfinished.append(part)
                if not begun:
                    return
                for future in wait(begun, return_when=FIRST_COMPLETED).done:
                    part = begun.pop(future)
                    try:
                        yield from future.result()
                    except BrokenProcessPool:
                        unfinished.append(part)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _work(function: Callable, part: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    return [(position, function(job)) for position, job in part]
