"""Annotation files, whose failures say where the data are looked for; files of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcclip.errors import InputError, MissingFileError
from fcclip.files import read_json

WHERE_DATA_IS = (
    "Data sets are looked for below $DETECTRON2_DATASETS, else below the folder 'datasets'; "
    "datasets/README.md shows the layout."
)
_FILES = {"file_name": "image", "pan_seg_file_name": "id PNG"}  # of a record


@dataclass(frozen=True)
class AnnotationFile:
    """A JSON file with the annotations of a data set.

    Args:
        source: the data set, for messages.
        path: the file.
        lists: names of the lists that it must have.
        expected: sentence that tells what the file should be.
        remedy: sentence that tells where files are looked for.
    """

    source: str
    path: Path
    lists: tuple[str, ...]
    expected: str
    remedy: str = WHERE_DATA_IS

    @property
    def where(self) -> str:
        """Data set and file, for messages."""
        return f"{self.source}: {self.path}"

    def read(self) -> dict:
        """The content of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is a folder, is not JSON, or lacks a list.
        """
        if self.path.is_dir():
            raise InputError(f"{self.where} is a folder, not a JSON file. {self.expected}")
        try:
            content = read_json(self.path)
        except MissingFileError as error:
            raise MissingFileError(f"{self.where} does not exist. {self.remedy}") from error
        except (InputError, RecursionError) as error:
            raise InputError(f"{self.where} cannot be read: {error}") from error
        for name in self.lists:
            self.check_list(content, name)
        return content

    def check_list(self, content: Any, name: str) -> None:
        """Refuses content that is not an object with a list of this name.

        Raises:
            ValueError: as it says.
        """
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(f"{self.where} has no list '{name}'. {self.expected}")

    def records(self, parse: Callable[[dict], list[dict]]) -> list[dict]:
        """What `parse` makes of the content; a wrong folder shows at the files of the first record.

        Raises:
            FileNotFoundError: the annotation file, or a file of the first record, does not exist.
            ValueError: as `read`, and what `parse` raises.
        """
        records = parse(self.read())
        for record in records[:1]:
            for key, kind in _FILES.items():
                if key in record and not Path(record[key]).is_file():
                    raise MissingFileError(
                        f"{self.where} lists the {kind} {record[key]}, which does not exist. {self.remedy}"
                    )
        return records


def files_by_stem(folder: Path, ending: str) -> dict[str, Path]:
    """Name without `ending` -> file of a folder, sorted; hidden files are skipped."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(ending) and not name.startswith("."))
    return {name.removesuffix(ending): folder / name for name in names}
