"""Pickles of plain data, read without calling anything that they name.

A small machine follows the instructions of a pickle. It knows a handful of names, each standing for a function of this
file; any other name, and every instruction that plain data does not need, is refused before anything happens.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fcclip.errors import InputError

VERSIONS = "_metadata"  # under this name torch keeps the versions of modules beside a state dict


class UnsafeFileError(ValueError):
    """A file that only running code could open; nothing of it was run."""


class UnreadableFileError(ValueError):
    """A file with a problem that the text tells; whoever knows the file's name puts it in front."""


def wants(name: str) -> str:
    """What is said of a file that asks for the function `name`."""
    return (
        f"wants to call '{name[:200]}' when it is opened. That could run any program, so it is refused; nothing of it "
        "was run. Where you trust the file, open it with the program that wrote it and save only the state dict: "
        "torch.save(model.state_dict(), ...), or .safetensors."
    )


# ---- objects in the making ----


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle asks for: only its name."""

    name: str


@dataclass(eq=False)
class Record:
    """An object of a TorchScript class: its attributes and nothing that they could do."""

    kind: str
    state: Any = None


@dataclass(frozen=True)
class Storage:
    """The values behind tensors."""

    values: torch.UntypedStorage
    dtype: torch.dtype


@dataclass(eq=False)
class _DType:
    """A NumPy dtype; its state brings the byte order."""

    code: Any
    state: Any = None

    def build(self) -> np.dtype:
        code = checked(self.code, str, bytes)
        code = (code.decode("latin-1") if isinstance(code, bytes) else code).lstrip("|<>=")
        state = (3, "|", None, None, None) if self.state is None else checked(self.state, tuple)
        if code.startswith("O"):
            raise UnsafeFileError("holds NumPy arrays of Python objects, which could be anything; it is refused")
        if code not in _NUMPY_NUMBERS or any(part is not None for part in state[2:5]):  # 2..5: fields
            raise UnreadableFileError("holds NumPy values that are not plain numbers")
        dtype = np.dtype(code)
        return dtype.newbyteorder(state[1]) if state[1] in ("<", ">") else dtype


@dataclass(eq=False)
class _Array:
    """A NumPy array; its state brings shape, dtype and values."""

    state: Any = None

    def build(self) -> np.ndarray:
        shape, dtype, fortran, values = checked(self.state, tuple)[-4:]
        return _numpy_array(values, dtype, shape, "F" if fortran else "C")


class _State(OrderedDict):
    """An OrderedDict; what torch hangs on a state dict is kept as an attribute."""


_NUMPY_NUMBERS = frozenset(
    {"b1", "c8", "c16", "f2", "f4", "f8", *(f"{sign}{size}" for sign in "iu" for size in "1248")}
)


# ---- the machine ----


def run_pickle(
    stream: BinaryIO,
    calls: Mapping[str, Callable[..., Any]],
    *,
    storage: Callable[[str, torch.dtype, int], Storage] | None = None,
    classes: bool = False,
) -> Any:
    """Follows the instructions of a pickle, calling nothing but `calls`.

    Args:
        stream: the pickle.
        calls: name in the pickle -> the function of ours that it stands for.
        storage: (key, dtype, number of values) -> the storage of a tensor that is kept beside the pickle; None: there
            is none.
        classes: whether objects of `__torch__` classes become records.

    Raises:
        UnsafeFileError: it asks for any other name, or for an instruction that plain data does not need.
        UnreadableFileError: data of kinds that are no weights.
        Exception: anything, on damaged bytes.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop() -> Any:
        if len(stack) <= (marks[-1] if marks else 0):
            raise InputError("a pickle takes more than it has put")
        return stack.pop()

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def ask(name: str) -> Name:
        if name not in calls and name not in DTYPES and not (classes and name.startswith("__torch__.")):
            raise UnsafeFileError(wants(name))
        return Name(name)

    for opcode, argument, _ in pickletools.genops(_Bounded(stream)):
        kind = opcode.name
        if kind in _LITERALS:
            stack.append(argument)
        elif kind in _CONSTANTS:
            stack.append(_CONSTANTS[kind]())
        elif kind in ("PROTO", "FRAME"):
            pass
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif kind == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif kind in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif kind in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [pop() for _ in range(int(kind[-1]))]
            stack.append(tuple(reversed(items)))
        elif kind == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif kind == "LIST":
            stack.append(pop_to_mark())
        elif kind in ("APPEND", "APPENDS"):
            items = pop_to_mark() if kind == "APPENDS" else [pop()]
            checked(stack[-1], list).extend(items)
        elif kind == "DICT":
            stack.append(_pairs(pop_to_mark()))
        elif kind in ("SETITEM", "SETITEMS"):
            items = pop_to_mark() if kind == "SETITEMS" else [pop(), pop()][::-1]
            checked(stack[-1], dict).update(_pairs(items))
        elif kind == "POP":
            pop()
        elif kind == "POP_MARK":
            pop_to_mark()
        elif kind == "DUP":
            stack.append(stack[-1])
        elif kind == "GLOBAL":
            stack.append(ask(argument.replace(" ", ".", 1)))
        elif kind == "STACK_GLOBAL":
            name, module = checked(pop(), str), checked(pop(), str)
            stack.append(ask(f"{module}.{name}"))
        elif kind == "NEWOBJ":
            arguments, name = pop(), checked(pop(), Name).name
            if not name.startswith("__torch__.") or arguments != ():
                raise UnsafeFileError(wants(name))
            stack.append(Record(name))
        elif kind == "REDUCE":
            arguments, name = checked(pop(), tuple), checked(pop(), Name).name
            if name not in calls:
                raise UnsafeFileError(wants(name))
            stack.append(calls[name](*arguments))
        elif kind == "BUILD":
            state, target = pop(), stack[-1]
            if isinstance(target, (Record, _Array, _DType)):
                target.state = state
            elif isinstance(target, _State):
                target._metadata = checked(state, dict).get(VERSIONS)
            else:
                raise UnsafeFileError(wants(f"{type(target).__name__}.__setstate__"))
        elif kind == "BINPERSID" and storage is not None:
            stack.append(_persistent(pop(), storage))
        elif kind == "STOP":
            return pop()
        else:
            raise UnsafeFileError(
                f"holds the pickle instruction {kind}, which plain data does not need; it is refused, and nothing of "
                "it was run"
            )
    raise InputError("a pickle without an end")


class _Bounded:
    """A stream that is never asked for more than it holds: a damaged length would take all memory."""

    def __init__(self, stream: BinaryIO) -> None:
        start = stream.tell()
        self._size = stream.seek(0, io.SEEK_END)
        stream.seek(start)
        self._stream, self.readline = stream, stream.readline

    def read(self, number: int) -> bytes:
        """At most `number` bytes."""
        return self._stream.read(min(number, self._size))


_LITERALS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}


def checked(value: Any, *kinds: type) -> Any:
    """The value, if it is of one of these types.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, kinds):
        raise InputError(f"a {type(value).__name__} where a {kinds[0].__name__} is expected")
    return value


def _pairs(items: list[Any]) -> dict:
    keys = [checked(key, str, int, float, bytes, type(None)) for key in items[::2]]
    return dict(zip(keys, items[1::2], strict=True))


def _persistent(given: Any, storage: Callable[[str, torch.dtype, int], Storage]) -> Storage:
    kind, name, key, _, numel = checked(given, tuple)[:5]
    if checked(kind, str) != "storage":
        raise UnsafeFileError(
            f"refers to a '{kind[:40]}' outside the pickle, expected a tensor's values; it is refused"
        )
    if checked(name, Name).name not in DTYPES:
        raise UnreadableFileError(f"holds tensors of kind '{name.name}', expected dense ones of numbers")
    return storage(checked(key, str), DTYPES[name.name], checked(numel, int))


# ---- what the names in a pickle stand for ----


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
    return _strided(checked(storage, Storage), storage.dtype, offset, size, stride, lazy=more[2:3])


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *more: Any
) -> Tensor:
    return _strided(checked(storage, Storage), DTYPES[checked(dtype, Name).name], offset, size, stride, lazy=more[:1])


def _strided(storage: Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any, *, lazy: tuple) -> Tensor:
    if any(lazy):
        raise UnreadableFileError("holds a lazy view; save the tensor with .resolve_conj().resolve_neg()")
    numbers = (offset, *checked(size, tuple, list), *checked(stride, tuple, list))
    if len(size) != len(stride) or any(checked(number, int) < 0 for number in numbers):
        raise UnreadableFileError(f"is damaged: a tensor has size {size} and stride {stride}")
    empty = math.prod(size) == 0
    end = offset if empty else offset + sum((length - 1) * step for length, step in zip(size, stride)) + 1
    there = storage.values.nbytes() // dtype.itemsize
    if end > there:
        raise UnreadableFileError(f"is damaged: a tensor needs {end} values, its storage has {there}")
    return torch.empty(0, dtype=dtype).set_(storage.values, offset, tuple(size), tuple(stride))


def _load_from_bytes(content: Any) -> Storage:
    """The values of a tensor that was pickled without torch.save: a torch.save file in bytes."""
    loaded = torch.load(io.BytesIO(checked(content, bytes, bytearray)), map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.storage.TypedStorage):
        return Storage(loaded._untyped_storage, loaded.dtype)
    return Storage(checked(loaded, torch.UntypedStorage), torch.uint8)


def _numpy_array(values: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    dtype = checked(dtype, _DType).build()
    values = checked(values, bytes, bytearray, str)
    content = values.encode("latin-1") if isinstance(values, str) else values
    if any(checked(length, int) < 0 for length in checked(shape, tuple)) or order not in ("C", "F"):
        raise UnreadableFileError("is damaged: a NumPy array has no proper shape")
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise UnreadableFileError(f"is damaged: a NumPy array of shape {shape} has {len(content)} bytes")
    return np.frombuffer(content, dtype).astype(dtype.newbyteorder("=")).reshape(shape, order=order)


def _numpy_scalar(dtype: Any, value: Any) -> np.generic:
    return _numpy_array(value, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise UnsafeFileError(wants("codecs.encode"))
    return checked(text, str).encode("latin-1")


DTYPES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}
_TENSOR_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): _State(pairs),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda tensor, *_: checked(tensor, Tensor),
    "torch.Size": lambda sizes: tuple(checked(sizes, list, tuple)),
}
_NUMPY_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": lambda *_: _Array(),
    "numpy.dtype": lambda code, *_: _DType(code),
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",
    "__builtin__.bytes": lambda: b"",
}
for _core in ("core", "_core"):
    _NUMPY_CALLS[f"numpy.{_core}.multiarray._reconstruct"] = lambda *_: _Array()
    _NUMPY_CALLS[f"numpy.{_core}.multiarray.scalar"] = _numpy_scalar
    _NUMPY_CALLS[f"numpy.{_core}.numeric._frombuffer"] = _numpy_array
TORCHSCRIPT_CALLS: dict[str, Callable[..., Any]] = {
    **_TENSOR_CALLS,
    "torch.jit._pickle.build_intlist": lambda items: checked(items, list),
    "torch.jit._pickle.build_doublelist": lambda items: checked(items, list),
    "torch.jit._pickle.build_boollist": lambda items: checked(items, list),
    "torch.jit._pickle.build_tensorlist": lambda items: checked(items, list),
    "torch.jit._pickle.restore_type_tag": lambda value, _: value,
    "torch.device": lambda *parts: ":".join(checked(part, str) for part in parts),
}
ARCHIVE_CALLS = {**_TENSOR_CALLS, **_NUMPY_CALLS}  # in archives of torch.save
PICKLE_CALLS = {**ARCHIVE_CALLS, "torch.storage._load_from_bytes": _load_from_bytes}  # in pickles by themselves


def plain(value: Any, done: dict[int, Any] | None = None) -> Any:
    """What `run_pickle` returned, with tensors for NumPy's arrays; NumPy's scalars stay.

    Raises:
        UnreadableFileError: something else than tensors and plain data is in it.
    """
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    found = value
    if isinstance(value, dict):
        found = done[id(value)] = OrderedDict() if isinstance(value, OrderedDict) else {}
        found.update((name, plain(one, done)) for name, one in value.items())
        if isinstance(getattr(value, VERSIONS, None), dict):
            found._metadata = plain(value._metadata, done)
    elif isinstance(value, list):
        found = done[id(value)] = []
        found += [plain(one, done) for one in value]
    elif isinstance(value, tuple):
        found = done[id(value)] = tuple(plain(one, done) for one in value)
    elif isinstance(value, (_Array, np.ndarray)):
        found = done[id(value)] = torch.from_numpy(value.build() if isinstance(value, _Array) else value)
    elif isinstance(value, (Name, _DType, Storage)):
        raise UnreadableFileError("holds types besides tensors and plain data")
    return found
