"""Toy models and trainers (toys.py) as fixtures."""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fvcore.common.config import CfgNode

from fcclip.engine import Trainer
from tests.engine.programs import Program
from tests.engine.toys import ToyModel, make_batch, make_trainer


@pytest.fixture
def toy() -> Callable[..., ToyModel]:
    """Seeded models; arguments as of ToyModel."""

    def build(seed: int = 0, **sizes: int) -> ToyModel:
        torch.manual_seed(seed)
        return ToyModel(**sizes)

    return build


@pytest.fixture
def toy_batch() -> Callable[..., list[dict]]:
    """(position, size=4) -> the batch of toy models at that position."""
    return make_batch


@pytest.fixture
def toy_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Trainers of toy models that write into a folder of the test; keywords as of `make_trainer`."""
    return functools.partial(make_trainer, folder=tmp_path)


@pytest.fixture
def start_program() -> Iterator[Callable[..., Program]]:
    """Starts programs (arguments as of Program), and kills what is left of them."""
    programs: list[Program] = []
    yield lambda *args, **kwargs: programs.append(Program(*args, **kwargs)) or programs[-1]
    for program in programs:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def train_net(monkeypatch) -> ModuleType:
    """The program as a module."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("train_net")


@pytest.fixture(scope="session")
def shapes_world(tmp_path_factory) -> Path:
    """A folder of data sets with six training images of shapes and two in every other set."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "datasets")
        prepare = importlib.import_module("prepare_shapes").prepare
        prepare(out=folder, seed=3, num_images=6, num_workers=1, num_evaluation=2)
    return folder


@pytest.fixture(scope="session")
def environment(shapes_world, tmp_path_factory) -> dict[str, str]:
    """Of a program that trains on `shapes_world`."""
    return os.environ | {
        "DETECTRON2_DATASETS": str(shapes_world),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache"),
    }


@pytest.fixture(scope="module")
def run_forked_trainings(environment, tmp_path_factory) -> Callable[[str, CfgNode], dict[str, dict]]:
    """(program, cfg) -> what a program of forked_trainings.py reports, by the name of the scenario."""

    def run(program: str, cfg: CfgNode) -> dict[str, dict]:
        folder = tmp_path_factory.mktemp("runs")
        config = folder / "tiny.yaml"
        config.write_text(cfg.dump())
        words = [sys.executable, str(Path(__file__).with_name(program)), str(config), str(folder / "runs")]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
        reports = [json.loads(path.read_text()) for path in (folder / "runs").glob("*/report.json")]
        return {report["name"]: report for report in reports}

    return run
