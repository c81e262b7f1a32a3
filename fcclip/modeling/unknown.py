"""Names that nobody asked for: scored beside the asked ones, so that what fits none of these need not take one of them.

They may have an answer of their own, `UNKNOWN`. Two rules make a mask unknown: its best name is one of the others; or
no asked name fits, and its probability of being void reaches a threshold. Or they count as void (`AskedMasks`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fcclip.errors import InputError
from fcclip.modeling.architecture import Ensemble, ScoredMasks
from fcclip.vocabulary import ClassEntry, Vocabulary

UNKNOWN = "unknown"


def other_names(vocabulary: Vocabulary, others: Vocabulary) -> Vocabulary:
    """The classes of `others` of which no synonym is one of `vocabulary`'s, whatever the case.

    Raises:
        ValueError: none is left, or a class is called `UNKNOWN`.
    """
    asked = {synonym.casefold() for synonyms in vocabulary.synonyms for synonym in synonyms}
    left = [entry for entry in others.classes if asked.isdisjoint(map(str.casefold, entry.synonyms))]
    if not left:
        raise InputError(
            f"every class of '{others.name}' was asked for: it has no other name to tell unknown things by"
        )
    if UNKNOWN in asked:
        raise InputError(f"a class is called '{UNKNOWN}', which is the answer where no name fits; remove it")
    return Vocabulary(f"{others.name}-{vocabulary.name}", tuple(left))


@dataclass(frozen=True)
class AskedMasks(ScoredMasks):
    """Masks scored among K asked classes and `others`, whose probability is added to that of void.

    Args:
        others: the same masks scored among the other names.
    """

    others: ScoredMasks

    @classmethod
    def of(cls, asked: ScoredMasks, others: ScoredMasks) -> AskedMasks:
        """Both opinions on the same masks, joined."""
        return cls(**{name: getattr(asked, name) for name in ScoredMasks.__dataclass_fields__}, others=others)

    @torch.no_grad()
    def class_logits(self, ensemble: Ensemble | tuple[float, float]) -> Tensor:
        """(Q, K + 1) log-probabilities: the asked classes, void."""
        shares = self.logits_of_all(ensemble).softmax(-1)[:, : self.out_logits.shape[-1]]
        return (torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], dim=-1) + 1e-8).log()

    def logits_of_all(self, ensemble: Ensemble | tuple[float, float]) -> Tensor:
        """All names scored as one vocabulary: the asked classes, the others, void."""
        others = self.others
        whole = replace(
            others,
            in_logits=torch.cat([self.in_logits[:, :-1], others.in_logits], dim=-1),  # void is the same in both
            out_logits=torch.cat([self.out_logits, others.out_logits], dim=-1),
            seen=torch.cat([self.seen, others.seen]),
        )
        return whole.class_logits(ensemble)


@dataclass(frozen=True)
class UnknownMasks(AskedMasks):
    """Masks scored among K asked classes and `others`; its vocabulary is the asked one and `UNKNOWN`, a thing.

    Args:
        void_threshold: a mask whose best name was asked for is unknown where void has this probability, 0..1; 1: never.
    """

    void_threshold: float

    @classmethod
    def of(cls, asked: ScoredMasks, others: ScoredMasks, *, void_threshold: float) -> UnknownMasks:
        """Both opinions on the same masks, joined."""
        fields = {name: getattr(asked, name) for name in ScoredMasks.__dataclass_fields__}
        entry = ClassEntry(len(asked.vocabulary), UNKNOWN, (UNKNOWN,))
        vocabulary = replace(asked.vocabulary, classes=(*asked.vocabulary.classes, entry), source_sha256="")
        return cls(**{**fields, "vocabulary": vocabulary}, others=others, void_threshold=void_threshold)

    @torch.no_grad()
    def class_logits(self, ensemble: Ensemble | tuple[float, float]) -> Tensor:
        """(Q, K + 2) log-probabilities: the asked classes, unknown, void.

        The best of the others stands for all of them, so that a mask is unknown if and only if its best name is one of
        them, however many there are.
        """
        num_classes, logits = self.out_logits.shape[-1], self.logits_of_all(ensemble)
        best_other = logits[:, num_classes:-1].amax(-1, keepdim=True)
        shares = torch.cat([logits[:, :num_classes], best_other, logits[:, -1:]], dim=-1).softmax(-1)
        doubtful = shares[:, -1:] >= self.void_threshold
        named = torch.where(doubtful, 0.0, shares[:, :num_classes])
        unknown = shares[:, num_classes:-1] + torch.where(doubtful, shares[:, :num_classes], 0.0).sum(-1, keepdim=True)
        return (torch.cat([named, unknown, shares[:, -1:]], dim=-1) + 1e-8).log()
