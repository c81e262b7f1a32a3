"""Toy models with the keys of FC-CLIP."""

from tests.engine.conftest import toy

__all__ = ["toy"]
