"""How defaults.py says what a key affects, where it sets the key.

    model = Keys(changes_model)      # what an unmarked key of the group is
    model.DEVICE = harmless("auto")  # and a marked one

What a key affects is one of
    training    what is trained; the same weights predict the same
    model       what is built, and so both what is trained and what is predicted
    prediction  what the same weights predict; may change when a training is resumed
    nothing     neither; or it is compared by what it leads to, as a file by its hash
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from fvcore.common.config import CfgNode


@dataclass(frozen=True)
class Mark:
    """What a key affects. Called with a default, it gives the key both.

    Args:
        affects: training, model, prediction or nothing.
        fact: a further one that `keys_that` knows.
        reason: why the key has no effect at all; "": it has one.
        default: of the key.
    """

    affects: str
    fact: str = ""
    reason: str = ""
    default: Any = None

    def __call__(self, default: Any) -> Mark:
        return replace(self, default=default)


changes_training = Mark("training")
changes_model = Mark("model")
changes_shapes = Mark("model", "changes_shapes")  # of weights
changes_meaning = Mark("model", "changes_meaning")  # of weights, whose shapes stay
chooses_clip = Mark("model", "chooses_clip")
chooses_clip_weights = Mark("nothing", "chooses_clip")  # compared by their fingerprint
changes_prediction = Mark("prediction")
harmless = Mark("nothing")


def without_effect(reason: str) -> Mark:
    """The mark of published keys that are accepted and have no effect."""
    return Mark("nothing", "without_effect", reason)


class Keys(SimpleNamespace):
    """A group of keys while it is defined: KEY = default, KEY = mark(default) or KEY = Keys()."""

    def __init__(self, mark: Mark | None = None) -> None:
        self._mark = mark  # of keys without one; None: that of the group around

    def tree(self) -> CfgNode:
        """The defaults alone."""
        tree = CfgNode()
        for name, value in self._items():
            tree[name] = value.tree() if isinstance(value, Keys) else getattr(value, "default", value)
        return tree

    def marks(self, prefix: str = "", around: Mark = changes_training) -> dict[str, Mark]:
        """Key or group, as "MODEL.DEVICE" or "MODEL" -> its mark."""
        own, marks = self._mark or around, {}
        for name, value in self._items():
            key = prefix + name
            if isinstance(value, Keys):
                marks |= {key: value._mark or own, **value.marks(f"{key}.", own)}
            else:
                marks[key] = value if isinstance(value, Mark) else own
        return marks

    def _items(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in vars(self).items() if name != "_mark"]
