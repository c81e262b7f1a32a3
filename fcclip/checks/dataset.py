"""Everything that can be wrong with the files of a data set, found before a GPU is taken.

check_dataset looks at the annotation file, at the classes and, in processes of its own, at every image and its
labels. Nothing that is wrong with the data raises: it becomes a `Finding`, and the rest is looked at all the same.

checker_findings.py     what there is to find, and how bad it is
checker_annotations.py  annotation files
checker_images.py     the files of one image
checker_processes.py    processes that may die of a file
"""

from __future__ import annotations

import dataclasses
import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fcclip.checks.annotations import (
    Classes,
    check_categories,
    known_classes,
    spelling,
    usable_instances,
    usable_panoptic,
)
from fcclip.checks.findings import KINDS, SEVERITIES, Finding, Findings, some
from fcclip.checks.images import Looked, Rules, look
from fcclip.checks.processes import Death, map_in_processes
from fcclip.data.dataset import Dataset, collector_paused
from fcclip.data.datasets.cityscapes import CITYSCAPES, instance_ids_file
from fcclip.data.datasets.files import AnnotationFile
from fcclip.data.datasets.instances import NOT_INSTANCES
from fcclip.data.datasets.panoptic import NOT_PANOPTIC
from fcclip.data.transport import CompactRecords
from fcclip.data.vocabularies import dataset_vocabulary
from fcclip.errors import InputError
from fcclip.vocabulary import Vocabulary

__all__ = ["ClassCount", "Finding", "Report", "check_dataset", "choose_images"]

_CHUNK = 16  # images that a process gets at a time
_EXAMPLES = 4  # images that are remembered of each class
_SAMPLES = 20  # records whose label maps are looked for before all are
_SHOWN = 12  # classes named in a finding
_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".pgm", ".gif")


@dataclass
class ClassCount:
    """What a data set has of a class.

    Args:
        name: of the class.
        thing: whether it can be counted; None where the data set does not tell.
        seen: whether it shares a word with a training class; None: there are no training classes.
        images: in which it is.
        segments: segments or instances; in semantic sets the same as images.
        pixels: by the JSON where pixels are not decoded.
        examples: positions of the first of these images.
    """

    name: str
    thing: bool | None
    seen: bool | None = None
    images: int = 0
    segments: int = 0
    pixels: int = 0
    examples: tuple[int, ...] = ()


@dataclass
class Report:
    """What was found in a data set.

    Args:
        dataset: its name.
        kind: "panoptic", "instances" or "semantic".
        fast: whether pixels were left alone.
        source: the annotation file, or the folder of label maps.
        findings: worst first when `check_dataset` returns.
        vocabulary: its words; None: they cannot be read.
        training: name of what the seen classes were seen in; None: nothing.
        num_images: records.
        num_published: images of the published set; None: there is none.
        num_crowds: crowd segments or instances.
        classes: in order.
        records: of the data set, as far as they can be used; None: there are none.
    """

    dataset: str
    kind: str
    fast: bool
    source: str
    findings: Findings = field(default_factory=Findings)
    vocabulary: Vocabulary | None = None
    training: str | None = None
    num_images: int = 0
    num_published: int | None = None
    num_crowds: int = 0
    classes: list[ClassCount] = field(default_factory=list)
    records: CompactRecords | None = None

    def count(self, severity: str) -> int:
        """How many findings there are of a severity."""
        return sum(one.severity == severity for one in self.findings)

    @property
    def knows_classes(self) -> bool:
        """Whether `classes` say what is in the images: label maps say so only when they are decoded."""
        return self.records is not None and not (self.fast and self.kind == "semantic")

    def groups(self) -> list[list[Finding]]:
        """Findings that differ in file and detail alone, together; the worst first, in the order of `KINDS`."""
        order = list(KINDS)
        groups: dict[tuple, list[Finding]] = {}
        for one in self.findings:
            groups.setdefault((SEVERITIES.index(one.severity), order.index(one.kind), one.remedy), []).append(one)
        return [groups[key] for key in sorted(groups)]

    def as_dict(self) -> dict[str, Any]:
        """JSON values; every finding and every class."""
        words = self.vocabulary
        return {
            "schema": 1,
            "dataset": self.dataset,
            "kind": self.kind,
            "fast": self.fast,
            "source": self.source,
            "images": self.num_images,
            "published_images": self.num_published,
            "vocabulary": words
            and {"name": words.name, "sha256": words.hash, "published": words.is_published, "classes": len(words)},
            "training": self.training,
            **{f"{severity}s": self.count(severity) for severity in SEVERITIES},
            "findings": [asdict(one) for one in self.findings],
            "classes": [
                {key: value for key, value in asdict(one).items() if key != "examples"} for one in self.classes
            ],
        }


def check_dataset(
    dataset: Dataset,
    *,
    fast: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    vocabularies: str | Path = "",
    training: Vocabulary | None = None,
) -> Report:
    """Looks at all that training and evaluation would read of a data set.

    Args:
        dataset: registered, or of a YAML.
        fast: leave pixels alone: annotation files, headers and the existence of files only.
        workers: processes that look at images; one that dies of a file is named and replaced. 0: this process.
        progress: called with (images done, images in all) from time to time.
        vocabularies: folder of published vocabulary files; see `dataset_vocabulary`.
        training: words by which classes count as seen; None: it is not told.

    Raises:
        ValueError: a negative number of workers.
        RuntimeError: processes cannot be started.
    """
    if workers < 0:
        raise InputError(f"the number of workers must be 0 or more, got {workers}")
    kind, source = _kind_and_source(dataset)
    report = Report(dataset=dataset.name, kind=kind, fast=fast, source=source)
    report.num_published = dataset.published_count
    records = _records(report, dataset)
    _check_words(report, dataset, vocabularies, training)
    if records is not None and report.classes:
        report.num_images = len(records)
        _check_count(report)
        _check_unlisted(report, dataset, records)
        _check_instance_ids(report, dataset, records)
        rules = _rules(report, dataset, records)
        report.records = CompactRecords(records)
        del records  # a hundred thousand dicts
        _look_at_all(report, rules, workers, progress)
        _check_classes(report)
    order = list(KINDS)
    report.findings.sort(key=lambda one: (SEVERITIES.index(one.severity), order.index(one.kind), one.file, one.what))
    return report


def choose_images(report: Report, number: int) -> list[int]:
    """Positions of at most so many records to look at: half of them show the rarest classes, the others are evenly
    spread; none with an error. The same every time."""
    if report.records is None or number < 1:
        return []
    bad = {one.file for one in report.findings if one.severity == "error"}

    def is_good(position: int) -> bool:
        record = report.records[position]
        return bad.isdisjoint(record.get(key) for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name"))

    chosen: set[int] = set()
    for one in sorted((one for one in report.classes if one.examples), key=lambda one: one.images):
        if len(chosen) == number // 2:
            break
        if chosen.isdisjoint(one.examples):
            chosen.update([position for position in one.examples if is_good(position)][:1])
    total, left = len(report.records), number - len(chosen)
    for step in range(left):
        start = (2 * step + 1) * total // (2 * left)
        there = (position % total for position in range(start, start + total))
        chosen.update([one for one in there if one not in chosen and is_good(one)][:1])
    return sorted(chosen)


# ---- the annotation file ----


def _kind_and_source(dataset: Dataset) -> tuple[str, str]:
    metadata = dataset.metadata
    if metadata.get("panoptic_json"):
        return "panoptic", metadata["panoptic_json"]
    return ("instances", metadata["json_file"]) if metadata.get("json_file") else ("semantic", metadata["sem_seg_root"])


def _records(report: Report, dataset: Dataset) -> list[dict] | None:
    """What can be used of the data set, or None with the findings that say why nothing can."""
    say, metadata = report.findings, dataset.metadata
    folders = {"panoptic": ("image_root", "panoptic_root"), "semantic": ("image_root", "sem_seg_root")}
    missing = [metadata[key] for key in folders.get(report.kind, ("image_root",)) if not Path(metadata[key]).is_dir()]
    for folder in missing:
        say.say("missing-folder", folder, "a file" if Path(folder).exists() else "no such folder")
    if report.kind == "semantic":
        records = None if missing else _read(report, dataset.annotations)
    else:
        records = _from_json(report, dataset)
    if records is not None and not records:
        say.say("no-images", report.source, _what_is_there(metadata["image_root"]))
    if report.kind == "panoptic" and metadata.get("json_file"):
        _check_instances_file(report, dataset, records)
    return None if missing else records or None


def _what_is_there(folder: str) -> str:
    endings: dict[str, int] = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        ending = os.path.splitext(name)[1]
        endings[ending] = endings.get(ending, 0) + 1
    found = ", ".join(f"{count} '{ending}'" for ending, count in sorted(endings.items(), key=lambda item: -item[1])[:3])
    return f"the folder of images, {folder}, has files that end in: {found}" if found else f"{folder} is empty"


def _read(report: Report, reader: Callable[[], list[dict]]) -> list[dict] | None:
    """The records that the data set's own reader gives; None with a finding."""
    try:
        return reader()
    except (ValueError, OSError) as error:
        report.findings.say("annotation-file", report.source, str(error), remedy="see there")
    except Exception as error:  # a reader may stumble over what nobody has thought of
        report.findings.say("annotation-file", report.source, f"{type(error).__name__}: {error}")
    return None


def _from_json(report: Report, dataset: Dataset) -> list[dict] | None:
    """The records of an annotation file, without the entries that its reader refuses."""
    say, path = report.findings, Path(report.source)
    is_panoptic = report.kind == "panoptic"
    with collector_paused():
        content = _content(say, path, dataset, is_panoptic)
        if content is None:
            return None
        try:
            classes = known_classes(dataset, content)
        except (ValueError, OSError) as error:
            say.say("annotation-file", path, str(error), remedy="see there")
            return None
        check_categories(say, path, content, classes, names_stuff=is_panoptic)
        if is_panoptic:
            usable = usable_panoptic(say, path, content, classes, as_published=_has_stale_areas(dataset))
        else:
            usable = usable_instances(say, path, content, classes)
        records = _read(report, partial(dataset.parse, usable) if dataset.parse else dataset.annotations)
        if records is not None and not is_panoptic:
            _add_areas(records, usable["annotations"])
        for record in records or () if is_panoptic else ():
            left_out = usable["left_out"].get(str(record["image_id"]))
            if left_out:  # its PNG has them all the same
                record["left_out"] = left_out
    return records


def _content(say: Findings, path: Path, dataset: Dataset, is_panoptic: bool) -> dict | None:
    """The object in a file with the lists that it must have; None with a finding."""
    lists, expected = (("annotations",), NOT_PANOPTIC) if is_panoptic else (("images", "annotations"), NOT_INSTANCES)
    where = f"data set '{dataset.name}': {path}"
    try:
        content = AnnotationFile(f"data set '{dataset.name}'", path, lists, expected).read()
    except (ValueError, OSError) as error:
        reason = str(error).removeprefix(where).removeprefix(": ").strip()
        first, _, remedy = reason.partition(". ")
        say.say("annotation-file", path, first.removesuffix("."), **({"remedy": remedy} if remedy else {}))
        return None
    return content


def _add_areas(records: list[dict], annotations: Sequence[dict]) -> None:
    """Puts back what the reader of instances leaves out, id and area, where it has kept all annotations."""
    of_image: dict[str, list[dict]] = {}
    for annotation in annotations:
        of_image.setdefault(str(annotation["image_id"]), []).append(annotation)
    for record in records:
        originals = of_image.get(str(record["image_id"]), [])
        if len(originals) != len(record["annotations"]):
            continue
        for one, original in zip(record["annotations"], originals):
            one.update({key: original[key] for key in ("id", "area") if key in original})


def _check_instances_file(report: Report, dataset: Dataset, records: Sequence[dict] | None) -> None:
    """The annotations that average precision on a panoptic set is measured with."""
    say, path = report.findings, Path(dataset.metadata["json_file"])
    if not path.is_file():
        say.say("no-instances-file", path, "no such file")
        return
    with collector_paused():
        content = _content(say, path, dataset, is_panoptic=False)
        if content is None:
            return
        classes = known_classes(dataset, content)
        things = [classes.vocabulary.classes[index] for index in sorted(classes.things)]
        position = {entry.id: index for index, entry in enumerate(things)}
        words = dataclasses.replace(classes.vocabulary, classes=tuple(things))
        of_things = Classes(words, position, frozenset(range(len(things))), by_name=False)
        check_categories(say, path, content, of_things, names_stuff=False)
        usable = usable_instances(say, path, content, classes)
    if records is not None:
        listed = {str(image["id"]) for image in usable["images"]}
        alone = [str(record["image_id"]) for record in records if str(record["image_id"]) not in listed]
        if alone:
            what = f"{len(alone)} of {len(records)} images are not in it, e.g. {alone[0]}"
            say.say("other-images", path, what)


def _has_stale_areas(dataset: Dataset) -> bool:
    """Whether the published files give areas of stuff before instances were painted over it, as ADE20K's do."""
    return dataset.metadata["evaluator_type"] == "ade20k_panoptic_seg"


# ---- words ----


def _check_words(report: Report, dataset: Dataset, vocabularies: str | Path, training: Vocabulary | None) -> None:
    """The words of the data set, and the classes as far as they are known without an image."""
    say, metadata = report.findings, dataset.metadata
    try:
        own = dataset.own_vocabulary()
        names = list(metadata["stuff_classes"])
        things = {*metadata["thing_classes"]} if report.kind != "semantic" else None
    except (ValueError, OSError) as error:
        if not any(one.kind == "annotation-file" for one in say):  # which gives the class names of LVIS
            say.say("vocabulary", dataset.vocabulary, str(error), remedy="see there")
        return
    try:
        vocabulary = dataset_vocabulary(dataset, vocabularies)
    except (ValueError, OSError) as error:
        say.say("vocabulary", dataset.vocabulary, str(error), remedy="see there")
        vocabulary = own
    report.vocabulary = vocabulary
    if names != list(own.class_names):
        other = [f"'{one}'" for one in {*names} ^ {*own.class_names}] or ["their order"]
        what = f"metadata and words have {len(names)} and {len(own)} classes; they differ in {', '.join(other[:5])}"
        say.say("vocabulary", dataset.vocabulary, what)
    report.classes = [ClassCount(name, None if things is None else name in things) for name in names]
    is_own = "yaml_file" in metadata
    _check_names(say, vocabulary, is_own)
    if training is None or len(vocabulary) != len(names):
        return
    report.training = training.name
    known = {spelling(word): word for words in training.synonyms for word in words}
    for entry, words, seen in zip(report.classes, vocabulary.synonyms, vocabulary.seen_by(training).tolist()):
        entry.seen = seen
        almost = next((word for word in words if spelling(word) in known), None)
        if not seen and almost is not None:
            what = f"'{entry.name}': its word '{almost}' is '{known[spelling(almost)]}' in training"
            say.say("almost-seen", _called(vocabulary), what, **_severity(is_own))


def _check_names(say: Findings, vocabulary: Vocabulary, is_own: bool) -> None:
    """Names and words that cannot be told apart."""
    file = _called(vocabulary)
    first: dict[str, int] = {}
    spelled: dict[str, int] = {}
    for index, name in enumerate(vocabulary.class_names):
        if first.setdefault(name, index) != index:
            say.say("same-name", file, f"'{name}': classes {first[name]} and {index}", **_severity(is_own))
        elif spelled.setdefault(spelling(name), index) != index:
            other = spelled[spelling(name)]
            what = f"'{vocabulary.class_names[other]}' and '{name}': classes {other} and {index}"
            say.say("similar-names", file, what, **_severity(is_own))
    owners: dict[str, set[int]] = {}
    for index, words in enumerate(vocabulary.synonyms):
        for word in words:
            owners.setdefault(word, set()).add(index)
    shared = [word for word, those in owners.items() if len(those) > 1]
    if shared:
        names = {word: [vocabulary.class_names[index] for index in sorted(owners[word])] for word in shared}
        named = [f"'{word}' ({', '.join(those)})" for word, those in names.items()]
        say.say("shared-word", file, some(named, _SHOWN))


def _severity(is_own: bool) -> dict[str, str]:
    """Words that come with fcclip or are published are as they are; the user's can be changed."""
    return {} if is_own else {"severity": "note", "remedy": "nothing: the words are as they were written"}


def _called(vocabulary: Vocabulary) -> str:
    return f"vocabulary '{vocabulary.name}'"


# ---- the set as a whole ----


def _check_count(report: Report) -> None:
    if report.num_published not in (None, report.num_images):
        what = f"{report.num_images:,} images, the published set has {report.num_published:,}"
        report.findings.say("count", report.source, what)


def _check_unlisted(report: Report, dataset: Dataset, records: Sequence[Mapping[str, Any]]) -> None:
    """Files beside those of the records that no record has."""
    say, is_semantic = report.findings, report.kind == "semantic"
    keys = {"file_name": "without-labels" if is_semantic else "unlisted-file"}
    keys |= {"pan_seg_file_name": "unlisted-labels"} if report.kind == "panoptic" else {}
    keys |= {"sem_seg_file_name": "without-image"} if is_semantic else {}
    used = {record[key] for key in keys for record in records}
    for key, kind in keys.items():
        folders = {os.path.dirname(record[key]) for record in records}
        if is_semantic:
            folders.add(dataset.metadata["image_root" if key == "file_name" else "sem_seg_root"])
        for path in sorted(_images_in(folders)):
            if path not in used:
                what = f"no record; the records have names like {os.path.basename(records[0][key])}"
                say.say(kind, path, what)


def _check_instance_ids(report: Report, dataset: Dataset, records: Sequence[Mapping[str, Any]]) -> None:
    """The files that Cityscapes is evaluated with, beside the label maps."""
    if dataset.metadata["evaluator_type"] != CITYSCAPES:
        return
    missing = [path for path in map(instance_ids_file, records) if not os.path.isfile(path)]
    if len(missing) == len(records):
        what = f"none of {len(records):,} *_gtFine_instanceIds.png is there"
        report.findings.say("missing-instance-ids", dataset.metadata["sem_seg_root"], what)
        return
    for path in missing:
        report.findings.say("missing-instance-ids", path, "no such file")


def _images_in(folders: set[str]) -> Iterator[str]:
    for folder in folders:
        if not os.path.isdir(folder):
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(_ENDINGS) and not entry.name.startswith(".") and entry.is_file():
                    yield os.path.join(folder, entry.name)


def _rules(report: Report, dataset: Dataset, records: Sequence[Mapping[str, Any]]) -> Rules:
    """What every image is held against."""
    has_label_maps = False
    if report.kind == "panoptic" and records[0].get("sem_seg_file_name"):
        samples = records[:: max(1, len(records) // _SAMPLES)]
        has_label_maps = any(os.path.exists(record["sem_seg_file_name"]) for record in samples)
        if not has_label_maps:
            what = f"none of {len(samples)} that were looked for is there"
            report.findings.say("no-label-maps", dataset.metadata["sem_seg_root"], what)
    return Rules(
        class_names=tuple(one.name for one in report.classes),
        ignore_label=dataset.metadata.get("ignore_label"),
        fast=report.fast,
        stale_areas=_has_stale_areas(dataset),
        has_label_maps=has_label_maps,
    )


def _look_at_all(report: Report, rules: Rules, workers: int, progress: Callable[[int, int], None] | None) -> None:
    """Looks at the files of every record and adds up what is found."""
    records = report.records
    jobs = (records[position] for position in range(len(records)))
    workers = min(workers, -(-len(records) // _CHUNK))
    results = map_in_processes(partial(look, rules), jobs, workers=workers, chunk=_CHUNK, preload=[look.__module__])
    examples: list[list[int]] = [[] for _ in report.classes]  # heaps of the smallest positions, negated
    labelled = False
    for done, (position, result) in enumerate(results, start=1):
        if isinstance(result, Death):
            report.findings.say("process-died", records[position]["file_name"], f"{result}, it or its labels")
        else:
            _add(report, result, position, examples)
            labelled = labelled or bool(result.classes)
        if progress is not None and (done % _CHUNK == 0 or done == len(records)):
            progress(done, len(records))
    for one, positions in zip(report.classes, examples):
        one.examples = tuple(sorted(-position for position in positions))
    if report.knows_classes and not labelled and not report.count("error"):
        report.findings.say("nothing-labelled", report.source, f"{len(records):,} images")
    _name_similar_files(report)


def _add(report: Report, looked: Looked, position: int, examples: list[list[int]]) -> None:
    report.findings.extend(looked.findings)
    report.num_crowds += looked.num_crowds
    for index, (segments, pixels) in looked.classes.items():
        entry = report.classes[index]
        entry.images += 1
        entry.segments += segments
        entry.pixels += pixels
        if len(examples[index]) < _EXAMPLES:
            heapq.heappush(examples[index], -position)
        else:
            heapq.heappushpop(examples[index], -position)


def _name_similar_files(report: Report) -> None:
    """Says of a missing file which file beside it has the same name but for case and ending."""
    missing = {one.file for one in report.findings if one.kind in ("missing-image", "missing-ids", "missing-labels")}
    if not missing:
        return
    there: dict[tuple[str, str], str] = {}
    for path in _images_in({os.path.dirname(file) for file in missing}):
        there[_key(path)] = os.path.basename(path)
    for number, one in enumerate(report.findings):
        if one.file in missing and _key(one.file) in there:
            what = f"{one.what}, but there is {there[_key(one.file)]}"
            report.findings[number] = dataclasses.replace(one, what=what, remedy="rename it, or the entry")


def _key(path: str) -> tuple[str, str]:
    folder, name = os.path.split(path)
    return folder, os.path.splitext(name)[0].casefold()


def _check_classes(report: Report) -> None:
    """Classes that nothing belongs to."""
    unused = [one.name for one in report.classes if not one.images]
    if report.knows_classes and unused and len(unused) < len(report.classes):
        what = f"{len(unused)} of {len(report.classes)}: {some(unused, _SHOWN)}"
        report.findings.say("unused-class", report.source, what)
