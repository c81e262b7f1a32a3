"""Sliding windows: what a network of a fixed input size says of a larger image (Fusioner, released evaluation)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fcclip.errors import InputError

BORDERS = ("shift", "pad")


@dataclass(frozen=True)
class Windows:
    """Square windows, each two thirds of a side after the one before.

    Args:
        side: pixels.
        border: "shift" moves the last window back so that it ends with the image, and images smaller than a window are
            padded with zeros, the mean colour; "pad" lets it reach beyond the image and pads with -1 (published).
    """

    side: int
    border: str = "shift"

    def __post_init__(self) -> None:
        if self.side < 1 or self.border not in BORDERS:
            raise InputError(
                f"MODEL.FUSIONER.WINDOW must be a number of pixels and WINDOW_BORDER one of {', '.join(BORDERS)}, got "
                f"{self.side} and '{self.border}'"
            )

    def starts(self, length: int) -> list[int]:
        """First pixel of each window along a side of the image.

        Example:
            >>> Windows(224).starts(500), Windows(224, "pad").starts(500)
            ([0, 149, 276], [0, 149, 298])
        """
        stride = max(1, self.side * 2 // 3)
        starts = [stride * index for index in range(-(-max(length - self.side, 0) // stride) + 1)]
        return [min(start, max(length - self.side, 0)) for start in starts] if self.border == "shift" else starts

    def boxes(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """Rows and columns of the image that each window sees, row after row."""
        rows, columns = (
            [slice(start, min(start + self.side, length)) for start in self.starts(length)]
            for length in (height, width)
        )
        return list(itertools.product(rows, columns))

    def mean(self, image: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of what the network says of the windows that see a pixel.

        Args:
            image: (C, H, W), normalised.
            network: (C, side, side) -> (K, side, side).

        Returns:
            (K, H, W).
        """
        total, count = None, image.new_zeros(image.shape[-2:])
        for rows, columns in self.boxes(*image.shape[-2:]):
            part = image[:, rows, columns]
            (h, w), value = part.shape[-2:], -1.0 if self.border == "pad" else 0.0
            result = network(F.pad(part, (0, self.side - w, 0, self.side - h), value=value))[:, :h, :w]
            total = result.new_zeros(len(result), *count.shape) if total is None else total
            total[:, rows, columns] += result
            count[rows, columns] += 1
        return total / count
