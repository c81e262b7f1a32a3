"""What a fine-tuning gave and what it took: the same classes before and after, as a table and as `finetune.json`.

Classes are told apart by what the *start* knew, so both columns compare the same ones: `seen` are the former classes,
`own` those that only the fine-tuning names, `unseen` those that neither does.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from fvcore.common.config import CfgNode

from fcclip.comm import is_main_process
from fcclip.data import Dataset, dataset_vocabulary, distinct_datasets
from fcclip.engine import random_state, set_random_state
from fcclip.evaluation.averages import mean_of_defined
from fcclip.evaluation.evaluators import distinct_names
from fcclip.evaluation.results import format_change, format_value
from fcclip.evaluation.runner import evaluate
from fcclip.files import read_json, write_json
from fcclip.modeling import FCCLIP, test_modes
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SCHEMA = 1
FILE = "finetune.json"
GROUPS = ("all", "seen", "own", "unseen")
# Name in tables -> task, metric over all classes, and beginning of the metric of a class.
_METRICS = {
    "PQ": ("panoptic_seg", "PQ", "PQ-"),
    "AP": ("segm", "AP", "AP-"),
    "mIoU": ("sem_seg", "mIoU", "IoU-"),
}

Figures = dict[str, dict[str, float]]  # metric -> group -> percent, NaN where undefined


class Comparison:
    """Evaluates DATASETS.TEST in the mode of TEST.MODE before a fine-tuning, and compares the results after it.

    `finetune.json` in OUTPUT_DIR is {"schema", "method", …, "before", "after"}, with figures in percent, null where
    undefined; "after" is null until it is known.

    Args:
        cfg: reads DATASETS.TEST, TEST.MODE, FINETUNE.METHOD, MODEL.WEIGHTS, OUTPUT_DIR and what `evaluate` reads.
        former: classes that the start was trained on.
        own: classes that the fine-tuning is trained on.
    """

    def __init__(self, cfg: CfgNode, *, former: Vocabulary, own: Vocabulary) -> None:
        self.cfg = cfg
        self.former = former
        self.own = own
        self.before: dict[str, Figures] = {}
        self.path = Path(cfg.OUTPUT_DIR, FILE)
        folder = cfg.MODEL.FC_CLIP.VOCABULARIES
        datasets = distinct_datasets(cfg.DATASETS.TEST)
        self._sets = [(dataset, dataset_vocabulary(dataset, folder)) for dataset in datasets]

    def measure(self, model: FCCLIP) -> None:
        """Evaluates the start, to which the former classes alone are seen; writes `finetune.json` on rank 0. Random
        numbers are as they were afterwards."""
        logger.info("evaluating before the first iteration, to compare with the end")
        random, seen = random_state(), model.seen_vocabulary
        model.seen_vocabulary = self.former
        try:
            mode = self.cfg.TEST.MODE
            for dataset, vocabulary in self._sets:
                results = evaluate(
                    model,
                    self.cfg,
                    dataset,
                    modes={mode: test_modes(self.cfg)[mode]},
                    training_vocabulary=self.former,
                    vocabulary=vocabulary,
                )
                if is_main_process():
                    self.before[dataset.name] = self._figures(results[mode], dataset, vocabulary)
        finally:
            model.seen_vocabulary = seen
            set_random_state(random)
        if is_main_process():
            self._write(None)

    def resume(self) -> None:
        """Takes the figures of the start from `finetune.json`, when the fine-tuning goes on."""
        if self.path.is_file():
            self.before = figures_of(read_json(self.path)["before"])
        elif is_main_process():
            logger.warning("%s does not exist: results will not be compared", self.path)

    def finish(self, results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> None:
        """Writes `finetune.json` and tells the log, on rank 0.

        Args:
            results: data set -> mode -> task -> metric -> percent, after the last iteration.
        """
        if not is_main_process():
            return
        mode = self.cfg.TEST.MODE
        after = {
            dataset.name: self._figures(results[dataset.name][mode], dataset, vocabulary)
            for dataset, vocabulary in self._sets
        }
        self._write(after)
        logger.info(
            "before and after the fine-tuning (%s), in percent, also in %s; seen: the %d former classes, own: new ones "
            "of '%s', unseen: all others\n%s",
            *(self.cfg.FINETUNE.METHOD, self.path, len(self.former), self.own.name),
            format_comparison(self.before, after),
        )

    def _figures(self, tasks: Mapping[str, Mapping[str, float]], dataset: Dataset, vocabulary: Vocabulary) -> Figures:
        return grouped_figures(tasks, dataset, vocabulary, former=self.former, own=self.own)

    def _write(self, after: Mapping[str, Figures] | None) -> None:
        content = {
            "schema": SCHEMA,
            "method": self.cfg.FINETUNE.METHOD,
            "weights": self.cfg.MODEL.WEIGHTS,
            "iterations": self.cfg.SOLVER.MAX_ITER,
            "mode": self.cfg.TEST.MODE,
            "former_vocabulary": {"name": self.former.name, "sha256": self.former.hash},
            "own_vocabulary": {"name": self.own.name, "sha256": self.own.hash},
            "before": self.before,
            "after": after,
        }
        write_json(self.path, content, indent=2)


def grouped_figures(
    tasks: Mapping[str, Mapping[str, float]],
    dataset: Dataset,
    vocabulary: Vocabulary,
    *,
    former: Vocabulary,
    own: Vocabulary,
) -> Figures:
    """PQ, AP and mIoU of one data set over all classes and over those of each group.

    Args:
        tasks: task -> metric -> percent, with the metrics of single classes.
        dataset, vocabulary: what was evaluated.
        former, own: classes that the start and the fine-tuning are trained on.
    """
    known, new = vocabulary.seen_by(former), vocabulary.seen_by(own)
    members = {"seen": known, "own": new & ~known, "unseen": ~new & ~known}
    names = distinct_names(dataset.metadata["stuff_classes"])
    figures = {}
    for metric, (task, whole, prefix) in _METRICS.items():
        metrics = tasks.get(task, {})
        values = [metrics.get(prefix + name, math.nan) for name in names]
        figures[metric] = {"all": metrics.get(whole, math.nan)} | {
            group: mean_of_defined(value for value, inside in zip(values, chosen.tolist(), strict=True) if inside)
            for group, chosen in members.items()
        }
    return figures


def format_comparison(before: Mapping[str, Figures], after: Mapping[str, Figures]) -> str:
    """A text table: data sets and groups of classes; of each metric before, after and the difference; `-` is NaN.

    Groups without a figure are left out; a data set that is in one of the two only has dashes for the other.
    """
    names = list(dict.fromkeys([*before, *after]))
    width = max(map(len, ["data set", *names]))
    metrics = "".join(f"{metric:>6} before   after  change" for metric in _METRICS)
    lines = [f"{'data set':<{width}}  classes{metrics}"]
    for name, group in itertools.product(names, GROUPS):
        pairs = [
            [figures.get(name, {}).get(metric, {}).get(group, math.nan) for figures in (before, after)]
            for metric in _METRICS
        ]
        if all(math.isnan(value) for pair in pairs for value in pair):
            continue
        cells = "".join(
            f"{format_value(old):>13}{format_value(new):>8}{format_change(new - old):>8}" for old, new in pairs
        )
        lines.append(f"{name:<{width}}  {group:<7}{cells}")
    return "\n".join(lines)


def figures_of(content: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, Figures]:
    """Figures as `finetune.json` has them, with NaN for null."""
    return {
        name: {
            metric: {group: math.nan if value is None else value for group, value in groups.items()}
            for metric, groups in figures.items()
        }
        for name, figures in content.items()
    }
