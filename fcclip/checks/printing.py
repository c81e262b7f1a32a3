"""Issues and progress in print, on a terminal with colours and a bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fcclip.checks.issue import ERROR, NOTE, OK, WARNING, Issue, Issues
from fcclip.checks.kinds import KINDS
from fcclip.data import root_folder
from fcclip.preparation.programs import new_progress

_SHOWN = {OK: ("ok", "green"), NOTE: ("note", "dim"), WARNING: ("warn", "yellow"), ERROR: ("ERROR", "bold red")}
_FEW = 3  # examples of a kind


def new_console() -> Console:
    """What programs print with: long lines are wrapped on a terminal only."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def print_issues(issues: Issues, console: Console) -> None:
    """A list by section, issues of one kind together, with the first files."""
    section = ""
    for group in _groups(issues):
        first = group[0]
        if first.section != section:
            section = first.section
            console.print(Text(section, style="bold"))
        if first.kind:
            lines = [f"{KINDS[first.kind].title}: {len(group):,}"]
            lines += [f"{short(issue.file)}: {issue.text}" for issue in group[:_FEW]]
            if len(group) > _FEW:
                lines.append(f"and {len(group) - _FEW:,} more (--output)")
        else:
            head, *more = first.text.splitlines()
            lines = [head, *(f"  {line.strip()}" for line in more)]
        remedy = "" if first.remedy.startswith("nothing") else first.remedy
        _print_entry(console, first.level, lines, remedy)


def _groups(issues: Iterable[Issue]) -> list[list[Issue]]:
    groups: dict[tuple, list[Issue]] = {}
    for position, issue in enumerate(issues):
        same = (issue.section, issue.level, issue.kind, issue.remedy) if issue.kind else (position,)
        groups.setdefault(same, []).append(issue)
    return list(groups.values())


def _print_entry(console: Console, level: str, lines: list[str], remedy: str) -> None:
    word, style = _SHOWN[level]
    if remedy:
        lines = [*lines, f"-> {remedy}"]
    console.print(Text.assemble((f"  {word:<5} ", style), lines[0]))
    for line in lines[1:]:
        console.print(Text(f"{'':8}{line}"))


def print_verdict(issues: Issues, console: Console, text: str) -> None:
    """One line at the end, in the colour of the worst issue."""
    worst = next((level for level in (ERROR, WARNING) if issues.count(level)), OK)
    console.print(Text(text, style=_SHOWN[worst][1]))


def counted(issues: Issues, levels: Iterable[str] = (ERROR, WARNING, NOTE)) -> str:
    """The numbers of issues, e.g. "2 errors, 1 warning"; "" if there are none."""
    counts = {level: issues.count(level) for level in levels}
    return ", ".join(f"{count:,} {level}{'s' if count != 1 else ''}" for level, count in counts.items() if count)


def short(file: str) -> str:
    """A path below the folder of all data sets or the present one, without these."""
    for folder in (root_folder(), Path.cwd()):
        with contextlib.suppress(ValueError):
            return str(Path(file).relative_to(folder))
    return file


@contextlib.contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A function to be called with (images done, images in all), which moves a bar on a terminal."""
    with new_progress(transient=True) as bar:
        task = bar.add_task(f"{name}: annotations", total=None)
        yield lambda done, total: bar.update(task, description=name, completed=done, total=total)
