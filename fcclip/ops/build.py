"""Builds the compiled engines of multi-scale deformable attention into the user's cache folder.

    python -m fcclip.ops.build [ENGINE ...] [--force]

Without names, every engine whose compiler is there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from fcclip.config import lookup
from fcclip.errors import UserError, run_program
from fcclip.ops.builder import BuildError, NoCompilerError, build
from fcclip.ops.engines import ENGINES


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when everything that was asked for is there; without names, when anything is."""
    extensions = {name: engine.EXTENSION for name, engine in ENGINES.items() if hasattr(engine, "EXTENSION")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"of {', '.join(extensions)}")
    parser.add_argument("--force", action="store_true", help="build again what is there")
    options = parser.parse_args(arguments)
    built, failed = 0, 0
    for name in options.engines or extensions:
        began = time.perf_counter()
        try:
            path, fresh = build(lookup("compiled engine", name, extensions), force=options.force)
        except NoCompilerError as error:
            failed += bool(options.engines)
            print(f"{name}: not built: {error}", file=sys.stderr)
        except UserError as error:
            failed += 1
            print(f"{name}: {'not built: ' if isinstance(error, BuildError) else ''}{error}", file=sys.stderr)
        else:
            built += 1
            print(f"{name}: {f'built in {time.perf_counter() - began:.0f} s' if fresh else 'already built'}: {path}")
    return 1 if failed or not built else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
