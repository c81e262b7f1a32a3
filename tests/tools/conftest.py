"""Programs as modules, and a small shapes world that a test may damage."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def load_program(path: Path) -> ModuleType:
    """A program of a folder that is no package, as a module; it finds those beside it, as when it is run."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The shapes world with three training images and two in every other set."""
    root = tmp_path_factory.mktemp("datasets")
    program = load_program(REPOSITORY / "datasets" / "prepare_shapes.py")
    program.prepare(out=root, seed=3, num_images=3, num_workers=1, num_evaluation=2)
    return root


@pytest.fixture
def root(world, tmp_path, monkeypatch) -> Path:
    """A world of its own for each test, where data sets are looked for; the present folder is `tmp_path`."""
    root = tmp_path / "datasets"
    shutil.copytree(world, root)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    monkeypatch.chdir(tmp_path)
    return root
