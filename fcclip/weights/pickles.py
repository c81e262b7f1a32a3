"""Pickles of plain data, read without calling anything that they name.

Python's own reader follows a short list of instructions and knows a short list of names, each of which stands for a
function of this file. Arrays of NumPy and objects of TorchScript become records of what is said of them.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcclip.errors import InputError

VERSIONS = "_metadata"  # under this name torch keeps the versions of modules beside a state dict
SCRIPT = "__torch__."  # begins the names of TorchScript's classes
_MAX_REPEATED = 1 << 28  # bytes of a tensor that repeats fewer values
_MAX_DEPTH = 200  # of tuples in tuples: the hash of a very deep one overflows the stack of the process


class UnsafeFileError(InputError):
    """A file that only running code could open; nothing of it was run."""


class UnreadableFileError(InputError):
    """A file with a problem that the text tells; whoever knows the file's name puts it in front."""


def refusal(name: str) -> UnsafeFileError:
    """The error for a file that asks for the function `name`."""
    return UnsafeFileError(
        f"wants to call '{name[:200]}' when it is opened. That could run any program, so it is refused; nothing of it "
        "was run. Where you trust the file, open it with the program that wrote it and save only the state dict: "
        "torch.save(model.state_dict(), ...), or .safetensors."
    )


# ---- reading ----


class Storage(NamedTuple):
    """The values behind tensors."""

    values: torch.UntypedStorage
    dtype: torch.dtype


class Name(str):
    """A function or class that a pickle asks for."""

    __slots__ = ()


@dataclass(eq=False)
class Record:
    """An object of TorchScript, or a dtype of NumPy: its arguments, and the state that came after them."""

    name: str
    arguments: tuple = ()
    state: Any = None


class PickleReader(pickle._Unpickler):  # the one in Python, of which every instruction can be replaced
    """Reads one pickle of a stream.

    Args:
        stream: never asked for more than it holds (a `BytesIO` or an `mmap`).
        storage: (key, dtype, number of values) -> the values of a tensor that are kept outside the pickle; None: there
            are none.
        script: objects of TorchScript's classes become records.
    """

    def __init__(
        self,
        stream: BinaryIO,
        *,
        storage: Callable[[str, torch.dtype, int], Storage] | None = None,
        script: bool = False,
    ) -> None:
        super().__init__(stream, encoding="latin1")  # of byte strings that Python 2 wrote
        self.storage, self.script = storage, script
        self._depths: dict[int, int] = {}  # by the id of a tuple
        self._arrays: dict[int, Tensor] = {}  # by their ids: those of NumPy that wait for their values

    def load(self) -> Any:
        """The content, with tensors for NumPy's arrays; `plain` makes the rest of it plain.

        Raises:
            UnsafeFileError: it asks for any other name than those of plain data, or for an instruction that plain data
                does not need.
            UnreadableFileError: data of kinds that are no weights, or claims that cannot be true.
            Exception: anything, on damaged bytes.
        """
        content = super().load()
        if self._arrays:
            raise UnreadableFileError("is damaged: it holds a NumPy array without values")
        return content

    def find_class(self, module: str, name: str) -> Name:
        """The name, if it is one of plain data."""
        name = f"{module}.{name}"
        if name not in _CALLS and name not in DTYPES and not (self.script and name.startswith(SCRIPT)):
            raise refusal(name)
        return Name(name)

    def persistent_load(self, pid: Any) -> Storage:
        """The values behind a tensor."""
        if self.storage is None:
            self.refuse("BINPERSID")
        kind, name, key, _, number = _checked(pid, tuple)[:5]
        if _checked(kind, str) != "storage":
            raise UnsafeFileError(f"refers to a '{kind[:40]}' outside the pickle, not to values of a tensor; refused")
        return self.storage(_checked(key, str), _dtype(name), _checked(number, int))

    def load_reduce(self) -> None:
        """Calls what a name stands for."""
        arguments, name = _checked(self.stack.pop(), tuple), _checked(self.stack.pop(), Name)
        call = _CALLS.get(name)
        if call is None:
            raise refusal(name)
        self.append(call(*arguments))
        if name.endswith("._reconstruct"):
            self._arrays[id(self.stack[-1])] = self.stack[-1]

    def load_newobj(self) -> None:
        """Makes an object of TorchScript."""
        arguments, name = self.stack.pop(), _checked(self.stack.pop(), Name)
        if not name.startswith(SCRIPT) or arguments != ():
            raise refusal(name)
        self.append(Record(name))

    def load_build(self) -> None:
        """Gives an object its state."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif id(target) in self._arrays:
            shape, dtype, fortran, values = _checked(state, tuple)[-4:]
            self._arrays.pop(id(target)).data = _numbers(values, dtype, shape, "F" if fortran else "C")
        elif isinstance(target, OrderedDict):
            target._metadata = _checked(state, dict).get(VERSIONS)
        else:
            raise refusal(f"{type(target).__name__}.__setstate__")

    def load_any_tuple(self, load: Callable[[Any], None]) -> None:
        """Makes a tuple that is not too deep."""
        load(self)
        depth = 1 + max((self._depths.get(id(part), 0) for part in self.stack[-1] if type(part) is tuple), default=0)
        if depth > _MAX_DEPTH:
            raise UnreadableFileError(f"is damaged: more than {_MAX_DEPTH} tuples in each other")
        self._depths[id(self.stack[-1])] = depth

    def refuse(self, instruction: str) -> None:
        """Refuses an instruction that plain data does not need."""
        raise UnsafeFileError(
            f"holds the pickle instruction {instruction}, which plain data does not need; it is refused, and nothing "
            "of it was run"
        )


def _instructions() -> dict[int, Callable[[PickleReader], None]]:
    """What the reader does, by code."""
    known = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
    chosen = {code: lambda reader, name=name: reader.refuse(name) for name, code in known.items()}
    python = pickle._Unpickler.dispatch
    chosen |= {known[name]: python[known[name]] for name in _INSTRUCTIONS.split()}
    for name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        chosen[known[name]] = lambda reader, load=python[known[name]]: reader.load_any_tuple(load)
    chosen[known["BYTEARRAY8"]] = python[known["BINBYTES8"]]  # the other makes room for as much as is claimed
    chosen[known["REDUCE"]] = PickleReader.load_reduce
    chosen[known["NEWOBJ"]] = PickleReader.load_newobj
    chosen[known["BUILD"]] = PickleReader.load_build
    return chosen


_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING "
    "BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_TUPLE EMPTY_LIST EMPTY_DICT LIST DICT APPEND APPENDS SETITEM SETITEMS EMPTY_SET ADDITEMS POP "
    "POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"
)
PickleReader.dispatch = _instructions()


def check_legacy(stream: BinaryIO, size: int) -> None:
    """Looks at the pickles of a torch.save file before torch 1.6, of `size` bytes.

    Raises:
        UnsafeFileError, UnreadableFileError: as `PickleReader.load`; or a tensor claims values that the file lacks, for
            which torch would hand out whatever memory holds.
    """
    keys: set[str] = set()

    def storage(key: str, dtype: torch.dtype, number: int) -> Storage:
        keys.add(key)
        return claimed(number, dtype, size, "it")

    *_, stored = [PickleReader(stream, storage=storage).load() for _ in range(5)]
    if keys != set(stored):
        raise UnreadableFileError("is damaged: it does not hold the values of each tensor")


def claimed(number: int, dtype: torch.dtype, size: int, place: str) -> Storage:
    """A storage without memory for `number` values that are claimed to stand in `size` bytes of `place`."""
    if not 0 <= number * dtype.itemsize <= size:
        raise UnreadableFileError(f"is damaged: {place} has {size} bytes, expected {number * dtype.itemsize}")
    return Storage(torch.UntypedStorage(number * dtype.itemsize, device="meta"), dtype)


def plain(value: Any, done: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """What was read, with Python's numbers for NumPy's scalars; lists and mappings are changed in place.

    Raises:
        UnreadableFileError: something else than tensors and plain data is in it.
    """
    done = {} if done is None else done  # by id: what it was, which keeps the id its own, and what it became
    if id(value) in done:
        return done[id(value)][1]
    made = value
    if isinstance(value, (dict, list)):
        done[id(value)] = value, value
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = plain(part, done)
    elif type(value) is tuple:
        made = tuple(plain(part, done) for part in value)
        done[id(value)] = value, made
    elif isinstance(value, np.generic):
        made = value.item()
    elif isinstance(value, (Name, Record, Storage)):
        raise UnreadableFileError("holds types besides tensors and plain data")
    return made


# ---- what the names stand for ----


def _checked(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise InputError(f"a {type(value).__name__} where a {kinds[0].__name__} is expected")
    return value


def _dtype(name: Any) -> torch.dtype:
    if _checked(name, Name) not in DTYPES:
        raise UnreadableFileError(f"holds tensors of kind '{name}', expected dense ones of numbers")
    return DTYPES[name]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
    return _strided(storage, _checked(storage, Storage).dtype, offset, size, stride, more[2:3])


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, _: Any, __: Any, dtype: Any, *more: Any) -> Tensor:
    return _strided(storage, _dtype(dtype), offset, size, stride, more[:1])


def _strided(storage: Any, dtype: torch.dtype, offset: Any, size: Any, stride: Any, lazy: tuple) -> Tensor:
    if any(lazy):
        raise UnreadableFileError("holds a lazy view; save the tensor with .resolve_conj().resolve_neg()")
    numbers = (offset, *_checked(size, tuple, list), *_checked(stride, tuple, list))
    if len(size) != len(stride) or any(_checked(number, int) < 0 for number in numbers):
        raise UnreadableFileError(f"is damaged: a tensor has size {size} and stride {stride}")
    last = sum((length - 1) * step for length, step in zip(size, stride))
    end = offset + last + 1 if math.prod(size) else offset
    values = _checked(storage, Storage).values
    if end > values.nbytes() // dtype.itemsize:
        raise UnreadableFileError(
            f"is damaged: a tensor needs {end} values, its storage has {values.nbytes() // dtype.itemsize}"
        )
    if math.prod(size) * dtype.itemsize > max(values.nbytes(), _MAX_REPEATED):
        raise UnreadableFileError(f"is damaged: a tensor claims the size {size} by repeating values")
    return torch.empty(0, dtype=dtype, device=values.device).set_(values, offset, tuple(size), tuple(stride))


def _numbers(values: Any, dtype: Any, shape: Any, order: Any) -> Tensor:
    """The tensor of an array of NumPy, from its bytes."""
    code = _checked(_checked(dtype, Record).arguments[0], str, bytes)
    code = (code.decode("latin-1") if isinstance(code, bytes) else code).lstrip("|<>=")
    byte_order, *fields = (3, "|", None, None, None)[1:] if dtype.state is None else _checked(dtype.state, tuple)[1:5]
    if code.startswith("O"):
        raise UnsafeFileError("holds NumPy arrays of Python objects, which could be anything; it is refused")
    if code[:1] not in tuple("bfiuc") or not code[1:].isdigit() or any(field is not None for field in fields):
        raise UnreadableFileError("holds NumPy values that are not plain numbers")
    made = np.dtype(code)
    content = _checked(values, bytes, bytearray, str)
    content = content.encode("latin-1") if isinstance(content, str) else content
    if any(_checked(length, int) < 0 for length in _checked(shape, tuple)) or order not in ("C", "F"):
        raise UnreadableFileError("is damaged: a NumPy array has no proper shape")
    if len(content) != math.prod(shape) * made.itemsize:
        raise UnreadableFileError(f"is damaged: a NumPy array of shape {shape} has {len(content)} bytes")
    array = np.frombuffer(content, made.newbyteorder(byte_order) if byte_order in ("<", ">") else made)
    return torch.from_numpy(array.astype(made).reshape(shape, order=order))


def _load_from_bytes(content: Any) -> Storage:
    """The values of a tensor that was pickled without torch.save: a torch.save file in bytes."""
    check_legacy(io.BytesIO(_checked(content, bytes, bytearray)), len(content))
    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.storage.TypedStorage):
        return Storage(loaded._untyped_storage, loaded.dtype)
    return Storage(_checked(loaded, torch.UntypedStorage), torch.uint8)


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise refusal("codecs.encode")
    return _checked(text, str).encode("latin-1")


def _list(items: Any, *_: Any) -> list:
    return _checked(items, list)


DTYPES: dict[str, torch.dtype] = {
    **{f"torch.{name}": dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()},
    "torch.storage.UntypedStorage": torch.uint8,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}
_CALLS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": lambda counts=(): Counter(_checked(counts, dict)),
    "torch.device": torch.device,
    "torch.Size": torch.Size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda tensor, *_: _checked(tensor, Tensor),
    "torch.storage._load_from_bytes": _load_from_bytes,
    "numpy.ndarray": None,  # named as an argument only
    "numpy.dtype": lambda *arguments: Record("numpy.dtype", arguments),
    "_codecs.encode": _encode,
    **{f"torch.jit._pickle.{name}": _list for name in ("build_intlist", "build_doublelist", "build_boollist")},
    "torch.jit._pickle.build_tensorlist": _list,
    "torch.jit._pickle.restore_type_tag": lambda value, _: value,
}
for _builtins in ("builtins", "__builtin__"):  # of Python 3 and 2
    _CALLS[f"{_builtins}.bytes"] = lambda: b""
    _CALLS[f"{_builtins}.set"] = lambda items: set(_checked(items, list))
    _CALLS[f"{_builtins}.complex"] = lambda *parts: complex(*(_checked(part, float) for part in parts))
for _core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
    _CALLS[f"{_core}.multiarray._reconstruct"] = lambda *_: torch.empty(0)
    _CALLS[f"{_core}.multiarray.scalar"] = lambda dtype, value: _numbers(value, dtype, (), "C").numpy()[()]
    _CALLS[f"{_core}.numeric._frombuffer"] = _numbers
