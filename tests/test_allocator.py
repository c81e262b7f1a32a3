"""What a process does with memory that it frees, counted in page faults of processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from fcclip.allocator import described

PROGRAM = """
import resource
from fcclip.errors import run_program

def main():
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(64 * 2**20)  # 16,384 pages of zeros
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    print(min(faults() for _ in range(3)))

run_program(main)
"""


def faults_of_64_mib(**variables: str) -> int:
    root = str(Path(__file__).parents[1])
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": root, **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's")
def test_a_program_takes_its_freed_memory_again_unless_the_user_chose_otherwise():
    assert faults_of_64_mib() < 1000
    assert faults_of_64_mib(FCCLIP_MALLOC="default") > 10_000
    assert faults_of_64_mib(MALLOC_MMAP_THRESHOLD_="131072") > 10_000  # glibc's own variables win


def test_the_variables_are_told(monkeypatch):
    monkeypatch.setenv("FCCLIP_MALLOC", "default")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")  # of nobody: glibc's end with an underscore
    monkeypatch.setenv("MALLOC_ARENA_MAX_", "2")
    assert "FCCLIP_MALLOC=default, MALLOC_ARENA_MAX_=2" in described()
