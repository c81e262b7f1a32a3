"""Fixtures that run a test with every engine of multi-scale deformable attention that this machine has.

A new engine joins by its line in `ENGINES`. Compiled ones are built once in a test session, into a cache of their own,
so that no other test finds them by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fcclip.ops import ENGINES
from fcclip.ops.builder import NoCompilerError, build


@dataclass(frozen=True)
class Engine:
    """What a test needs to know: the name to hand to the operator, and where its tensors must lie."""

    name: str
    device: str


def engines_and_devices() -> list:
    """Each engine on each kind of device it computes on, as parameters."""
    return [
        pytest.param(Engine(name, device), id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for name, module in ENGINES.items()
        for device in (module.DEVICES or ("cpu", "cuda"))
    ]


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Callable[[str], Path]:
    """Function (engine) -> the cache folder in which it is built; skips where there is no compiler."""
    folder = tmp_path_factory.getbasetemp() / "engines"  # one for all folders of tests that import this fixture
    failures: dict[str, str] = {}

    def build_once(name: str) -> Path:
        extension = getattr(ENGINES[name], "EXTENSION", None)
        if extension is not None and name not in failures:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(folder))
                try:
                    build(extension)
                    failures[name] = ""
                except NoCompilerError as error:
                    failures[name] = str(error)
        if failures.get(name):
            pytest.skip(failures[name])
        return folder

    return build_once


@pytest.fixture(params=engines_and_devices())
def engine(request, built, monkeypatch) -> Engine:
    """Every engine in turn, ready to run; skips, with the reason, what this machine cannot run."""
    engine: Engine = request.param
    if engine.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("XDG_CACHE_HOME", str(built(engine.name)))
    availability = ENGINES[engine.name].available(torch.device(engine.device))
    if not availability:
        assert not availability.broken, availability.reason
        pytest.skip(availability.reason)
    if engine.name == "triton":  # each of its kernels is compiled for each test: without tuning, one of many
        kernels = ENGINES["triton"]._kernels()
        for kernel in (kernels.forward, kernels.backward):
            monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    return engine


@pytest.fixture(params=["torch", "cpp"])
def output_functions(request, built, monkeypatch) -> str:
    """The plain functions that outputs are made with (`fcclip.ops.output_maps`), then the compiled ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(built(request.param)))
    monkeypatch.setenv("FCCLIP_MSDA", request.param)
    return request.param
