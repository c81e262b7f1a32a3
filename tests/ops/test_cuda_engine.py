"""The CUDA engine around its kernels: what it is compiled for and what it says when it cannot be; compiling where nvcc
is. What its kernels compute is in test_cuda_on_cpu.py and, on a GPU, in test_ms_deform_attn.py and test_on_gpu.py.
"""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch

from fcclip.ops import builder, cuda_engine
from fcclip.ops.build import main
from fcclip.ops.builder import SOURCES, BuildError, NoCompilerError, build
from fcclip.ops.cuda_engine import EXTENSION, MAX_LEVELS, target_architectures

SHELL = shutil.which("sh")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _a_machine_without_settings(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpus(monkeypatch):
    """Function (capabilities) -> nothing: from now on torch sees these GPUs."""

    def pretend(*capabilities):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        of = {CUDA: 0, 0: 0, 1: 1, 2: 2}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capabilities[of[device]])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: f"GPU {of[device]}")

    return pretend


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """Function (shell commands) -> nothing: $CUDA_HOME has an nvcc that tells its version, and otherwise does this."""
    if SHELL is None:
        pytest.skip("no shell for the compiler, which is a script")

    def install(commands, *, version="Build cuda_13.0.r13.0/compiler.1"):
        script = tmp_path / "cuda" / "bin" / "nvcc"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(
            f"""#!{SHELL}
case "$1" in
--version) echo "nvcc: a compiler"; echo "{version}"; exit 0;;
esac
{commands}
"""
        )
        script.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))

    return install


# ---- architectures ----


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0", ["sm_80"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.6 10.0", ["sm_86", "sm_100"]),
        ("9.0a 9.0", ["sm_90"]),
    ],
)
def test_the_list_of_torch_says_what_to_compile_for(monkeypatch, gpus, listed, expected):
    gpus((7, 5))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert target_architectures() == expected


def test_without_a_list_it_is_compiled_for_the_gpus_of_the_machine(gpus):
    gpus((9, 0), (8, 6), (9, 0))
    assert target_architectures() == ["sm_86", "sm_90"]


def test_without_gpus_it_is_compiled_for_two_generations_and_what_follows(no_gpu):
    assert target_architectures() == ["sm_80", "sm_90", "compute_90"]


def test_what_is_no_architecture_is_named(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(NoCompilerError, match=r"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0\+PTX', got 'Hopper'"):
        target_architectures()


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        (["sm_86"], [(8, 6), (8, 9)], [(8, 0)]),
        (["sm_80", "sm_90", "compute_90"], [(8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        (["sm_100"], [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_which_gpus_a_library_runs_on(architectures, runs, does_not):
    assert all(cuda_engine._covers(architectures, capability) for capability in runs)
    assert not any(cuda_engine._covers(architectures, capability) for capability in does_not)


# ---- what it says when it cannot run ----


def test_other_devices_and_machines_without_a_gpu_are_no_fault(no_gpu):
    for device, reason in (("cpu", "on CUDA devices, not on cpu"), ("cuda", "torch sees no NVIDIA GPU")):
        availability = cuda_engine.available(torch.device(device))
        assert reason in availability.reason and not availability.broken


def test_a_gpu_without_the_library_hears_how_to_build_it(gpus):
    gpus((9, 0))
    availability = cuda_engine.available(CUDA)
    assert "`python -m fcclip.ops.build cuda` builds it" in availability.reason and not availability.broken


def test_a_library_for_other_gpus_is_broken_and_says_so(gpus, monkeypatch):
    gpus((7, 5))
    for module in (builder, cuda_engine):
        monkeypatch.setattr(module, "load", lambda extension: None)
    monkeypatch.setattr(cuda_engine, "_architectures_of", lambda library: ["sm_80", "sm_90"])
    availability = cuda_engine.available(CUDA)
    assert availability.broken
    assert "built for sm_80, sm_90, which GPU 0 (sm_75) cannot run" in availability.reason
    assert "TORCH_CUDA_ARCH_LIST=7.5 python -m fcclip.ops.build cuda --force" in availability.reason
    gpus((8, 9))
    assert cuda_engine.available(CUDA)


def test_a_library_that_cannot_be_loaded_is_broken(gpus, monkeypatch):
    def load(extension):
        raise BuildError("its library cannot be loaded: truncated")

    gpus((9, 0))
    monkeypatch.setattr(builder, "load", load)
    availability = cuda_engine.available(CUDA)
    assert availability.broken and "truncated" in availability.reason


# ---- compilers that do not work ----


def test_without_nvcc_the_message_says_what_to_install(no_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(NoCompilerError, match="/bin/nvcc cannot be run: .* CUDA toolkit is needed .*CUDA_HOME"):
        build(EXTENSION)
    assert main(["cuda"]) == 1 and "cuda: not built: the compiler" in capsys.readouterr().err
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    with pytest.raises(NoCompilerError, match="compiler nvcc cannot be run: .*'triton' and 'torch' serve"):
        cuda_engine._compiler()


def test_an_nvcc_that_is_broken_is_shown_with_its_words(no_gpu, nvcc):
    nvcc("echo 'unsupported GNU version! gcc versions later than 13 are not supported' >&2; exit 1")
    with pytest.raises(BuildError, match=r"(?s)status 1:\nunsupported GNU version.*the command was: .*compute_90"):
        build(EXTENSION)


def test_other_architectures_and_other_toolkits_are_other_libraries(no_gpu, nvcc, monkeypatch):
    nvcc("")
    identities = {cuda_engine._compiler()[1]}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    identities.add(cuda_engine._compiler()[1])
    nvcc("", version="Build cuda_12.8.r12.8/compiler.2")
    identities.add(cuda_engine._compiler()[1])
    assert len(identities) == 3 and "Build cuda_13.0.r13.0/compiler.1 for sm_80 sm_90 compute_90" in identities


def test_the_command_line_tells_nvcc_what_to_compile_for(no_gpu, nvcc, tmp_path):
    nvcc(f'echo "$@" > "{tmp_path}/arguments"; exit 3')
    with pytest.raises(BuildError, match="status 3"):
        build(EXTENSION)
    passed = (tmp_path / "arguments").read_text()
    for argument in (
        "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
        '-DFCCLIP_ARCHITECTURES="sm_80 sm_90 compute_90"',
        str(SOURCES / "ms_deform_attn.cu"),
    ):
        assert argument in passed


# ---- compiling ----


def test_the_source_compiles_for_sm_80_and_sm_90_without_spilling_in_the_common_case(no_gpu, monkeypatch, tmp_path):
    """About half a minute on two cores."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0")
    try:
        command, _ = cuda_engine._compiler()
    except NoCompilerError as error:
        pytest.skip(str(error))
    built = tmp_path / "library.so"
    arguments = [*EXTENSION.arguments(command), "--resource-usage"]
    done = subprocess.run(
        [*command, str(SOURCES / EXTENSION.sources[0]), "-o", str(built), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    library = ctypes.CDLL(str(built))
    assert cuda_engine._architectures_of(library) == ["sm_80", "sm_90"]
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        done.stdout + done.stderr,
        re.DOTALL,
    )
    common = [kernel for kernel in kernels if re.search(r"msda_(forward|backward)IfLi4ELi8ELi3ELi4E", kernel[0])]
    assert sorted(kernel[1] for kernel in common) == ["sm_80", "sm_80", "sm_90", "sm_90"]
    assert all(int(spilled) == 0 and int(registers) <= 64 for _, _, spilled, registers in common), common


def test_what_the_source_and_the_engine_both_say_is_the_same():
    source = (SOURCES / EXTENSION.sources[0]).read_text()
    assert f"constexpr int kMaxLevels = {MAX_LEVELS};" in source
    assert "case 2: result = body(static_cast<__half*>" in source and cuda_engine._DTYPES[torch.float16] == 2
