"""Vocabularies: of the data sets of a run, and those that the weights know."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from fvcore.common.config import CfgNode

from fcclip.checks.issue import ERROR, NOTE, OK, WARNING, Issues
from fcclip.data import Dataset, dataset_vocabulary, get_dataset, joined
from fcclip.files import listed
from fcclip.finetuning.start import former_vocabulary
from fcclip.vocabulary import Vocabulary
from fcclip.weights import WeightFile, trained_vocabulary
from fcclip.weights.checkpoint import FORMER


def check_vocabularies(
    issues: Issues,
    cfg: CfgNode,
    names: Sequence[str],
    *,
    weights: WeightFile | None,
    training: bool,
) -> Vocabulary | None:
    """Vocabularies of the data sets of a run (`names`, those to train on first), and those that the weights know.

    Returns:
        The vocabulary of the training classes; None: it cannot be read.
    """
    former = _former_vocabulary(issues, cfg, weights, training=training)
    if not cfg.DATASETS.TRAIN:
        issues.add(ERROR, "DATASETS.TRAIN is empty; its data set decides which classes are seen", "name a data set")
    to_train_on: list[Dataset] = []
    trained: Vocabulary | None = None
    for name in names:
        with issues.attempt():
            dataset = get_dataset(name)
            vocabulary = dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES)
            if name in cfg.DATASETS.TRAIN:
                to_train_on.append(dataset)
            if name == names[0] and cfg.DATASETS.TRAIN:
                trained = vocabulary
            issues.add(OK, f"{name}: {_described(vocabulary, trained, former)}")
            if dataset.published_vocabulary and not vocabulary.is_published:
                remedy = "put the published files into a folder and name it in MODEL.FC_CLIP.VOCABULARIES"
                text = "not the published vocabulary, so numbers cannot be compared with published ones"
                issues.add(NOTE, f"{name}: {text}", f"{remedy} (datasets/README.md)")
    if to_train_on:
        with issues.attempt(ERROR if training else WARNING):
            joined(to_train_on)
    if weights is not None and trained is not None:
        with issues.attempt():
            _compare_with_weights(issues, cfg, weights, trained, former, training=training)
    return trained


def _former_vocabulary(
    issues: Issues, cfg: CfgNode, weights: WeightFile | None, *, training: bool
) -> Vocabulary | None:
    """Classes that count as seen beside those of DATASETS.TRAIN: of a fine-tuning's start, or of fine-tuned weights."""
    if weights is None:
        return None
    with issues.attempt():
        if training and cfg.FINETUNE.METHOD:
            with contextlib.suppress(ValueError, OSError):  # the section on fine-tuning says why
                return former_vocabulary(cfg, weights.rest)
        elif not training and FORMER in weights.rest:
            return trained_vocabulary(weights.rest)
    return None


def _described(vocabulary: Vocabulary, trained: Vocabulary | None, former: Vocabulary | None) -> str:
    origin = "published" if vocabulary.is_published else "of fcclip"
    names = sum(map(len, vocabulary.synonyms))
    text = f"'{vocabulary.name}' ({origin}), {len(vocabulary)} classes, {names} names"
    if trained is None or trained is vocabulary:
        return text
    seen = int(vocabulary.seen_by(trained if former is None else former.joined(trained)).sum())
    return f"{text}; {seen} classes seen in training, {len(vocabulary) - seen} unseen"


def _compare_with_weights(
    issues: Issues, cfg: CfgNode, file: WeightFile, trained: Vocabulary, former: Vocabulary | None, *, training: bool
) -> None:
    """The classes that the weights know against those of DATASETS.TRAIN, which decide what counts as seen."""
    if training and cfg.FINETUNE.METHOD:
        if former is not None:
            new = int((~trained.seen_by(former)).sum())
            text = f"the weights know {len(former)} classes ('{former.name}'), which stay seen"
            issues.add(OK, f"{text}; {new} of the {len(trained)} classes of DATASETS.TRAIN are new to them")
        return
    note, known = file.rest.get("vocabulary"), trained_vocabulary(file.rest)
    if not note:
        return
    ours, theirs = set(trained.synonyms), set() if known is None else set(known.synonyms)
    if former is not None:  # of fine-tuned weights: all that they know counts as seen
        ours = {names for names, seen in zip(trained.synonyms, trained.seen_by(known).tolist()) if not seen}
        theirs = set()
    if known is not None and ours == theirs:
        text = f"the {len(known)} classes that the weights were trained on count as seen, those of DATASETS.TRAIN too"
        issues.add(OK, text)
        return
    name = f"'{note}'" if known is None else f"'{known.name}' ({len(known)} classes)"
    examples = [", ".join(names[:3]) for names in sorted(ours ^ theirs)]
    remedy = "set DATASETS.TRAIN and MODEL.FC_CLIP.VOCABULARIES as in the training"
    issues.add(
        WARNING,
        f"the weights were trained on {name}, but DATASETS.TRAIN has '{trained.name}' ({len(trained)} classes): "
        f"{len(theirs - ours)} are gone, {len(ours - theirs)} are new ({listed(examples)}); seen and unseen classes "
        "would be told wrongly",
        f"{remedy}; for a fine-tuning set FINETUNE.METHOD" if training else remedy,
    )
