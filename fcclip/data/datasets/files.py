"""Reading annotation files; every failure says where the data are looked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["WHERE_DATA_IS", "check_first_files", "given_content", "read_json"]

WHERE_DATA_IS = (
    "Data sets are looked for below $DETECTRON2_DATASETS, else below the folder 'datasets'; "
    "datasets/README.md shows the layout."
)
_given: dict[Path, dict] = {}  # what `given_content` puts in the place of a file


def read_json(where: str, path: Path, lists: Sequence[str], expected: str, remedy: str = WHERE_DATA_IS) -> dict:
    """The object in a JSON file.

    Args:
        where: data set and file, for messages.
        path: the file.
        lists: names of the lists that it must have.
        expected: sentence that tells what the file should be.
        remedy: sentence that tells where it is looked for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON, or lacks a list.
    """
    try:
        content = _given[path] if path in _given else json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where} does not exist. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not valid JSON ({path.stat().st_size} bytes): {error}. "
            "It may have been cut off; copy or prepare it again."
        ) from error
    for name in lists:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{where} has no list '{name}'. {expected}")
    return content


def check_first_files(where: str, files: Mapping[str, str], remedy: str = WHERE_DATA_IS) -> None:
    """A wrong folder shows at the files of the first record.

    Args:
        where: data set and file, for messages.
        files: what a file is -> the file.
        remedy: sentence that tells where files are looked for.

    Raises:
        FileNotFoundError: there is no such file.
    """
    for kind, path in files.items():
        if not _given and not Path(path).is_file():
            raise FileNotFoundError(f"{where} lists the {kind} {path}, which does not exist. {remedy}")


@contextlib.contextmanager
def given_content(path: str | Path, content: dict) -> Iterator[None]:
    """Inside, `read_json` of this file gives `content`, and a reader asks for no picture.

    For the checker: it has read the file, leaves out of it what is broken, and looks for every picture itself.
    """
    _given[Path(path)] = content
    try:
        yield
    finally:
        del _given[Path(path)]
