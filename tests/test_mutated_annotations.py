"""Annotations with something wrong in them: check, training and evaluation agree, nothing is lost in silence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 2000


@pytest.mark.slow
def test_two_thousand_mutated_annotations_are_used_or_refused_alike(tmp_path):
    half = SEEDS // 2
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(__file__).with_name("mutated_annotations.py"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [
        subprocess.Popen([*program, str(tmp_path / str(part)), str(part * half), str(part * half + half)], **pipes)
        for part in range(2)
    ]
    for process in processes:
        output, log = process.communicate(timeout=1500)
        assert process.returncode == 0, f"{log.splitlines()[-1:]} ended with {process.returncode}"
        *wrong, last = map(json.loads, output.splitlines())
        assert last == {"tried": half} and not wrong, wrong[:3]
