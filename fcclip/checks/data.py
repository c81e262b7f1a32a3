"""Data sets as a run reads them: folders and annotations are there, and one image goes through; `dataset.py` looks at
every file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from fcclip.checks.dataset import rules_of
from fcclip.checks.images import check_image
from fcclip.checks.issue import ERROR, NOTE, OK, WARNING, Issues
from fcclip.checks.kinds import KINDS
from fcclip.data import Dataset, build_test_mapper, build_train_mapper, get_dataset, root_folder
from fcclip.data.datasets.cityscapes import CITYSCAPES, instance_ids_file
from fcclip.data.datasets.files import WHERE_DATA_IS
from fcclip.errors import InputError
from fcclip.evaluation import build_evaluators
from fcclip.evaluation.cityscapes import read_instance_ids
from fcclip.evaluation.ground_truth import GroundTruth

_SPOT_CHECKS = 64  # records of a data set whose files are looked for
_INSTANCE_IDS = "instance_ids_file"  # field of a record of Cityscapes, here alone


def check_training_set(issues: Issues, cfg: CfgNode, name: str, level: str) -> None:
    """Folders and annotations are there, and one image becomes a training sample; else there are issues of `level`."""
    dataset = _dataset(issues, name)
    if dataset is None:
        return
    records = _read_records(issues, dataset, ("panoptic_json", "image_root", "panoptic_root"), level)
    if not records:
        return
    with issues.attempt(level):
        sample = build_train_mapper(cfg, dataset.metadata)(records[0], np.random.default_rng(0))
        height, width = sample["image"].shape[1:]
        made = f"the first becomes a sample of {height} x {width} with {len(sample['targets'])} segments"
        issues.add(OK, f"{len(records):,} images; {made}")
    files = [key for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name") if key in records[0]]
    _look_for_files(issues, records, files, level)


def check_test_set(issues: Issues, cfg: CfgNode, name: str) -> None:
    """Folders, annotations and evaluators are there, and ground truth of one image fits it."""
    dataset = _dataset(issues, name)
    if dataset is None:
        return
    kind, test = dataset.metadata["evaluator_type"], cfg.MODEL.MASK_FORMER.TEST
    heads = {"panoptic": test.PANOPTIC_ON, "instance": test.INSTANCE_ON, "semantic": test.SEMANTIC_ON}
    tasks = [task for task in dataset.evaluators if heads[task]]
    # task -> (key of the folder or file in the metadata, key of the file in a record)
    truth = {
        "panoptic": ("panoptic_root", "pan_seg_file_name"),
        "instance": ("json_file", ""),
        "semantic": ("sem_seg_root", "sem_seg_file_name"),
    }
    if kind == CITYSCAPES:  # both are evaluated with the files of instance ids beside the label maps
        truth["instance"] = truth["semantic"] = ("sem_seg_root", _INSTANCE_IDS)
    places = dict.fromkeys(["panoptic_json", "image_root", *(truth[task][0] for task in tasks)])
    records = _read_records(issues, dataset, places, ERROR)
    if records and kind == CITYSCAPES:
        records = [{**record, _INSTANCE_IDS: instance_ids_file(record)} for record in records]
    before = issues.count(ERROR)
    if records is not None or not tasks:
        with issues.attempt():
            build_evaluators(cfg, dataset, modes=("check",))
    if not records or issues.count(ERROR) > before:
        return
    files = [key for key in dict.fromkeys(["file_name", *(truth[task][1] for task in tasks)]) if key in records[0]]
    with issues.attempt():
        sample = build_test_mapper(cfg)(records[0])
        _check_truth(issues, dataset, records[0], files)
        height, width = sample["image"].shape[1:]
        text = f"{len(records):,} images; the first, {sample['height']} x {sample['width']} as its ground truth, is"
        issues.add(OK, f"{text} tested at {height} x {width}; evaluated for {', '.join(tasks)} ({kind})")
    _look_for_files(issues, records, files, ERROR)


def _dataset(issues: Issues, name: str) -> Dataset | None:
    with contextlib.suppress(ValueError, FileNotFoundError):  # the section on vocabularies says that there is none
        return get_dataset(name)
    issues.add(NOTE, "not looked at, because it is not a data set")
    return None


def _read_records(issues: Issues, dataset: Dataset, places: Iterable[str], level: str) -> list[dict] | None:
    """The records of a data set, or None with issues: everything missing at once, or what is wrong with a file."""
    paths = [Path(dataset.metadata[place]) for place in places if dataset.metadata.get(place)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        root, described = root_folder(), dataset.metadata.get("yaml_file")
        names = ", ".join(str(path.relative_to(root) if path.is_relative_to(root) else path) for path in missing)
        where, remedy = f"below {root}", WHERE_DATA_IS
        if described:
            where = f"where {described} says"
            remedy = f"paths in it are relative to its folder, {Path(described).absolute().parent}"
        count = f"only {len(paths) - len(missing)}" if len(missing) < len(paths) else "none"
        issues.add(level, f"{count} of {len(paths)} files and folders found {where}; missing: {names}", remedy)
        return None
    with issues.attempt(level):
        records = dataset.annotations()
        if not records:
            raise InputError(f"data set '{dataset.name}' has no records: {', '.join(map(str, paths))}")
        return records
    return None


def _check_truth(issues: Issues, dataset: Dataset, record: Mapping[str, Any], files: Sequence[str]) -> None:
    """The files of one image that are evaluated with, as the check of whole data sets judges them.

    Raises:
        ValueError, OSError: a file of instance ids that cannot be read.
    """
    record = dict(record)
    if _INSTANCE_IDS in files:
        read_instance_ids(GroundTruth(record))
    if "pan_seg_file_name" not in files:
        record.pop("segments_info", None)
    if "sem_seg_file_name" not in files:
        record.pop("sem_seg_file_name", None)
    for issue in check_image(rules_of(dataset), record).issues:
        if issue.level in (WARNING, ERROR):
            issues.add(issue.level, f"{KINDS[issue.kind].title}: {issue.file}: {issue.text}", issue.remedy)


def _look_for_files(issues: Issues, records: Sequence[Mapping[str, Any]], files: Sequence[str], level: str) -> None:
    """Whether the files of some records exist, from the first to the last."""
    step = max(1, (len(records) - 1) // (_SPOT_CHECKS - 1))
    for key in files:
        names = dict.fromkeys(record[key] for record in [*records[::step], records[-1]])
        missing = [name for name in names if not Path(name).is_file()]
        if missing:
            text = f"{len(missing)} of {len(names)} files that were looked for do not exist, e.g. {missing[0]}"
            issues.add(level, text, "the data set is not complete: unpack or prepare it again")
