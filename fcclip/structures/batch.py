"""A batch of training samples, and the parts that it is cut into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingBatch(Sequence):
    """Samples that are trained on together, or a part of them.

    The losses of the parts of a batch add up to the loss of the whole: what a loss is divided by (the number of images
    or of segments) is counted over the whole batch, of which `segment_counts` tells.

    Args:
        samples: a mapping for each image, with its `targets`.
        segment_counts: number of segments of each image of the whole batch that this one is a part of; None: it is the
            whole.

    Example:
        >>> batch = TrainingBatch([{"targets": "ab"}, {"targets": ""}, {"targets": "c"}])
        >>> [(len(part), part.segment_counts) for part in batch.split(2)]
        [(2, (2, 0, 1)), (1, (2, 0, 1))]
    """

    samples: Sequence[Mapping[str, Any]]
    segment_counts: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.samples[index]

    def split(self, parts: int) -> list[TrainingBatch]:
        """At most `parts` parts of equal size, the last one may be smaller; the batch itself when that is one."""
        size = math.ceil(len(self) / parts)
        if size >= len(self):
            return [self]
        counts = tuple(len(sample.get("targets", ())) for sample in self)
        return [TrainingBatch(self.samples[start : start + size], counts) for start in range(0, len(self), size)]
