"""Programs of tests that signals are sent to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PATIENCE_S = 200  # on a busy machine each of several processes takes a while to start


class Program(subprocess.Popen):
    """A Python file in a group of processes of its own; `lines` holds what it has said so far."""

    def __init__(self, file: Path, *words: object, starter: tuple[str, ...] = (), **variables: str) -> None:
        self.lines: list[str] = []
        super().__init__(
            [sys.executable, *starter, str(file), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(file.parents[2])} | variables,
            start_new_session=True,
        )

    def until(self, text: str) -> Program:
        """Reads until a line holds the text."""
        while not (self.lines and text in self.lines[-1]):
            line = self.stdout.readline()
            assert line, f"ended without '{text}': {self.lines}"
            self.lines.append(line.rstrip("\n"))
        return self

    def send(self, number: int) -> None:
        """A signal."""
        self.send_signal(number)

    def exit_code(self) -> int:
        """As soon as it has ended."""
        self.lines += self.communicate(timeout=PATIENCE_S)[0].splitlines()
        return self.returncode
