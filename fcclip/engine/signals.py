"""A polite end: SIGTERM and SIGUSR1 ask a training to finish its step, to save, and to leave with a code that means
"start me again".

Schedulers send these signals before they take a machine away, often to every process of a job at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits: stopped on request after saving; start again with --resume
ECHO_S = 3.0  # a signal this soon after the first is the same request, come by another way (the job's, the launcher's)
_NAMES = ("SIGTERM", "SIGUSR1")
_PATIENCE_S = 2.0  # for the log, before leaving without it


class StopRequested(BaseException):
    """Raised inside `StopRequest.interrupting()`; like KeyboardInterrupt no `except Exception` holds it up."""


class StopRequest:
    """Notes SIGTERM and SIGUSR1 while it is entered, so that a loop can end where it likes.

    The first signal is noted and logged. A second one leaves at once with 128 + its number, even from a process that
    hangs in a collective: nothing half-written can result, because files are replaced as a whole. Outside the main
    thread, and for a signal that the system lacks, nothing is noted. Child processes forked meanwhile ignore SIGUSR1
    and treat SIGTERM as before; give `shield_worker` to loaders.

    Args:
        echo_s: a further signal within this many seconds after the first is taken for the same request.

    Example:
        >>> with StopRequest() as stop:
        ...     for step in range(3):
        ...         if stop.requested:
        ...             break
        >>> stop.requested, stop.signal_name
        (False, '')
    """

    def __init__(self, *, echo_s: float = ECHO_S) -> None:
        self.signal_name = ""  # of the first signal: SIGTERM or SIGUSR1
        self.echo_s = echo_s
        self._previous: dict[int, signal.Handlers | object] = {}
        self._interrupts = False
        self._interrupted = False

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self.signal_name)

    def __enter__(self) -> StopRequest:
        global _entered
        if threading.current_thread() is not threading.main_thread():
            return self
        # Python's own handlers wait for the main thread, which may hang in a collective. The number of a signal is
        # written to this socket at once, and a thread reads it there.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for name in _NAMES:
            if hasattr(signal, name):
                number = getattr(signal, name)
                self._previous[number] = signal.signal(number, self._handle)
        self._outer, _entered = _entered, self
        self._watcher = threading.Thread(target=self._watch, name="stop request", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _entered
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_fd)
        _entered = self._outer
        self._writer.send(b"\0")
        self._watcher.join()  # what it logs shall stand before what follows
        self._reader.close()
        self._writer.close()
        self._previous = {}

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """For work without a state to finish, such as an evaluation: a signal breaks it off.

        Raises:
            StopRequested: when the first signal comes, at once when it has come before, and in place of an error after
                it (a process of the same job that was asked too may have left first).
        """
        if self.requested:
            raise StopRequested(self.signal_name)
        self._interrupts = True
        try:
            yield
        except Exception as error:
            if self.requested:
                raise StopRequested(self.signal_name) from error
            raise
        finally:
            self._interrupts = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        """In the main thread, between two of its instructions."""
        self._note(number)
        if self._interrupts and not self._interrupted:
            self._interrupted = True
            raise StopRequested(self.signal_name)

    def _note(self, number: int) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def _watch(self) -> None:
        first = None
        while True:
            for number in self._reader.recv(64):
                if number == 0:  # from __exit__; no signal has this number
                    return
                if number not in self._previous:  # somebody else's signal
                    continue
                if first is None:
                    first = time.monotonic()
                    self._note(number)
                    _say(
                        f"{self.signal_name}: finishing this iteration, then saving and leaving; a second signal "
                        "leaves at once"
                    )
                elif time.monotonic() - first > self.echo_s:
                    _leave(number)


def shield_worker(worker: int = 0) -> None:
    """Lets a loader's worker outlive a signal that was sent to the whole job; to be given as `worker_init_fn`.

    The training process needs its workers until the iteration is done. SIGTERM then ends a worker only when its parent
    sends it, and SIGUSR1 never does. A worker leaves by itself when its parent is gone.

    Args:
        worker: the number of the worker, as a loader passes it.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows cannot tell who sent a signal
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parent_to_end_us, name="shield", daemon=True).start()


def _wait_for_parent_to_end_us() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _leave(number: int) -> None:
    _say(f"{signal.Signals(number).name} again: leaving at once")
    if sys.stdout is not None and sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # a progress bar had hidden the cursor
    os._exit(128 + number)


def _say(message: str) -> None:
    """Logs, but waits for no log that the main thread holds."""
    speaker = threading.Thread(target=logger.warning, args=(message,), daemon=True)
    speaker.start()
    speaker.join(_PATIENCE_S)


_entered: StopRequest | None = None  # the innermost one of this process
_mask = threading.local()  # what a thread had blocked before it forked


def _before_fork() -> None:
    """A signal that reaches the child too early would be written into the parent's socket; it waits."""
    if _entered is not None:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _entered._previous)


def _after_fork_in_parent() -> None:
    if hasattr(_mask, "before"):
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)
        del _mask.before


def _after_fork_in_child() -> None:
    global _entered
    if _entered is not None:
        signal.set_wakeup_fd(-1)
        for number, handler in _entered._previous.items():
            ignored = signal.Signals(number).name == "SIGUSR1"  # its default is to end the process
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL if handler is None else handler)
        _entered = None
    _after_fork_in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
