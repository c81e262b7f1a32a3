"""Fine-tuning: a training on other classes that starts from weights of FC-CLIP and is not to forget the former ones.

The former classes come from the checkpoint, and go into those of the new training: what counts as seen at test time is
both. FINETUNE.METHOD says how forgetting is fought: by former images (replay.py), or by the answers of the
frozen start (teacher.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from fcclip.config import lookup, resolve_file
from fcclip.data import Dataset, dataset_vocabulary, get_dataset
from fcclip.errors import InputError
from fcclip.finetuning.distillation import DistillationLoss
from fcclip.finetuning.replay import replayed_images
from fcclip.finetuning.teacher import Teacher
from fcclip.modeling import FCCLIP
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights, trained_vocabulary, vocabulary_note, weights_hash
from fcclip.weights.checkpoint import FORMER
from fcclip.weights.files import read_weight_file

logger = logging.getLogger(__name__)

METHODS = ("", "plain", "replay", "distill")
_START = "finetuned_from"  # note of a fine-tuned file: hash of the weights that it began with
_VOCABULARY_FILES = (".json", ".txt")


def check_finetuning(cfg: CfgNode, *, world_size: int, resumes: bool = False) -> None:
    """Refuses FINETUNE.* that cannot work, before anything starts.

    Args:
        cfg: scaled to the number of processes.
        world_size: processes that share a batch.
        resumes: there is a checkpoint to go on from, so the start is needed by `distill` alone.

    Raises:
        ValueError, FileNotFoundError: an unknown method, weights that are not of FC-CLIP, unknown former classes,
            missing former data, an impossible share or weight.
    """
    tuning = cfg.FINETUNE
    lookup("FINETUNE.METHOD", tuning.METHOD, dict.fromkeys(METHODS))
    if not tuning.METHOD:
        return
    if not tuning.DISTILL_WEIGHT >= 0 or math.isinf(tuning.DISTILL_WEIGHT):
        raise InputError(f"FINETUNE.DISTILL_WEIGHT must be a finite number, 0 or more, got {tuning.DISTILL_WEIGHT}")
    if tuning.METHOD == "replay":
        replayed_images(cfg, world_size)
        for dataset, _ in replay_sets(cfg):
            if not dataset.annotations():
                raise InputError(f"FINETUNE.REPLAY_DATASETS: data set '{dataset.name}' has no records")
    if resumes and tuning.METHOD != "distill":
        return
    former_vocabulary(cfg, _read_start(cfg))


def begin_finetuning(
    cfg: CfgNode, model: FCCLIP, *, resumed: Mapping[str, Any] | None = None
) -> tuple[Vocabulary, dict[str, Any]]:
    """Loads the start (MODEL.WEIGHTS) into a model and gives it what its method needs.

    Args:
        cfg: FINETUNE.METHOD is not "".
        model: built for the new classes.
        resumed: the checkpoint that will be resumed from afterwards; its former classes hold, and the start is loaded
            for `distill` alone.

    Returns:
        All classes that the start was trained on, and entries for every checkpoint.

    Raises:
        ValueError: as `load_weights` and `former_vocabulary`; the start is not that of the training that is resumed.
    """
    method, source = cfg.FINETUNE.METHOD, cfg.MODEL.WEIGHTS
    if resumed is None:
        former = former_vocabulary(cfg, load_weights(model, source))
        notes = {FORMER: vocabulary_note(former), _START: weights_hash(model)}
    else:
        absent = [key for key in (FORMER, _START) if key not in resumed]
        if absent:
            raise InputError(
                f"FINETUNE.METHOD is '{method}', but the checkpoint that is resumed from is of no fine-tuning (it has "
                f"no {' and no '.join(absent)}). Start from it with MODEL.WEIGHTS in another OUTPUT_DIR."
            )
        notes = {key: resumed[key] for key in (FORMER, _START)}
        former = trained_vocabulary({"vocabulary": notes[FORMER]})
        if method == "distill":
            load_weights(model, source)
            if weights_hash(model) != notes[_START]:
                raise InputError(
                    f"the fine-tuning that is resumed began with other weights than MODEL.WEIGHTS '{source}', and "
                    "FINETUNE.METHOD 'distill' keeps to the weights it began with; give the same file"
                )
    model.seen_vocabulary = former.joined(model.train_vocabulary)
    new = int((~model.train_vocabulary.seen_by(former)).sum())
    logger.info(
        "fine-tuning (%s) from %s: %d former classes ('%s'); %d of the %d classes of '%s' are new",
        *(method, source or "a checkpoint", len(former), former.name),
        *(new, len(model.train_vocabulary), model.train_vocabulary.name),
    )
    if method == "distill" and cfg.FINETUNE.DISTILL_WEIGHT > 0:
        model.extra_losses.append(build_teacher(cfg, model, former))
    return former, notes


def build_teacher(cfg: CfgNode, model: FCCLIP, vocabulary: Vocabulary) -> Teacher:
    """The model as it is now, as a teacher in the former classes; its losses have the weights of the criterion, times
    FINETUNE.DISTILL_WEIGHT."""
    former, weight = cfg.MODEL.MASK_FORMER, cfg.FINETUNE.DISTILL_WEIGHT
    loss = DistillationLoss(
        class_weight=weight * former.CLASS_WEIGHT,
        mask_weight=weight * former.MASK_WEIGHT,
        dice_weight=weight * former.DICE_WEIGHT,
        void_floor=former.NO_OBJECT_WEIGHT,
        num_points=former.TRAIN_NUM_POINTS,
        oversample_ratio=former.OVERSAMPLE_RATIO,
        importance_ratio=former.IMPORTANCE_SAMPLE_RATIO,
    )
    head, void = model.sem_seg_head, model.void_embedding.weight
    return Teacher(head=head, void_embedding=void, vocabulary=vocabulary, loss=loss)


def former_vocabulary(cfg: CfgNode, notes: Mapping[str, Any]) -> Vocabulary:
    """The classes that the start was trained on: FINETUNE.VOCABULARY, else what the file says, else those of
    FINETUNE.REPLAY_DATASETS.

    Args:
        cfg: reads FINETUNE and MODEL.FC_CLIP.VOCABULARIES.
        notes: what stands beside the weights of the start.

    Raises:
        ValueError: nobody says.
    """
    name, folder = cfg.FINETUNE.VOCABULARY, cfg.MODEL.FC_CLIP.VOCABULARIES
    if name:
        if Path(name).suffix in _VOCABULARY_FILES:
            return Vocabulary.from_file(name)
        return dataset_vocabulary(name, folder)
    noted = trained_vocabulary(notes)
    if noted is not None:
        return noted
    if cfg.FINETUNE.METHOD == "replay":
        return reduce(Vocabulary.joined, (vocabulary for _, vocabulary in replay_sets(cfg)))
    raise InputError(
        f"MODEL.WEIGHTS '{cfg.MODEL.WEIGHTS}' does not say which classes it was trained on. Name them with "
        "FINETUNE.VOCABULARY: a data set (openvocab_coco_2017_train_panoptic_with_sem_seg for the published weights) "
        "or a vocabulary file (.json, .txt)."
    )


def replay_sets(cfg: CfgNode) -> list[tuple[Dataset, Vocabulary]]:
    """FINETUNE.REPLAY_DATASETS, each with the vocabulary of its labels.

    Raises:
        ValueError: none, or an unknown one.
    """
    names: Sequence[str] = cfg.FINETUNE.REPLAY_DATASETS
    if not names:
        raise InputError(
            "FINETUNE.METHOD 'replay' needs FINETUNE.REPLAY_DATASETS, the data sets that MODEL.WEIGHTS was trained on "
            "(names or YAML files). Without that data, use FINETUNE.METHOD distill."
        )
    datasets = [get_dataset(name) for name in names]
    return [(dataset, dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES)) for dataset in datasets]


def _read_start(cfg: CfgNode) -> dict[str, Any]:
    """What stands beside the weights of MODEL.WEIGHTS.

    Raises:
        ValueError: MODEL.WEIGHTS is empty, or the weights are not of FC-CLIP.
    """
    method, source = cfg.FINETUNE.METHOD, cfg.MODEL.WEIGHTS
    if not source:
        raise InputError(
            f"FINETUNE.METHOD is '{method}', but MODEL.WEIGHTS is empty: a fine-tuning starts from weights of FC-CLIP. "
            'Name them, or set FINETUNE.METHOD "" for a training from the beginning.'
        )
    file = read_weight_file(resolve_file(source, what="MODEL.WEIGHTS"), what="MODEL.WEIGHTS")
    if "void_embedding.weight" not in file.tensors:
        raise InputError(
            f"FINETUNE.METHOD is '{method}', but MODEL.WEIGHTS '{source}' holds no weights of FC-CLIP (there is no "
            'void_embedding), which a fine-tuning starts from. Set FINETUNE.METHOD "" for a training that starts from '
            "such a file."
        )
    return file.rest
