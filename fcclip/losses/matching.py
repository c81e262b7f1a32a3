"""The assignment of queries to segments (Mask2Former, section 3.3; costs of equation 1 on sampled points)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def match_costs(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    *,
    class_weight: float,
    mask_weight: float,
    dice_weight: float,
) -> Tensor:
    """What it costs to give segment m to query q, for one prediction set or, with one more dimension in front, several.

    Args:
        class_logits: (Q, K + 1) float.
        mask_logits: (Q, P) float, at the sampled points.
        labels: (n,) int64.
        masks: (n, P) float, 0..1, at the same points.

    Returns:
        (Q, n) float32.
    """
    class_cost = -class_logits.float().softmax(-1)[..., labels]
    x, t = mask_logits.float(), masks.float().mT  # (Q, P), (P, n)
    # softplus(-x) where the mask is and softplus(x) where it is not differ by x
    mask_cost = (F.softplus(x).sum(-1)[..., None] - x @ t) / x.shape[-1]
    probability = x.sigmoid()
    dice_cost = 1 - (2 * probability @ t + 1) / (probability.sum(-1)[..., None] + t.sum(-2)[..., None, :] + 1)
    return class_weight * class_cost + mask_weight * mask_cost + dice_weight * dice_cost


def match(costs: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """The cheapest assignments of all images and prediction sets, after one transfer to the CPU.

    A cost that is not finite counts as dearer than every finite one; the loss that belongs to it stays non-finite,
    where the training loop catches it.

    Args:
        costs: for each image (S, Q, n_i) float; n_i may be 0.

    Returns:
        [image][set] -> (queries, segments), both (min(Q, n_i),) int64 on the CPU.
    """
    if not costs:
        return []
    flat = torch.cat([cost.detach().float().flatten() for cost in costs]).cpu().numpy()
    flat = np.nan_to_num(flat, nan=1e6, posinf=1e6, neginf=1e6)
    offsets = np.cumsum([0, *(cost.numel() for cost in costs)])
    assignments = []
    for cost, start, stop in zip(costs, offsets[:-1], offsets[1:]):
        per_set = flat[start:stop].reshape(tuple(cost.shape))
        pairs = [linear_sum_assignment(cost_of_set) for cost_of_set in per_set]
        assignments.append([(torch.as_tensor(rows), torch.as_tensor(columns)) for rows, columns in pairs])
    return assignments
