"""A polite stop: SIGTERM and SIGUSR1 ask a training to finish its step, to save, and to leave with a code that means
"start me again".

Schedulers send these signals before they take a machine away, often to every process of a job at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
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
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
ECHO_S = 3.0  # a signal this soon after the first is the same request, come by another way (the job's, the launcher's)
_PATIENCE_S = 2.0  # for the log, before leaving without it
_DUMP_S = 20.0  # torch's launcher kills a process 30 s after SIGTERM when another one has failed


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
    """

    def __init__(self, *, echo_s: float = ECHO_S) -> None:
        self.signal_name = ""  # of the first signal: SIGTERM or SIGUSR1
        self.echo_s = echo_s
        self._first = -math.inf  # when it came
        self._previous: dict[int, signal.Handlers | object] = {}
        self._interrupts = False

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
        self._previous = {number: signal.signal(number, self._handle) or signal.SIG_DFL for number in STOP_SIGNALS}
        _entered = self
        self._watcher = threading.Thread(target=self._watch, name="stop request", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _entered
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, self._handle_late if self.requested else handler)
        signal.set_wakeup_fd(self._previous_fd)
        _entered = None
        self._writer.send(b"\0")
        self._watcher.join()  # what it logs shall stand before what follows
        self._reader.close()
        self._writer.close()

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
        self.signal_name = self.signal_name or signal.Signals(number).name
        if self._interrupts:
            self._interrupts = False
            raise StopRequested(self.signal_name)

    def _handle_late(self, number: int, _: FrameType | None) -> None:
        """After the exit: the same request by another way means nothing, a later signal what it meant before."""
        if time.monotonic() - self._first > self.echo_s:
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)

    def _watch(self) -> None:
        while True:
            for number in self._reader.recv(64):
                if number == 0:  # from __exit__; no signal has this number
                    faulthandler.cancel_dump_traceback_later()
                    return
                if number not in self._previous:  # somebody else's signal
                    continue
                if self._first == -math.inf:
                    self._first = time.monotonic()
                    self.signal_name = self.signal_name or signal.Signals(number).name
                    if number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
                        faulthandler.dump_traceback_later(_DUMP_S)  # it may be the one that hangs
                    _say(
                        f"{self.signal_name}: finishing this iteration, then saving and leaving; a second signal "
                        "leaves at once"
                    )
                elif time.monotonic() - self._first > self.echo_s:
                    _leave(number)


def shield_worker(worker: int = 0) -> None:
    """Lets a loader's worker outlive a signal that was sent to the whole job; to be given as `worker_init_fn`.

    The training process needs its workers until the iteration is done. SIGTERM then ends a worker only when its parent
    sends it, and SIGUSR1 never does. A worker leaves by itself when its parent is gone.
    """
    if hasattr(signal, "sigwaitinfo"):  # macOS and Windows cannot tell who sent a signal
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


_entered: StopRequest | None = None  # in this process


def _after_fork_in_child() -> None:
    """A child must not speak to its parent's thread, and a loader's worker ends on SIGTERM without a word."""
    global _entered
    if _entered is not None:
        signal.set_wakeup_fd(-1)
        for number, handler in _entered._previous.items():  # the default of SIGUSR1 is to end the process
            signal.signal(number, handler if number == signal.SIGTERM else signal.SIG_IGN)
        _entered = None
    if hasattr(faulthandler, "unregister"):
        faulthandler.unregister(signal.SIGTERM)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
