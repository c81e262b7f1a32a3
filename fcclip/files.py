"""Files: written so that a crash never leaves half of one, read with errors that name them."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fcclip.errors import InputError, MissingFileError

TEMPORARY = ".{}.writing"  # name of a file while it is written


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces the file `path` by what `write` puts into the file it is handed, once all of that is on the disk.

    Raises:
        OSError: it could not be written; a file that was there before is untouched.
    """
    temporary = path.with_name(TEMPORARY.format(path.name))
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if (cause := _system_error(error)) is None:
            raise
        raise OSError(
            f"cannot write '{path}': {cause}. Earlier files in the folder are untouched; is the disk full? Is the "
            "folder read-only?"
        ) from error
    _flush_folder(path.parent)


def _system_error(error: BaseException) -> OSError | None:
    """The error itself, or the one that torch hides behind "unexpected pos" when it closes what it could not write."""
    if isinstance(error, RuntimeError):
        error = error.__context__
    return error if isinstance(error, OSError) else None


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, content: Any, *, indent: int | None = None) -> None:
    """Writes JSON as UTF-8, atomically; undefined numbers become null.

    Raises:
        OSError: as `write_atomically`.
    """
    options = {"indent": indent, "ensure_ascii": False, "allow_nan": False}
    try:
        text = json.dumps(content, **options)
    except (TypeError, ValueError):  # then alone it is worth walking the tree
        text = json.dumps(without_nan(content), **options)
    text += "\n" if indent is not None else ""
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def read_json(path: str | Path, *, what: str = "file") -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        what: what it is, for messages: "annotations", "results".

    Raises:
        MissingFileError: there is no such file.
        InputError: the file is empty, cut off or not JSON; says where.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingFileError(f"{what} '{path}' does not exist (looked at {path.absolute()})") from error
    if not content.strip():
        raise InputError(f"{what} '{path}' is empty; was a copy or a download interrupted?")
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{what} '{path}' is not JSON: {error}. Was a copy or a download interrupted?") from error


def without_nan(tree: Any) -> Any:
    """Nested mappings and sequences with None for every number that is NaN or infinite.

    Example:
        >>> without_nan({"PQ": float("nan"), "parts": (1.5, float("inf"))})
        {'PQ': None, 'parts': [1.5, None]}
    """
    if isinstance(tree, Mapping):
        return {key: without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def visible_files(folder: Path, endings: Collection[str]) -> list[Path]:
    """The files in a folder and below it with one of these endings (lower case, any case on disk), sorted; hidden ones,
    such as the `._name` that some file systems leave behind, and those in hidden folders are skipped."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in endings
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def listed(names: Iterable[object], limit: int = 3, *, separator: str = ", ") -> str:
    """The first names, and how many more there are.

    Example:
        >>> listed("abcdefghij")
        'a, b, c and 7 more'
    """
    names = [str(name) for name in names]
    more = len(names) - limit
    return separator.join(names[:limit]) + (f" and {more} more" if more > 0 else "")
