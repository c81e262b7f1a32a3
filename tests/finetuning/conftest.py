"""Fixtures of the engine that tests of fine-tuning share."""

from tests.engine.conftest import shapes_world

__all__ = ["shapes_world"]
