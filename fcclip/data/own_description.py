"""What the YAML of a data set of the user says: its keys, each checked, and the classes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fcclip.config import nearest
from fcclip.errors import InputError, MissingFileError
from fcclip.files import listed
from fcclip.vocabulary import Vocabulary, plain_name, refuse_same_names, split_mark

KINDS = ("panoptic", "instances", "semantic")
_MEANINGS = {
    "type": "panoptic, instances or semantic",
    "images": "the folder of the images",
    "annotations": "the COCO JSON, or with type semantic the folder of the label maps",
    "masks": "the folder of the id PNGs, with type panoptic",
    "classes": "a list of class names, or a file of them",
    "things": "the names of the classes that can be counted",
    "ignore_label": "the value of unlabelled pixels",
}
_NEEDED = ("type", "images", "annotations", "classes")
_NOT_OF = {"panoptic": (), "instances": ("masks", "ignore_label"), "semantic": ("masks",)}  # type -> keys of others
_HIGHEST_LABEL = 65535  # of a label map of 16 bit


def is_own_data(name: str | Path) -> bool:
    """Whether the name of a data set is the path of a YAML file."""
    return str(name).lower().endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class Description:
    """The keys of a YAML, each of the right type."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Description:
        """Reads a YAML.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: it is broken or not plain, or has an unknown, missing or wrong key.
        """
        try:
            content = yaml.safe_load(path.read_bytes())
        except FileNotFoundError as error:
            folder = path.absolute().parent
            neighbours = sorted(file.name for file in folder.iterdir() if is_own_data(file)) if folder.is_dir() else []
            raise MissingFileError(
                f"the data set '{path}' does not exist (looked at {path.absolute()}).{nearest(path.name, neighbours)} "
                "Give the path of a YAML that describes it, from the folder in which the program is started."
            ) from error
        except yaml.YAMLError as error:
            raise InputError(
                f"{path} is not a plain YAML file: {error}. Python objects in YAML are not read."
            ) from error
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected the keys {', '.join(_MEANINGS)} of a data set, got {content!r}")
        description = cls(path, content)
        description._check()
        return description

    def _check(self) -> None:
        for key in self.content:
            if key not in _MEANINGS:
                raise InputError(
                    f"{self.path}: unknown key '{key}'.{nearest(str(key), _MEANINGS)} Known: {', '.join(_MEANINGS)}."
                )
        for key in _NEEDED:
            if self.content.get(key) is None:
                raise InputError(f"{self.path}: key '{key}' is missing: {_MEANINGS[key]}. Add it.")
        if self.kind not in KINDS:
            hint = nearest(self.kind, KINDS) if isinstance(self.kind, str) else ""
            raise self.wrong("type", f"expected {_MEANINGS['type']}, got {self.kind!r}.{hint}")
        for key in self.content:
            if key in _NOT_OF[self.kind]:
                raise self.wrong(key, f"type {self.kind} has no {_MEANINGS[key].partition(',')[0]}; remove the key")
        for key in ("images", "annotations", "masks"):
            value = self.content.get(key, "given")
            if not isinstance(value, str) or not value.strip():
                raise self.wrong(key, f"expected a path, {_MEANINGS[key]}; got {value!r}")

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.path.stem

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.content["type"]

    @property
    def remedy(self) -> str:
        """Where files are looked for."""
        return f"Paths in {self.path} are relative to its folder, {self.path.absolute().parent}."

    def wrong(self, key: str, problem: str) -> InputError:
        """The error that a key has a problem."""
        return InputError(f"{self.path}: key '{key}': {problem}")

    def place(self, key: str) -> Path:
        """The path that a key names."""
        return self.path.parent / Path(self.content[key]).expanduser()

    def check_folder(self, key: str, folder: Path) -> None:
        """Refuses a path that is not a folder.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: it is a file.
        """
        if folder.is_file():
            raise self.wrong(key, f"expected {_MEANINGS[key]}, but {folder} is a file")
        if not folder.is_dir():
            raise MissingFileError(f"{self.path}: key '{key}': {_MEANINGS[key]} {folder} does not exist. {self.remedy}")

    def ignore_label(self, num_classes: int) -> int:
        """The value of unlabelled pixels: by default the highest of 8 bits, or of 16 if the former is a class."""
        value = self.content.get("ignore_label")
        if value is None:
            return 255 if num_classes <= 255 else _HIGHEST_LABEL
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _HIGHEST_LABEL:
            raise self.wrong("ignore_label", f"expected a whole number 0..{_HIGHEST_LABEL}, got {value!r}")
        if value < num_classes:
            raise self.wrong(
                "ignore_label",
                f"{value} is the id of a class: the {num_classes} classes have the ids 0..{num_classes - 1}, in the "
                "order of `classes`. Give unlabelled pixels another value, such as 255. (Where 0 is unlabelled and the "
                "classes begin at 1, subtract 1 from every pixel: in 8 bits 0 becomes 255.)",
            )
        return value

    def vocabulary(self) -> Vocabulary:
        """The classes, ids by position, named like the data set.

        Raises:
            FileNotFoundError: they stand in a file that does not exist.
            ValueError: there are none, two cannot be told apart, or nothing says which are things.
        """
        vocabulary, marks = self._classes()
        if self.content.get("things") is not None:
            marks = self._things(vocabulary, marks)
        elif self.kind == "panoptic" and len(marks) < len(vocabulary) and False not in marks.values():
            # not even if some are marked as things: the others may have been meant to be stuff
            raise InputError(
                f"{self.path}: nothing says which classes are things (can be counted) and which are stuff. Add "
                f"`things: [{vocabulary.class_names[0]}, ...]` ([] for none), or write :thing or :stuff at the end of "
                "a class."
            )
        classes = tuple(
            dataclasses.replace(entry, id=index, thing=marks.get(index, True))
            for index, entry in enumerate(vocabulary.classes)
        )
        return dataclasses.replace(vocabulary, name=self.name, classes=classes)

    def _classes(self) -> tuple[Vocabulary, dict[int, bool]]:
        """The classes in their order, and for each that says so whether it is a thing."""
        value = self.content["classes"]
        if isinstance(value, str):
            return self._classes_of_file(self.place("classes"))
        if not isinstance(value, list):
            raise self.wrong("classes", f"expected a list of names or the path of a file, got {value!r}")
        for number, entry in enumerate(value):
            if not isinstance(entry, str):
                raise self.wrong(
                    "classes", f"entry {number} is {entry!r} for YAML, not a text. Put it into quotes, as 'car:stuff'"
                )
        return self._classes_of_list(value)

    def _classes_of_file(self, path: Path) -> tuple[Vocabulary, dict[int, bool]]:
        if not path.is_file():
            raise MissingFileError(
                f"{self.path}: key 'classes': the file {path} does not exist. {self.remedy} A list of names may stand "
                "in its place."
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
            lines = [line for line in text.splitlines() if line.strip()]
            is_json = text.lstrip().startswith("{")
            if not is_json and not all(re.match(r"\s*\d+\s*:", line) for line in lines):
                return self._classes_of_list(lines)
            vocabulary = Vocabulary.from_file(path)
            refuse_same_names(vocabulary.classes)
        except UnicodeDecodeError as error:
            raise self.wrong("classes", f"{path} is not UTF-8 text: {error}. Save it as UTF-8") from error
        except ValueError as error:
            raise self.wrong("classes", str(error)) from error
        # the published text format does not know things
        return vocabulary, {index: entry.thing for index, entry in enumerate(vocabulary.classes)} if is_json else {}

    def _classes_of_list(self, entries: Sequence[str]) -> tuple[Vocabulary, dict[int, bool]]:
        try:
            vocabulary = Vocabulary.from_names(entries, name=self.name)
        except ValueError as error:
            raise self.wrong("classes", str(error)) from error
        marks = {index: split_mark(entry)[1] for index, entry in enumerate(entries)}
        return vocabulary, {index: thing for index, thing in marks.items() if thing is not None}

    def _things(self, vocabulary: Vocabulary, marks: Mapping[int, bool]) -> dict[int, bool]:
        """What `things` says of every class; marks in a list must not say otherwise, the flags of a JSON give way."""
        value = self.content["things"]
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong("things", f"expected a list of class names, such as [car], got {value!r}")
        index_of = {name: index for index, name in enumerate(vocabulary.class_names)}
        things = set()
        for entry in value:
            name = plain_name(entry.partition(",")[0])  # a whole entry of `classes` is fine too
            if name not in index_of:
                raise self.wrong(
                    "things",
                    f"'{entry}' is not a class.{nearest(name, index_of)} Expected names of `classes`: "
                    f"{listed(index_of, 5)}",
                )
            things.add(index_of[name])
        for index, thing in marks.items():
            if thing != (index in things) and not vocabulary.source_sha256:  # those are marks, of a list
                problem = "is not in it, but is marked :thing" if thing else "is in it, but is marked :stuff"
                raise self.wrong("things", f"'{vocabulary.class_names[index]}' {problem} in `classes`. Remove one")
        return {index: index in things for index in range(len(vocabulary))}
