"""How records and batches travel between processes.

Records: one byte buffer instead of a hundred thousand dicts, so that workers share its pages instead of copying them.
Batches: all tensors of a batch in one block of shared memory, so that a batch costs one copy and one file handle.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; every dtype may start there


class CompactRecords:
    """A read-only list of records, each pickled into one shared byte buffer.

    Example:
        >>> records = CompactRecords([{"image_id": 7}, {"image_id": 9}])
        >>> len(records), records[1]
        (2, {'image_id': 9})
    """

    def __init__(self, records: Iterable[dict]) -> None:
        pickled = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = np.cumsum([len(entry) for entry in pickled], dtype=np.int64)
        self._buffer = np.frombuffer(b"".join(pickled), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict:
        begin = self._ends[index - 1] if index else 0
        return pickle.loads(self._buffer[begin : self._ends[index]])


class PackedBatch:
    """A batch as one block of bytes for its tensors and a pickle of everything around them.

    Args:
        batch: anything that can be pickled; CPU tensors in it are taken out, wherever they are.
        shared: allocate the block in shared memory, for a batch that will leave its process.
    """

    def __init__(self, batch: Any, *, shared: bool = False) -> None:
        stream = io.BytesIO()
        packer = _Packer(stream)
        packer.dump(batch)
        self._frame = stream.getvalue()
        self._block = torch.empty(packer.size, dtype=torch.uint8)
        if shared:
            self._block.share_memory_()
        for begin, tensor in packer.tensors:
            data = tensor.contiguous().reshape(-1).view(torch.uint8)
            self._block[begin : begin + len(data)] = data

    def unpack(self) -> Any:
        """The batch; its tensors are views of the block."""
        return _Unpacker(io.BytesIO(self._frame), self._block).load()

    def pin_memory(self, device: torch.device | None = None) -> PackedBatch:
        """Called by a loader that pins batches: the block moves to page-locked memory."""
        self._block = self._block.pin_memory()
        return self


class _Packer(pickle.Pickler):
    """Pickles the frame; a tensor becomes its place in the block."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, Tensor]] = []
        self.size = 0

    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, Tensor):
            return None
        begin, length = self.size, value.numel() * value.element_size()
        self.tensors.append((begin, value))
        self.size += -(-length // _ALIGNMENT) * _ALIGNMENT
        return begin, length, str(value.dtype).removeprefix("torch."), tuple(value.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, block: Tensor) -> None:
        super().__init__(stream)
        self._block = block

    def persistent_load(self, place: tuple) -> Tensor:
        begin, length, dtype, shape = place
        return self._block[begin : begin + length].view(getattr(torch, dtype)).view(shape)
