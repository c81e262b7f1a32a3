"""Reading annotation files; every failure says where the data are looked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fcclip.errors import InputError, MissingFileError

__all__ = ["WHERE_DATA_IS", "check_first_files", "check_lists", "read_json"]

WHERE_DATA_IS = (
    "Data sets are looked for below $DETECTRON2_DATASETS, else below the folder 'datasets'; "
    "datasets/README.md shows the layout."
)
_FILES = {"file_name": "image", "pan_seg_file_name": "id PNG"}  # of a record


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
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingFileError(f"{where} does not exist. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is not valid JSON ({path.stat().st_size} bytes): {error}. "
            "It may have been cut off; copy or prepare it again."
        ) from error
    check_lists(where, content, lists, expected)
    return content


def check_lists(where: str, content: Any, lists: Sequence[str], expected: str) -> None:
    """Refuses content of a JSON file without a list that it must have; arguments as of `read_json`.

    Raises:
        ValueError: it lacks one, or is no object.
    """
    for name in lists:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(f"{where} has no list '{name}'. {expected}")


def check_first_files(where: str, records: Sequence[Mapping], remedy: str = WHERE_DATA_IS) -> None:
    """A wrong folder shows at the files of the first record.

    Args:
        where: data set and file, for messages.
        records: of the data set.
        remedy: sentence that tells where files are looked for.

    Raises:
        FileNotFoundError: there is no such file.
    """
    for record in records[:1]:
        for key, kind in _FILES.items():
            if key in record and not Path(record[key]).is_file():
                raise MissingFileError(f"{where} lists the {kind} {record[key]}, which does not exist. {remedy}")
