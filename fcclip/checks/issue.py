"""What a check has to say: one record, and the list that collects it."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fcclip.checks.kinds import ERROR, KINDS, NOTE, OK, WARNING
from fcclip.errors import is_users

__all__ = ["ERROR", "NOTE", "OK", "WARNING", "Issue", "Issues"]

_OUR_MISTAKE = "this is a mistake of fcclip; please report it"


@dataclass(frozen=True)
class Issue:
    """One thing that a check found out.

    Args:
        level: "error", "warning", "note" or "ok".
        text: what is so.
        remedy: what to do, where `text` does not say.
        section: which check it belongs to.
        kind: key of `KINDS`; issues of one kind are shown together. "": shown alone.
        file: that it is about.
    """

    level: str
    text: str
    remedy: str = ""
    section: str = ""
    kind: str = ""
    file: str = ""


class Issues(list[Issue]):
    """Collects issues; what is raised or logged inside `section` and `attempt` becomes one."""

    def __init__(self) -> None:
        super().__init__()
        self._section, self._about = "", ""

    def add(self, level: str, text: str, remedy: str = "") -> None:
        """Adds an issue to the present section; what is wrong is said once."""
        text = text.strip()
        if level in (WARNING, ERROR) and any(text in issue.text and issue.level == level for issue in self):
            return
        if self._about and self._about not in text:
            text = f"{self._about}: {text}"
        self.append(Issue(level, text, remedy, self._section))

    def add_kind(
        self, kind: str, file: object, text: str, *, level: str | None = None, remedy: str | None = None
    ) -> None:
        """Adds an issue of one of `KINDS`, with level and remedy of its own where they differ from the kind's."""
        known = KINDS[kind]
        remedy = known.remedy if remedy is None else remedy
        self.append(Issue(level or known.level, text, remedy, self._section, kind, str(file)))

    def count(self, level: str) -> int:
        """The number of issues of a level."""
        return sum(issue.level == level for issue in self)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        counts = Counter(issue.level for issue in self)
        return {
            **{f"{level}s": counts[level] for level in (ERROR, WARNING, NOTE)},
            "issues": [asdict(issue) for issue in self],
        }

    @contextlib.contextmanager
    def section(self, name: str, about: str = "") -> Iterator[None]:
        """Issues inside belong to `name`, and their texts name what they are `about`; warnings that fcclip logs are
        issues, and so is an error."""
        self._section, self._about = name, about
        logger, handler = logging.getLogger("fcclip"), logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.add(WARNING, record.getMessage())
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            with self.attempt():
                yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate

    @contextlib.contextmanager
    def attempt(self, level: str = ERROR) -> Iterator[None]:
        """An error inside ends the block and becomes an issue."""
        try:
            yield
        except Exception as error:
            if is_users(error):
                self.add(level, str(error) or type(error).__name__)
            else:
                self.add(level, f"{type(error).__name__}: {error}", _OUR_MISTAKE)
