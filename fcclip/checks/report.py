"""What a data set holds and what is wrong with it, as a record and in print."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fcclip.checks.issue import ERROR, WARNING, Issues
from fcclip.checks.printing import counted, print_issues, print_verdict, short
from fcclip.data import root_folder
from fcclip.data.transport import CompactRecords
from fcclip.vocabulary import Vocabulary


@dataclass
class ClassCount:
    """What a data set has of a class.

    Args:
        name: of the class.
        thing: whether it can be counted; None where the data set does not tell.
        seen: whether it shares a name with a training class; None: there are no training classes.
        images: in which it is.
        segments: segments or instances; in semantic sets the same as images.
        pixels: of all its segments.
    """

    name: str
    thing: bool | None
    seen: bool | None = None
    images: int = 0
    segments: int = 0
    pixels: int = 0


@dataclass
class DatasetReport:
    """What a data set holds, and what is wrong with it.

    Args:
        dataset: its name.
        kind: "panoptic", "instances" or "semantic".
        source: the annotation file, or the folder of label maps.
        issues: worst first when `check_dataset` returns.
        vocabulary: of the data set; None: it cannot be read.
        training: name of what the seen classes were seen in; None: nothing.
        num_images: records.
        num_published: images of the published set; None: there is none.
        classes: in order.
        records: of the data set, as far as they can be used; None: there are none.
    """

    dataset: str
    kind: str
    source: str
    issues: Issues = field(default_factory=Issues)
    vocabulary: Vocabulary | None = None
    training: str | None = None
    num_images: int = 0
    num_published: int | None = None
    classes: list[ClassCount] = field(default_factory=list)
    records: CompactRecords | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values; every issue and every class."""
        vocabulary = self.vocabulary
        return {
            **{key: getattr(self, key) for key in ("dataset", "kind", "source", "training")},
            "images": self.num_images,
            "published_images": self.num_published,
            "vocabulary": vocabulary
            and {
                "name": vocabulary.name,
                "sha256": vocabulary.hash,
                "published": vocabulary.is_published,
                "classes": len(vocabulary),
            },
            **self.issues.as_dict(),
            "classes": [asdict(entry) for entry in self.classes],
        }


def print_report(report: DatasetReport, console: Console, *, seconds: float) -> None:
    """A summary, the issues and a verdict."""
    console.print(Text(f"{report.dataset} ({report.kind})", style="bold"))
    for name, value in _summary(report).items():
        console.print(Text(f"  {name:<11}{value}"))
    issues = report.issues
    print_issues(issues, console)
    state = "usable; look at the warnings" if issues.count(WARNING) else "in order"
    state = "not fit for use" if issues.count(ERROR) else state
    numbers = f" ({counted(issues)})" if issues else ""
    print_verdict(issues, console, f"{report.dataset}: {state}{numbers}; checked in {seconds:.1f} s")


def _summary(report: DatasetReport) -> dict[str, str]:
    """What the data set is, in lines: heading -> text."""
    root, classes, vocabulary = root_folder(), report.classes, report.vocabulary
    source = short(report.source)
    lines = {"files": f"{source} below {root}" if Path(report.source).is_relative_to(root) else source}
    if vocabulary is not None:
        origin = "published" if vocabulary.is_published else "not published"
        size = f"{len(vocabulary)} classes, {sum(map(len, vocabulary.synonyms)):,} names"
        lines["vocabulary"] = f"'{vocabulary.name}' ({origin}), {size}, sha256 {vocabulary.hash[:12]}"
    if report.records is not None:
        published = "" if report.num_published is None else f" (published: {report.num_published:,})"
        lines["images"] = f"{report.num_images:,}{published}"
    if classes:
        things = sum(entry.thing is True for entry in classes)
        kinds = f"{things} things, {len(classes) - things} stuff"
        kinds = "things and stuff are not told apart" if classes[0].thing is None else kinds
        used = f", {sum(entry.images > 0 for entry in classes)} of them used" if report.records is not None else ""
        lines["classes"] = f"{len(classes)}{used}; {kinds}"
        if report.training is not None:
            seen = sum(bool(entry.seen) for entry in classes)
            shared = f"{seen} share a name with the training vocabulary '{report.training}'"
            lines["seen"] = f"{shared}, {len(classes) - seen} are unseen"
    if report.records is not None and report.kind != "semantic":
        what = "segments" if report.kind == "panoptic" else "instances"
        lines[what] = f"{sum(entry.segments for entry in classes):,}"
    return lines
