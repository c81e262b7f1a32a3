"""Category ids of a COCO JSON of the user, matched to the classes of the YAML by name."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fcclip.config import nearest
from fcclip.data.datasets.files import AnnotationFile
from fcclip.errors import InputError
from fcclip.files import listed
from fcclip.vocabulary import Vocabulary, plain_name

_SHOWN = 5  # names in a message


def class_of(name: str, vocabulary: Vocabulary) -> int | None:
    """The class that a category of a JSON belongs to: the one with this name, else the only one with this synonym."""
    name = plain_name(name)
    if name in vocabulary.class_names:
        return vocabulary.class_names.index(name)
    having = [index for index, synonyms in enumerate(vocabulary.synonyms) if name in synonyms]
    return having[0] if len(having) == 1 else None


class CategoryMatch:
    """Which class each category of a COCO JSON is.

    Args:
        source: the JSON; `categories` and `annotations` are among its lists.
        classes: of the YAML.
        yaml_file: the YAML, for messages.
    """

    def __init__(self, source: AnnotationFile, classes: Vocabulary, yaml_file: Path) -> None:
        self.source = source
        self.classes = classes
        self.yaml_file = yaml_file
        self._vocabulary: Vocabulary | None = None

    def vocabulary(self, content: dict | None = None) -> Vocabulary:
        """The classes with the category ids of the JSON; a class that it does not have gets an id that is free there.

        Args:
            content: of the file, where it is at hand; else the file is read, once.

        Raises:
            FileNotFoundError, ValueError: the file cannot be read; or a category that is used belongs to no class, or
                two to one.
        """
        if self._vocabulary is None:
            content = self.source.read() if content is None else content
            self.source.check_list(content, "categories")
            names = self._names(content["categories"])
            try:
                used = Counter(_category_ids(content["annotations"]))
            except TypeError as error:
                raise self._wrong(f"a category_id is neither a number nor a text: {error}") from error
            id_of = self._ids(names, used)
            unused_ids = itertools.count(max([0, *names]) + 1)
            entries = tuple(
                dataclasses.replace(entry, id=id_of[index] if index in id_of else next(unused_ids))
                for index, entry in enumerate(self.classes.classes)
            )
            self._vocabulary = dataclasses.replace(self.classes, classes=entries)
        return self._vocabulary

    def _wrong(self, problem: str) -> InputError:
        return InputError(f"{self.source.where}: {problem}. {self.source.expected}")

    def _names(self, categories: list) -> dict[int, str]:
        """Category id -> name."""
        names: dict[int, str] = {}
        for category in categories:
            fields = category if isinstance(category, dict) else {}
            category_id, name = fields.get("id"), fields.get("name")
            if isinstance(category_id, bool) or not isinstance(category_id, int) or not isinstance(name, str):
                raise self._wrong(f"the category {category!r} has no whole number 'id' and text 'name'")
            if category_id in names:
                raise InputError(
                    f"{self.source.where}: the categories '{names[category_id]}' and '{name}' have the same id "
                    f"{category_id}. Give each an id of its own."
                )
            names[category_id] = name
        return names

    def _ids(self, names: Mapping[int, str], used: Mapping[Any, int]) -> dict[int, int]:
        """Class -> its category id; of several categories of a class the one that has annotations."""
        unlisted = [category_id for category_id in used if category_id not in names]
        if unlisted:
            raise self._wrong(
                f"{used[unlisted[0]]} annotations have category_id {unlisted[0]!r}, which is not in its 'categories' "
                f"({len(names)} ids: {listed(names, _SHOWN)})"
            )
        classes = {category_id: class_of(name, self.classes) for category_id, name in names.items()}
        strange = [(names[key].strip(), used[key]) for key, index in classes.items() if index is None and used.get(key)]
        if strange:
            raise InputError(self._without_class(strange))
        ids: dict[int, int] = {}
        for category_id, index in sorted(classes.items(), key=lambda item: not used.get(item[0])):  # used ones first
            if index is None:
                continue
            if index in ids and used.get(category_id):
                raise InputError(
                    f"{self.source.where}: the categories '{names[ids[index]]}' ({ids[index]}) and "
                    f"'{names[category_id]}' ({category_id}) both belong to the class "
                    f"'{self.classes.class_names[index]}'. Give each a class of its own in `classes` of "
                    f"{self.yaml_file}, or merge them in the JSON."
                )
            ids.setdefault(index, category_id)
        return ids

    def _without_class(self, categories: Sequence[tuple[str, int]]) -> str:
        """What is wrong with (name, number of annotations) of categories."""
        known = [*self.classes.class_names, *itertools.chain(*self.classes.synonyms)]
        lines = []
        for name, count in categories[:_SHOWN]:
            several = sum(name in synonyms for synonyms in self.classes.synonyms) > 1
            hint = " Several classes have it among their synonyms." if several else nearest(name, known)
            lines.append(f"'{name}' ({count} annotations).{hint}")
        more = f" And {len(categories) - _SHOWN} more." if len(categories) > _SHOWN else ""
        return (
            f"{self.source.where} has annotations of categories that are not a class: {' '.join(lines)}{more} Names "
            f"are compared letter by letter: in `classes` of {self.yaml_file} add it at the end, or as a synonym of a "
            "class ('car, automobile'); or take these annotations out."
        )


def _category_ids(annotations: Iterable[Any]) -> Iterator[Any]:
    """The category id of every annotation, or of every segment of one; its reader refuses what is malformed."""
    for annotation in annotations:
        segments = annotation.get("segments_info", [annotation]) if isinstance(annotation, dict) else ()
        for segment in segments if isinstance(segments, list) else ():
            if isinstance(segment, dict) and "category_id" in segment:
                yield segment["category_id"]
