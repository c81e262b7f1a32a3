"""A model to `fcclip.engine`, which checks weights itself and then loads them part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["LenientModel"]


class LenientModel:
    """The model inside with torch's own `load_state_dict` instead of the strict one that the model brings.

    Args:
        model: stands behind every other attribute, read or set.
        assign: as of torch's `load_state_dict`.
    """

    def __init__(self, model: nn.Module, *, assign: bool = False) -> None:
        self.__dict__.update(_model=model, _assign=assign)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load_state_dict(self, weights: Mapping[str, Any], strict: bool = True) -> Any:
        """See torch."""
        return nn.Module.load_state_dict(self._model, weights, strict=strict, assign=self._assign)
