"""Names become code here and nowhere else."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from fcclip.errors import InputError

Value = TypeVar("Value")


def lookup(kind: str, name: str, known: Mapping[str, Value]) -> Value:
    """The entry of `known` called `name`.

    Args:
        kind: what the names stand for, used in the error: "data set", "backbone".
        name: the wanted name, as written in the config.
        known: every name there is.

    Raises:
        ValueError: `name` is not in `known`; the message gives the nearest neighbour and what exists.
    """
    if name in known:
        return known[name]
    raise InputError(f"unknown {kind} '{name}'.{nearest(name, known)} Known: {', '.join(sorted(known)) or 'none'}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """For messages: a sentence with a space before it that asks for the name most like this one; "" if none is.

    Example:
        >>> nearest("gras", ["grass", "car"])
        " Did you mean 'grass'?"
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
