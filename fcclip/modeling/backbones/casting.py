"""A low-precision copy of a frozen tower, for training under autocast."""

from __future__ import annotations

import copy

import torch
from torch import nn


class CastCopy:
    """The tower whose convolutions and products have autocast's type already; it is no module, so no part of a state
    dict.

    Autocast would cast the same frozen weights again in every iteration. The copy rounds them once, to the same values;
    norms stay in fp32. It follows the weights.

    Attributes:
        module: the copy; None before it is made.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self._version: tuple = ()

    @torch.compiler.disable  # copies modules and compares addresses, which breaks a graph into pieces
    def of(self, tower: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The copy of this tower, made once for each of its states."""
        version = (dtype, *((weight.data_ptr(), weight._version) for weight in tower.parameters()))
        if self._version != version:
            self.module = None  # the old one goes before the new one comes
            self.module = copy.deepcopy(tower)
            for part in self.module.modules():
                if isinstance(part, (nn.Conv2d, nn.Linear)):
                    part.to(dtype)
            self._version = version
        return self.module
