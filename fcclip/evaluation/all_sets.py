"""Evaluates the data sets of DATASETS.TEST one after the other and tells what came of it."""

from __future__ import annotations

import logging
from pathlib import Path

from fvcore.common.config import CfgNode
from torch import nn

from fcclip.comm import is_main_process
from fcclip.data import Dataset, dataset_vocabulary, distinct_datasets
from fcclip.errors import InputError
from fcclip.evaluation.results import copypaste_lines, format_table, unmet_expectations
from fcclip.evaluation.runner import evaluate, evaluate_augmented
from fcclip.files import write_json
from fcclip.modeling import build_variants, options_of, test_modes

__all__ = ["Results", "check_evaluation", "check_expectations", "evaluate_all", "evaluate_plainly", "scalars"]

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, dict[str, dict[str, float]]]]  # data set -> mode -> task -> metric -> percent


def check_evaluation(cfg: CfgNode, *, has_checkpoint: bool = False) -> None:
    """Refuses a config that cannot be evaluated, before anything starts.

    Args:
        has_checkpoint: there are weights besides MODEL.WEIGHTS.

    Raises:
        ValueError: no data set, no weights, or test-time augmentation that cannot be.
    """
    if cfg.TEST.AUG.ENABLED:
        build_variants(cfg)
    if not cfg.DATASETS.TEST:
        raise InputError("--eval-only needs DATASETS.TEST, the data sets to evaluate on")
    if not cfg.MODEL.WEIGHTS and not has_checkpoint:
        raise InputError(
            "--eval-only needs MODEL.WEIGHTS (or --resume with a checkpoint in OUTPUT_DIR); there is nothing to "
            "evaluate"
        )


def evaluate_all(model: nn.Module, cfg: CfgNode, *, augmented: bool = False) -> Results:
    """Evaluates each data set of DATASETS.TEST with its own vocabulary, in the three modes; rank 0 writes and prints.

    Args:
        model: the bare model.
        cfg: the config.
        augmented: also the mean semantic maps of TEST.AUG's variants, in a folder and under task names of their own.

    Returns:
        The results on rank 0, {} elsewhere.
    """
    results = _evaluate_all(model, cfg, Path(cfg.OUTPUT_DIR, "inference"))
    if augmented:
        for name, modes in _evaluate_all(model, cfg, Path(cfg.OUTPUT_DIR, "inference_TTA"), augmented=True).items():
            for mode, tasks in modes.items():
                results[name][mode] |= tasks
    return results


def _evaluate_all(model: nn.Module, cfg: CfgNode, folder: Path, *, augmented: bool = False) -> Results:
    results: Results = {}
    for dataset in distinct_datasets(cfg.DATASETS.TEST):
        name, vocabulary = dataset.name, dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES)
        modes = (evaluate_augmented if augmented else evaluate)(
            model,
            cfg,
            dataset,
            modes=test_modes(cfg),
            training_vocabulary=model.seen_vocabulary,
            vocabulary=vocabulary,
            output_dir=folder,
        )
        if not is_main_process():
            continue
        results[name] = modes
        content = {
            "vocabulary": vocabulary.name,
            "sha256": vocabulary.hash,
            "published_vocabulary": vocabulary.is_published,
            "options": options_of(cfg),
            "results": modes,
        }
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_json(folder / name / "results.json", content, indent=2)
        for line in copypaste_lines(modes[cfg.TEST.MODE]):
            logger.info("%s %s", name, line)
    if results:
        title = ", ".join(["test-time augmentation" if augmented else "results", *options_of(cfg)])
        logger.info("%s in percent, files in %s\n%s", title, folder, format_table(_without_suffix(results)))
    return results


def evaluate_plainly(model: nn.Module, cfg: CfgNode, dataset: Dataset) -> dict[str, dict[str, float]]:
    """One data set in the mode of TEST.MODE, without files.

    Returns:
        task -> metric -> percent on rank 0, {} elsewhere.
    """
    mode = cfg.TEST.MODE
    modes = evaluate(
        model,
        cfg,
        dataset,
        modes={mode: test_modes(cfg)[mode]},
        training_vocabulary=model.seen_vocabulary,
        vocabulary=dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES),
    )
    return modes.get(mode, {})


def scalars(results: Results, mode: str) -> dict[str, float]:
    """What goes into metrics.json: `task/metric` of the config's mode, with the data set in front when there are
    several.

    Metrics of single classes stay in results.json; other modes have their name in front.

    Example:
        >>> modes = {"ensemble": {"segm": {"AP": 3.0, "AP-cat": 5.0}}, "in_vocabulary": {"segm": {"AP": 2.0}}}
        >>> scalars({"shapes_val": modes}, "ensemble")
        {'segm/AP': 3.0, 'in_vocabulary/segm/AP': 2.0}
    """
    flat = {}
    for name, modes in results.items():
        for other, tasks in modes.items():
            place = [part for part in (name if len(results) > 1 else "", other if other != mode else "") if part]
            for task, metrics in tasks.items():
                flat |= {"/".join([*place, task, key]): value for key, value in metrics.items() if "-" not in key}
    return flat


def check_expectations(cfg: CfgNode, results: Results) -> None:
    """Compares the first data set with TEST.EXPECTED_RESULTS.

    Raises:
        ValueError: a result is missing or out of tolerance.
    """
    if not (cfg.TEST.EXPECTED_RESULTS and results):
        return
    name, modes = next(iter(results.items()))
    unmet = unmet_expectations(modes[cfg.TEST.MODE], cfg.TEST.EXPECTED_RESULTS)
    if unmet:
        raise InputError(f"{name}: results are not those of TEST.EXPECTED_RESULTS: {'; '.join(unmet)}")
    logger.info("%s: results are those of TEST.EXPECTED_RESULTS", name)


def _without_suffix(results: Results) -> Results:
    """Tasks under the names that a table knows."""
    return {
        name: {
            mode: {task.removesuffix("_TTA"): metrics for task, metrics in tasks.items()}
            for mode, tasks in modes.items()
        }
        for name, modes in results.items()
    }
