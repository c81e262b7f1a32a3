"""Files of weights, read without ever running what is in them.

safetensors; `torch.save` files, by `torch.load(weights_only=True)` after a look at their pickles, since some hostile
ones make torch crash or hand out whatever memory holds; and by the reader of `pickles.py` TorchScript archives such as
OpenAI's CLIP, pickles of arrays or tensors, and `torch.save` files with NumPy values. The code inside a TorchScript
archive is looked at as text, for the names of its parameters and buffers.
"""

from __future__ import annotations

import io
import json
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fcclip.errors import InputError, MissingFileError
from fcclip.files import listed
from fcclip.weights.pickles import (
    VERSIONS,
    PickleReader,
    Record,
    Storage,
    UnreadableFileError,
    UnsafeFileError,
    check_legacy,
    claimed,
    plain,
)

__all__ = ["VERSIONS", "UnsafeFileError", "WeightFile", "read_plain_data", "read_weight_file"]

_WRAPPERS = ("model", "state_dict")
_MODULE_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning
_TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # near the start of torch.save files before torch 1.6
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}
_MAX_TEXT = 1 << 28  # bytes of the text of a class, and of a pickle inside an archive
_MAX_MODULES, _MAX_NAME = 100_000, 10_000  # modules in a TorchScript archive, letters of the longest name
_AGAIN = "Copy or download it again"


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds.

    Args:
        tensors: name -> tensor as stored, on the CPU, without the prefixes `module.`, `_orig_mod.` and `model.` where
            all names have them, and without the wrapper `model` or `state_dict`.
        rest: the other entries of the file; for safetensors its metadata, parsed where it is JSON.
        kind: "safetensors"; "torch" (of `torch.save`); "torchscript"; "pickle" (of plain arrays or tensors).
        versions: module name -> what torch keeps beside a state dict, such as {"version": 2}; {} where absent.
    """

    tensors: dict[str, Tensor]
    rest: dict[str, Any]
    kind: str
    versions: dict[str, Any] = field(default_factory=dict)


def read_weight_file(path: str | Path, *, what: str = "weights file") -> WeightFile:
    """Reads the weights of a file onto the CPU; its format is told by its content, not by its name.

    Args:
        path: the file.
        what: what it is to the user, for messages.

    Raises:
        MissingFileError: there is no such file.
        UnsafeFileError: only running code could open it.
        InputError: it is empty, cut off, damaged, something else than a file of weights, or holds no state dict.
    """
    return _read(Path(path), what, _weights)


def read_plain_data(path: str | Path, *, what: str = "checkpoint") -> Any:
    """The whole content of a `torch.save` file or a pickle: tensors, numbers, strings and containers of them.

    Raises:
        MissingFileError, UnsafeFileError, InputError: as `read_weight_file`; other kinds of files are an InputError.
    """
    return _read(Path(path), what, _plain_data)


def _weights(path: Path) -> WeightFile:
    content, kind = _content(path)
    if kind in ("safetensors", "torchscript"):
        tensors, rest = content
        versions = rest.pop(VERSIONS, None)
    else:
        tensors, rest, versions = _state_dict(content)
    versions = dict(versions) if isinstance(versions, Mapping) else {}
    if not tensors:
        raise UnreadableFileError("holds no tensors")
    while wrappers := [prefix for prefix in _MODULE_WRAPPERS if all(name.startswith(prefix) for name in tensors)]:
        tensors = {name.removeprefix(wrappers[0]): value for name, value in tensors.items()}
        versions = {f"{name}.".removeprefix(wrappers[0])[:-1]: value for name, value in versions.items() if name}
    return WeightFile(dict(tensors), rest, kind, versions)


def _plain_data(path: Path) -> Any:
    content, kind = _content(path)
    if kind in ("safetensors", "torchscript"):
        raise UnreadableFileError(f"is a {kind} file, which holds weights only; expected one of torch.save")
    return plain(content)


# ---- what kind of file it is ----


def _read(path: Path, what: str, read: Callable[[Path], Any]) -> Any:
    """What `read` returns; every error says which file it is about."""
    if not path.is_file():
        hint = " (it is a folder; give a file in it)" if path.is_dir() else ""
        raise MissingFileError(f"{what} '{path}' does not exist{hint}")
    place, size = f"{what} '{path}'", path.stat().st_size
    try:
        _refuse_other_files(path, size)
        return read(path)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{place} {error}") from error
    except UnreadableFileError as error:
        raise InputError(f"{place} {error}") from error
    except PermissionError:
        raise
    except Exception as error:  # what damaged bytes do to a parser cannot be listed
        reason = " ".join(str(error).split())[:120] or "no reason given"
        raise InputError(
            f"{place} cannot be read: it is damaged, cut off or no checkpoint ({size} bytes; {type(error).__name__}: "
            f"{reason}). {_AGAIN}, or use an earlier checkpoint."
        ) from error


def _content(path: Path) -> tuple[Any, str]:
    """(content, kind); the content is (tensors, rest) for safetensors and TorchScript."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if stream[:2] == b"PK":
            return _read_zip(path)
        if _TORCH_MAGIC in stream[:32]:
            check_legacy(stream, size)
            return _torch_load(path), "torch"
        header = int.from_bytes(stream[:8], "little")
        if path.suffix == ".safetensors" or (stream[8:9] == b"{" and header <= size):
            return _read_safetensors(path, size), "safetensors"
        return PickleReader(stream).load(), "pickle"


def _torch_load(path: Path) -> Any:
    with path.open("rb") as file:  # given a path, torch goes by its suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def _refuse_other_files(path: Path, size: int) -> None:
    """Tells what people mistake for weights, by the first bytes."""
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    packed = [name for magic, name in _PACKED.items() if start.startswith(magic)]
    reason = None
    if not size:
        reason = f"is empty: it is damaged, cut off or no checkpoint (0 bytes). {_AGAIN}."
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = (
            f"is a web page ({size} bytes), not weights: the link leads to a page, or the download wants a login or a "
            "confirmation. Download the file itself."
        )
    elif text.startswith(b"version https://git-lfs"):
        reason = (
            f"is a pointer of Git LFS ({size} bytes), not the weights it stands for: run `git lfs pull` in its "
            "repository, or download the file itself."
        )
    elif text.startswith((b'{"', b"{\n", b"error", b"not found", b"access denied")) and size < 1 << 16:
        begins = start[:60].decode("utf-8", "replace")
        reason = (
            f"is a text ({size} bytes), not weights; it begins {begins!r}. A server answers so when it refuses a "
            f"download. {_AGAIN}."
        )
    elif packed or start[257:262] == b"ustar":
        reason = f"is a packed archive ({packed[0] if packed else 'tar'}); unpack it and give the file inside"
    elif start.startswith(b"\x89HDF"):
        reason = "is an HDF5 file, as Keras writes them, not weights of PyTorch"
    if reason:
        raise UnreadableFileError(reason)


def _state_dict(content: Any) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """(state dict, the other entries, versions of modules) in what a file holds."""
    if not isinstance(content, dict):
        raise UnreadableFileError(f"holds a {type(content).__name__}, expected a mapping of names to tensors")
    wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
    inner = content if wrapper is None else content[wrapper]
    tensors = {name: _tensor(value) for name, value in inner.items() if isinstance(value, (Tensor, np.generic))}
    if wrapper is None:  # conversion scripts put notes beside a bare state dict ("__author__", "matching_heuristics")
        rest = {name: value for name, value in content.items() if name not in tensors}
        odd = any(not isinstance(value, (str, int, float, type(None))) for value in rest.values())
    else:
        rest = {name: value for name, value in content.items() if name != wrapper}
        odd = len(tensors) < len(inner)
    if odd or not tensors or not all(isinstance(name, str) for name in tensors):
        inside = "" if wrapper is None else f", those under {wrapper!r} {listed(inner, 6)}"
        raise UnreadableFileError(
            "holds neither a state dict nor one under the key 'model' or 'state_dict'; its keys are "
            f"{listed(content, 6)}{inside}"
        )
    rest = {str(name): value for name, value in rest.items()}
    return tensors, plain(rest), plain(getattr(inner, VERSIONS, None))


def _tensor(value: Tensor | np.generic) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


# ---- safetensors ----


def _read_safetensors(path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            notes = file.metadata() or {}
    except SafetensorError as error:
        raise UnreadableFileError(
            f"cannot be read as safetensors: it is damaged or cut off ({size} bytes; {error}). {_AGAIN}."
        ) from error
    return tensors, {name: _from_json(value) for name, value in notes.items()}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# ---- zip archives of torch ----


def _read_zip(path: Path) -> tuple[Any, str]:
    with zipfile.ZipFile(path) as file:
        archive = _Archive(file)
        if archive.has("constants.pkl"):
            return (_read_torchscript(archive), {}), "torchscript"
        archive.reader(storage=archive.claimed).load()
        try:
            return _torch_load(path), "torch"
        except pickle.UnpicklingError:  # plain data that torch does not know: NumPy's, newer instructions
            return archive.reader(storage=archive.storage).load(), "torch"


class _Archive:
    """Records of a zip file that torch wrote: `<folder>/data.pkl`, `<folder>/data/<key>`, …; nothing is unpacked."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self._records: dict[str, zipfile.ZipInfo] = {}
        for info in file.infolist():
            name = info.orig_filename
            if name.startswith("/") or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:[/\\]", name):
                raise UnsafeFileError(f"holds a record '{name}', which points outside the archive; it is refused")
            if name in self._records:
                raise UnsafeFileError(f"holds two records '{name}', so that readers may differ; it is refused")
            if info.flag_bits & 1:
                raise UnreadableFileError("is an encrypted archive, not weights")
            self._records[name] = info
        folders = [name.removesuffix("/data.pkl") for name in self._records if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(folders) != 1:
            if any(name.endswith(".npy") for name in self._records):
                raise UnreadableFileError("is an archive of NumPy arrays (.npz); save them as .safetensors")
            raise UnreadableFileError(
                "is a zip archive, but not one that torch wrote (no data.pkl in its only folder); if it was packed "
                "around a checkpoint, unpack it and give the file inside"
            )
        self._folder = folders[0]
        self._storages: dict[str, torch.UntypedStorage] = {}
        order = self.read("byteorder").decode("ascii", "replace") if self.has("byteorder") else "little"
        if order not in ("little", "big"):
            raise UnreadableFileError(f"is damaged: its byte order is '{order[:20]}', expected 'little' or 'big'")
        self._swap = order != sys.byteorder

    def has(self, name: str) -> bool:
        """Whether there is a record of that name in the archive's folder."""
        return f"{self._folder}/{name}" in self._records

    def read(self, name: str) -> bytes:
        """A whole record that holds text or a pickle."""
        info = self._records[f"{self._folder}/{name}"]
        if info.file_size > _MAX_TEXT:
            raise UnreadableFileError(f"is damaged: its record '{name}' has {info.file_size} bytes, over {_MAX_TEXT}")
        return self._file.read(info)

    def reader(self, **options: Any) -> PickleReader:
        """The reader of the main pickle."""
        return PickleReader(io.BytesIO(self.read("data.pkl")), **options)

    def code(self) -> Iterator[tuple[str, str]]:
        """(dotted name, text) of each file of a TorchScript archive that defines classes."""
        for name in self._records:
            if match := re.fullmatch(rf"{re.escape(self._folder)}/(code/(.+)\.py)", name):
                yield match[2].replace("/", "."), self.read(match[1]).decode()

    def claimed(self, key: str, dtype: torch.dtype, number: int) -> Storage:
        """A storage without memory, if there is a record for it."""
        if not re.fullmatch(r"\w+", key, re.ASCII):
            raise UnsafeFileError(f"has a tensor in '{key[:40]}', which points outside the archive; it is refused")
        info = self._records.get(f"{self._folder}/data/{key}")
        if info is None:
            raise UnreadableFileError(f"is damaged: the values of a tensor are missing (record 'data/{key}')")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UnreadableFileError("was packed anew by a zip program; use the file as torch wrote it")
        return claimed(number, dtype, info.file_size, f"record 'data/{key}'")

    def storage(self, key: str, dtype: torch.dtype, number: int) -> Storage:
        """The values behind tensors; a record is read once, so that tensors may share it."""
        self.claimed(key, dtype, number)
        if key not in self._storages:
            content = bytearray(self._file.read(self._records[f"{self._folder}/data/{key}"]))
            values = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            self._storages[key] = values.untyped_storage()
            if self._swap:
                self._storages[key].byteswap(dtype)
        return Storage(self._storages[key], dtype)


# ---- TorchScript ----


def _read_torchscript(archive: _Archive) -> dict[str, Tensor]:
    """Parameters and buffers under the names that `torch.jit.load(...).state_dict()` gives them."""
    root = archive.reader(storage=archive.storage, script=True).load()
    if not isinstance(root, Record):
        raise UnreadableFileError("is a TorchScript archive that holds no module")
    classes = _module_classes(archive)
    tensors = {
        prefix + name: value
        for prefix, module in _modules(root, classes)
        for names in classes.get(module.name, ())
        for name, value in module.state.items()
        if name in names and isinstance(value, Tensor)
    }
    if not tensors:
        raise UnreadableFileError(
            "is a TorchScript archive without parameters: it was frozen, and its weights are constants of its code"
        )
    return tensors


def _modules(root: Record, classes: Mapping[str, Any]) -> Iterator[tuple[str, Record]]:
    """(prefix of its names, module) for a module and everything below it, in order."""
    waiting = [("", root)]
    for _ in range(_MAX_MODULES):
        if not waiting:
            return
        prefix, module = waiting.pop()
        if not isinstance(module.state, dict):
            raise UnreadableFileError(f"holds a module '{module.name[:200]}' that only its own code could restore")
        yield prefix, module
        below = [(name, value) for name, value in module.state.items() if isinstance(value, Record)]
        waiting += [(f"{prefix}{name}.", value) for name, value in reversed(below) if value.name in classes]
        if len(prefix) > _MAX_NAME:
            break
    raise UnreadableFileError("is damaged: its modules contain each other")


_CLASS = re.compile(r"^class (?P<name>\w+)\(Module\):\n(?P<body>(?:  __\w+__ = .*\n)*)", re.MULTILINE)


def _module_classes(archive: _Archive) -> dict[str, tuple[set[str], set[str]]]:
    """Name of a class of modules -> names of its parameters, names of its buffers; from the text of the archive."""

    def names(kind: str, body: str) -> set[str]:
        line = re.search(rf"^  __{kind}__ = \[(.*)\]$", body, re.MULTILINE)
        return set(re.findall(r'"([^"]*)"', line[1])) if line else set()

    return {
        f"{module}.{match['name']}": (names("parameters", match["body"]), names("buffers", match["body"]))
        for module, text in archive.code()
        for match in _CLASS.finditer(text)
    }
