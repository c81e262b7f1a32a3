"""A data set of the user's own: a YAML file says where its images and labels are and what its classes are.

type: panoptic             # or instances, or semantic
images: images           # folder; paths are relative to the YAML, `~` is expanded
annotations: labels.json   # COCO JSON; with type semantic the folder of label maps
masks: labels              # type panoptic: folder of the id PNGs; by default the path of the JSON without `.json`
classes:                   # or a file; the order is the class id
  - car, automobile        # a class and its synonyms
  - grass
things: [car]              # or `:thing` and `:stuff` at the end of a class
ignore_label: 255          # of unlabelled pixels
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from fcclip.config import nearest
from fcclip.data.dataset import Dataset
from fcclip.data.datasets.files import check_first_files, check_lists, read_json
from fcclip.data.datasets.instances import NOT_INSTANCES, instance_records
from fcclip.data.datasets.metadata import LateMetadata, class_metadata
from fcclip.data.datasets.panoptic import NOT_PANOPTIC, panoptic_records
from fcclip.errors import InputError, MissingFileError
from fcclip.vocabulary import Vocabulary

__all__ = ["class_of", "is_own_data", "own_dataset"]

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".pgm")
LABEL_ENDINGS = (".png", ".tif", ".tiff", ".bmp")  # lossless ones
_KINDS = ("panoptic", "instances", "semantic")
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
_WITHOUT = {"panoptic": (), "instances": ("masks", "ignore_label"), "semantic": ("masks",)}  # keys of other types
_MARKS = {":thing": True, ":stuff": False}
_HIGHEST_LABEL = 65535  # of a label map of 16 bit
_SHOWN = 5  # names in a message


def is_own_data(name: str | Path) -> bool:
    """Whether the name of a data set is the path of a YAML file."""
    return str(name).lower().endswith((".yaml", ".yml"))


def own_dataset(path: str | Path) -> Dataset:
    """The data set that a YAML file describes; its name is the file's without the ending.

    The YAML and the file of classes, if it names one, are read here; images and labels when records are asked for,
    and the categories of a JSON when one asks for records or for category ids. These are matched to the classes by
    name: a contiguous id is a position in `classes`, whatever the ids in the JSON.

    Raises:
        FileNotFoundError: no such YAML, or no file of classes.
        ValueError: the YAML is broken or not plain, or has an unknown, missing or wrong key. The message names the file
            and the key.
    """
    description = _Description.read(Path(path).expanduser())
    kind = description.content["type"]
    return {"panoptic": _panoptic, "instances": _instances, "semantic": _semantic}[kind](description)


# ---- the YAML ----


@dataclass(frozen=True)
class _Description:
    """The keys of a YAML, each of the right type.

    Args:
        path: of the YAML.
        content: its keys.
    """

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Description:
        try:
            content = yaml.safe_load(path.read_bytes())
        except FileNotFoundError as error:
            folder = path.absolute().parent
            there = sorted(one.name for one in folder.iterdir() if is_own_data(one)) if folder.is_dir() else []
            raise MissingFileError(
                f"the data set '{path}' does not exist (looked at {path.absolute()}).{nearest(path.name, there)} Give "
                "the path of a YAML that describes it, from the folder in which the program is started."
            ) from error
        except yaml.YAMLError as error:
            raise InputError(
                f"{path} is not a plain YAML file: {error}. Python objects in YAML are not read."
            ) from error
        if not isinstance(content, dict):
            raise InputError(
                f"{path}: expected the keys {', '.join(_MEANINGS)} of a data set, got {_described(content)}"
            )
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
        kind = self.content["type"]
        if kind not in _KINDS:
            near = nearest(kind, _KINDS) if isinstance(kind, str) else ""
            raise self.wrong("type", f"expected {', '.join(_KINDS[:-1])} or {_KINDS[-1]}, got {kind!r}.{near}")
        for key in self.content:
            if key in _WITHOUT[kind]:
                raise self.wrong(key, f"type {kind} has no {_MEANINGS[key].partition(',')[0]}; remove the key")
        for key in ("images", "annotations", "masks"):
            value = self.content.get(key, "given")
            if not isinstance(value, str) or not value.strip():
                raise self.wrong(key, f"expected a path, {_MEANINGS[key]}; got {_described(value)}")

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def remedy(self) -> str:
        """Where files are looked for."""
        return f"Paths in {self.path} are relative to its folder, {self.path.absolute().parent}."

    def wrong(self, key: str, problem: str) -> ValueError:
        """The error that a key has a problem."""
        return ValueError(f"{self.path}: key '{key}': {problem}")

    def place(self, key: str) -> Path:
        """The path that a key names."""
        return self.path.parent / Path(self.content[key]).expanduser()

    def folder(self, key: str, place: Path | None = None) -> Path:
        """The same, which must be a folder.

        Args:
            key: the key.
            place: where it is by default, if the YAML does not say.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is a file.
        """
        place = self.place(key) if place is None else place
        if place.is_file():
            raise self.wrong(key, f"expected {_MEANINGS[key]}, but {place} is a file")
        if not place.is_dir():
            raise MissingFileError(f"{self.path}: key '{key}': {_MEANINGS[key]} {place} does not exist. {self.remedy}")
        return place

    def ignore_label(self, num_classes: int) -> int:
        """The value of unlabelled pixels: by default the highest of 8 bits, or of 16 if the former is a class."""
        value = self.content.get("ignore_label")
        if value is None:
            return 255 if num_classes <= 255 else _HIGHEST_LABEL
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _HIGHEST_LABEL:
            raise self.wrong("ignore_label", f"expected a whole number 0..{_HIGHEST_LABEL}, got {_described(value)}")
        if value < num_classes:
            raise self.wrong(
                "ignore_label",
                f"{value} is the id of a class: the {num_classes} classes have the ids 0..{num_classes - 1}, in the "
                "order of `classes`. Give unlabelled pixels another value, such as 255. (Where 0 is unlabelled and the "
                "classes begin at 1, subtract 1 from every pixel: in 8 bits 0 becomes 255.)",
            )
        return value


# ---- classes ----


def _vocabulary(description: _Description) -> Vocabulary:
    """The classes, ids by position, named like the data set."""
    vocabulary, told = _listed(description)
    _check_names(description, vocabulary)
    things = description.content.get("things")
    if things is not None:
        told = _things(description, vocabulary, told)
    elif description.content["type"] == "panoptic" and len(told) < len(vocabulary) and False not in told.values():
        # not even if some are marked as things: the others may have been meant to be stuff
        raise InputError(
            f"{description.path}: nothing says which classes are things (can be counted) and which are stuff. Add "
            f"`things: [{vocabulary.class_names[0]}, ...]` ([] for none), or write :thing or :stuff at the end of a "
            "class."
        )
    classes = tuple(
        dataclasses.replace(entry, id=index, thing=told.get(index, True))
        for index, entry in enumerate(vocabulary.classes)
    )
    return dataclasses.replace(vocabulary, name=description.name, classes=classes)


def _listed(description: _Description) -> tuple[Vocabulary, dict[int, bool]]:
    """The classes in their order, and for each that says so whether it is a thing."""
    value = description.content["classes"]
    if isinstance(value, str):
        return _from_file(description, description.path.parent / Path(value).expanduser())
    if not isinstance(value, list):
        raise description.wrong("classes", f"expected a list of names or the path of a file, got {_described(value)}")
    for number, entry in enumerate(value):
        if isinstance(entry, str):
            continue
        advice = "Put it into quotes" if not isinstance(entry, (dict, list)) else "Expected 'class, synonym:stuff'"
        raise description.wrong(
            "classes", f'entry {number} is {_described(entry)} for YAML, not a text. {advice}: - "{_quoted(entry)}"'
        )
    return _from_entries(description, value)


def _from_file(description: _Description, path: Path) -> tuple[Vocabulary, dict[int, bool]]:
    if not path.is_file():
        raise MissingFileError(
            f"{description.path}: key 'classes': the file {path} does not exist. {description.remedy} A list of names "
            "may stand in its place."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise description.wrong("classes", f"{path} is not UTF-8 text: {error}. Save it as UTF-8") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not text.lstrip().startswith("{") and not all(re.match(r"\s*\d+\s*:", line) for line in lines):
        return _from_entries(description, lines)
    try:
        vocabulary = Vocabulary.from_file(path)
    except ValueError as error:
        raise description.wrong("classes", str(error)) from error
    marked = text.lstrip().startswith("{")  # the text format does not know things
    return vocabulary, {index: entry.thing for index, entry in enumerate(vocabulary.classes) if marked}


def _from_entries(description: _Description, entries: Sequence[str]) -> tuple[Vocabulary, dict[int, bool]]:
    try:
        vocabulary = Vocabulary.from_names(entries, name=description.name)
    except ValueError as error:
        raise description.wrong("classes", str(error)) from error
    marks = {index: _mark(entry) for index, entry in enumerate(entries)}
    return vocabulary, {index: thing for index, thing in marks.items() if thing is not None}


def _mark(entry: str) -> bool | None:
    return next((thing for mark, thing in _MARKS.items() if entry.strip().endswith(mark)), None)


def _check_names(description: _Description, vocabulary: Vocabulary) -> None:
    """Refuses names that cannot be told apart."""
    known: dict[str, tuple[int, str]] = {}
    for index, name in enumerate(vocabulary.class_names):
        before, other = known.setdefault(name.casefold(), (index, name))
        if before == index:
            continue
        same = f"'{name}' twice" if name == other else f"'{other}' and '{name}', which differ only by case"
        raise description.wrong(
            "classes",
            f"classes {before} and {index} are {same}. Names tell classes apart; give one of them another name, or "
            "remove it if they are the same",
        )


def _things(description: _Description, vocabulary: Vocabulary, told: Mapping[int, bool]) -> dict[int, bool]:
    """What `things` says of every class; marks in a list must not say otherwise, the flags of a JSON give way."""
    value = description.content["things"]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise description.wrong("things", f"expected a list of class names, such as [car], got {_described(value)}")
    position = {name: index for index, name in enumerate(vocabulary.class_names)}
    chosen = set()
    for one in value:
        name = one.partition(",")[0].strip()  # a whole entry of `classes` is fine too
        if name not in position:
            raise description.wrong(
                "things",
                f"'{one}' is no class.{nearest(name, position)} Expected names of `classes`: "
                f"{_some(vocabulary.class_names)}",
            )
        chosen.add(position[name])
    for index, thing in told.items():
        if thing != (index in chosen) and not vocabulary.source_sha256:  # those are marks, of a list
            mark = ":thing" if thing else ":stuff"
            where = "is not in it" if thing else "is in it"
            raise description.wrong(
                "things", f"'{vocabulary.class_names[index]}' {where}, but is marked {mark} in `classes`. Remove one"
            )
    return {index: index in chosen for index in range(len(vocabulary))}


# ---- category ids ----


def class_of(name: str, vocabulary: Vocabulary) -> int | None:
    """The class that a category of a JSON belongs to: the one with this name, else the only one with this synonym."""
    name = name.strip()
    if name in vocabulary.class_names:
        return vocabulary.class_names.index(name)
    those = [index for index, words in enumerate(vocabulary.synonyms) if name in words]
    return those[0] if len(those) == 1 else None


class _CocoFile:
    """A COCO JSON whose category ids are matched to the classes by name.

    Args:
        description: the YAML.
        vocabulary: its classes.
        lists: names of the lists that the JSON must have.
        expected: sentence that tells what the JSON should be.
    """

    def __init__(
        self, description: _Description, vocabulary: Vocabulary, *, lists: Sequence[str], expected: str
    ) -> None:
        self.description = description
        self.vocabulary = vocabulary
        self.lists = lists
        self.expected = expected
        self.path = description.place("annotations")
        self.where = f"{description.path}: key 'annotations': {self.path}"
        self._matched: Vocabulary | None = None

    def read(self) -> dict:
        """The content of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is a folder, no valid JSON, or lacks a list.
        """
        if self.path.is_dir():
            kind = self.description.content["type"]
            raise InputError(
                f"{self.where} is a folder. With type {kind}, `annotations` is the COCO JSON; label maps with one "
                "number a pixel have type semantic."
            )
        return read_json(
            self.where, self.path, ("categories", *self.lists), self.expected, remedy=self.description.remedy
        )

    def records(self, parse: Callable[[dict], list[dict]]) -> list[dict]:
        """What `parse` makes of the file; the files of the first record must be there.

        Raises:
            FileNotFoundError, ValueError: as `read`, and what `parse` raises.
        """
        records = parse(self.read())
        check_first_files(self.where, records, self.description.remedy)
        return records

    def matched(self, content: dict | None = None) -> Vocabulary:
        """The classes with the category ids of the JSON; a class that it does not have gets an id that is free there.

        Args:
            content: of the file, where it is at hand; else the file is read, once.

        Raises:
            FileNotFoundError, ValueError: as `read`; or a category that is used belongs to no class, or two to one.
        """
        if self._matched is None:
            content = self.read() if content is None else content
            check_lists(self.where, content, ("categories",), self.expected)
            names = self._categories(content["categories"])
            try:
                used = Counter(_used(content["annotations"]))
            except TypeError as error:
                raise InputError(
                    f"{self.where}: a category_id is neither a number nor a text: {error}. {self.expected}"
                ) from error
            ids = self._ids(names, used)
            fresh = itertools.count(max([0, *names]) + 1)
            classes = tuple(
                dataclasses.replace(entry, id=ids[index] if index in ids else next(fresh))
                for index, entry in enumerate(self.vocabulary.classes)
            )
            self._matched = dataclasses.replace(self.vocabulary, classes=classes)
            self._compare_things(content["categories"])
        return self._matched

    def _categories(self, categories: list) -> dict[int, str]:
        """Category id -> name."""
        names: dict[int, str] = {}
        for category in categories:
            identifier, name = (
                (category.get("id"), category.get("name")) if isinstance(category, dict) else (None, None)
            )
            if isinstance(identifier, bool) or not isinstance(identifier, int) or not isinstance(name, str):
                raise InputError(
                    f"{self.where}: the category {category!r} has no whole number 'id' and text 'name'. {self.expected}"
                )
            if identifier in names:
                raise InputError(
                    f"{self.where}: the categories '{names[identifier]}' and '{name}' have the same id {identifier}. "
                    "Give each an id of its own."
                )
            names[identifier] = name
        return names

    def _ids(self, names: Mapping[int, str], used: Mapping[Any, int]) -> dict[int, int]:
        """Class -> its category id."""
        unlisted = [identifier for identifier in used if identifier not in names]
        if unlisted:
            raise InputError(
                f"{self.where}: {used[unlisted[0]]} annotations have category_id {unlisted[0]!r}, which is not in its "
                f"'categories' ({len(names)} ids: {_some(names)}). {self.expected}"
            )
        found = {identifier: class_of(name, self.vocabulary) for identifier, name in names.items()}
        strange = [identifier for identifier, index in found.items() if index is None and used.get(identifier)]
        if strange:
            raise InputError(self._without_class([(names[one], used[one]) for one in strange]))
        ids: dict[int, int] = {}
        for identifier, index in sorted(found.items(), key=lambda item: not used.get(item[0])):  # used ones first
            if index is None:
                continue
            if index in ids and used.get(identifier):
                other, name = names[ids[index]], self.vocabulary.class_names[index]
                raise InputError(
                    f"{self.where}: the categories '{other}' ({ids[index]}) and '{names[identifier]}' ({identifier}) "
                    f"both belong to the class '{name}'. Give each a class of its own in `classes` of "
                    f"{self.description.path}, or merge them in the JSON."
                )
            ids.setdefault(index, identifier)
        return ids

    def _without_class(self, categories: Sequence[tuple[str, int]]) -> str:
        words = [*self.vocabulary.class_names, *(word for words in self.vocabulary.synonyms for word in words)]
        lines = []
        for name, count in categories[:_SHOWN]:
            case = next((word for word in words if word.casefold() == name.strip().casefold()), None)
            several = sum(name.strip() in one for one in self.vocabulary.synonyms) > 1
            hint = nearest(name, words)
            if several:
                hint = " Several classes have it among their words."
            elif case is not None:
                hint = f" '{case}' differs only by case."
            lines.append(f"'{name}' ({count} annotations).{hint}")
        more = f" And {len(categories) - _SHOWN} more." if len(categories) > _SHOWN else ""
        return (
            f"{self.where} has annotations of categories that are no class: {' '.join(lines)}{more} Names are compared "
            f"letter by letter: in `classes` of {self.description.path} add it at the end, or as a synonym of a class "
            "('car, automobile'); or take these annotations out."
        )

    def _compare_things(self, categories: Iterable[dict]) -> None:
        """Says where `isthing` of the JSON and the YAML differ."""
        said = {one["id"]: bool(one["isthing"]) for one in categories if "isthing" in one}
        other = [one for one in self._matched.classes if said.get(one.id, one.thing) != one.thing]
        if other:
            shown = _some([f"{one.name} ({'stuff' if one.thing else 'thing'} there)" for one in other])
            logger.warning(
                "%s and its JSON %s do not agree what is a thing: %s; the YAML counts",
                *(self.description.path, self.path, shown),
            )


def _used(annotations: Iterable[Any]) -> Iterator[Any]:
    """The category id of every annotation, or of every segment of one; what is malformed is told by its reader."""
    for annotation in annotations:
        segments = annotation.get("segments_info", [annotation]) if isinstance(annotation, dict) else ()
        for segment in segments if isinstance(segments, list) else ():
            if isinstance(segment, dict) and "category_id" in segment:
                yield segment["category_id"]


# ---- the three types ----


def _panoptic(description: _Description) -> Dataset:
    vocabulary = _vocabulary(description)
    source = _CocoFile(description, vocabulary, lists=("annotations",), expected=NOT_PANOPTIC)
    default = source.path.parent / source.path.name.removesuffix(".json")
    masks = description.place("masks") if "masks" in description.content else default
    images = description.place("images")

    def parse(content: dict) -> list[dict]:
        words = source.matched(content)
        image_files = _ImageFiles(images, content.get("images") or ())

        def files(annotation: dict) -> dict[str, str]:
            mask = annotation["file_name"]
            return {
                "file_name": str(images / image_files.of(annotation["image_id"], mask)),
                "pan_seg_file_name": str(masks / mask),
            }

        records = panoptic_records(source.where, content, vocabulary=words, image_id=lambda value: value, files=files)
        if image_files.num_listed > len(records):
            logger.info(
                "%s: %d of %d images have no annotation; left out",
                *(source.where, image_files.num_listed - len(records), image_files.num_listed),
            )
        return records

    def load() -> list[dict]:
        description.folder("images")
        description.folder("masks", masks)
        return source.records(parse)

    known = {
        **_class_names(vocabulary),
        "ignore_label": description.ignore_label(len(vocabulary)),
        "evaluator_type": "coco_panoptic_seg",
        "image_root": str(images),
        "panoptic_root": str(masks),
        "panoptic_json": str(source.path),
        "sem_seg_root": None,
        "json_file": None,
        "label_divisor": 1000,
        "yaml_file": str(description.path),
    }
    return _dataset(description, vocabulary, LateMetadata(known, source.matched), load, parse)


def _instances(description: _Description) -> Dataset:
    vocabulary = _vocabulary(description)
    source = _CocoFile(description, vocabulary, lists=("images", "annotations"), expected=NOT_INSTANCES)
    images = description.place("images")

    def image_file(image: dict) -> dict[str, Any]:
        return {"file_name": str(images / image["file_name"]), "image_id": image["id"]}

    def parse(content: dict) -> list[dict]:
        words = source.matched(content)
        records = instance_records(source.where, content, vocabulary=words, image_file=image_file)
        _check_instances(description, source.where, words, records)
        return records

    def load() -> list[dict]:
        description.folder("images")
        return source.records(parse)

    known = {
        **_class_names(vocabulary),
        "evaluator_type": "coco",
        "image_root": str(images),
        "json_file": str(source.path),
        "yaml_file": str(description.path),
    }
    return _dataset(description, vocabulary, LateMetadata(known, source.matched), load, parse)


def _check_instances(description: _Description, where: str, words: Vocabulary, records: Iterable[dict]) -> None:
    """Refuses what can neither be trained on nor evaluated."""
    stuff = {index for index, entry in enumerate(words.classes) if not entry.thing}
    found = set()
    for record in records:
        if "height" not in record:
            raise InputError(
                f"{where} does not say the size of image {record['image_id']!r}: it needs height and width in "
                f"'images'. {NOT_INSTANCES}"
            )
        for one in record["annotations"]:
            if "segmentation" not in one:
                raise InputError(
                    f"{where}: an annotation of image {record['image_id']!r} ({record['file_name']}) has no "
                    "segmentation, and its box alone gives no mask. Add polygons or a run-length code, or take it out."
                )
            found |= {one["category_id"]} & stuff
    if found:
        names = _some([words.class_names[index] for index in sorted(found)])
        raise InputError(
            f"{where} has instances of stuff: {names}. Add these classes to `things` in {description.path} (without "
            "the key, all are things), or take their annotations out."
        )


def _semantic(description: _Description) -> Dataset:
    vocabulary = _vocabulary(description)

    def load() -> list[dict]:
        images, labels = description.folder("images"), description.folder("annotations")
        if images.resolve() == labels.resolve():
            raise description.wrong(
                "annotations", f"{labels} is the folder of the images too. Move the label maps into one of their own"
            )
        return _paired(description, images, labels)

    metadata = {
        **class_metadata(vocabulary, things=False),
        "ignore_label": description.ignore_label(len(vocabulary)),
        "evaluator_type": "sem_seg",
        "image_root": str(description.place("images")),
        "sem_seg_root": str(description.place("annotations")),
        "yaml_file": str(description.path),
    }
    return _dataset(description, vocabulary, metadata, load)


def _dataset(
    description: _Description,
    vocabulary: Vocabulary,
    metadata: Mapping[str, Any],
    load: Callable[[], list[dict]],
    parse: Callable[[dict], list[dict]] | None = None,
) -> Dataset:
    return Dataset(
        name=description.name,
        metadata=metadata,
        load=load,
        parse=parse,
        vocabulary=f"own-{vocabulary.hash[:12]}",  # data sets with the same classes share it
        words=lambda: vocabulary,
    )


def _class_names(vocabulary: Vocabulary) -> dict[str, list[str]]:
    names = vocabulary.class_names
    return {"stuff_classes": list(names), "thing_classes": [names[index] for index in vocabulary.thing_classes]}


# ---- files ----


class _ImageFiles:
    """Where the images of a panoptic JSON are: as its `images` say, else the file of the same stem as the PNG.

    Args:
        folder: of the images.
        images: entries `id, file_name`.
    """

    def __init__(self, folder: Path, images: Iterable[dict]) -> None:
        named = [image for image in images if isinstance(image, dict)]
        self.num_listed = len({str(image.get("id")) for image in named})
        self._folder = folder
        self._names = {str(one.get("id")): one["file_name"] for one in named if isinstance(one.get("file_name"), str)}
        self._by_stem: dict[str, str] | None = None

    def of(self, image_id: Any, mask: str) -> str:
        """The path below the folder of the image that belongs to an id PNG."""
        name = self._names.get(str(image_id))
        if name is not None:
            return name
        if self._by_stem is None:
            self._by_stem = {
                one.stem: one.relative_to(self._folder).as_posix() for one in _files(self._folder, IMAGE_ENDINGS)
            }
        stem = PurePosixPath(mask).stem
        return self._by_stem.get(stem, f"{stem}.jpg")


def _paired(description: _Description, images: Path, labels: Path) -> list[dict]:
    """Records `file_name, sem_seg_file_name, image_id` of the images and label maps whose paths below the two folders
    are the same but for the ending, sorted by them. A file without a partner is left out, which the log says."""
    image_files = _by_name(description, "images", images, IMAGE_ENDINGS, without=labels)
    maps = _by_name(description, "annotations", labels, LABEL_ENDINGS, without=images)
    names = sorted(image_files.keys() & maps.keys())
    alone = sorted(str(files[name]) for files in (image_files, maps) for name in files.keys() - set(names))
    if not names:
        raise InputError(
            f"{description.path}: no image in {images} has a label map of the same name in {labels}: there are "
            f"{alone[0]} and {sorted(map(str, maps.values()))[0]}. Names must be the same but for the ending."
        )
    if alone:
        logger.warning(
            "%s: %d of %d images in %s and %d label maps in %s have no partner of the same name: %s; left out",
            *(description.path, len(alone), len(image_files), images, len(maps), labels, _some(alone)),
        )
    return [
        {"file_name": str(image_files[name]), "sem_seg_file_name": str(maps[name]), "image_id": name} for name in names
    ]


def _by_name(
    description: _Description, key: str, folder: Path, endings: Sequence[str], *, without: Path
) -> dict[str, Path]:
    """The files in a folder and below it, but not those in another, by their path below it without the ending."""
    other = without.resolve()
    inside = other.is_relative_to(folder.resolve())
    files: dict[str, Path] = {}
    for path in _files(folder, endings):
        if inside and path.resolve().is_relative_to(other):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise description.wrong(
                key,
                f"{files[name]} and {path} have the same name but for the ending, so neither belongs to one partner",
            )
        files[name] = path
    if not files:
        raise description.wrong(key, f"there is no file in {folder} that ends in {', '.join(endings)}")
    return files


def _files(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    """The files with these endings in a folder and below it, sorted; hidden ones are none."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in endings and not hidden and path.is_file():
            yield path


# ---- words of messages ----


def _described(value: Any) -> str:
    """A value of a YAML as its user knows it."""
    if isinstance(value, dict):
        return f"a mapping ({_some(list(map(str, value)))})"
    if isinstance(value, list):
        return f"a list ({_some(list(map(str, value)))})"
    return "nothing" if value is None else f"{value!r}"


def _quoted(entry: Any) -> str:
    """What an entry that YAML did not take for a text was probably meant to be."""
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, mark),) = entry.items()
        return f"{name}:{mark}"
    return {True: "yes", False: "no", None: "null"}.get(entry, str(entry)) if not isinstance(entry, list) else "..."


def _some(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
