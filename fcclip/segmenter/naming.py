"""Which class names, and how masks get theirs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fcclip.errors import InputError
from fcclip.modeling import Architecture, Ensemble
from fcclip.modeling.unknown import other_names
from fcclip.vocabulary import Vocabulary, builtin_names

VOID_THRESHOLD = 0.3  # of `unknown`; chosen on shapes_tune (docs/class_names.md)

VocabularyInput = str | Sequence[str] | Vocabulary


@dataclass(frozen=True)
class Naming:
    """How the masks of an image get names.

    Args:
        vocabulary: the classes that can be found.
        min_score: things with a lower score are left out, 0..1.
        ensemble: weights (alpha, beta) of the frozen CLIP for seen and for unseen classes, or a whole `Ensemble`; None:
            the model's.
        distractors: names some of which nobody asked for; what these fit better is unknown. None: everything gets a
            name.
        void_threshold: with distractors, a mask is unknown too where void has this probability.
        distractors_are_void: what the distractors fit is not called unknown, but left out.

    Raises:
        ValueError: a number outside 0..1, or no distractor that was not asked for.
    """

    vocabulary: Vocabulary
    min_score: float = 0.0
    ensemble: Ensemble | tuple[float, float] | None = None
    distractors: Vocabulary | None = None
    void_threshold: float = VOID_THRESHOLD
    distractors_are_void: bool = False

    def __post_init__(self) -> None:
        ensemble = Ensemble.of(self.ensemble or (0, 0))
        for name, value in (("min_score", self.min_score), ("alpha", ensemble.alpha), ("beta", ensemble.beta)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} must be in 0..1, got {value}")
        _ = self.others

    @functools.cached_property
    def others(self) -> Vocabulary | None:
        """The names that nobody asked for."""
        return None if self.distractors is None else other_names(self.vocabulary, self.distractors)


def read_vocabulary(given: VocabularyInput) -> Vocabulary:
    """A vocabulary from what a user writes.

    Args:
        given: as for `Vocabulary.from_names`; an entry that is the name of a built-in vocabulary stands for all of its
            classes, and classes that share a synonym become one. Or a vocabulary.

    Raises:
        ValueError: as `Vocabulary.from_names`.

    Example:
        >>> len(read_vocabulary("coco_panoptic; cityscapes; glorp")) < 133 + 19 + 1
        True
    """
    if isinstance(given, Vocabulary):
        return given
    entries = given.split(";") if isinstance(given, str) else list(given)
    whole = [entry.strip() for entry in entries if entry.strip() in builtin_names()]
    if not whole:
        return Vocabulary.from_names(given)
    own = [entry for entry in entries if entry.strip() and entry.strip() not in whole]
    parts = [Vocabulary.from_names(own)] if own else []
    return functools.reduce(Vocabulary.joined, [*parts, *map(Vocabulary.builtin, dict.fromkeys(whole))])


def read_distractors(
    unknown: bool | VocabularyInput, others: bool | VocabularyInput, model: Architecture
) -> dict[str, Any]:
    """The names to tell unknown things by, and whether they count as void, as arguments of `Naming`.

    Args:
        unknown, others: as for a call of the segmenter; True are the names that the model was trained with, False none.
    """
    if unknown is not False and others is not False:
        raise InputError("what fits none of your names is called unknown (`unknown`) or left out (`others`): give one")
    given, key = (unknown, "unknown") if others is False else (others, "others")
    distractors = None if given is False else model.seen_vocabulary if given is True else read_vocabulary(given)
    if distractors is None and given is True:
        raise InputError(
            f"{key}=True tells unknown things by the names that the model was trained with, and this one does not "
            f'know them; give names, e.g. {key}="coco_panoptic"'
        )
    return {"distractors": distractors, "distractors_are_void": key == "others"}
