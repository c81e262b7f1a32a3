"""What a fine-tuning gave and what it took: the same classes before and after, as a table and as `finetune.json`.

Classes are told apart by what the *start* knew, so both columns compare the same ones: `seen` are the former classes,
`own` those that only the fine-tuning names, `unseen` those that neither does.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fcclip.comm import is_main_process
from fcclip.data import Dataset, dataset_vocabulary, distinct_datasets
from fcclip.engine import random_state, set_random_state
from fcclip.errors import InputError
from fcclip.evaluation.averages import mean_of_defined
from fcclip.evaluation.evaluators import distinct_names
from fcclip.evaluation.results import format_value
from fcclip.evaluation.runner import evaluate
from fcclip.files import write_atomically
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
    """Evaluates DATASETS.TEST in the mode of TEST.MODE before a fine-tuning, and compares what comes out behind it.

    Args:
        cfg: reads DATASETS.TEST, TEST.MODE, FINETUNE.METHOD, MODEL.WEIGHTS, OUTPUT_DIR and what `evaluate` reads.
        former: classes that the start was trained on.
        own: classes that the fine-tuning is trained on.
    """

    def __init__(self, cfg: Any, *, former: Vocabulary, own: Vocabulary) -> None:
        self.cfg = cfg
        self.former = former
        self.own = own
        self.before: dict[str, Figures] = {}
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
            write_comparison(self.cfg.OUTPUT_DIR, about=self._about(), before=self.before)

    def resume(self) -> None:
        """Takes the figures of the start from `finetune.json`, when the fine-tuning goes on."""
        before = read_before(self.cfg.OUTPUT_DIR) if is_main_process() else {}
        if before is None:
            logger.warning("%s has no %s: results will not be compared", self.cfg.OUTPUT_DIR, FILE)
        self.before = before or {}

    def finish(self, results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> None:
        """Writes `finetune.json` and tells the log, on rank 0.

        Args:
            results: data set -> mode -> task -> metric -> percent, after the last iteration.
        """
        if not is_main_process():
            return
        mode = self.cfg.TEST.MODE
        after = {one.name: self._figures(results[one.name][mode], one, words) for one, words in self._sets}
        path = write_comparison(self.cfg.OUTPUT_DIR, about=self._about(), before=self.before, after=after)
        logger.info(
            "before and after the fine-tuning (%s), in percent, also in %s; seen: the %d former classes, own: new ones "
            "of '%s', unseen: all others\n%s",
            *(self.cfg.FINETUNE.METHOD, path, len(self.former), self.own.name),
            format_comparison(self.before, after),
        )

    def _figures(self, tasks: Mapping[str, Mapping[str, float]], dataset: Dataset, vocabulary: Vocabulary) -> Figures:
        return grouped_figures(tasks, dataset, vocabulary, former=self.former, own=self.own)

    def _about(self) -> dict[str, Any]:
        return {
            "method": self.cfg.FINETUNE.METHOD,
            "weights": self.cfg.MODEL.WEIGHTS,
            "iterations": self.cfg.SOLVER.MAX_ITER,
            "mode": self.cfg.TEST.MODE,
            "former_vocabulary": {"name": self.former.name, "sha256": self.former.hash},
            "own_vocabulary": {"name": self.own.name, "sha256": self.own.hash},
        }


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
        former: classes that the start was trained on.
        own: classes that the fine-tuning is trained on.
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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("data set")
    table.add_column("classes")
    for metric in _METRICS:
        for column in ("before", "after", "change"):
            table.add_column(f"{metric}\n{column}", justify="right")
    for name in dict.fromkeys([*before, *after]):
        rows = []
        for group in GROUPS:
            pairs = [
                [figures.get(name, {}).get(metric, {}).get(group, math.nan) for figures in (before, after)]
                for metric in _METRICS
            ]
            if not all(math.isnan(value) for pair in pairs for value in pair):
                rows.append([group, *(text for pair in pairs for text in _three(*pair))])
        for index, row in enumerate(rows):
            table.add_row(name if index == 0 else "", *row, end_section=index == len(rows) - 1)
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines())


def _three(before: float, after: float) -> tuple[str, str, str]:
    change = after - before
    return format_value(before), format_value(after), "-" if math.isnan(change) else f"{change:+.1f}"


def write_comparison(
    folder: str | Path,
    *,
    about: Mapping[str, Any],
    before: Mapping[str, Figures],
    after: Mapping[str, Figures] | None = None,
) -> Path:
    """Writes `finetune.json`, whole or not at all: {"schema", …about, "before", "after"}.

    Figures are in percent, null where undefined; `after` is null until it is known.
    """
    content = {
        "schema": SCHEMA,
        **about,
        "before": _with_null(before),
        "after": None if after is None else _with_null(after),
    }
    path = Path(folder) / FILE
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def read_before(folder: str | Path) -> dict[str, Figures] | None:
    """The figures before the fine-tuning in `folder`; None when there is no such file.

    Raises:
        ValueError: the file is broken.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["before"]
        return {
            name: {
                metric: {group: math.nan if value is None else float(value) for group, value in groups.items()}
                for metric, groups in figures.items()
            }
            for name, figures in before.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({error!r}). It holds the figures before the fine-tuning; delete it to go on "
            "without."
        ) from error


def _with_null(figures: Mapping[str, Figures]) -> dict[str, Any]:
    return {
        name: {
            metric: {group: None if math.isnan(value) else value for group, value in groups.items()}
            for metric, groups in by_group.items()
        }
        for name, by_group in figures.items()
    }
