"""Where the mask losses look: sampled points instead of whole images (Kirillov et al., PointRend; Mask2Former section
3.3).

Points are (x, y), 0..1 over the padded network input, so one set of points serves maps of any resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.errors import InputError
from fcclip.structures import Targets

PointSource = Callable[[int, int], Tensor]  # (n, count) -> (n, count, 2), (x, y) uniform in 0..1


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps at points; 0 outside.

    Args:
        maps: (n, C, h, w) float.
        points: (n, P, 2) float, (x, y), 0..1.

    Returns:
        (n, C, P) float.
    """
    grid = (2 * points - 1)[:, None]  # (n, 1, P, 2)
    return F.grid_sample(maps, grid.to(maps.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)[:, :, 0]


@torch.no_grad()
def sample_cells(cells: Tensor, size: tuple[int, int], points: Tensor) -> Tensor:
    """What `sample_maps` gives for one map whose channels lie together, many times as fast; no gradients.

    Args:
        cells: (h * w, C) float, row after row.
        size: (h, w).
        points: (P, 2) float, (x, y), 0..1.

    Returns:
        (P, C) float.
    """
    index, shares = zip(*_corners(points, size, size))
    return F.embedding_bag(
        torch.stack(index, -1), cells, mode="sum", per_sample_weights=torch.stack(shares, -1).to(cells)
    )


def _corners(points: Tensor, size: tuple[int, int], scale: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The four neighbours of each point, by the index of a cell and its share, which is 0 for those outside.

    `scale`: cells that 0..1 of the points is high and wide, which may be more than the `size` of the map.
    """
    height, width = size
    x, y = points[..., 0].float() * scale[1] - 0.5, points[..., 1].float() * scale[0] - 0.5
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    left, top = left.long(), top.long()
    for dy, row_share in ((0, 1 - bottom_share), (1, bottom_share)):
        for dx, column_share in ((0, 1 - right_share), (1, right_share)):
            row, column = top + dy, left + dx
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            yield row.clamp(0, height - 1) * width + column.clamp(0, width - 1), inside * row_share * column_share


def sample_targets(targets: Targets, segments: Tensor, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Bilinear values of segment masks at points, read off the id map: no mask is ever expanded.

    Args:
        targets: the segments of one image.
        segments: (n,) int64, which segments, with repetitions.
        points: (n, P, 2) or (1, P, 2) float, (x, y), 0..1 over `padded_size`.
        padded_size: (height, width) of the network input; the part beyond the image belongs to no segment.

    Returns:
        (n, P) float32, 0..1; equal to sampling the zero-padded 0/1 mask.
    """
    values = torch.zeros(len(segments), points.shape[1], device=points.device)
    for index, share in _corners(points, targets.image_size, padded_size):  # (n or 1, P)
        if targets.masks is None:
            hit = targets.id_map.flatten()[index] == targets.ids.to(targets.id_map.dtype)[segments][:, None]
        else:
            hit = targets.masks.flatten(1)[segments].gather(1, index.expand(len(segments), -1)) > 0
        values = values + hit * share
    return values


def uncertain_points(
    mask_logits: Tensor, num_points: int, oversample_ratio: float, importance_ratio: float, draw
) -> Tensor:
    """Points of which a share lies where the prediction is least certain (PointRend section 3.2).

    Args:
        mask_logits: (n, h, w) float, before the sigmoid.
        num_points: P.
        oversample_ratio: candidates drawn per wanted point, at least 1.
        importance_ratio: share of P taken from the most uncertain candidates, 0..1; the rest is uniform.
        draw: function (count) -> (n, count, 2) uniform points in 0..1.

    Returns:
        (n, P, 2) float, without gradient.
    """
    with torch.no_grad():
        candidates = draw(int(num_points * oversample_ratio))
        values = sample_maps(mask_logits.float()[:, None], candidates)[:, 0]  # (n, candidates)
        num_uncertain = int(importance_ratio * num_points)
        chosen = (-values.abs()).topk(num_uncertain, dim=1).indices
        points = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        if num_points > num_uncertain:
            points = torch.cat([points, draw(num_points - num_uncertain)], dim=1)
        return points


def point_sources(seeds: Sequence[int] | None, num_images: int, device: torch.device) -> list[PointSource]:
    """One source of uniform points an image.

    Args:
        seeds: one an image, which makes its points independent of all others; None: torch's global generator.
        num_images: how many images.
        device: of the points.

    Raises:
        ValueError: another number of seeds than of images.
    """

    def source(seed: int | None) -> PointSource:
        generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))
        return lambda num, count: torch.rand(num, count, 2, device=device, generator=generator)

    if seeds is not None and len(seeds) != num_images:
        raise InputError(f"{len(seeds)} point seeds for {num_images} images")
    return [source(None if seeds is None else seed) for seed in (seeds or [None] * num_images)]
