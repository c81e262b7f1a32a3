"""Files of weights as users share them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fcclip.weights import frozen_notes, model_weights, write_safetensors


def save_weights(
    model: nn.Module,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float16,
    full: bool = False,
) -> None:
    """Writes the weights of a model as `.safetensors`, with the fingerprints of its frozen parts."""
    weights = {
        key: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for key, value in model_weights(model, full=full).items()
    }
    write_safetensors(path, weights, {**frozen_notes(model), **(metadata or {})})
