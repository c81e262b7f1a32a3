"""Classes and their synonyms, from names, from our JSON or from the published text files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fcclip.config import lookup
from fcclip.errors import InputError, MissingFileError
from fcclip.files import listed

logger = logging.getLogger(__name__)

_MARKS = {"thing": True, "stuff": False}
_NAMES = Path(__file__).resolve().parent / "names"
_PLACEHOLDER = "invalid_class_id"
# SHA-256 of the vocabulary files with which the published numbers were obtained: prompt-engineered ones, but of BDD100K
# its own class names, which are ours.
_PUBLISHED = {
    "3204c154e2c524ce2575f873838893fc25d68c5c4f7973f2d4ee76d7e24bb781": "ade20k_150_with_prompt_eng.txt",
    "173d44806d8b3ca94cfb8947f459e6ecdb90770387b3a4116fdd78e8e111d732": "ade20k_847_with_prompt_eng.txt",
    "1c0acd251e1fdf8359e85f3a4a76c1a64c95f8a9a7b68df6f6a00a11e149450b": "bdd100k_19.json",
    "6c8043c2edb613c45b71798062eee697715feb2e70ef0ed1df62453f4893e84a": "bdd100k_40.json",
    "e4afc7fb7776a05213822333a48ad708448a0fd25eb819b2ea7ef253af164b43": "cityscapes_with_prompt_eng.txt",
    "560169ea22202460c3b9427df387f8d1778e94dadecd38554da683e2097cda9f": "coco_panoptic_with_prompt_eng.txt",
    "af860dc8362af7c7fed556b79014cfbf775b7ece2279b11317a16260cdca9bcb": "coco_stuff_with_prompt_eng.txt",
    "7108477b1bdfca7c95d17f7b9e992250be9a6bd6dc704fcb4592484ac626dffd": "lvis_1203_with_prompt_eng.txt",
    "67d04273ba43538b4ae8c5c809951422982e3abd6eb2ee6ab2a2d063916e9c10": "mapillary_vistas_with_prompt_eng.txt",
    "574ae7e3dc9decff20366696309c36d40502cda90204f7e94c96251559be5197": "pascal_ctx_459_with_prompt_eng.txt",
    "0bf48d67f93b15d331cbf36e112777cc3a407084e94e395b98fad8c67e50149a": "pascal_ctx_59_with_prompt_eng.txt",
    "9acddc0dc82ebb9167e23ac93b197c91794603ec320f5e30053f983d4fa23c21": "pascal_voc_21_with_prompt_eng.txt",
}


@dataclass(frozen=True)
class ClassEntry:
    """One class.

    Args:
        id: the data set's own id of the class (a COCO category id, a Cityscapes label id); the position where there is
            none.
        name: the canonical name, used in tables and images.
        synonyms: every name that stands for the class, the best first; never empty. The name is the first of them,
            unless it is a label only: no plain English ("wall-other-merged"), misleading alone ("crane"), or the name
            of another class too.
        thing: countable, in contrast to stuff.
        color: published (R, G, B), 0..255; None: there is none.
    """

    id: int
    name: str
    synonyms: tuple[str, ...]
    thing: bool = True
    color: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """K classes in order; a class's position is its contiguous index.

    Raises:
        ValueError: no class at all, or a class without a synonym.
    """

    name: str
    classes: tuple[ClassEntry, ...]
    source_sha256: str = ""  # of the file it was read from

    def __post_init__(self) -> None:
        if not self.classes:
            raise InputError(
                f"vocabulary '{self.name}' has no classes; give at least one, e.g. \"cat; dog; grass:stuff\""
            )
        for index, entry in enumerate(self.classes):
            if not entry.synonyms:
                raise InputError(f"vocabulary '{self.name}': class {index} has no synonym")

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The canonical name of each class."""
        return tuple(entry.name for entry in self.classes)

    @property
    def synonyms(self) -> tuple[tuple[str, ...], ...]:
        """The synonyms of each class, the best first."""
        return tuple(entry.synonyms for entry in self.classes)

    @property
    def thing_classes(self) -> tuple[int, ...]:
        """Contiguous indices of the thing classes, ascending."""
        return tuple(index for index, entry in enumerate(self.classes) if entry.thing)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the synonyms and thing marks, independent of the file they came from."""
        content = json.dumps([[list(entry.synonyms), entry.thing] for entry in self.classes], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def is_published(self) -> bool:
        """Whether it was read from one of the files with which numbers were published."""
        return self.source_sha256 in _PUBLISHED

    def seen_by(self, training: Vocabulary | None) -> Tensor:
        """(K,) bool: the class shares a synonym with any class of `training` (exact, case-sensitive comparison; None
        has no class)."""
        known = {synonym for synonyms in training.synonyms for synonym in synonyms} if training else set()
        return torch.tensor([not known.isdisjoint(synonyms) for synonyms in self.synonyms])

    def joined(self, other: Vocabulary) -> Vocabulary:
        """Both lists as one. A class of `other` that shares a synonym with a class here adds its own to that class; the
        others follow in their order, with their position as id.

        Example:
            >>> pets, farm = Vocabulary.from_names("cat; dog"), Vocabulary.from_names("cow; dog, hound")
            >>> pets.joined(farm).synonyms
            (('cat',), ('dog', 'hound'), ('cow',))
        """
        classes: list[ClassEntry] = list(self.classes)
        owner: dict[str, int] = {}  # of each synonym, the first class that has it
        for index, entry in enumerate(classes):
            for synonym in entry.synonyms:
                owner.setdefault(synonym, index)
        for entry in other.classes:
            index = next((owner[synonym] for synonym in entry.synonyms if synonym in owner), len(classes))
            if index == len(classes):
                classes.append(dataclasses.replace(entry, id=index))
            mine = classes[index].synonyms
            synonyms = (*mine, *(synonym for synonym in entry.synonyms if synonym not in mine))
            classes[index] = dataclasses.replace(classes[index], synonyms=synonyms)
            for synonym in synonyms:
                owner.setdefault(synonym, index)
        if tuple(classes) == self.classes:
            return self
        return Vocabulary(f"{self.name}+{other.name}", tuple(classes))

    def with_things(self, things: Iterable[int]) -> Vocabulary:
        """The same classes with the thing classes given by contiguous index."""
        wanted = _check_things(things, len(self), self.name)
        marked = (dataclasses.replace(entry, thing=index in wanted) for index, entry in enumerate(self.classes))
        return dataclasses.replace(self, classes=tuple(marked))

    @classmethod
    def from_names(
        cls, entries: str | Sequence[str], things: Iterable[int] | None = None, *, name: str = "words"
    ) -> Vocabulary:
        """A vocabulary of the user's own class names.

        Args:
            entries: one entry a class, or one string in which `;` separates entries. An entry is `"class, synonym, …"`,
                with an optional `:thing` or `:stuff` at its end (see `split_mark`), which wins over `things`.
            things: contiguous indices of the thing classes; None: every unmarked class is a thing.

        Raises:
            ValueError: no entries, an entry without a name or with an unknown mark, two classes of one name, an index
                in `things` that is not a class.

        Example:
            >>> Vocabulary.from_names("surfboard, surf board; sand:stuff").thing_classes
            (0,)
        """
        parts = entries.split(";") if isinstance(entries, str) else list(entries)
        if isinstance(entries, str):
            parts = [part for part in parts if part.strip()]
        if not parts:
            raise InputError('no class names given; give at least one, e.g. "cat; dog, puppy; grass:stuff"')
        marked = None if things is None else _check_things(things, len(parts), name)
        classes = []
        for index, part in enumerate(parts):
            text, thing = split_mark(part)
            synonyms = tuple(dict.fromkeys(_split(text)))
            if not synonyms:
                raise InputError(f'entry {index} ({part!r}) has no name; write it as "class, synonym" or remove it')
            thing = (marked is None or index in marked) if thing is None else thing
            classes.append(ClassEntry(index, synonyms[0], synonyms, thing))
        refuse_same_names(classes)
        return cls(name, tuple(classes))

    @classmethod
    def from_file(cls, path: str | Path, things: Iterable[int] | None = None) -> Vocabulary:
        """A vocabulary from our JSON, or from the published text format (`id:name,synonym,…`, one class a line).

        The JSON is {"name", "version", "classes": [{"id", "name", "synonyms", "thing", "color"}, …]}. A class with
        `"label_only": true` is shown by its name, and CLIP's text tower reads only its synonyms.

        The text format is split at the first colon; lines named `invalid_class_id` are dropped; the order of the lines
        is the order of the classes. It does not know things: they come from `things`, and without it every class is a
        thing.

        Raises:
            FileNotFoundError: no such file.
            ValueError: neither format, naming the line.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise MissingFileError(f"vocabulary file '{path}' does not exist")
        content = path.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"vocabulary file '{path}' is not UTF-8 text: {error}") from error
        digest = hashlib.sha256(content).hexdigest()
        parse = _parse_json if text.lstrip().startswith("{") else _parse_text
        name, classes = parse(text, path)
        vocabulary = cls(name, tuple(classes), digest)
        return vocabulary if things is None else vocabulary.with_things(things)

    @classmethod
    def builtin(cls, name: str) -> Vocabulary:
        """A vocabulary that comes with the package.

        Raises:
            ValueError: unknown name, with the nearest known one.
        """
        return _builtin(name)


@functools.lru_cache(maxsize=32)
def _builtin(name: str) -> Vocabulary:
    return Vocabulary.from_file(lookup("vocabulary", name, {key: _NAMES / f"{key}.json" for key in builtin_names()}))


def builtin_names() -> tuple[str, ...]:
    """The names of the vocabularies that come with the package."""
    return tuple(sorted(path.stem for path in _NAMES.glob("*.json")))


def plain_name(name: str) -> str:
    """A name as it is compared and shown: composed Unicode (NFC), no invisible letters, single spaces.

    Example:
        >>> plain_name(" cafe\u0301\u200b  table ")
        'café table'
    """
    visible = (letter for letter in unicodedata.normalize("NFC", name) if unicodedata.category(letter) != "Cf")
    return " ".join("".join(visible).split())


def split_mark(entry: str) -> tuple[str, bool | None]:
    """An entry without its mark, and whether the mark says thing; None: it has none. Case and spaces do not matter.

    Raises:
        ValueError: a single word behind a colon that is neither "thing" nor "stuff".

    Example:
        >>> split_mark("sand: Stuff"), split_mark("sand")
        (('sand', False), ('sand', None))
    """
    text, colon, mark = entry.rpartition(":")
    mark = plain_name(mark)
    if not colon or not re.fullmatch(r"[^\W\d]+", mark):
        return entry, None
    if mark.lower() not in _MARKS:
        raise InputError(f"{entry!r} has the unknown mark ':{mark}'; write :thing or :stuff, or no colon")
    return text, _MARKS[mark.lower()]


def _split(text: str) -> tuple[str, ...]:
    return tuple(synonym for part in text.split(",") if (synonym := plain_name(part)))


def refuse_same_names(classes: Sequence[ClassEntry]) -> None:
    """Says in the log where classes share a synonym: CLIP cannot tell them apart.

    Raises:
        ValueError: two classes have one name, but for case.
    """
    first: dict[str, ClassEntry] = {}
    for entry in classes:
        other = first.setdefault(entry.name.casefold(), entry)
        if other is not entry:
            same = f"'{entry.name}' twice" if entry.name == other.name else f"'{other.name}' and '{entry.name}'"
            raise InputError(
                f"classes {other.id} and {entry.id} are {same}. Names tell classes apart: remove one, write both in "
                f"one entry, or give one another name"
            )
    owners: dict[str, list[str]] = {}
    for entry in classes:
        for synonym in entry.synonyms:
            owners.setdefault(synonym, []).append(entry.name)
    for synonym, names in owners.items():
        if len(names) > 1:
            logger.warning("'%s' is a name of the classes %s, which share its score", synonym, listed(names))


def _check_things(things: Iterable[int], num_classes: int, name: str) -> set[int]:
    wanted = set(things)
    wrong = sorted(index for index in wanted if not 0 <= index < num_classes)
    if wrong:
        raise InputError(f"vocabulary '{name}': thing indices {wrong} are no classes (0..{num_classes - 1})")
    return wanted


def _parse_json(text: str, path: Path) -> tuple[str, list[ClassEntry]]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"vocabulary file '{path}' is broken JSON at line {error.lineno}: {error.msg}") from error
    unknown = set(data) - {"name", "version", "classes"}
    if unknown or not isinstance(data.get("classes"), list):
        raise InputError(
            f"vocabulary file '{path}': expected an object with name, version and a list of classes, got the keys "
            f"{sorted(data)}"
        )
    classes = []
    for index, entry in enumerate(data["classes"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("synonyms", []), list):
            raise InputError(
                f"vocabulary file '{path}': class {index} must be an object whose synonyms are a list, got {entry!r}"
            )
        synonyms = (str(entry.get("name", "")).strip(), *(synonym.strip() for synonym in entry.get("synonyms", ())))
        synonyms = tuple(synonym for synonym in synonyms if synonym)
        if not synonyms:
            raise InputError(f"vocabulary file '{path}': class {index} has no name")
        name = synonyms[0]
        if entry.get("label_only", False):  # the name is shown, but CLIP is asked for the synonyms alone
            synonyms = synonyms[1:]
        if not synonyms:
            raise InputError(f"vocabulary file '{path}': '{name}' is label_only, so it needs at least one synonym")
        color = entry.get("color")
        if color is not None and (len(color) != 3 or not all(isinstance(part, int) for part in color)):
            raise InputError(f"vocabulary file '{path}': '{name}' has the color {color!r}, expected [R, G, B]")
        identifier, thing = int(entry.get("id", index)), bool(entry.get("thing", True))
        classes.append(ClassEntry(identifier, name, synonyms, thing, color and tuple(color)))
    return str(data.get("name", path.stem)), classes


def _parse_text(text: str, path: Path) -> tuple[str, list[ClassEntry]]:
    classes = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        identifier, colon, names_text = line.partition(":")
        synonyms = _split(names_text)
        if synonyms == (_PLACEHOLDER,):
            continue
        if not colon or not identifier.strip().isdigit() or not synonyms:
            raise InputError(f"vocabulary file '{path}', line {number}: expected 'id:name,synonym,…', got {line!r}")
        classes.append(ClassEntry(int(identifier), synonyms[0], synonyms))
    return path.stem, classes
