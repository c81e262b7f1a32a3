"""Building the compiled engines: what is built, where it is kept, and what is said when it cannot be.

Most compilers here are shell scripts, which fail in ways that real ones do.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fcclip.ops import builder, cpp_engine, torch_engine
from fcclip.ops.build import main
from fcclip.ops.builder import BuildError, NoCompilerError, NotBuiltError, build, find, load
from fcclip.ops.cpp_engine import EXTENSION

ROOT = Path(__file__).resolve().parents[2]
SHELL = shutil.which("sh")

pytestmark = pytest.mark.skipif(SHELL is None, reason="no shell for the compilers that are scripts")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache: the folder of libraries, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fcclip" / "ops"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Function (shell commands) -> nothing: from now on these are the compiler, except for telling its version and
    checking flags. $OUT is the file to write; each compilation adds a line to the file `calls`.
    """

    def install(commands: str) -> None:
        script = tmp_path / "compiler"
        script.write_text(
            f"""#!{SHELL}
case "$*" in
*--version*) echo "pretended 1.0"; exit 0;;
*-fsyntax-only*) exit 0;;
esac
echo called >> "{tmp_path}/calls"
while [ "$1" != -o ]; do shift; done
OUT=$2
{commands}
"""
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))

    return install


@pytest.fixture
def library(built, monkeypatch) -> Path:
    """A library that works."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(built("cpp")))
        return find(EXTENSION)


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_a_library_is_built_once_and_found_and_loaded(cache, compiler, library, tmp_path):
    compiler(f'cp "{library}" "$OUT"')
    assert find(EXTENSION) is None
    with pytest.raises(NotBuiltError, match="`python -m fcclip.ops.build cpp` builds it"):
        load(EXTENSION)
    path, fresh = build(EXTENSION)
    assert fresh and path.parent == cache and find(EXTENSION) == path
    assert load(EXTENSION).fcclip_msda_forward and load(EXTENSION) is load(EXTENSION)
    assert build(EXTENSION) == (path, False)
    assert build(EXTENSION, force=True) == (path, True)
    assert (tmp_path / "calls").read_text().count("called") == 2
    assert left_in(cache) == [path.name, "cpp.lock"]


def test_the_command_builds_what_is_missing_and_says_where(cache, compiler, library, monkeypatch, capsys):
    monkeypatch.setattr("fcclip.ops.build.ENGINES", {"cpp": cpp_engine, "torch": torch_engine})
    compiler(f'cp "{library}" "$OUT"')
    assert main([]) == 0 and main(["cpp"]) == 0 and main(["cpp", "--force"]) == 0
    first, second, third = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cpp: ")]
    assert first.startswith("cpp: built in ") and str(cache) in first
    assert second.startswith("cpp: already built: ") and third.startswith("cpp: built in ")
    assert main(["cppp"]) == 1
    assert "unknown compiled engine 'cppp'. Did you mean 'cpp'?" in capsys.readouterr().err


def test_without_a_compiler_the_message_says_what_to_install(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CXX", f"'{tmp_path}/nothing here'")
    with pytest.raises(NoCompilerError, match=r"nothing here.* cannot be run: .*`apt install g\+\+`.* CXX .* serves"):
        build(EXTENSION)
    assert main(["cpp"]) == 1 and "cpp: not built: the compiler" in capsys.readouterr().err
    assert left_in(cache) == []


def test_a_compiler_that_does_not_even_tell_its_version(cache, monkeypatch, tmp_path):
    script = tmp_path / "broken"
    script.write_text(f"#!{SHELL}\necho cannot find libmpfr.so >&2\nexit 127\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(NoCompilerError, match=r"does not work: .* status 127: cannot find libmpfr.so. GCC or Clang"):
        build(EXTENSION)


def test_the_words_of_a_compiler_that_fails_are_shown_with_its_command(cache, compiler, capsys):
    compiler("echo 'fatal error: omp.h: No such file' >&2; exit 4")
    with pytest.raises(BuildError, match=r"(?s)status 4:\nfatal error: omp.h: No such file\nthe command was: .*-O3"):
        build(EXTENSION)
    assert main(["cpp"]) == 1 and "omp.h" in capsys.readouterr().err
    assert left_in(cache) == ["cpp.lock"] and find(EXTENSION) is None


@pytest.mark.parametrize("commands", ["exit 0", 'echo "no library" > "$OUT"'], ids=["nothing", "no library"])
def test_what_is_no_library_is_not_kept(cache, compiler, commands):
    compiler(commands)
    with pytest.raises(BuildError, match="cannot be loaded: .*this is an error of the build"):
        build(EXTENSION)
    assert left_in(cache) == ["cpp.lock"]


def test_a_library_that_computes_wrong_numbers_is_not_kept(cache, compiler, library, monkeypatch):
    compiler(f'cp "{library}" "$OUT"')
    monkeypatch.setattr("fcclip.ops.torch_engine._FAR_OUTSIDE", -3.0)
    monkeypatch.setattr("fcclip.ops.torch_engine._softmax", lambda logits: torch.full_like(logits, 0.5))
    with pytest.raises(BuildError, match="computes wrong numbers"):
        build(EXTENSION)
    assert left_in(cache) == ["cpp.lock"]


@pytest.mark.parametrize("kind", ["a file in the way", "no permission"])
def test_a_cache_that_cannot_be_written_is_named_with_a_way_out(compiler, library, tmp_path, monkeypatch, kind):
    compiler(f'cp "{library}" "$OUT"')
    root = tmp_path / "root"
    if kind == "no permission":
        if os.geteuid() == 0:
            pytest.skip("nothing is read-only for root")
        root.mkdir(mode=0o500)
    else:
        root.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    with pytest.raises(BuildError, match=r"the cache folder .* cannot be written: .*; set XDG_CACHE_HOME to a folder"):
        build(EXTENSION)
    assert find(EXTENSION) is None


def test_another_source_torch_or_processor_is_another_library(cache, compiler, library, monkeypatch, tmp_path):
    compiler(f'cp "{library}" "$OUT"')
    path, _ = build(EXTENSION)
    sources = tmp_path / "csrc"
    shutil.copytree(builder.SOURCES, sources)
    with (sources / EXTENSION.sources[0]).open("a") as file:
        file.write("// changed\n")
    for changed in (
        (builder, "SOURCES", sources),
        (torch, "__version__", "9.9"),
        (builder, "_instructions", lambda: "z80"),
    ):
        builder._key.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(*changed)
            assert find(EXTENSION) is None, changed[1]
    builder._key.cache_clear()
    assert find(EXTENSION) == path


def test_another_compiler_builds_its_own_and_the_newest_is_taken(cache, compiler, library, monkeypatch, tmp_path):
    compiler(f'cp "{library}" "$OUT"')
    first, _ = build(EXTENSION)
    os.utime(first, (1, 1))
    other = tmp_path / "other"
    shutil.copy(tmp_path / "compiler", other)
    monkeypatch.setenv("CXX", str(other))
    second, fresh = build(EXTENSION)
    assert fresh and second != first and find(EXTENSION) == second
    second.unlink()
    assert find(EXTENSION) == first


def start_build(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fcclip.ops.build", "cpp", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_two_processes_build_one_library_once(cache, compiler, library, tmp_path):
    compiler(f'sleep 2; cp "{library}" "$OUT"')
    said = [process.communicate(timeout=120) for process in [start_build(), start_build()]]
    assert sorted(out.split(":")[1].split(" in ")[0].strip() for out, _ in said) == ["already built", "built"], said
    assert (tmp_path / "calls").read_text() == "called\n"


def test_a_build_that_is_killed_leaves_nothing_half_and_no_lock(cache, compiler, library, tmp_path):
    compiler(f'head -c 1000 "{library}" > "$OUT"; sleep 60')
    process = start_build()
    deadline = time.monotonic() + 60
    while not list(cache.glob("*/*.so")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list(cache.glob("*/*.so"))) == 1 and find(EXTENSION) is None
    compiler(f'cp "{library}" "$OUT"')
    path, fresh = build(EXTENSION)
    assert fresh and left_in(cache) == [path.name, "cpp.lock"]
