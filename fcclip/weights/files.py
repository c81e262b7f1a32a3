"""Files of weights, read without ever running what is in them.

safetensors; `torch.save` files, by `torch.load(weights_only=True)`; and, by the machine of `plain_pickle.py`,
TorchScript archives such as OpenAI's CLIP, pickles of arrays or tensors, and `torch.save` files with NumPy values. The
code inside a TorchScript archive is looked at as text, for the names of its parameters and buffers.
"""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fcclip.errors import InputError, MissingFileError
from fcclip.weights.plain_pickle import (
    ARCHIVE_CALLS,
    PICKLE_CALLS,
    TORCHSCRIPT_CALLS,
    VERSIONS,
    Record,
    Storage,
    UnreadableFileError,
    UnsafeFileError,
    plain,
    run_pickle,
    wants,
)

__all__ = ["VERSIONS", "UnsafeFileError", "WeightFile", "read_plain_data", "read_weight_file"]

_WRAPPERS = ("model", "state_dict")
_TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # near the start of torch.save files before torch 1.6
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}
_MAX_TEXT = 1 << 26  # bytes of the text of a class, and of a pickle inside an archive
_MAX_MODULES, _MAX_NAME = 100_000, 10_000  # modules in a TorchScript archive, letters of the longest name
_AGAIN = "Copy or download it again"


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds.

    Args:
        tensors: name -> tensor as stored, on the CPU, without a `module.` prefix that all names share and without the
            wrapper `model` or `state_dict`.
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
        FileNotFoundError: there is no such file.
        UnsafeFileError: only running code could open it.
        ValueError: it is empty, cut off, damaged, something else than a file of weights, or holds no state dict.
    """
    content, kind = _read(Path(path), what)
    place = f"{what} '{path}'"
    if kind in ("safetensors", "torchscript"):
        tensors, rest = content
        versions = rest.pop(VERSIONS, None)
    else:
        tensors, rest = _state_dict(content, place)
        versions = getattr(tensors, VERSIONS, None)
    versions = dict(versions) if isinstance(versions, Mapping) else {}
    if not tensors:
        raise InputError(f"{place} holds no tensors")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
        versions = {key.removeprefix("module").removeprefix("."): value for key, value in versions.items() if key}
    return WeightFile(dict(tensors), rest, kind, versions)


def read_plain_data(path: str | Path, *, what: str = "checkpoint") -> Any:
    """The whole content of a `torch.save` file or a pickle: tensors, numbers, strings and containers of them.

    Raises:
        FileNotFoundError, UnsafeFileError, ValueError: as `read_weight_file`; other kinds of files are a ValueError.
    """
    content, kind = _read(Path(path), what)
    if kind in ("safetensors", "torchscript"):
        raise InputError(f"{what} '{path}' is a {kind} file, which holds weights only; expected one of torch.save")
    return content


# ---- what kind of file it is ----


def _read(path: Path, what: str) -> tuple[Any, str]:
    """(content, kind); the content is (tensors, rest) for safetensors and TorchScript."""
    if not path.is_file():
        hint = " (it is a folder; give a file in it)" if path.is_dir() else ""
        raise MissingFileError(f"{what} '{path}' does not exist{hint}")
    place, size = f"{what} '{path}'", path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    try:
        _refuse_other_files(start, size)
        return _read_known(path, start, size)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{place} {error}") from error
    except UnreadableFileError as error:
        raise InputError(f"{place} {error}") from error
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # what damaged bytes do to a parser cannot be listed
        if isinstance(error, UnpicklingError) and (name := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise UnsafeFileError(f"{place} {wants(name[1])}") from error
        reason = " ".join(str(error).split())[:120] or "no reason given"
        raise InputError(
            f"{place} cannot be read: it is damaged, cut off or no checkpoint ({size} bytes; {type(error).__name__}: "
            f"{reason}). {_AGAIN}, or use an earlier checkpoint."
        ) from error


def _read_known(path: Path, start: bytes, size: int) -> tuple[Any, str]:
    if start.startswith(b"PK"):
        return _read_zip(path)
    if _TORCH_MAGIC in start[:32]:
        return _torch_load(path), "torch"
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size):
        return _read_safetensors(path, size), "safetensors"
    with path.open("rb") as file:
        return plain(run_pickle(file, PICKLE_CALLS)), "pickle"


def _torch_load(path: Path) -> Any:
    with path.open("rb") as file:  # given a path, torch goes by its suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def _refuse_other_files(start: bytes, size: int) -> None:
    """Tells what people mistake for weights, by the first bytes."""
    text = start.lstrip().lower()
    if not size:
        raise UnreadableFileError(f"is empty: it is damaged, cut off or no checkpoint (0 bytes). {_AGAIN}.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UnreadableFileError(
            f"is a web page ({size} bytes), not weights: the link leads to a page, or the download wants a login or a "
            "confirmation. Download the file itself."
        )
    if text.startswith(b"version https://git-lfs"):
        raise UnreadableFileError(
            f"is a pointer of Git LFS ({size} bytes), not the weights it stands for: run `git lfs pull` in its "
            "repository, or download the file itself."
        )
    if text.startswith((b'{"', b"{\n", b"error", b"not found", b"access denied")) and size < 1 << 16:
        raise UnreadableFileError(
            f"is a text ({size} bytes), not weights; it begins {start[:60].decode('utf-8', 'replace')!r}. A server "
            f"answers so when it refuses a download. {_AGAIN}."
        )
    packed = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
    if packed or start[257:262] == b"ustar":
        raise UnreadableFileError(f"is a packed archive ({packed or 'tar'}); unpack it and give the file inside")
    if start.startswith(b"\x89HDF"):
        raise UnreadableFileError("is an HDF5 file, as Keras writes them, not weights of PyTorch")


# ---- state dicts ----


def _state_dict(content: Any, place: str) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """The state dict in what a file holds, and the other entries."""
    if not isinstance(content, dict):
        raise InputError(f"{place} holds a {type(content).__name__}, expected a mapping of names to tensors")
    wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
    if wrapper is not None:
        inner = content[wrapper]
        rest = {name: value for name, value in content.items() if name != wrapper}
        odd = [name for name, value in inner.items() if not _is_tensor(value)]
    else:  # a bare state dict; conversion scripts put notes beside it ("__author__", "matching_heuristics")
        inner = content
        rest = {name: value for name, value in content.items() if not _is_tensor(value)}
        odd = [name for name, value in rest.items() if not isinstance(value, (str, int, float, type(None)))]
    tensors = OrderedDict((name, _tensor(value)) for name, value in inner.items() if _is_tensor(value))
    if odd or not tensors or not all(isinstance(name, str) for name in tensors):
        raise InputError(
            f"{place} holds neither a state dict nor one under the key 'model' or 'state_dict'; its keys are "
            f"{_some(content)}{'' if wrapper is None else f', those under {wrapper!r} {_some(inner)}'}"
        )
    if isinstance(getattr(inner, VERSIONS, None), Mapping):
        tensors._metadata = dict(inner._metadata)
    return tensors, _python_numbers({str(name): value for name, value in rest.items()})


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, np.generic))


def _tensor(value: Tensor | np.generic) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _python_numbers(value: Any) -> Any:
    """The same data without NumPy's scalars."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {name: _python_numbers(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_python_numbers, value))
    return value


def _some(names: Mapping) -> str:
    return ", ".join(map(str, list(names)[:6])) + (", …" if len(names) > 6 else "") if names else "none"


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
    try:
        return _torch_load(path), "torch"
    except UnpicklingError:  # perhaps plain data that torch does not know: NumPy's
        with zipfile.ZipFile(path) as file:
            archive = _Archive(file)
            stream = io.BytesIO(archive.read("data.pkl"))
            return plain(run_pickle(stream, ARCHIVE_CALLS, storage=archive.storage)), "torch"


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
        folders = [name.removesuffix("/data.pkl") for name in self._records if name.count("/") == 1]
        folders = [folder for folder in folders if f"{folder}/data.pkl" in self._records]
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
        info = self._records.get(f"{self._folder}/{name}")
        if info is None or info.file_size > _MAX_TEXT:
            size = "missing" if info is None else f"of {info.file_size} bytes, more than {_MAX_TEXT}"
            raise UnreadableFileError(f"is damaged: its record '{name}' is {size}")
        return self._file.read(info)

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> Storage:
        """The `numel` values behind tensors; a record is read once, so that tensors may share it."""
        if not re.fullmatch(r"\w+", key, re.ASCII):
            raise UnsafeFileError(f"has a tensor in '{key[:40]}', which points outside the archive; it is refused")
        info = self._records.get(f"{self._folder}/data/{key}")
        if info is None:
            raise UnreadableFileError(f"is damaged: the values of a tensor are missing (record 'data/{key}')")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UnreadableFileError("was packed anew by a zip program; use the file as torch wrote it")
        if not 0 <= numel * dtype.itemsize <= info.file_size:
            raise UnreadableFileError(
                f"is damaged: record 'data/{key}' has {info.file_size} bytes, expected {numel * dtype.itemsize}"
            )
        if key not in self._storages:
            self._storages[key] = self._values(info)
            if self._swap:
                self._storages[key].byteswap(dtype)
        return Storage(self._storages[key], dtype)

    def _values(self, info: zipfile.ZipInfo) -> torch.UntypedStorage:
        values = torch.empty(info.file_size, dtype=torch.uint8)
        with self._file.open(info) as record:
            got = record.readinto(memoryview(values.numpy()))
            if got != info.file_size or record.read(1):  # the second read also compares the checksum
                raise UnreadableFileError(f"is cut off: record '{info.filename}' has {got} of {info.file_size} bytes")
        return values.untyped_storage()


# ---- TorchScript ----


def _read_torchscript(archive: _Archive) -> dict[str, Tensor]:
    """Parameters and buffers under the names that `torch.jit.load(...).state_dict()` gives them."""
    root = run_pickle(io.BytesIO(archive.read("data.pkl")), TORCHSCRIPT_CALLS, storage=archive.storage, classes=True)
    if not isinstance(root, Record):
        raise UnreadableFileError("is a TorchScript archive that holds no module")
    classes, tensors = _Classes(archive), {}
    for prefix, module in _modules(root, classes):
        kind = classes.of(module)
        for names in (kind.parameters, kind.buffers):
            for name, value in module.state.items():
                if name in names and isinstance(value, Tensor):
                    tensors[prefix + name] = value
    if not tensors:
        raise UnreadableFileError(
            "is a TorchScript archive without parameters: it was frozen, and its weights are constants of its code"
        )
    return tensors


def _modules(root: Record, classes: _Classes) -> Iterator[tuple[str, Record]]:
    """(prefix of its names, module) for a module and everything below it, in order."""
    waiting = [("", root)]
    for _ in range(_MAX_MODULES):
        if not waiting:
            return
        prefix, module = waiting.pop()
        if not isinstance(module.state, dict):
            raise UnreadableFileError(f"holds a module '{module.kind[:200]}' that only its own code could restore")
        yield prefix, module
        below = [(name, value) for name, value in module.state.items() if isinstance(value, Record)]
        waiting += [(f"{prefix}{name}.", value) for name, value in reversed(below) if classes.of(value).is_module]
        if len(prefix) > _MAX_NAME:
            break
    raise UnreadableFileError("is damaged: its modules contain each other")


@dataclass(frozen=True)
class _Class:
    """What the text of a TorchScript class says about its attributes."""

    is_module: bool = False
    parameters: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()


class _Classes:
    """The classes of a TorchScript archive, from the text below `code/`."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._texts: dict[str, dict[str, _Class]] = {}

    def of(self, record: Record) -> _Class:
        """The class of a record; one without a text is no module."""
        module, _, name = record.kind.rpartition(".")
        file = f"code/{module.replace('.', '/')}.py"
        if file not in self._texts:
            text = self._archive.read(file).decode() if self._archive.has(file) else ""
            self._texts[file] = {match["name"]: _class(match) for match in _CLASS.finditer(text)}
        return self._texts[file].get(name, _Class())


_CLASS = re.compile(r"^class (?P<name>\w+)(?:\((?P<base>\w+)\))?:\n(?P<body>(?:  __\w+__ = .*\n)*)", re.MULTILINE)


def _class(match: re.Match[str]) -> _Class:
    def names(kind: str) -> frozenset[str]:
        line = re.search(rf"^  __{kind}__ = \[(.*)\]$", match["body"], re.MULTILINE)
        return frozenset(re.findall(r'"([^"]*)"', line[1])) if line else frozenset()

    return _Class(match["base"] == "Module", names("parameters"), names("buffers"))
