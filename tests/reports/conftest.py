"""The tiny world of tests/evaluation."""

from tests.evaluation.conftest import folder

__all__ = ["folder"]
