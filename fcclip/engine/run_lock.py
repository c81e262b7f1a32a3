"""One training at a time in a folder."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from fcclip.errors import InputError

logger = logging.getLogger(__name__)


class RunLock:
    """Keeps a second training out of a folder, as long as this one lives.

    The file `.lock` is locked by the system, which frees it when the process dies, however it dies; it stays there
    unlocked. `.locked_by` names the owner.

    Args:
        folder: of the run; must exist.
        what: is done there, for the message.

    Raises:
        InputError: on entering, when another process holds the folder; names it.
    """

    def __init__(self, folder: str | Path, what: str = "training") -> None:
        self.folder, self.what = Path(folder), what
        self._lock = FileLock(self.folder / ".lock", timeout=0, thread_local=False)
        self._owner = self.folder / ".locked_by"

    def __enter__(self) -> RunLock:
        try:
            self._lock.acquire()
        except Timeout:
            owner = self._owner.read_text() if self._owner.is_file() else "another process that has just started"
            raise InputError(
                f"OUTPUT_DIR '{self.folder}' is in use by {owner}. Two trainings in one folder would overwrite each "
                "other's checkpoints: give this one another OUTPUT_DIR, or stop the other first."
            ) from None
        except (OSError, NotImplementedError) as error:  # some network file systems cannot
            logger.warning("%s cannot be locked (%s); a second training there is not refused", self.folder, error)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._owner.write_text(f"process {os.getpid()} on {socket.gethostname()}, {self.what} there since {since}")
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.unlink(missing_ok=True)
        self._lock.release()
