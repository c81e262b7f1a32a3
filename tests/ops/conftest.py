"""The engines, for every test of this folder."""

from tests.msda_engines import built, engine

__all__ = ["built", "engine"]
