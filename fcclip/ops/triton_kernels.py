"""The Triton kernels of multi-scale deformable attention. Imports triton: triton_engine.py imports this when it runs.

Legend: B images, S cells of all levels, M heads, D channels of a head, N queries, L levels, P points, K = L * P.

A program takes one head and a tile of TALL x WIDE neighbouring queries, whose samples lie near each other, so that most
values come out of the first cache; where the queries are not the cells, a tile is a run of queries. Heights h0, h1, …
and widths w0, w1, … of the levels are runtime numbers that triton must not look at, so that no size of image compiles
anything anew; triton would look into a tuple. Half types are computed in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

MAX_LEVELS = 8

_SIZES = [f"{side}{level}" for side in "hw" for level in range(MAX_LEVELS)]


def _tiles(*choices: tuple[int, int, int]) -> list[triton.Config]:
    return [triton.Config({"TILE": tile}, num_warps=warps, num_stages=stages) for tile, warps, stages in choices]


def _tuned(choices: list[triton.Config], **options):
    """Autotuned on the first call of each kind; the interpreter takes the first."""
    if knobs.runtime.interpret:
        choices = choices[:1]
    return triton.autotune(choices, key=["M", "D", "L", "P", "FUSED", "ON_GRID"], **options)


@triton.jit
def _computed(x):
    if x.dtype == tl.float64:
        return x
    return x.to(tl.float32)


@triton.jit
def _exact_quotient(x, y):
    """Rounded to nearest; `/` alone may be two units off in fp32."""
    if x.dtype == tl.float64:
        return x / y
    return tl.div_rn(x, y)


@triton.jit
def _tile_of_queries(tile, heights, widths, N, L: tl.constexpr, TILE: tl.constexpr, ON_GRID: tl.constexpr):
    """(TILE,) index, row and column of each query of a tile and whether it exists, and the size of its level."""
    member = tl.arange(0, TILE)
    if not ON_GRID:
        query = tile * TILE + member
        return query, query * 0, query, query < N, 1, N
    WIDE: tl.constexpr = 8 if TILE >= 32 else 4
    TALL: tl.constexpr = TILE // WIDE
    cells = 0
    tiles = 0
    first = 0
    place = 0
    height = 1
    width = 1
    for level in tl.static_range(L):
        more = tl.cdiv(widths[level], WIDE) * tl.cdiv(heights[level], TALL)
        here = (tile >= tiles) & (tile < tiles + more)
        first = tl.where(here, cells, first)
        place = tl.where(here, tile - tiles, place)
        height = tl.where(here, heights[level], height)
        width = tl.where(here, widths[level], width)
        tiles += more
        cells += heights[level] * widths[level]
    across = tl.cdiv(width, WIDE)
    row = place // across * TALL + member // WIDE
    column = place % across * WIDE + member % WIDE
    exists = (row < height) & (column < width)
    return tl.where(exists, first + row * width + column, 0), row, column, exists, height, width


@triton.jit
def _softmax(weights, row, exists, K: tl.constexpr):
    """(TILE,) highest logit of each query and one over the sum of the exponentials."""
    highest = _computed(tl.load(weights + row * K, mask=exists, other=0.0))
    for k in range(1, K):
        highest = tl.maximum(highest, _computed(tl.load(weights + row * K + k, mask=exists, other=0.0)))
    total = tl.zeros_like(highest)
    for k in range(K):
        total += tl.exp(_computed(tl.load(weights + row * K + k, mask=exists, other=0.0)) - highest)
    return highest, _exact_quotient(tl.full(total.shape, 1.0, total.dtype), total)


@triton.jit
def _sample(
    points, weights, at, exists, row, column, height, width, own_height, own_width, highest, share, FUSED: tl.constexpr
):
    """(TILE,) of one sample of each query: whether it counts, upper left corner, shares of the right and the lower
    corners, weight.
    """
    x = _computed(tl.load(points + 2 * at, mask=exists, other=0.0))
    y = _computed(tl.load(points + 2 * at + 1, mask=exists, other=0.0))
    weight = _computed(tl.load(weights + at, mask=exists, other=0.0))
    if FUSED:
        weight = tl.exp(weight - highest) * share
        wide = (column.to(x.dtype) + 0.5) * width
        tall = (row.to(x.dtype) + 0.5) * height
        x += _exact_quotient(wide, tl.zeros_like(wide) + own_width) - 0.5
        y += _exact_quotient(tall, tl.zeros_like(tall) + own_height) - 0.5
    else:
        x = x * width - 0.5
        y = y * height - 0.5
    counts = exists & (x >= -1) & (x < width) & (y >= -1) & (y < height)  # false for what is not finite, too
    x = tl.where(counts, x, 0.0)
    y = tl.where(counts, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return counts, left.to(tl.int32), top.to(tl.int32), x - left, y - top, weight


@triton.jit
def _corner(value, cell, inside, channel, has, M: tl.constexpr, D: tl.constexpr):
    """(TILE, BLOCK) values of a cell each, 0 for those outside."""
    at = cell.to(tl.int64)[:, None] * (M * D) + channel[None, :]
    return _computed(tl.load(value + at, mask=inside[:, None] & has[None, :], other=0.0))


@_tuned(_tiles((32, 4, 2), (32, 8, 2), (64, 4, 2), (64, 8, 2), (16, 4, 2)))
@triton.jit(do_not_specialize=[*_SIZES, "N", "S"])
def forward(
    value,
    points,
    weights,
    output,
    h0,
    h1,
    h2,
    h3,
    h4,
    h5,
    h6,
    h7,
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    w6,
    w7,
    N,
    S,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FUSED: tl.constexpr,
    ON_GRID: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """output (B, N, M, D); BLOCK: a power of two from D on."""
    heights = (h0, h1, h2, h3, h4, h5, h6, h7)
    widths = (w0, w1, w2, w3, w4, w5, w6, w7)
    head = tl.program_id(0) % M
    image = tl.program_id(1).to(tl.int64)
    query, row, column, exists, own_height, own_width = _tile_of_queries(
        tl.program_id(0) // M, heights, widths, N, L, TILE, ON_GRID
    )
    place = (image * N + query) * M + head
    value += (image * S * M + head) * D
    channel = tl.arange(0, BLOCK)
    has = channel < D
    K: tl.constexpr = L * P
    if FUSED:
        highest, share = _softmax(weights, place, exists, K)
    else:
        highest = 0.0
        share = 0.0
    if value.dtype.element_ty == tl.float64:
        total = tl.zeros([TILE, BLOCK], tl.float64)
    else:
        total = tl.zeros([TILE, BLOCK], tl.float32)
    first = 0
    for level in tl.static_range(L):
        height = heights[level]
        width = widths[level]
        for point in range(P):
            counts, left, top, right_share, low_share, weight = _sample(
                points, weights, place * K + level * P + point, exists, row, column, height, width, own_height,
                own_width, highest, share, FUSED,
            )  # fmt: skip
            cell = first + top * width + left
            low = weight * low_share
            high = weight * (1 - low_share)
            is_left = counts & (left >= 0)
            is_right = counts & (left + 1 < width)
            is_top = top >= 0
            is_low = top + 1 < height
            # a sample that does not count has a weight that may be anything, but only values of 0
            total += (high * (1 - right_share))[:, None] * _corner(value, cell, is_top & is_left, channel, has, M, D)
            total += (high * right_share)[:, None] * _corner(value, cell + 1, is_top & is_right, channel, has, M, D)
            total += (low * (1 - right_share))[:, None] * _corner(
                value, cell + width, is_low & is_left, channel, has, M, D
            )
            total += (low * right_share)[:, None] * _corner(
                value, cell + width + 1, is_low & is_right, channel, has, M, D
            )
        first += height * width
    tl.store(output + place[:, None] * D + channel[None, :], total, mask=exists[:, None] & has[None, :])


@triton.jit
def _add(grad_value, cell, inside, grads, coefficient, channel, has, M: tl.constexpr, D: tl.constexpr):
    at = cell.to(tl.int64)[:, None] * (M * D) + channel[None, :]
    tl.atomic_add(grad_value + at, coefficient[:, None] * grads, mask=inside[:, None] & has[None, :], sem="relaxed")


@_tuned(_tiles((32, 4, 2), (32, 8, 2), (16, 4, 2), (64, 8, 2)), reset_to_zero=["grad_value"])
@triton.jit(do_not_specialize=[*_SIZES, "N", "S", "B", "places"])
def backward(
    grad_output,
    value,
    points,
    weights,
    grad_value,
    grad_points,
    grad_weights,
    sample_places,
    coefficients,
    h0,
    h1,
    h2,
    h3,
    h4,
    h5,
    h6,
    h7,
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    w6,
    w7,
    N,
    S,
    B,
    places,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FUSED: tl.constexpr,
    ON_GRID: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """grad_value (B, S, M, D) fp32, or fp64 for fp64, of zeros. SORTED: nothing is added to it; instead `sample_places`
    (B, N, M, K) gets the place of each sample and `coefficients` (B, N, M, K, 4) its shares, for `gather`.
    """
    heights = (h0, h1, h2, h3, h4, h5, h6, h7)
    widths = (w0, w1, w2, w3, w4, w5, w6, w7)
    head = tl.program_id(0) % M
    image = tl.program_id(1).to(tl.int64)
    query, row, column, exists, own_height, own_width = _tile_of_queries(
        tl.program_id(0) // M, heights, widths, N, L, TILE, ON_GRID
    )
    place = (image * N + query) * M + head
    value += (image * S * M + head) * D
    grad_value += (image * S * M + head) * D
    channel = tl.arange(0, BLOCK)
    has = channel < D
    grads = _computed(
        tl.load(grad_output + place[:, None] * D + channel[None, :], mask=exists[:, None] & has[None, :], other=0.0)
    )
    K: tl.constexpr = L * P
    if FUSED:
        highest, share = _softmax(weights, place, exists, K)
    else:
        highest = 0.0
        share = 0.0
    sample_of = tl.arange(0, BLOCK_K)
    by_weight = tl.zeros([TILE, BLOCK_K], grads.dtype)  # gradients of the weights
    shares = tl.zeros([TILE, BLOCK_K], grads.dtype)  # the weights
    first = 0
    before = 0  # places of the levels before this one
    for level in tl.static_range(L):
        height = heights[level]
        width = widths[level]
        for point in range(P):
            k = level * P + point
            at = place * K + k
            counts, left, top, right_share, low_share, weight = _sample(
                points, weights, at, exists, row, column, height, width, own_height, own_width, highest, share, FUSED
            )
            cell = first + top * width + left
            is_top_left = counts & (left >= 0) & (top >= 0)
            is_top_right = counts & (left + 1 < width) & (top >= 0)
            is_low_left = counts & (left >= 0) & (top + 1 < height)
            is_low_right = counts & (left + 1 < width) & (top + 1 < height)
            top_left = tl.sum(grads * _corner(value, cell, is_top_left, channel, has, M, D), axis=1)
            top_right = tl.sum(grads * _corner(value, cell + 1, is_top_right, channel, has, M, D), axis=1)
            low_left = tl.sum(grads * _corner(value, cell + width, is_low_left, channel, has, M, D), axis=1)
            low_right = tl.sum(grads * _corner(value, cell + width + 1, is_low_right, channel, has, M, D), axis=1)
            above = top_right - top_left
            below = low_right - low_left
            upper = top_left + right_share * above
            lower = low_left + right_share * below
            by_x = weight * (above + low_share * (below - above))
            by_y = weight * (lower - upper)
            if not FUSED:
                by_x *= width
                by_y *= height
            tl.store(grad_points + 2 * at, tl.where(counts, by_x, 0.0), mask=exists)
            tl.store(grad_points + 2 * at + 1, tl.where(counts, by_y, 0.0), mask=exists)
            here = sample_of[None, :] == k
            by_weight = tl.where(here, tl.where(counts, upper + low_share * (lower - upper), 0.0)[:, None], by_weight)
            shares = tl.where(here, weight[:, None], shares)
            low = weight * low_share
            high = weight * (1 - low_share)
            if SORTED:
                nowhere = B * M * places
                here = before + (top + 1).to(tl.int64) * (width + 1) + left + 1
                tl.store(sample_places + at, tl.where(counts, (image * M + head) * places + here, nowhere), mask=exists)
                tl.store(coefficients + 4 * at, high * (1 - right_share), mask=exists)
                tl.store(coefficients + 4 * at + 1, high * right_share, mask=exists)
                tl.store(coefficients + 4 * at + 2, low * (1 - right_share), mask=exists)
                tl.store(coefficients + 4 * at + 3, low * right_share, mask=exists)
            else:
                _add(grad_value, cell, is_top_left, grads, high * (1 - right_share), channel, has, M, D)
                _add(grad_value, cell + 1, is_top_right, grads, high * right_share, channel, has, M, D)
                _add(grad_value, cell + width, is_low_left, grads, low * (1 - right_share), channel, has, M, D)
                _add(grad_value, cell + width + 1, is_low_right, grads, low * right_share, channel, has, M, D)
        first += height * width
        before += (height + 1) * (width + 1)
    if FUSED:
        by_weight = shares * (by_weight - tl.sum(shares * by_weight, axis=1)[:, None])
    tl.store(
        grad_weights + place[:, None] * K + sample_of[None, :],
        by_weight,
        mask=exists[:, None] & (sample_of < K)[None, :],
    )


@triton.jit(do_not_specialize=[*_SIZES, "S", "places"])
def gather(
    grad_output,
    order,
    starts,
    coefficients,
    grad_value,
    h0,
    h1,
    h2,
    h3,
    h4,
    h5,
    h6,
    h7,
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    w6,
    w7,
    S,
    places,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the values, one cell and head a program: the samples of four places, in their order. A sample lies in
    the place of its upper left corner, on levels with one more row and column before the first.
    """
    heights = (h0, h1, h2, h3, h4, h5, h6, h7)
    widths = (w0, w1, w2, w3, w4, w5, w6, w7)
    head = tl.program_id(0) % M
    cell = tl.program_id(0) // M
    image = tl.program_id(1).to(tl.int64)
    first = 0
    before = 0
    row = 0
    column = 0
    wide = 1
    start = 0
    for level in tl.static_range(L):
        height = heights[level]
        width = widths[level]
        here = (cell >= first) & (cell < first + height * width)
        row = tl.where(here, (cell - first) // width, row)
        column = tl.where(here, (cell - first) % width, column)
        wide = tl.where(here, width + 1, wide)
        start = tl.where(here, before, start)
        first += height * width
        before += (height + 1) * (width + 1)
    channel = tl.arange(0, BLOCK)
    has = channel < D
    if grad_output.dtype.element_ty == tl.float64:
        total = tl.zeros([BLOCK], tl.float64)
    else:
        total = tl.zeros([BLOCK], tl.float32)
    for corner in tl.static_range(4):
        place = (image * M + head) * places + start + (row + 1 - corner // 2) * wide + column + 1 - corner % 2
        begin = tl.load(starts + place)
        end = tl.load(starts + place + 1)
        for at in range(begin, end):
            sample = tl.load(order + at)
            grads = _computed(tl.load(grad_output + sample // (L * P) * D + channel, mask=has, other=0.0))
            total += tl.load(coefficients + 4 * sample + corner) * grads
    tl.store(grad_value + ((image * S + cell) * M + head) * D + channel, total, mask=has)


def check_driver() -> None:
    """Fails where triton cannot launch anything: it compiles a little C for that, once, and loads the driver."""
    driver.active.get_current_target()


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """What a type is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
