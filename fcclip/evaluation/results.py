"""What becomes of the numbers: a table to read, lines to paste, and `results.json`.

Everywhere `sets` is data set -> mode -> task -> metric -> percent, that is one `evaluate` per data set.
"""

from __future__ import annotations

import io
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fcclip.files import write_json

SCHEMA = 1
# Name in tables -> task and metric it comes from.
HEADLINES = {"PQ": ("panoptic_seg", "PQ"), "AP": ("segm", "AP"), "mIoU": ("sem_seg", "mIoU")}
_GROUPS = {"all": "", "seen": "_seen", "unseen": "_unseen"}

Tasks = Mapping[str, Mapping[str, float]]  # task -> metric -> percent


def headlines(tasks: Tasks) -> dict[str, dict[str, float]]:
    """PQ, AP and mIoU over all, seen and unseen classes; NaN where not evaluated or undefined."""
    return {
        name: {group: tasks.get(task, {}).get(metric + suffix, math.nan) for group, suffix in _GROUPS.items()}
        for name, (task, metric) in HEADLINES.items()
    }


def format_table(sets: Mapping[str, Mapping[str, Tasks]], *, title: str | None = None) -> str:
    """A text table: PQ, AP and mIoU for all, seen and unseen classes, a row for each data set and mode; `-` is NaN."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("data set")
    table.add_column("mode")
    for name in HEADLINES:
        for group in _GROUPS:
            table.add_column(f"{name}\n{group}", justify="right")
    for set_name, modes in sets.items():
        for row, (mode, tasks) in enumerate(modes.items()):
            values = [format_value(value) for groups in headlines(tasks).values() for value in groups.values()]
            last = row == len(modes) - 1
            table.add_row(set_name if row == 0 else "", mode.replace("_", " "), *values, end_section=last)
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines())


def format_value(value: float) -> str:
    """One decimal, `-` for NaN."""
    return "-" if math.isnan(value) else f"{value:.1f}"


def format_change(value: float, digits: int = 1) -> str:
    """A difference with its sign, `-` for NaN."""
    return "-" if math.isnan(value) else f"{value:+.{digits}f}"


def copypaste_lines(tasks: Tasks) -> list[str]:
    """Three lines for each task as detectron2 logs them: task, names, values; without metrics of single classes."""
    lines = []
    for task, metrics in tasks.items():
        chosen = {name: value for name, value in metrics.items() if "-" not in name}
        lines += [
            f"copypaste: Task: {task}",
            "copypaste: " + ",".join(chosen),
            "copypaste: " + ",".join(f"{value:.4f}" for value in chosen.values()),
        ]
    return lines


def unmet_expectations(tasks: Tasks, expected: Sequence[tuple[str, str, float, float]]) -> list[str]:
    """What TEST.EXPECTED_RESULTS asks for and the results do not give.

    Args:
        tasks: the results of one data set in one mode.
        expected: (task, metric, value, tolerance), in percent.

    Returns:
        One sentence for each that is missing, not finite or out of tolerance.
    """
    failures = []
    for task, metric, value, tolerance in expected:
        result = tasks.get(task, {}).get(metric)
        if result is None:
            failures.append(f"{task}/{metric} was not evaluated; expected {value}")
        elif not math.isfinite(result) or abs(result - value) > tolerance:
            failures.append(f"{task}/{metric} is {result:.4f}; expected {value} within {tolerance}")
    return failures


def write_results(
    path: str | os.PathLike,
    sets: Mapping[str, Mapping[str, Tasks]],
    *,
    seconds: Mapping[str, float],
    commit: str | None = None,
) -> None:
    """Writes `results.json`: the headline numbers of each set and mode in percent, null where undefined.

    The file is complete or not there.

    Args:
        path: the file; its folder is made when missing.
        sets: the results.
        seconds: how long each stage took.
        commit: of the code; None: asked of git.
    """
    content = {
        "schema": SCHEMA,
        "commit": current_commit() if commit is None else commit,
        "sets": {
            set_name: {mode: headlines(tasks) for mode, tasks in modes.items()} for set_name, modes in sets.items()
        },
        "seconds": dict(seconds),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content, indent=2)


def current_commit() -> str:
    """The commit of the source tree, with `-dirty` when it was changed since; `unknown` outside a git checkout."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():  # installed: the folders above are not ours
        return "unknown"
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=tree,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return "unknown"
    return described.stdout.strip()
