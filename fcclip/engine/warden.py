"""What a launcher does for the processes it has started, beside torch's own launcher, which only waits for them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from fcclip.engine.signals import ECHO_S
from fcclip.engine.watchdog import ProcessFailedError, announced, connect, launcher_is_gone

# A first one of these asks for a polite end, which is up to the processes.
POLITE = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
END_S = 30  # for processes that were told to leave at once, and for one that has failed
_TICK_S = 0.1
_HEARING_S = 1.0  # for a process to hear a signal that was not sent by its launcher
_STORE_PERIOD_S = 1.0
_STORE_S = 3.0  # for an answer of the store


class Warden:
    """Passes polite signals on to the processes of this machine, and ends those that do not end in time.

    It knows them by files in a folder, named after their ranks: `0.pid` holds the process id, `0.heard` says that the
    process has heard a signal, `0.done` that it has done its work, `0.failed` why it failed. While it is entered, the
    handlers of `POLITE` are its own; those of `handled` are put back at the end, too.

    Args:
        folder: where those files are.
        grace: seconds from the first signal until processes that are still there are killed.
        farewell: seconds from a failure until processes that are still there are killed.
        world_size: processes on all machines.
        store: host, port and name of the run, to hear of failures on other machines; None when there are none.
        handled: signals whose handlers torch's launcher replaces.
    """

    def __init__(
        self,
        folder: Path,
        *,
        grace: float,
        farewell: float,
        world_size: int,
        store: tuple[str, int, str] | None = None,
        handled: tuple[int, ...] = (),
    ) -> None:
        self.signals: list[int] = []  # polite ones that have come
        self.killed: dict[int, str] = {}  # rank -> why, of the processes that did not heed a signal or a failure
        self.elsewhere: ProcessFailedError | None = None  # a failure that was heard of through the store
        self._folder, self._grace, self._farewell, self._handled = folder, grace, farewell, handled
        self._came: list[float] = []  # when the signals came
        self._passed_on: dict[int, int] = {}  # rank -> how many of them it was sent
        self._failed_since: float | None = None
        self._where_store_is, self._world_size = store, world_size
        self.store: dist.Store | None = None  # reaches the other machines, once the processes have met there
        self._store_due = self._store_heard = 0.0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="warden", daemon=True)

    def __enter__(self) -> Warden:
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {one: signal.getsignal(one) for one in (*self._handled, *POLITE)}
            for one in POLITE:
                signal.signal(one, self._note)
        if os.name == "posix":  # elsewhere os.kill means something else
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()
        for one, handler in self._handlers.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)

    def failures(self) -> list[tuple[int, ProcessFailedError]]:
        """What processes of this machine have told, with the rank that told it; the first one first."""
        files = sorted(self._folder.glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
        return [(int(path.stem), ProcessFailedError.from_json(path.read_text())) for path in files]

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        # As in StopRequest, but later, so that no second signal is passed on that a process takes for the first.
        if not self._came or now - self._came[0] > ECHO_S + 5 * _TICK_S:
            self._came.append(now)
            self.signals.append(number)

    def _run(self) -> None:
        while not self._left.wait(_TICK_S):
            processes, one_is_gone = self._processes()
            self._pass_on(processes)
            if processes and self._where_store_is is not None:
                self._listen()
            failed = one_is_gone or self.elsewhere is not None or any(self._folder.glob("*.failed"))
            self._end_late(processes, failed=failed)

    def _processes(self) -> tuple[dict[int, int], bool]:
        """rank -> process id of those at work, and whether one has disappeared without being done."""
        processes, one_is_gone = {}, False
        for path in self._folder.glob("*.pid"):
            text = path.read_text()
            if not text or path.with_suffix(".done").exists():
                continue
            try:
                os.kill(int(text), 0)
            except ProcessLookupError:
                one_is_gone = True
            else:
                processes[int(path.stem)] = int(text)
        return processes, one_is_gone

    def _pass_on(self, processes: dict[int, int]) -> None:
        """Each process gets each signal once, though a scheduler may send the first to the processes as well.

        A second copy of it would be taken for a second signal, or would end a process that is about to leave.
        """
        now = time.monotonic()
        for rank, process in processes.items():
            for index in range(self._passed_on.get(rank, 0), len(self.signals)):
                heard = index == 0 and (self._folder / f"{rank}.heard").exists()
                if index == 0 and not heard and now - self._came[0] < _HEARING_S:
                    break
                if not heard:
                    _kill(process, self.signals[index])
                self._passed_on[rank] = index + 1

    def _listen(self) -> None:
        """Hears of failures on other machines, and of the end of the store, now and then."""
        now = time.monotonic()
        if now < self._store_due or self.elsewhere is not None:
            return
        host, port, run = self._where_store_is
        try:
            if self.store is None:
                self.store = connect(host, port, run=run, timeout=_STORE_S)
            self.elsewhere = announced(self.store)
            self._store_heard = time.monotonic()
        except RuntimeError:
            if self._store_heard and time.monotonic() - self._store_heard > self._farewell:
                self.elsewhere = launcher_is_gone(host, self._world_size)
        self._store_due = time.monotonic() + _STORE_PERIOD_S

    def _end_late(self, processes: dict[int, int], *, failed: bool) -> None:
        now = time.monotonic()
        if failed and self._failed_since is None:
            self._failed_since = now
        if self._failed_since is not None and now - self._failed_since > self._farewell:
            self._end(processes, "it did not end when another process had failed")
        patience = self._grace if len(self._came) == 1 else END_S
        if self._came and now - self._came[-1] > patience:
            name = signal.Signals(self.signals[0]).name
            self._end(processes, f"it did not leave within {patience:g} s after {name}")

    def _end(self, processes: dict[int, int], why: str) -> None:
        for rank, process in processes.items():
            self.killed.setdefault(rank, why)
            _kill(process, signal.SIGKILL)


def _kill(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
