"""What a training image contains: one class and one mask per segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fcclip.errors import InputError


@dataclass(frozen=True)
class Targets:
    """The n segments of one image, as masks or as an id map.

    Loader workers send the id map (4 bytes a pixel whatever n is); the device expands it with `expand`.

    Args:
        labels: (n,) int64, contiguous class index of each segment.
        masks: (n, H, W) bool, or None when `id_map` is given.
        id_map: (H, W) int32, segment id of each pixel; pixels whose id is not in `ids` belong to no segment.
        ids: (n,) int64, the id of each segment in `id_map`.

    Raises:
        ValueError: neither or both forms given, or lengths that differ.
    """

    labels: Tensor
    masks: Tensor | None = None
    id_map: Tensor | None = None
    ids: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.masks is None) == (self.id_map is None):
            raise InputError("Targets takes either masks or id_map with ids, got both or neither")
        if self.id_map is not None and self.ids is None:
            raise InputError("Targets with an id_map needs ids, the id of each segment in it")
        segments = self.ids if self.masks is None else self.masks
        if len(segments) != len(self.labels):
            raise InputError(f"Targets has {len(self.labels)} labels for {len(segments)} segments")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the masks in pixels."""
        grid = self.id_map if self.masks is None else self.masks
        return tuple(grid.shape[-2:])

    def expand(self) -> Tensor:
        """(n, H, W) bool, one mask per segment; a segment without a pixel gives an empty mask."""
        if self.masks is not None:
            return self.masks.bool()
        return self.id_map[None] == self.ids.to(self.id_map.dtype)[:, None, None]

    def to(self, device: torch.device | str) -> Targets:
        """The same record with every tensor on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) if value is not None else None
            for name, value in vars(self).items()
        }
        return Targets(**moved)
