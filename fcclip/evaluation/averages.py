"""Means over classes: unweighted, over the classes for which a metric is defined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def mean_of_defined(values: Iterable[float]) -> float:
    """The unweighted mean of the values that are not NaN; NaN when there is none.

    The sum is rounded once, so the order of the values does not matter.

    Example:
        >>> mean_of_defined([0.5, float("nan"), 1.0])
        0.75
    """
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def seen_and_unseen(metric: str, values: Sequence[float], seen: Sequence[bool] | None) -> dict[str, float]:
    """`metric` over the classes the training vocabulary has, and over the others.

    Args:
        metric: its name, the stem of the two keys.
        values: one per class, NaN where the class does not count.
        seen: one per class; None when the training vocabulary is unknown, which gives no entries.

    Returns:
        `{metric}_seen` and `{metric}_unseen`.
    """
    if seen is None:
        return {}
    return {
        f"{metric}_seen": mean_of_defined(value for value, known in zip(values, seen, strict=True) if known),
        f"{metric}_unseen": mean_of_defined(value for value, known in zip(values, seen, strict=True) if not known),
    }
