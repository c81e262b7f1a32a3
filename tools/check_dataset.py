"""Whether the files of a data set are whole and fit together: before a GPU is taken.

    python tools/check_dataset.py NAME_OR_YAML [NAME_OR_YAML ...] [--preview 12] [--output FILE] [--workers N]

Takes registered names (`openvocab_coco_2017_val_panoptic_with_sem_seg`, `shapes_val`, ...) and the YAML files of own
data. Looks at the annotation file, the classes, every image and its labels, as training and evaluation would read
them. Nothing is written but what --output and --preview ask for.

    error    training or evaluation stops at it, or uses wrong labels
    warning  they run, but probably not as meant
    note     good to know

Leaves with 0, with 1 if there are errors, with 2 when the command line cannot be used.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from fcclip.checks.dataset import check_dataset
from fcclip.checks.issue import ERROR
from fcclip.checks.preview import write_preview
from fcclip.checks.printing import new_console, progress
from fcclip.checks.report import print_report
from fcclip.data import dataset_vocabulary, get_dataset
from fcclip.errors import run_program
from fcclip.files import write_json
from fcclip.preparation.programs import default_processes

_SHAPES, _COCO = "shapes_train", "openvocab_coco_2017_train_panoptic_with_sem_seg"  # whose classes count as seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the data sets of a command line and returns the exit code."""
    args = parse_arguments(arguments)
    try:
        datasets = [get_dataset(name) for name in args.datasets]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console, reports = new_console(), []
    for dataset in datasets:
        began = time.perf_counter()
        training = dataset_vocabulary(_SHAPES if dataset.name.startswith("shapes_") else _COCO)
        with progress(dataset.name) as advance:
            report = check_dataset(dataset, workers=args.workers, progress=advance, training=training)
        reports.append(report)
        print_report(report, console, seconds=time.perf_counter() - began)
        if args.preview and report.records is not None:
            folder = args.output.parent if args.output else Path("output")
            path = folder / f"{report.dataset}_preview.jpg"
            number = write_preview(report, path, args.preview)
            console.print(Text(f"{number} images with their labels: {path}"))
        console.print()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, {"schema": 2, "reports": [report.as_dict() for report in reports]}, indent=1)
        console.print(Text(f"every issue and every class: {args.output}"))
    return 1 if any(report.issues.count(ERROR) for report in reports) else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("datasets", nargs="+", metavar="NAME_OR_YAML", help="registered data sets, or YAML files")
    add("--preview", type=int, metavar="N", help="write a sheet of N images with their labels drawn")
    add("--output", "--json", type=Path, metavar="FILE", help="write every issue and every class there, as JSON")
    processes = default_processes()
    add("--workers", type=int, default=processes, metavar="N", help="processes (default: one a core; 0: none)")
    args = parser.parse_args(arguments)
    if args.workers < 0:
        parser.error(f"--workers must be 0 or more, got {args.workers}")
    if args.preview is not None and args.preview < 1:
        parser.error(f"--preview must be 1 or more, got {args.preview}")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
