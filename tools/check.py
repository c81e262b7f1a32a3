"""Whether config, weights, vocabulary, data and machine fit together: in seconds, before a GPU is taken.

    python tools/check.py --config-file configs/shapes/fcclip_shapes.yaml [--eval-only] [--weights FILE]
        [--num-gpus N] [--json FILE] [KEY VALUE ...]

Takes the arguments of train_net.py and looks at everything that such a run would read, without running it: the model is
built on torch's meta device, nothing is downloaded, nothing is written. Every mismatch is named, with what to do about
it. What training alone needs is a warning with --eval-only. Of a data set it reads the annotations and one image, and
looks whether some other files are there.

Leaves with 0, with 1 if anything is wrong, with 2 when the command line cannot be read.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fcclip.checks.issue import ERROR, WARNING
from fcclip.checks.printing import counted, new_console, print_issues, print_verdict
from fcclip.checks.run import check_run
from fcclip.errors import run_program
from fcclip.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks a command line of train_net.py and returns the exit code."""
    args = parse_arguments(arguments)
    began = time.perf_counter()
    issues = check_run(
        args.config_file,
        args.opts,
        weights=args.weights,
        training=not args.eval_only,
        world_size=max(args.num_gpus, 1),
    )
    console = new_console()
    print_issues(issues, console)
    verdict = counted(issues, (ERROR, WARNING)) or "everything fits together"
    print_verdict(issues, console, f"{verdict} (checked in {time.perf_counter() - began:.1f} s)")
    if args.json:
        write_json(args.json, {"schema": 2, **issues.as_dict()}, indent=2)
    return 1 if issues.count(ERROR) else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML file, or the name of a shipped one")
    parser.add_argument("--eval-only", action="store_true", help="the run is to evaluate; training needs less then")
    parser.add_argument("--weights", metavar="FILE", help="default: the config's MODEL.WEIGHTS")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes of the run (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the issues there")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys that override the file"
    )
    args = parser.parse_args(arguments)
    late = [word for word in args.opts if word.startswith("--")]
    if late:
        parser.error(f"{late[0]} must come before KEY VALUE")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
