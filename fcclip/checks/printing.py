"""Issues and progress on a terminal, with marks and colours, and in plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fcclip.checks.issue import ERROR, NOTE, OK, WARNING, Issue, Issues
from fcclip.checks.kinds import KINDS
from fcclip.data import root_folder

_MARKS = {OK: ("✓", "green"), NOTE: ("·", "dim"), WARNING: ("!", "yellow"), ERROR: ("✗", "bold red")}
_PLAIN = {OK: "ok", NOTE: "note", WARNING: "warn", ERROR: "ERROR"}
_FEW = 3  # examples of a kind
_LINE_EVERY_S = 10  # of progress, where there is no terminal


def new_console() -> Console:
    """What programs print with: long lines are wrapped on a terminal only."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def print_issues(issues: Issues, console: Console, *, all_examples: bool = False) -> None:
    """A list by section, issues of one kind together; of a kind the first files, or `all_examples`."""
    section = ""
    for group in _groups(issues):
        first = group[0]
        if first.section != section:
            section = first.section
            console.print(Text(section, style="bold"))
        if first.kind:
            shown = group if all_examples else group[:_FEW]
            lines = [f"{KINDS[first.kind].title}: {len(group):,}"]
            lines += [f"{short(issue.file)}: {issue.text}" for issue in shown]
            if len(shown) < len(group):
                lines.append(f"and {len(group) - len(shown):,} more (--all, --output)")
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
    marked = _is_marked(console)
    sign, style = _MARKS[level] if marked else (f"{_PLAIN[level]:<5}", "")
    marks = [f"  {sign} ", *[" " * (len(sign) + 3)] * len(lines)]
    if remedy:
        lines = [*lines, f"{'→' if marked else '->'} {remedy}"]
    for mark, line in zip(marks, lines):
        if not console.is_terminal:
            console.print(Text(mark + line))
            continue
        grid = Table.grid()  # long lines are wrapped beside the mark
        grid.add_row(Text(mark, style=style), Text(line, style="dim" if level == NOTE else "", overflow="fold"))
        console.print(grid)


def print_verdict(issues: Issues, console: Console, text: str) -> None:
    """One line at the end, in the colour of the worst issue."""
    worst = next((level for level in (ERROR, WARNING) if issues.count(level)), OK)
    sign, style = _MARKS[worst]
    console.print(Text(f"{sign} {text}" if _is_marked(console) else text, style=style if console.is_terminal else ""))


def _is_marked(console: Console) -> bool:
    return console.is_terminal and console.encoding.startswith("utf")


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
    """A function to be called with (images done, images in all): a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY_S:
                last = time.monotonic()
                print(f"{name}: {done:,} of {total:,} images", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(f"{name}: annotations", total=None)
        yield lambda done, total: bar.update(task, description=name, completed=done, total=total)
