"""Everything that can be wrong with the files of a data set, found before a GPU is taken.

Looks at the annotation file, at the classes and, in processes of its own, at every image and its labels. Nothing that
is wrong with the data raises: it becomes an issue, and the rest is looked at all the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from fcclip.checks.annotations import check_categories, known_classes, usable
from fcclip.checks.images import ImageReport, Rules, check_image
from fcclip.checks.issue import ERROR, NOTE, WARNING, Issues
from fcclip.checks.kinds import KINDS
from fcclip.checks.names import check_names, check_seen_names
from fcclip.checks.report import ClassCount, DatasetReport
from fcclip.data import dataset_vocabulary
from fcclip.data.dataset import Dataset, collector_paused
from fcclip.data.datasets.cityscapes import CITYSCAPES, instance_ids_file
from fcclip.data.transport import CompactRecords
from fcclip.errors import InputError
from fcclip.files import listed, read_json
from fcclip.vocabulary import Vocabulary

_CHUNK = 16  # images that a process gets at a time
_CHUNKS = 16  # a process, before the next images are taken
_SAMPLES = 20  # records whose label maps are looked for before all are
_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".pgm", ".gif")
_LISTS = {"panoptic": ("annotations",), "instances": ("images", "annotations")}  # that an annotation file must have


def check_dataset(
    dataset: Dataset,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    training: Vocabulary | None = None,
) -> DatasetReport:
    """Looks at all that training and evaluation would read of a data set.

    Args:
        dataset: registered, or of a YAML.
        workers: processes that look at images; 0: this process.
        progress: called with (images done, images in all) from time to time.
        training: vocabulary by which classes count as seen; None: it is not told.
    """
    report = DatasetReport(dataset.name, *_kind_and_source(dataset))
    report.num_published = dataset.published_count
    records = _records(report, dataset)
    _check_vocabulary(report, dataset, training)
    if records is not None and report.classes:
        report.num_images = len(records)
        if report.num_published not in (None, report.num_images):
            what = f"{report.num_images:,} images, the published set has {report.num_published:,}"
            report.issues.add_kind("count", report.source, what)
        _check_unlisted(report, dataset, records)
        _check_instance_ids(report.issues, dataset, records)
        rules = rules_of(dataset, has_label_maps=_has_label_maps(report, dataset, records))
        report.records = CompactRecords(records)
        del records  # a hundred thousand dicts
        _check_images(report, rules, workers, progress)
    levels, kinds = (ERROR, WARNING, NOTE), list(KINDS)
    report.issues.sort(
        key=lambda issue: (levels.index(issue.level), kinds.index(issue.kind), issue.remedy, issue.file, issue.text)
    )
    return report


def rules_of(dataset: Dataset, *, has_label_maps: bool = True) -> Rules:
    """What the files of every image of a data set are held against."""
    metadata = dataset.metadata
    return Rules(
        class_names=tuple(metadata["stuff_classes"]),
        ignore_label=metadata.get("ignore_label"),
        stale_areas=metadata["evaluator_type"] == "ade20k_panoptic_seg",
        has_label_maps=has_label_maps,
    )


# ---- the annotation file ----


def _kind_and_source(dataset: Dataset) -> tuple[str, str]:
    metadata = dataset.metadata
    if metadata.get("panoptic_json"):
        return "panoptic", metadata["panoptic_json"]
    return ("instances", metadata["json_file"]) if metadata.get("json_file") else ("semantic", metadata["sem_seg_root"])


def _records(report: DatasetReport, dataset: Dataset) -> list[dict] | None:
    """What can be used of the data set, or None with the issues that say why nothing can."""
    issues, metadata = report.issues, dataset.metadata
    folders = {"panoptic": ("image_root", "panoptic_root"), "semantic": ("image_root", "sem_seg_root")}
    missing = [metadata[key] for key in folders.get(report.kind, ("image_root",)) if not Path(metadata[key]).is_dir()]
    for folder in missing:
        issues.add_kind("missing-folder", folder, "a file" if Path(folder).exists() else "no such folder")
    if report.kind == "semantic":
        records = None if missing else _read(report, dataset.annotations)
    else:
        with collector_paused():
            records = _from_json(report, dataset)
    if records is not None and not records:
        folder = Path(metadata["image_root"])
        endings = Counter(file.suffix for file in folder.iterdir()) if folder.is_dir() else {}
        files = listed(f"{count} '{ending}'" for ending, count in endings.items()) or "no file"
        issues.add_kind("no-images", report.source, f"the folder of images, {folder}, has {files}")
    if report.kind == "panoptic" and metadata.get("json_file"):
        _check_instances_file(issues, dataset, records)
    return None if missing else records or None


def _read(report: DatasetReport, reader: Callable[[], list[dict]]) -> list[dict] | None:
    """The records that the data set's own reader gives; None with an issue."""
    try:
        return reader()
    except (ValueError, OSError) as error:
        report.issues.add_kind("annotation-file", report.source, str(error), remedy="see there")
    except Exception as error:  # a reader may stumble over what nobody has thought of
        report.issues.add_kind("annotation-file", report.source, f"{type(error).__name__}: {error}")
    return None


def _from_json(report: DatasetReport, dataset: Dataset) -> list[dict] | None:
    """The records of an annotation file, without the entries that its reader refuses."""
    issues, path, is_panoptic = report.issues, Path(report.source), report.kind == "panoptic"
    content = _content(issues, path, report.kind)
    if content is None:
        return None
    try:
        classes = known_classes(dataset, content)
    except (ValueError, OSError) as error:
        return issues.add_kind("annotation-file", path, str(error), remedy="see there")
    check_categories(issues, path, content, classes)
    content = usable(issues, path, content, classes, report.kind)
    records = _read(report, partial(dataset.parse, content) if dataset.parse else dataset.annotations)
    if records is None:
        return None
    for record in records if is_panoptic else ():
        left_out = content["left_out"].get(str(record["image_id"]))
        if left_out:  # its PNG has them all the same
            record["left_out"] = left_out
    return records


def _content(issues: Issues, path: Path, kind: str) -> dict | None:
    """The object in a file with the lists that it must have; None with an issue."""
    try:
        content = read_json(path, what="annotation file")
        for name in _LISTS[kind]:
            if not isinstance(content, dict) or not isinstance(content.get(name), list):
                raise InputError(f"it has no list '{name}', so it does not hold COCO {kind} annotations")
    except (ValueError, OSError, RecursionError) as error:
        return issues.add_kind("annotation-file", path, str(error))
    return content


def _check_instances_file(issues: Issues, dataset: Dataset, records: Sequence[dict] | None) -> None:
    """The annotations that average precision on a panoptic set is measured with."""
    path = Path(dataset.metadata["json_file"])
    if not path.is_file():
        issues.add_kind("no-instances-file", path, "no such file")
        return
    with collector_paused():
        content = _content(issues, path, "instances")
        if content is None:
            return
        content = usable(issues, path, content, known_classes(dataset, content), "instances")
    if records is not None:
        known = {str(image["id"]) for image in content["images"]}
        alone = [str(record["image_id"]) for record in records if str(record["image_id"]) not in known]
        if alone:
            what = f"{len(alone)} of {len(records)} images are not in it, e.g. {alone[0]}"
            issues.add_kind("other-images", path, what)


def _check_vocabulary(report: DatasetReport, dataset: Dataset, training: Vocabulary | None) -> None:
    """The vocabulary of the data set, and the classes as far as they are known without an image."""
    issues, metadata = report.issues, dataset.metadata
    try:
        own = dataset.own_vocabulary()
        names = list(metadata["stuff_classes"])
        things = {*metadata["thing_classes"]} if report.kind != "semantic" else None
    except (ValueError, OSError) as error:
        if not any(issue.kind == "annotation-file" for issue in issues):  # which gives the class names of LVIS
            issues.add_kind("vocabulary", dataset.vocabulary, str(error), remedy="see there")
        return
    try:
        report.vocabulary = dataset_vocabulary(dataset)
    except (ValueError, OSError) as error:
        issues.add_kind("vocabulary", dataset.vocabulary, str(error), remedy="see there")
        report.vocabulary = own
    report.classes = [ClassCount(name, None if things is None else name in things) for name in names]
    is_own = "yaml_file" in metadata
    check_names(issues, report.vocabulary, is_own=is_own)
    if training is not None and len(report.vocabulary) == len(names):
        report.training = training.name
        for entry, seen in zip(report.classes, report.vocabulary.seen_by(training).tolist()):
            entry.seen = seen
        check_seen_names(issues, report.vocabulary, training, is_own=is_own)


# ---- the set as a whole ----


def _check_unlisted(report: DatasetReport, dataset: Dataset, records: Sequence[Mapping[str, Any]]) -> None:
    """Files beside those of the records that no record has."""
    is_semantic = report.kind == "semantic"
    keys = {"file_name": "unlisted-file"}
    if is_semantic:
        keys = {"file_name": "without-labels", "sem_seg_file_name": "without-image"}
    used = {record[key] for key in keys for record in records}
    for key, kind in keys.items():
        folders = {os.path.dirname(record[key]) for record in records}
        if is_semantic:
            folders.add(dataset.metadata["image_root" if key == "file_name" else "sem_seg_root"])
        for path in sorted(_images_in(folders)):
            if path not in used:
                what = f"no record; the records have names like {os.path.basename(records[0][key])}"
                report.issues.add_kind(kind, path, what)


def _images_in(folders: set[str]) -> Iterator[str]:
    for folder in filter(os.path.isdir, folders):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(_ENDINGS) and not entry.name.startswith(".") and entry.is_file():
                    yield os.path.join(folder, entry.name)


def _check_instance_ids(issues: Issues, dataset: Dataset, records: Sequence[Mapping[str, Any]]) -> None:
    """The files that Cityscapes is evaluated with, beside the label maps."""
    if dataset.metadata["evaluator_type"] != CITYSCAPES:
        return
    for path in map(instance_ids_file, records):
        if not os.path.isfile(path):
            issues.add_kind("missing-instance-ids", path, "no such file")


def _has_label_maps(report: DatasetReport, dataset: Dataset, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a panoptic set has label maps beside its id PNGs; where it should and has not, there is an issue."""
    if report.kind != "panoptic" or not records[0].get("sem_seg_file_name"):
        return False
    samples = records[:: max(1, len(records) // _SAMPLES)]
    if any(os.path.exists(record["sem_seg_file_name"]) for record in samples):
        return True
    what = f"0 of {len(samples)} that were looked for exist"
    report.issues.add_kind("no-label-maps", dataset.metadata["sem_seg_root"], what)
    return False


# ---- every image ----


def _check_images(
    report: DatasetReport, rules: Rules, workers: int, progress: Callable[[int, int], None] | None
) -> None:
    """Looks at the files of every record and adds up what they hold."""
    records, issues = report.records, report.issues
    jobs = (records[position] for position in range(len(records)))
    done = 0
    try:
        for image in in_processes(partial(check_image, rules), jobs, workers=min(workers, -(-len(records) // _CHUNK))):
            _add(report, image)
            done += 1
            if progress is not None and (done % _CHUNK == 0 or done == len(records)):
                progress(done, len(records))
    except BrokenProcessPool:
        what = f"it or one of the next; {len(records) - done:,} images were not looked at"
        issues.add_kind("process-died", records[done]["file_name"], what)
        return
    unused = [entry.name for entry in report.classes if not entry.images]
    if not unused:
        return
    if len(unused) < len(report.classes):
        issues.add_kind("unused-class", report.source, f"{len(unused)} of {len(report.classes)}: {listed(unused, 12)}")
    elif not issues.count(ERROR):
        issues.add_kind("nothing-labelled", report.source, f"{len(records):,} images")


def in_processes(function: Callable[[Any], Any], jobs: Iterable[Any], *, workers: int) -> Iterator[Any]:
    """function(job) of each job, in order, in so many processes; 0: in this one.

    Jobs are taken as processes ask for them, so that few are in memory.

    Raises:
        BrokenProcessPool: a process died of a job, the first without a result or one of the next.
    """
    if workers == 0:
        yield from map(function, jobs)
        return
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload([__name__])  # imported once for all
    jobs = iter(jobs)
    with ProcessPoolExecutor(
        workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        while block := list(islice(jobs, workers * _CHUNKS * _CHUNK)):
            yield from pool.map(function, block, chunksize=_CHUNK)


def _add(report: DatasetReport, image: ImageReport) -> None:
    report.issues.extend(image.issues)
    for index, (segments, pixels) in image.classes.items():
        entry = report.classes[index]
        entry.images += 1
        entry.segments += segments
        entry.pixels += pixels
