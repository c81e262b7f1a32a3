"""What a backbone gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What a backbone sees in B images.

    Args:
        levels: maps (B, C, h, w) by level name, finest first; channels and stride of each are the backbone's to say.
        dense: (B, C, h, w), the map that the out-of-vocabulary classifier pools.
    """

    levels: dict[str, Tensor]
    dense: Tensor
