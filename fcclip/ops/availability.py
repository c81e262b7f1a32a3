"""Whether an engine can run here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Availability:
    """What an engine says about a device; true when it can run now, with nothing to build.

    Attributes:
        reason: why it cannot run, and what to do about it; "": it can.
        broken: something that is there and ought to work does not, which a user wants to know even if they never asked
            for this engine.
    """

    reason: str = ""
    broken: bool = False

    def __bool__(self) -> bool:
        return not self.reason
