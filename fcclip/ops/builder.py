"""Builds the compiled engines into the user's cache folder, and loads them from there.

A finished library is one file, `<engine>-<key>-<compiler>.so`. The key is made of the sources, of torch's version and
of the instructions of the processor, so a home folder shared by different machines holds one library for each. It
appears under its name in one step, when it has been built, loaded and tried out: a build that is killed leaves nothing
that could be taken for a library. The compiler is called directly rather than through torch.utils.cpp_extension.load:
one call needs no ninja, nothing waits for the lock of a killed build, and a failure is shown as the compiler wrote it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from fcclip.config import cache_folder
from fcclip.errors import UserError
from fcclip.ops.availability import Availability

SOURCES = Path(__file__).parent / "csrc"
COMMAND = "python -m fcclip.ops.build"

_LIBRARIES = "ops"  # below the user's cache folder
_SHOWN_LINES = 20  # of a compiler's complaints
_WORK = ".building-"


class BuildError(UserError, ValueError):
    """A library that cannot be built or loaded; the message says why and what to do."""


class NotBuiltError(BuildError):
    """There is no library for this machine yet."""


class NoCompilerError(BuildError):
    """The compiler is missing or does not work."""


@dataclass(frozen=True)
class Extension:
    """What the builder must know of a compiled engine.

    Attributes:
        name: of the engine.
        sources: files in csrc/, compiled in one call.
        headers: files in csrc/ that those include.
        compiler: () -> its command and a line that tells its version; raises NoCompilerError.
        arguments: compiler's command -> what follows the source.
        try_out: takes the fresh library through a small problem; raises BuildError.
    """

    name: str
    sources: tuple[str, ...]
    compiler: Callable[[], tuple[list[str], str]]
    arguments: Callable[[list[str]], list[str]]
    try_out: Callable[[ctypes.CDLL], None]
    headers: tuple[str, ...] = ()


def find(extension: Extension) -> Path | None:
    """The newest library that was built for this source, torch and processor, by whatever compiler."""
    with contextlib.suppress(OSError):
        libraries = cache_folder(_LIBRARIES).glob(f"{extension.name}-{_key(extension)}-*.so")
        return max(libraries, key=lambda path: path.stat().st_mtime, default=None)
    return None


def load(extension: Extension) -> ctypes.CDLL:
    """The library of an engine; loaded once per process.

    Raises:
        NotBuiltError: there is none.
        BuildError: there is one that cannot be loaded.
    """
    return _load(extension, cache_folder(_LIBRARIES))


def availability(extension: Extension) -> Availability:
    """Whether the library of an engine is there and can be loaded."""
    try:
        load(extension)
    except NotBuiltError as error:
        return Availability(str(error))
    except BuildError as error:
        return Availability(str(error), broken=True)
    return Availability()


@functools.cache
def _load(extension: Extension, _folder: Path) -> ctypes.CDLL:
    path = find(extension)
    if path is None:
        raise NotBuiltError(f"it is not built; `{COMMAND} {extension.name}` builds it")
    return _open(path, f"`{COMMAND} {extension.name} --force` builds it again")


def _open(path: Path, advice: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"its library {path} cannot be loaded: {error}; {advice}") from error


def build(extension: Extension, *, force: bool = False) -> tuple[Path, bool]:
    """Builds the library of an engine unless it is there; two processes that want it build it once.

    Args:
        extension: of the engine.
        force: build it again.

    Returns:
        The library, and whether it was built by this call.

    Raises:
        NoCompilerError: no compiler, or one that does not work.
        BuildError: the source does not compile, the result does not work, or the cache folder cannot be written.
    """
    command, version = extension.compiler()
    folder = cache_folder(_LIBRARIES)
    identity = hashlib.sha256("\n".join([*command, version]).encode()).hexdigest()[:8]
    target = folder / f"{extension.name}-{_key(extension)}-{identity}.so"
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{extension.name}.lock")  # the system frees it when its owner dies
        lock.acquire()
    try:
        if target.exists() and not force:
            return target, False
        for left_over in folder.glob(f"{_WORK}{extension.name}-*"):  # of builds that were killed; we hold the lock
            shutil.rmtree(left_over, ignore_errors=True)
        with _writable(folder), tempfile.TemporaryDirectory(dir=folder, prefix=f"{_WORK}{extension.name}-") as work:
            fresh = Path(work, target.name)
            sources = [str(SOURCES / source) for source in extension.sources]
            _compile([*command, *sources, "-o", str(fresh), *extension.arguments(command)])
            extension.try_out(_open(fresh, "this is an error of the build"))
            os.replace(fresh, target)
    finally:
        lock.release()
    _load.cache_clear()
    return target, True


def int64s(numbers: Sequence[int]) -> ctypes.Array:
    """Numbers as the compiled engines take them."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def ask_compiler(command: list[str], question: str, advice: str) -> str:
    """What a compiler prints when it is called with `question`, such as "--version".

    Raises:
        NoCompilerError: it is not there, fails or prints nothing; the message ends with `advice`.
    """
    try:
        done = subprocess.run([*command, question], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompilerError(f"the compiler {shlex.join(command)} cannot be run: {error}. {advice}") from error
    if done.returncode or not done.stdout.strip():
        raise NoCompilerError(
            f"the compiler {shlex.join(command)} does not work: `{question}` ended with status {done.returncode}: "
            f"{_last_lines(done.stderr or done.stdout)}. {advice}"
        )
    return done.stdout.strip()


def accepts(command: list[str], *flags: str, program: str = "int main() { return 0; }\n") -> bool:
    """Whether a C++ compiler takes these flags for a program; looks at its syntax alone."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        arguments = [*command, *flags, "-Werror", "-fsyntax-only", "-x", "c++", "-"]
        return subprocess.run(arguments, input=program, capture_output=True, text=True, timeout=60).returncode == 0
    return False


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NoCompilerError(f"the compiler cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(
            f"the compiler failed with status {done.returncode}:\n{_last_lines(done.stderr or done.stdout)}\n"
            f"the command was: {shlex.join(command)}"
        )


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_SHOWN_LINES:]) or "no message"


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} cannot be written: {error}; set XDG_CACHE_HOME to a folder that can"
        ) from error


@functools.cache
def _key(extension: Extension) -> str:
    sources = [(SOURCES / name).read_bytes() for name in (*extension.sources, *extension.headers)]
    parts = (*sources, torch.__version__.encode(), _instructions().encode())
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _instructions() -> str:
    """What the processor of this machine can do, as its system tells it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        return f"{platform.machine()} {' '.join(sorted(flags.partition(':')[2].split()))}"
    return f"{platform.system()} {platform.machine()} {platform.processor()}"
