"""Which engine runs, and what the log says about it."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from fcclip.ops import ENGINES, build_advice, engines, ms_deform_attn_fused, select_engine
from fcclip.ops.availability import Availability
from fcclip.ops.builder import find
from tests.ops.test_ms_deform_attn import inputs


@pytest.fixture(autouse=True)
def _a_process_that_has_not_chosen(monkeypatch):
    monkeypatch.delenv("FCCLIP_MSDA", raising=False)
    engines._choose.cache_clear()
    yield
    engines._choose.cache_clear()


@pytest.fixture
def log(caplog):
    """Function () -> what was logged since the last call, one string per record, with its level."""
    caplog.set_level(logging.INFO)

    def take() -> list[str]:
        said = [f"{record.levelname}: {record.getMessage()}" for record in caplog.records]
        caplog.clear()
        return said

    return take


def fake(*, reason="", broken=False, devices=("cpu",)):
    return SimpleNamespace(DEVICES=devices, available=lambda device: Availability(reason, broken))


def run(engine):
    return ms_deform_attn_fused(*with_shapes(inputs([(2, 3)], form="fused", dtype=torch.float32)), engine=engine)


def test_auto_takes_plain_torch_where_nothing_is_built_and_says_how_to_build(log):
    assert select_engine("auto") == "auto"
    (line,) = log()
    assert line.startswith("INFO: multi-scale deformable attention: engine 'torch' on cpu (auto; not 'cpp': it is not")
    assert "python -m fcclip.ops.build cpp" in line
    torch.testing.assert_close(run("auto"), run("torch"), rtol=0, atol=0)


def test_auto_takes_what_is_built(built, monkeypatch, log):
    monkeypatch.setenv("XDG_CACHE_HOME", str(built("cpp")))
    select_engine("auto")
    assert log() == ["INFO: multi-scale deformable attention: engine 'cpp' on cpu (auto)"]
    torch.testing.assert_close(run("auto"), run("cpp"), rtol=0, atol=0)


def test_auto_takes_the_fastest_that_can_run_and_looks_only_at_those_of_the_device(monkeypatch, log):
    monkeypatch.setattr(engines, "AUTO", ("gpu", "slow", "torch"))
    monkeypatch.setitem(ENGINES, "gpu", fake(devices=("cuda",)))
    monkeypatch.setitem(ENGINES, "slow", fake(reason="no licence"))
    assert engines.automatic_engine("cpu") == "torch"
    assert engines.automatic_engine("cuda") == "gpu"
    assert [line.partition("engine ")[2] for line in log()] == [
        "'torch' on cpu (auto; not 'slow': no licence)",
        "'gpu' on cuda (auto)",
    ]


def test_something_broken_is_one_warning_with_its_cause(built, monkeypatch, tmp_path, log):
    library = find_in(built("cpp"), monkeypatch)
    folder = tmp_path / "fcclip" / "ops"
    folder.mkdir(parents=True)
    (folder / library.name).write_bytes(library.read_bytes()[:100])  # a disk that was full
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        assert engines.automatic_engine("cpu") == "torch"
    warning, choice = log()
    assert warning.startswith("WARNING: multi-scale deformable attention: engine 'cpp' is broken: its library")
    assert f"{library.name} cannot be loaded: " in warning
    assert "python -m fcclip.ops.build cpp --force" in warning
    assert choice.endswith("engine 'torch' on cpu (auto; not 'cpp': broken)")
    with pytest.raises(ValueError, match="MODEL.MSDA_ENGINE asks for the engine 'cpp' .* cannot be loaded"):
        select_engine("cpp")


def test_a_faster_engine_is_advised_where_it_can_be_built(built, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "AUTO", ("cpp", "torch"))
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    assert build_advice("cpu") == ""
    folder = built("cpp")
    monkeypatch.setenv("CXX", "c++")
    if shutil.which("c++"):
        assert build_advice("cpu").startswith(
            "`python -m fcclip.ops.build cpp` (or `make build`) builds a faster engine"
        )
    assert build_advice("cuda") == ""  # none of these is for a GPU
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert build_advice("cpu") == ""


def test_an_engine_that_is_asked_for_runs_or_says_why_not(built, monkeypatch, log):
    with pytest.raises(
        ValueError, match="'cpp' .* cannot run on cpu: it is not built; `python -m fcclip.ops.build cpp`"
    ):
        select_engine("cpp")
    with pytest.raises(ValueError, match="it is not built"):
        run("cpp")
    with pytest.raises(ValueError, match="'cpp' .* cannot run on cuda: it computes on the CPU"):
        select_engine("cpp", "cuda")
    monkeypatch.setenv("XDG_CACHE_HOME", str(built("cpp")))
    assert select_engine("cpp") == "cpp" and select_engine("torch", "cuda") == "torch"
    assert log() == [
        "INFO: multi-scale deformable attention: engine 'cpp', asked for",
        "INFO: multi-scale deformable attention: engine 'torch', asked for",
    ]


def test_an_engine_may_be_asked_for_where_there_are_only_shapes():
    assert select_engine("cpp", "meta") == "cpp"
    with pytest.raises(ValueError, match="unknown engine"):
        select_engine("ccp", "meta")


def test_the_variable_wins_over_the_key(monkeypatch):
    monkeypatch.setenv("FCCLIP_MSDA", "torch")
    assert select_engine("cpp") == "torch"
    monkeypatch.setenv("FCCLIP_MSDA", "cpp")
    with pytest.raises(ValueError, match="the variable FCCLIP_MSDA asks for the engine 'cpp'"):
        select_engine("torch")
    monkeypatch.setenv("FCCLIP_MSDA", "nothing")
    with pytest.raises(ValueError, match="unknown engine .* 'nothing'"):
        select_engine("torch")
    monkeypatch.setenv("FCCLIP_MSDA", "")
    with pytest.raises(ValueError, match="unknown engine .* 'tritn'"):
        select_engine("tritn")


def test_every_engine_of_auto_exists_and_the_last_runs_everywhere():
    assert {*engines.AUTO, "gather"} == set(ENGINES)  # which is for exports
    assert engines.AUTO[-1] == "torch" and ENGINES["torch"].DEVICES == ()
    for name, module in ENGINES.items():
        functions = ("available", "forward", "backward")
        assert all(callable(getattr(module, function)) for function in functions), name


def test_a_model_says_its_engine_and_runs_with_it(built, monkeypatch, tiny_cfg, tiny_model, log):
    monkeypatch.setenv("XDG_CACHE_HOME", str(built("cpp")))
    tiny_cfg.MODEL.MSDA_ENGINE = "cpp"
    model = tiny_model(cfg=tiny_cfg)
    assert "INFO: multi-scale deformable attention: engine 'cpp', asked for" in log()
    called = []
    original = ENGINES["cpp"].forward
    monkeypatch.setattr(ENGINES["cpp"], "forward", lambda *inputs: called.append(1) or original(*inputs))
    model([{"image": torch.zeros(3, 64, 64)}])
    assert called


def find_in(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        return find(ENGINES["cpp"].EXTENSION)


def with_shapes(tensors):
    value, points, weights, _ = tensors
    return value, [(2, 3)], points, weights
