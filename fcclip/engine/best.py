"""Which data set and which metric choose the weights that stay as `best.pth`.

It should not be one of DATASETS.TEST: a number that is reported must not have chosen its own weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fvcore.common.config import CfgNode

from fcclip.data import Dataset, distinct_datasets, get_dataset
from fcclip.errors import InputError

logger = logging.getLogger(__name__)

Metrics = Mapping[str, Mapping[str, float]]  # task -> metric -> percent

_TASKS = ("panoptic_seg", "segm", "bbox", "sem_seg", "pairs", "novel_classes")


@dataclass(frozen=True)
class BestChoice:
    """What chooses."""

    dataset: Dataset
    metric: str  # task/metric
    is_reported: bool  # whether the data set is one of DATASETS.TEST too

    @property
    def name(self) -> str:
        """Of the scalar that chooses: `data set/task/metric`."""
        return f"{self.dataset.name}/{self.metric}"

    def scalars(self, reported: Mapping[str, Metrics], evaluate: Callable[[Dataset], Metrics]) -> dict[str, float]:
        """The metrics of the data set as `data set/task/metric`, without those of single classes.

        Args:
            reported: data set -> metrics of those in DATASETS.TEST, among which this one may be.
            evaluate: called when it is not; on every process, of which the main one gets metrics.

        Raises:
            ValueError: SOLVER.BEST.METRIC is not among them.
        """
        metrics = reported.get(self.dataset.name, {}) if self.is_reported else evaluate(self.dataset)
        if not metrics:  # not the main process
            return {}
        pairs = ((f"{task}/{key}", value) for task, values in metrics.items() for key, value in values.items())
        scalars = {name: value for name, value in pairs if "-" not in name}
        if self.metric not in scalars:
            known = ", ".join(sorted(scalars))
            raise InputError(f"SOLVER.BEST.METRIC is '{self.metric}'; '{self.dataset.name}' is evaluated for {known}")
        return {f"{self.dataset.name}/{name}": value for name, value in scalars.items()}


def check_best(cfg: CfgNode) -> None:
    """Refuses SOLVER.BEST.* that cannot choose; whether the metric exists is known after the first evaluation.

    Raises:
        ValueError: an unknown data set or task, or another data set of the name of one in DATASETS.TEST.
    """
    if not cfg.SOLVER.BEST.DATASET or not cfg.TEST.EVAL_PERIOD:
        return
    _is_reported(cfg, cfg.SOLVER.BEST.DATASET)
    task, _, metric = cfg.SOLVER.BEST.METRIC.partition("/")
    if task not in _TASKS or not metric:
        raise InputError(
            f"SOLVER.BEST.METRIC must be task/metric with a task of {', '.join(_TASKS)}, such as panoptic_seg/PQ; got "
            f"'{cfg.SOLVER.BEST.METRIC}'"
        )


def best_choice(cfg: CfgNode) -> BestChoice | None:
    """What SOLVER.BEST.* says; None: no `best.pth` is kept."""
    name = cfg.SOLVER.BEST.DATASET
    if not name or not cfg.TEST.EVAL_PERIOD:
        return None
    is_reported = _is_reported(cfg, name)
    if is_reported:
        logger.warning(
            "best.pth is chosen by '%s', which is in DATASETS.TEST: its results there look better than they are", name
        )
    logger.info("best.pth: the weights with the highest %s on '%s'", cfg.SOLVER.BEST.METRIC, name)
    return BestChoice(get_dataset(name), cfg.SOLVER.BEST.METRIC, is_reported)


def _is_reported(cfg: CfgNode, name: str) -> bool:
    """Whether a data set is one of DATASETS.TEST.

    Raises:
        ValueError: it is not, but has the name of one; metrics are stored by name.
    """
    dataset = get_dataset(name)
    for other, reported in zip(cfg.DATASETS.TEST, distinct_datasets(cfg.DATASETS.TEST)):
        if dataset.name != reported.name:
            continue
        if Path(name).expanduser().resolve() == Path(other).expanduser().resolve():  # names are no paths, and compare
            return True
        raise InputError(
            f"SOLVER.BEST.DATASET '{name}' and '{other}' of DATASETS.TEST are both named '{dataset.name}', the name "
            "that metrics are stored by. Rename the YAML of one of them."
        )
    return False
