"""What programs share that call others: where the repository is, and a call that says when it failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fcclip.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def call(script: str, *arguments: object) -> None:
    """Runs a script of the repository as a user would, from its root.

    Raises:
        UserError: it failed; it has said why.
    """
    if status := subprocess.run([sys.executable, script, *map(str, arguments)], cwd=REPOSITORY).returncode:
        raise UserError(f"{script} ended with status {status}")
