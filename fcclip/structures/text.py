"""A vocabulary as vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fcclip.errors import InputError


@dataclass(frozen=True)
class TextEmbeddings:
    """A vocabulary of K classes, each with one or more synonyms, as vectors.

    Args:
        vectors: (W, D) float, unit length, one row per synonym, classes in order.
        class_of_vector: (W,) int64, the class each row belongs to, 0..K-1, ascending.
        num_classes: K.
    """

    vectors: Tensor
    class_of_vector: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.vectors.shape[0] != self.class_of_vector.shape[0]:  # len() would fix the number in an export
            raise InputError(f"{len(self.vectors)} vectors for {len(self.class_of_vector)} synonyms")

    @staticmethod
    def joined(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """Several vocabularies as one, their classes one after the other."""
        if len(parts) == 1:
            return parts[0]
        starts = accumulate((part.num_classes for part in parts), initial=0)
        return TextEmbeddings(
            vectors=torch.cat([part.vectors for part in parts]),
            class_of_vector=torch.cat([part.class_of_vector + start for part, start in zip(parts, starts)]),
            num_classes=sum(part.num_classes for part in parts),
        )
