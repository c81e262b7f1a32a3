"""The preparation programs, run in the test's own process on data sets of four tiny images."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from fcclip.errors import run_program
from tests.tools.conftest import REPOSITORY, load_program

sys.path.insert(0, str(REPOSITORY / "datasets"))  # processes that a program starts find it by this path too


@pytest.fixture(scope="session")
def downloads() -> ModuleType:
    """downloads.py: writes data sets as they come from their sites."""
    return load_program(Path(__file__).with_name("downloads.py"))


@pytest.fixture
def program() -> Callable[[str], ModuleType]:
    """Function (name without prepare_) -> the program as a module."""
    return lambda name: importlib.import_module(f"prepare_{name}")


@pytest.fixture
def prepare(tmp_path, program) -> Callable[..., int]:
    """Function (name without prepare_, flags) -> exit status of the program, run on `tmp_path`."""

    def run(name: str, *flags: str) -> int:
        return run_program(lambda: program(name).main(["--root", str(tmp_path), "--workers", "1", *flags]))

    return run


@pytest.fixture
def values(tmp_path) -> Callable[[str], list]:
    """Function (path below `tmp_path`) -> the pixels of an image of one channel, as lists."""

    def read(path: str) -> list:
        with Image.open(tmp_path / path) as image:
            assert image.mode in ("L", "I;16"), image.mode
            return np.array(image).tolist()

    return read


@pytest.fixture
def files(tmp_path) -> Callable[[], dict[str, tuple[int, bytes]]]:
    """Function () -> name: (time of the last change, content) of every file below `tmp_path`."""

    def read() -> dict[str, tuple[int, bytes]]:
        paths = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
        return {str(path.relative_to(tmp_path)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    return read
