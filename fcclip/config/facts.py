"""What is known of the keys, as defaults.py says it where it sets them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from fcclip.config.defaults import OTHER_MODELS, all_keys, get_cfg
from fcclip.config.marks import Mark, changes_training


def affects(key: str) -> str:
    """What a key affects: training, model, prediction or nothing (see marks.py); an unknown one as the group it is in.

    Example:
        >>> affects("SOLVER.BASE_LR"), affects("TEST.KEY_OF_A_LATER_VERSION")
        ('training', 'nothing')
    """
    return _mark(key).affects


def why_without_effect(key: str) -> str:
    """The reason why a key has no effect at all; "": it has one."""
    if key not in _marks() and any(f"{key}.".startswith(f"{group}.") for group in OTHER_MODELS):
        return "of another model"
    return _mark(key).reason


@functools.cache
def keys_that(fact: str) -> tuple[str, ...]:
    """The keys of which a fact is true, in the order of their definition.

    Args:
        fact: `harmless_at_resume`, `decides_predictions`, `without_effect`; or what another value than that of the
            training does with weights: `changes_shapes`, `changes_meaning`, `chooses_clip`.
    """
    affected = {"harmless_at_resume": ("prediction", "nothing"), "decides_predictions": ("model", "prediction")}
    keys = [key for key in flatten(get_cfg()) if affects(key) in affected.get(fact, ()) or _mark(key).fact == fact]
    assert keys, fact
    return tuple(keys)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested groups of keys as one mapping; tuples as lists, as YAML has them.

    Example:
        >>> flatten({"MODEL": {"DEVICE": "cpu", "X": {"STEPS": (1, 2)}}})
        {'MODEL.DEVICE': 'cpu', 'MODEL.X.STEPS': [1, 2]}
    """
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[str(name)] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _mark(key: str) -> Mark:
    marks = _marks()
    while key and key not in marks:
        key = key.rpartition(".")[0]
    return marks.get(key, changes_training)


@functools.cache
def _marks() -> dict[str, Mark]:
    return all_keys().marks()
