"""Masks at the output size: a few queries or a few rows at a time, so that memory does not grow with the image.

A hundred classes more cost a hundred maps of the whole image otherwise, and ADE20K-847 several gigabytes. Blocks give
the numbers of the whole to rounding: bilinear resizing and the sum over queries are linear, so they may change places.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.ops import output_maps

# Floats of mask logits at the output size that are held at once: on a CPU, and on a GPU, which few would not keep busy.
_MASKS_CPU, _MASKS = 2**24, 2**26
# Floats in the largest tensor of a block of rows, of which heads hold a few: what a CPU's cache holds well, and what
# keeps a GPU busy. Nobody asks how much memory is free, so that results do not depend on what else is running.
_BLOCK_CPU, _BLOCK = 2**22, 2**25


@dataclass(frozen=True)
class OutputMasks:
    """The masks of an image at the output size, made a few at a time.

    Args:
        mask_logits: (Q, ·, ·) float at network stride, over the padded image.
        padded_size, image_size, output_size: (height, width) of the network input with and without padding, and of the
            outputs.
    """

    mask_logits: Tensor
    padded_size: tuple[int, int]
    image_size: tuple[int, int]
    output_size: tuple[int, int]

    @classmethod
    def whole(cls, mask_logits: Tensor) -> OutputMasks:
        """Masks (Q, h, w) that have the output size already."""
        size = tuple(mask_logits.shape[-2:])
        return cls(mask_logits, size, size, size)

    def cells_of(self, regions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Regions of the output, (n, h, w) bool, on a grid over the padded image: (n, *grid), above 0 in the cells of
        which a region has most, compared with its fullest cell."""
        shares = F.interpolate(regions[None].to(self.mask_logits.device, torch.float32), self.image_size, mode="area")
        padding = [whole - side for whole, side in zip(self.padded_size, self.image_size)]
        shares = F.adaptive_avg_pool2d(F.pad(shares, (0, padding[1], 0, padding[0])), grid)[0]
        return shares - shares.amax((-2, -1), keepdim=True) / 2

    def rows(self, queries: Tensor | None = None, *, maps: int = 0) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Mask logits of all queries and their probabilities, some rows of the output at a time.

        Args:
            queries: (n,) int64, of these alone.
            maps: how many the caller makes of them; so many rows at a time that these fit too.

        Yields:
            rows of the output, and there the logits (n, number of rows, width) and their sigmoids.
        """
        if (compiled := output_maps.library(self.mask_logits)) is not None and not self._is_whole():
            yield from self._rows_compiled(compiled, queries, maps=maps)
            return
        for rows, needed, mask_logits in self.input_rows(queries, maps=maps):
            wanted = range(rows.start, rows.stop)
            place = {"first": needed.start, "of": self.image_size[0]}
            mask_logits = resize_rows(mask_logits, wanted, self.output_size, **place)
            yield rows, mask_logits, mask_logits.sigmoid()

    def _is_whole(self) -> bool:
        return tuple(self.mask_logits.shape[-2:]) == self.padded_size and self.image_size == self.output_size

    def _rows_compiled(
        self, compiled: ctypes.CDLL, queries: Tensor | None, *, maps: int
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        places = torch.arange(len(self.mask_logits)) if queries is None else queries
        along = [
            _sources_and_weights(*sizes)
            for sizes in zip(self.mask_logits.shape[-2:], self.padded_size, self.image_size, self.output_size)
        ]
        taps = max(len(numbers) for numbers, _ in along)
        (row_numbers, row_weights), columns = ([_filled(part, taps) for part in parts] for parts in along)
        for rows in _blocks(self.output_size, max(maps, len(places)), _BLOCK_CPU // 4):
            some = (row_numbers[:, rows], row_weights[:, rows])
            yield rows, *output_maps.enlarge(compiled, self.mask_logits, places, some, columns)

    def input_rows(self, queries: Tensor | None = None, *, maps: int = 0) -> Iterator[tuple[slice, range, Tensor]]:
        """As `rows`, before the image is resized to the output: rows of the output, the rows of the image that they
        are made of, and the logits (n, number of those, width of the image)."""
        mask_logits = self.mask_logits if queries is None else self.mask_logits[queries]
        height, width = self.output_size
        budget = _BLOCK_CPU if mask_logits.device.type == "cpu" else _BLOCK
        for rows in _blocks((height, max(self.padded_size[1], width)), max(maps, len(mask_logits)), budget):
            needed = _sources(range(rows.start, rows.stop), self.image_size[0], height)
            yield rows, needed, resize_rows(mask_logits, needed, self.padded_size)[..., : self.image_size[1]]

    def of(self, queries: Tensor) -> Iterator[Tensor]:
        """Mask logits (m, h, w) of the queries (n,) int64, as many at a time as fit, in their order."""
        height, width = self.output_size
        budget = _MASKS_CPU if self.mask_logits.device.type == "cpu" else _MASKS
        for chunk in queries.split(max(1, budget // (height * width))):
            if len(chunk):
                maps = resize(self.mask_logits[chunk], self.padded_size)
                yield resize(maps[:, : self.image_size[0], : self.image_size[1]], self.output_size)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, ·, ·) -> (n, *size), bilinear; the input itself when it has that size."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def semantic_blocks(masks: OutputMasks, probabilities: Tensor, *, masks_first: bool) -> Iterator[tuple[slice, Tensor]]:
    """Semantic scores at the output size, some rows at a time.

    Args:
        masks: of Q queries.
        probabilities: (Q, K), of the classes.
        masks_first: resize the mask logits to the output size and then take their probabilities, as for panoptic maps;
            else the scores at the size of the input are resized.

    Yields:
        rows of the output, and the scores (K, number of rows, width) there.
    """
    queries, num_classes = probabilities.shape
    output_size = masks.output_size
    if masks_first or masks.image_size == output_size:
        for rows, _, shares in masks.rows(maps=num_classes):
            yield rows, weighted_sum(probabilities, shares)
        return
    for rows, needed, mask_logits in masks.input_rows(maps=num_classes):
        shares = mask_logits.sigmoid()
        few = shares if num_classes >= queries else weighted_sum(probabilities, shares)  # the fewer maps to resize
        few = resize_rows(few, range(rows.start, rows.stop), output_size, first=needed.start, of=masks.image_size[0])
        yield rows, weighted_sum(probabilities, few) if num_classes >= queries else few


def weighted_sum(probabilities: Tensor, shares: Tensor) -> Tensor:
    """(Q, K) and (Q, h, w) -> (K, h, w)."""
    return (probabilities.T @ shares.flatten(1)).unflatten(1, shares.shape[1:])


def resize_rows(maps: Tensor, rows: range, size: tuple[int, int], *, first: int = 0, of: int | None = None) -> Tensor:
    """Some rows of maps resized bilinearly, as `interpolate` (align_corners=False) resizes them.

    Args:
        maps: (n, h, w) float; rows of larger maps, all that are needed and perhaps more.
        rows: of the result, consecutive.
        size: (height, width) of the whole result.
        first: number of the first row of `maps` in the larger maps.
        of: height of the larger maps; None: `maps` are whole.

    Returns:
        (n, len(rows), width).
    """
    height = maps.shape[1] if of is None else of
    sources = _sources(rows, height, size[0])
    maps = maps[:, sources.start - first : sources.stop - first]
    if size[0] % height == 0:  # a block of whole rows, and one more at each side, has the weights of the whole
        factor = size[0] // height
        resized = resize(maps, (len(sources) * factor, size[1]))
        start = rows.start - sources.start * factor
        return resized[:, start : start + len(rows)]
    wide = resize(maps, (len(sources), size[1]))
    above, below, share = _rows_between(rows, height, size[0], maps.device)
    return torch.lerp(wide[:, above - sources.start], wide[:, below - sources.start], share.to(maps.dtype)[:, None])


def _sources(rows: range, height: int, resized: int) -> range:
    """The rows of a map of this height that `rows` of the resized one are made of."""
    if height == resized:
        return rows
    above, below, _ = _rows_between(range(rows.start, rows.start + 1), height, resized)
    start = int(above[0])
    above, below, _ = _rows_between(range(rows.stop - 1, rows.stop), height, resized)
    return range(start, int(below[0]) + 1)


def _rows_between(
    rows: range, height: int, resized: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of the resized map the two rows it lies between, and how far it is from the first to the second."""
    centre = (torch.arange(rows.start, rows.stop, dtype=torch.float32, device=device) + 0.5) * (height / resized) - 0.5
    centre = centre.clamp(min=0)
    above = centre.long().clamp(max=height - 1)
    return above, (above + 1).clamp(max=height - 1), centre - above


def _blocks(size: tuple[int, int], maps: int, budget: int) -> Iterator[slice]:
    """The rows of maps of this size, as many at a time as `budget` floats hold."""
    step = max(1, budget // (max(maps, 1) * size[1]))
    for start in range(0, size[0], step):
        yield slice(start, min(start + step, size[0]))


def _sources_and_weights(stride: int, padded: int, image: int, output: int) -> tuple[Tensor, Tensor]:
    """Along one side, of which numbers at network stride each of the output is the weighted sum, and the weights:
    (t, output) int32 and float32 with t = 2, or 4 where the image is resized to the output."""

    def between(of: int, resized: int, number: int) -> tuple[Tensor, Tensor]:
        first, second, share = _rows_between(range(number), of, resized)
        return torch.stack([first, second]), torch.stack([1 - share, share])

    numbers, weights = between(stride, padded, image)
    if image != output:
        through, shares = between(image, output, output)
        numbers = numbers[:, through].flatten(0, 1)
        weights = (weights[:, through] * shares).flatten(0, 1)
    return numbers.int(), weights


def _filled(tensor: Tensor, rows: int) -> Tensor:
    """Rows of zeros added."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), tensor.shape[1])])
