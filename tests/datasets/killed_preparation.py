"""Runs a preparation program once for each folder and kills it at its n-th file: killed_preparation.py NAME ROOT ...

Each run is a child forked from here; prints how it ended, -9 for killed. At that moment the n-th file is half-written.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets"))


def run_and_die(name: str, root: str, number: int) -> None:
    replace, calls = os.replace, []

    def replace_or_die(source, target):
        calls.append(target)
        if len(calls) == number:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die
    os._exit(importlib.import_module(f"prepare_{name}").main(["--root", root, "--splits", "val", "--workers", "1"]))


if __name__ == "__main__":
    importlib.import_module(f"prepare_{sys.argv[1]}")
    for number, root in enumerate(sys.argv[2:], start=1):
        child = os.fork()
        if child == 0:
            run_and_die(sys.argv[1], root, number)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
