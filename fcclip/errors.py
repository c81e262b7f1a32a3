"""Errors that the user can fix, and how a program says them.

A program prints such an error in one line and leaves with 1. Every other error is a mistake of ours and keeps its
traceback; nothing but these classes decides which is which.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from fcclip.allocator import keep_freed_memory


class UserError(Exception):
    """An error that the user can fix; its text says what, where, expected, got, and what to do."""


class InputError(UserError, ValueError):
    """A value, a file or a combination of them that cannot be used."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that must be there."""


class NotReachableError(UserError, ConnectionError):
    """Something on the network that cannot be had from this machine."""


class NotInstalledError(UserError, ImportError):
    """An optional package that must be installed first."""


def is_users(error: BaseException) -> bool:
    """Whether the user can fix an error: one of ours that says so, or what the file system refuses."""
    return isinstance(error, (UserError, OSError))


def run_program(main: Callable[[], int | None]) -> int:
    """Runs the `main` of a program and returns the exit code. A program keeps the memory that it frees
    (`fcclip.allocator`).

    Args:
        main: returns its exit code, None being 0.

    Returns:
        what `main` returned; 1 after an error of the user, which stands on standard error as `error: …`; 130 when
        interrupted. Other errors are raised.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # a letter that a terminal or pipe cannot show ends no work
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
