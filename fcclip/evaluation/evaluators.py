"""Which evaluators a data set gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from fcclip.config import lookup
from fcclip.data import EVALUATORS, Dataset
from fcclip.errors import InputError
from fcclip.evaluation.boundary import BoundaryEvaluator
from fcclip.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from fcclip.evaluation.ground_truth import Evaluator
from fcclip.evaluation.instances import InstanceEvaluator, InstanceTruth
from fcclip.evaluation.lvis import LvisEvaluator
from fcclip.evaluation.pairs import NovelClassesEvaluator, PairEvaluator
from fcclip.evaluation.panoptic import PanopticEvaluator
from fcclip.evaluation.recall import MaskRecallEvaluator
from fcclip.evaluation.semantic import SemanticEvaluator


def build_evaluators(
    cfg: CfgNode,
    dataset: Dataset,
    *,
    modes: Sequence[str],
    seen: Sequence[bool] | None = None,
    folder: Path | None = None,
) -> dict[str, list[Evaluator]]:
    """The evaluators that a data set's kind and the config ask for, one set for each mode.

    Args:
        cfg: says which heads are on.
        dataset: brings kind, class names, ids and ground-truth files.
        modes: a name for each set.
        seen: (K,) whether training knew the class; None when unknown.
        folder: for files, with several modes a folder for each below it; None: no files.

    Raises:
        ValueError: an unknown kind, no head on that the kind is evaluated for, missing ground truth.
    """
    metadata = dataset.metadata
    kind = metadata["evaluator_type"]
    tasks = enabled_tasks(cfg, dataset.name, kind)
    if cfg.MODEL.MASK_FORMER.TEST.RECALL_ON and "semantic" not in EVALUATORS[kind]:
        raise InputError(f"MODEL.MASK_FORMER.TEST.RECALL_ON: data set '{dataset.name}' has no semantic ground truth")
    names = distinct_names(metadata["stuff_classes"])
    thing_index = metadata.get("thing_dataset_id_to_contiguous_id", {})
    things = {index: identifier for identifier, index in thing_index.items()}
    truth = _instance_truth(dataset) if "instance" in tasks and kind != "cityscapes_panoptic_seg" else None
    common = {"class_names": names, "seen": seen}

    def build(mode_folder: Path | None) -> Iterator[Evaluator]:
        if mode_folder is not None:
            mode_folder.mkdir(parents=True, exist_ok=True)
        if kind in ("one_class_pairs", "novel_classes"):
            evaluator = PairEvaluator if kind == "one_class_pairs" else NovelClassesEvaluator
            yield evaluator(class_names=names, ignore_label=metadata["ignore_label"])
            return
        if "panoptic" in tasks:
            yield PanopticEvaluator(**common, thing_classes=things)
        if cfg.MODEL.MASK_FORMER.TEST.RECALL_ON:
            yield MaskRecallEvaluator(**common)
        if kind == "cityscapes_panoptic_seg":
            ids = {index: identifier for identifier, index in metadata["stuff_dataset_id_to_contiguous_id"].items()}
            if "instance" in tasks:
                yield CityscapesInstanceEvaluator(**common, dataset_ids=things)
            if "semantic" in tasks:
                yield CityscapesSemanticEvaluator(**common, dataset_ids=ids)
            return
        if "instance" in tasks:
            instance_evaluator = LvisEvaluator if kind == "lvis" else InstanceEvaluator
            yield instance_evaluator(**common, truth=truth, dataset_ids=things, folder=mode_folder)
        if "semantic" in tasks:
            yield SemanticEvaluator(**common, ignore_label=metadata["ignore_label"])
            if cfg.TEST.BOUNDARY_IOU:
                yield BoundaryEvaluator(class_names=names, ignore_label=metadata["ignore_label"])

    return {mode: list(build(mode_folder)) for mode, mode_folder in mode_folders(folder, modes).items()}


def enabled_tasks(cfg: CfgNode, name: str, kind: str) -> list[str]:
    """What the data set `name` is evaluated for, as its kind (`evaluator_type`) allows and the config asks.

    Raises:
        ValueError: an unknown kind, no head on that the kind is evaluated for.
    """
    keys = {task: f"{task.upper()}_ON" for task in lookup("evaluator type", kind, EVALUATORS)}
    tasks = [task for task, key in keys.items() if cfg.MODEL.MASK_FORMER.TEST[key]]
    if not tasks:
        names = ", ".join(f"MODEL.MASK_FORMER.TEST.{key}" for key in keys.values())
        raise InputError(f"nothing to evaluate on data set '{name}' ({kind}): switch on at least one of {names}")
    return tasks


def mode_folders(folder: Path | None, modes: Sequence[str]) -> dict[str, Path | None]:
    """Mode -> the folder of its files: that of the data set, of several modes a folder for each below it."""
    return {mode: folder / mode if folder is not None and len(modes) > 1 else folder for mode in modes}


def distinct_names(names: Sequence[str]) -> list[str]:
    """Class names by which metrics can be told apart: those that occur twice get their index.

    ADE20K-847 has nine such names; without this the IoU of one "bag" would take the place of the other's.

    Example:
        >>> distinct_names(["bag", "cat", "bag"])
        ['bag [0]', 'cat', 'bag [2]']
    """
    counts = Counter(names)
    return [f"{name} [{index}]" if counts[name] > 1 else name for index, name in enumerate(names)]


def _instance_truth(dataset: Dataset) -> InstanceTruth | None:
    """What AP is measured against; None: the segments of the panoptic annotation.

    Of the kinds with panoptic annotations, the users' own may do without an instances file; a benchmark may not.
    """
    path = dataset.metadata.get("json_file")
    if path:
        return InstanceTruth.read(path, dataset.metadata["thing_dataset_id_to_contiguous_id"])
    if dataset.metadata["evaluator_type"] == "coco_panoptic_seg" and dataset.metadata.get("panoptic_json"):
        return None
    raise InputError(
        f"data set '{dataset.name}' has no instances file, so AP cannot be evaluated; set "
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON False"
    )
