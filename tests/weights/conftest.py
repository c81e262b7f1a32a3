"""Toy models with the keys of FC-CLIP."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.engine.toys import ToyModel


@pytest.fixture
def toy() -> Callable[..., ToyModel]:
    """Seeded models; arguments as of ToyModel."""

    def build(seed: int = 0, **sizes: int) -> ToyModel:
        torch.manual_seed(seed)
        return ToyModel(**sizes)

    return build
