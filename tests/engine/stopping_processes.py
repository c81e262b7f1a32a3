"""What processes of test_signals.py do until a signal comes: `python stopping_processes.py <function>`.

signals.py is loaded by itself, so that a process starts in a moment.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import signal
import sys
import time
from pathlib import Path

SPEC = importlib.util.spec_from_file_location(
    "signals", Path(__file__).resolve().parents[2] / "fcclip" / "engine" / "signals.py"
)
signals = importlib.util.module_from_spec(SPEC)
sys.modules["signals"] = signals
SPEC.loader.exec_module(signals)
say = functools.partial(print, flush=True)


def train() -> None:
    """Steps that must not be torn, then a save, then the code for a new start."""
    with signals.StopRequest(echo_s=0.2) as stop:
        for step in range(100):
            say(f"step {step} begun")
            time.sleep(0.3)
            say(f"step {step} done")
            if stop.requested:
                say(f"saved after {stop.signal_name}")
                raise SystemExit(signals.REQUEUE_EXIT_CODE)


def leave_soon() -> None:
    """It has saved and left the loop before the same request comes by another way."""
    with signals.StopRequest(echo_s=1.0) as stop:
        say("ready")
        while not stop.requested:
            time.sleep(0.01)
    say("saved")
    time.sleep(60)


def hang() -> None:
    """The main thread waits where Python cannot reach it, as in a collective whose partner has died."""
    with signals.StopRequest(echo_s=0.2):
        # No signal interrupts the call of this thread, so Python gets no chance to run a handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
        say("ready")
        ctypes.CDLL(None).sleep(60)


def hang_among_others() -> None:
    """The same in one of several processes, of which torch's launcher ends one that hangs with SIGTERM."""
    os.environ["TORCHELASTIC_RUN_ID"] = "some"
    signals._DUMP_S = 0.1
    hang()


def hold_the_log() -> None:
    """The main thread hangs while it holds the lock of the log."""
    signals._PATIENCE_S = 0.2
    logging.getLogger().handlers[0].acquire()
    hang()


def fork() -> None:
    """A forked child gets the signals too, as every process of a job does."""
    with signals.StopRequest(echo_s=0.2) as stop:
        child = os.fork()
        if child == 0:
            say(f"child {os.getpid()}")
            time.sleep(60)
            os._exit(0)
        while not stop.requested:
            time.sleep(0.01)
        say(f"child ended by {os.WTERMSIG(os.waitpid(child, 0)[1])}")


class Images:
    """Forty samples that take a moment."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


def load() -> None:
    """A loader with workers, while the signal goes to the whole job."""
    from torch.utils.data import DataLoader

    with signals.StopRequest() as stop:
        loader = DataLoader(Images(), num_workers=2, worker_init_fn=signals.shield_worker, batch_size=1)
        for position, _ in enumerate(loader):
            say(f"batch {position}")
        say(f"all batches, {stop.signal_name}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="log: %(message)s")
    globals()[sys.argv[1]]()
