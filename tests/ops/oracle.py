"""Multi-scale deformable attention and its gradients, written out in float64: one sample after the other, straight
from the definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Truth:
    """What the loop found. `smooth` (B, N, M, L, P) is false where a sample lies on a whole pixel but for rounding, so
    that the derivative by its location may be that of either side."""

    output: Tensor
    grad_value: Tensor
    grad_points: Tensor
    grad_weights: Tensor
    smooth: Tensor


def oracle(value, shapes, locations, weights, grad_output) -> Truth:
    """The published form: locations 0..1 and weights."""
    return _loop(*_arrays(value, locations, weights, grad_output), shapes)


def oracle_fused(value, shapes, offsets, logits, grad_output) -> Truth:
    """The fused form: query n is cell n, samples lie at its centre plus offsets, weights are the softmax of logits."""
    value, offsets, logits, grad_output = _arrays(value, offsets, logits, grad_output)
    centres = [
        ((j + 0.5) / width, (i + 0.5) / height) for height, width in shapes for i, j in np.ndindex(height, width)
    ]
    sizes = np.array([(width, height) for height, width in shapes], dtype=np.float64)[:, None]  # (L, 1, 2)
    locations = np.array(centres)[:, None, None, None] + offsets / sizes
    shares = np.exp(logits - logits.max((-2, -1), keepdims=True))
    weights = shares / shares.sum((-2, -1), keepdims=True)
    truth = _loop(value, locations, weights, grad_output, shapes)
    grad_weights = truth.grad_weights.numpy()
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum((-2, -1), keepdims=True))
    return Truth(
        truth.output,
        truth.grad_value,
        truth.grad_points / torch.from_numpy(sizes),
        torch.from_numpy(grad_logits),
        truth.smooth,
    )


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().cpu().double().numpy() for tensor in tensors]


def _loop(value, locations, weights, grad_output, shapes) -> Truth:
    batch, queries, heads, levels, points, _ = locations.shape
    channels = value.shape[-1]
    starts = np.cumsum([0] + [height * width for height, width in shapes])
    grads = grad_output.reshape(batch, queries, heads, channels)
    output = np.zeros((batch, queries, heads, channels))
    grad_value, grad_points, grad_weights = (np.zeros_like(tensor) for tensor in (value, locations, weights))
    smooth = np.ones(weights.shape, dtype=bool)
    for at in np.ndindex(batch, queries, heads, levels, points):
        b, q, m, level, _ = at
        height, width = shapes[level]
        x, y = locations[at][0] * width - 0.5, locations[at][1] * height - 0.5
        if -2 < x < width + 1 and -2 < y < height + 1:
            smooth[at] = min(abs(x - round(x)), abs(y - round(y))) > 1e-4
        if not (-1 <= x < width and -1 <= y < height):  # nor what is not finite
            continue
        left, top, grad, weight = math.floor(x), math.floor(y), grads[b, q, m], weights[at]
        for row, low in ((top, False), (top + 1, True)):
            for column, right in ((left, False), (left + 1, True)):
                if 0 <= row < height and 0 <= column < width:
                    cell = (b, starts[level] + row * width + column, m)
                    share_x, share_y = (x - left if right else left + 1 - x), (y - top if low else top + 1 - y)
                    output[b, q, m] += weight * share_x * share_y * value[cell]
                    grad_value[cell] += weight * share_x * share_y * grad
                    dot = float(value[cell] @ grad)
                    grad_weights[at] += share_x * share_y * dot
                    grad_points[at][0] += width * weight * share_y * dot * (1 if right else -1)
                    grad_points[at][1] += height * weight * share_x * dot * (1 if low else -1)
    arrays = (output.reshape(batch, queries, -1), grad_value, grad_points, grad_weights, smooth)
    return Truth(*(torch.from_numpy(tensor) for tensor in arrays))
