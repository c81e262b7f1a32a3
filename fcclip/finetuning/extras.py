"""What a fine-tuning adds to a training, as one value; for an ordinary training it adds nothing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from fcclip.comm import barrier
from fcclip.data import build_train_loader
from fcclip.engine import REQUEUE_EXIT_CODE, StopRequest, StopRequested, load_checkpoint
from fcclip.finetuning.comparison import Comparison
from fcclip.finetuning.replay import build_replay_loader
from fcclip.finetuning.start import begin_finetuning, replay_sets
from fcclip.weights import has_layouts, load_weights

logger = logging.getLogger(__name__)

Results = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]  # data set -> mode -> task -> metric -> percent
BuildLoader = Callable[..., Iterator[list[dict[str, Any]]]]  # called as `build_train_loader`


@dataclass(frozen=True)
class Extras:
    """What a training asks for.

    Args:
        build_loader: builds the training loader.
        notes: entries for every checkpoint.
        comparison: of the results before and after; None: nothing is compared.
        resumes: the training goes on from a checkpoint.
    """

    build_loader: BuildLoader = build_train_loader
    notes: Mapping[str, Any] = field(default_factory=dict)
    comparison: Comparison | None = None
    resumes: bool = False

    def before(self, model: nn.Module, stop: StopRequest) -> None:
        """Evaluates what the training starts from, or finds the figures in OUTPUT_DIR when it is resumed.

        Raises:
            SystemExit: REQUEUE_EXIT_CODE, when it was asked to stop meanwhile; nothing is lost.
        """
        if self.comparison is None:
            return
        if self.resumes:
            self.comparison.resume()
            return
        try:
            with stop.interrupting():
                self.comparison.measure(model)
                barrier()  # nobody trains while the first process is still at its figures and can be stopped there
        except StopRequested:
            raise SystemExit(REQUEUE_EXIT_CODE) from None

    def after(self, results: Results) -> None:
        """Compares with what was before; `results` of DATASETS.TEST after the last iteration."""
        if self.comparison is not None:
            self.comparison.finish(results)


def begin(cfg: CfgNode, model: nn.Module, *, last: Path | None) -> Extras:
    """Loads MODEL.WEIGHTS into a model, as far as a training needs them, and gives what a fine-tuning adds.

    Args:
        cfg: the config.
        model: built for the classes of DATASETS.TRAIN.
        last: the checkpoint that the training will be resumed from, if any.

    Raises:
        ValueError: as `load_weights` and `begin_finetuning`.
    """
    if not cfg.FINETUNE.METHOD:
        if cfg.MODEL.WEIGHTS and last is None:
            load_weights(model, cfg.MODEL.WEIGHTS, initialise=True)
            model.seen_vocabulary = model.train_vocabulary  # an ordinary training knows no former classes
            logger.info("starting from the weights in %s", cfg.MODEL.WEIGHTS)
        elif last is not None and has_layouts(model):
            load_weights(model, last)  # also when it is resumed, but shapes must not change once it is distributed
        return Extras()
    resumed = None if last is None else load_checkpoint(last)
    former, notes = begin_finetuning(cfg, model, resumed=resumed)
    build_loader, comparison = build_train_loader, None
    if cfg.FINETUNE.METHOD == "replay" and cfg.FINETUNE.REPLAY_SHARE:
        build_loader = functools.partial(build_replay_loader, former=replay_sets(cfg))
    if cfg.DATASETS.TEST:
        comparison = Comparison(cfg, former=former, own=model.train_vocabulary)
    else:
        logger.info("DATASETS.TEST is empty: nothing is compared before and after the fine-tuning")
    return Extras(build_loader, notes, comparison, resumes=last is not None)
