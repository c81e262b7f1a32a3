"""Reading annotation files; every failure says where the data are looked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

__all__ = ["WHERE_DATA_IS", "read_json"]

WHERE_DATA_IS = (
    "Data sets are looked for below $DETECTRON2_DATASETS, else below the folder 'datasets'; "
    "datasets/README.md shows the layout."
)


def read_json(where: str, path: Path, lists: Sequence[str], expected: str) -> dict:
    """The object in a JSON file.

    Args:
        where: data set and file, for messages.
        path: the file.
        lists: names of the lists that it must have.
        expected: sentence that tells what the file should be.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON, or lacks a list.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where} does not exist. {WHERE_DATA_IS}") from error
    except ValueError as error:
        raise ValueError(
            f"{where} is not valid JSON ({path.stat().st_size} bytes): {error}. "
            "It may have been cut off; copy or prepare it again."
        ) from error
    for name in lists:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{where} has no list '{name}'. {expected}")
    return content
