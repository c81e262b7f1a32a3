"""log.txt and what a terminal shows of it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from fcclip.engine import metrics
from fcclip.engine.progress_bar import has_room_for_a_bar

logger = logging.getLogger(__name__)


def setup_logging(output_dir: Path, *, rank: int = 0) -> None:
    """Sends this package's log to `log.txt` (`log.txt.rank1`, … on other ranks) and, on rank 0, to standard output.

    Args:
        output_dir: where the file is; it is appended to.
        rank: this process's number.
    """
    package = logging.getLogger("fcclip")
    close_logging()
    package.setLevel(logging.INFO)
    package.propagate = False
    name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
    file = logging.FileHandler(output_dir / name, encoding="utf-8")
    file.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    package.addHandler(file)
    if rank == 0:
        console = _StdoutHandler()
        if has_room_for_a_bar():  # which shows what those lines say
            console.addFilter(lambda record: record.name != metrics.__name__ or record.levelno > logging.INFO)
        console.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
        package.addHandler(console)


def close_logging() -> None:
    """Closes what `setup_logging` opened."""
    package = logging.getLogger("fcclip")
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    package.propagate = True


def log_exception() -> None:
    """Writes the traceback of the exception that is being handled to log.txt, and not to the terminal."""
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "stopped by an error", (), sys.exc_info())
    for handler in logging.getLogger("fcclip").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


class _StdoutHandler(logging.StreamHandler):
    """Writes to whatever sys.stdout is at that moment, so that lines appear above a live progress bar."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)
