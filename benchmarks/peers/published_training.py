"""A training step of FC-CLIP as published, step by step in plain PyTorch, on the weights of our model.

The layers of the networks are borrowed, and the steps of the decoders are those of published_inference.py. Every
prediction set makes whole masks, is matched by itself, image after image, on points of its masks, and gets its own
losses (Mask2Former section 3.3). Points come from the seeds of the samples in the order in which ours draws them, so
that both see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_ops import load_peer
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fcclip.modeling import FCCLIP


def losses(model: FCCLIP, batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The weighted losses of a batch whose samples all have the training classes and seeds of their points."""
    steps, criterion, vocabulary = load_peer("published_inference"), model.criterion, model.train_vocabulary
    images, _ = model.preprocess(batch)
    text = model.text_encoder.encode(vocabulary).vectors
    with_void = torch.cat([text, F.normalize(model.void_embedding.weight, dim=-1)])
    counts = [len(names) for names in vocabulary.synonyms]
    levels = model.backbone(images).levels
    with steps.attention_as_published():
        mask_features, pyramid = model.sem_seg_head.pixel_decoder(levels)
    sets = steps.decode_all(model.sem_seg_head.predictor, pyramid, mask_features, with_void, counts)

    targets = [sample["targets"].to(images.device) for sample in batch]
    labels, truth = [target.labels for target in targets], [target.expand().float() for target in targets]
    truth = [
        F.pad(masks, (0, images.shape[-1] - masks.shape[-1], 0, images.shape[-2] - masks.shape[-2])) for masks in truth
    ]
    matched = [min(len(masks), sets[0][0].shape[1]) for masks in truth]
    points = [
        Points(sample["point_seed"], len(sets), number, criterion, images.device)
        for sample, number in zip(batch, matched)
    ]
    num_masks = max(sum(map(len, truth)), 1)
    weights, result = criterion.weights, {}
    for index, (scores, masks) in enumerate(sets):
        pairs = [
            match(scores[image], masks[image], labels[image], truth[image], points[image].matching[index], weights)
            for image in range(len(batch))
        ]
        own = {
            "loss_ce": class_loss(scores, labels, pairs, criterion.empty_weight),
            **mask_losses(masks, truth, pairs, [partial(each.of_set, index) for each in points], criterion, num_masks),
        }
        suffix = "" if index == len(sets) - 1 else f"_{index}"
        result |= {f"{name}{suffix}": weights[name] * value for name, value in own.items()}
    return result


class Points:
    """All points of one image: of the matching, the candidates and the rest of the mask losses."""

    def __init__(self, seed: int, num_sets: int, num_matched: int, criterion: nn.Module, device: torch.device) -> None:
        draw = partial(torch.rand, generator=torch.Generator(device).manual_seed(seed), device=device)
        number = criterion.num_points
        self.uncertain = int(criterion.importance_ratio * number)
        self.num_matched = num_matched
        self.matching = draw(num_sets, number, 2)
        self.candidates = draw(num_sets * num_matched, int(criterion.oversample_ratio * number), 2)
        self.rest = draw(num_sets * num_matched, number - self.uncertain, 2)

    def of_set(self, index: int) -> tuple[Tensor, Tensor]:
        rows = slice(index * self.num_matched, (index + 1) * self.num_matched)
        return self.candidates[rows], self.rest[rows]


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """(n, h, w) at (n, P, 2) -> (n, P)."""
    return F.grid_sample(maps[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


@torch.no_grad()
def match(
    scores: Tensor, masks: Tensor, labels: Tensor, truth: Tensor, points: Tensor, weights: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """Queries and segments of one image in one prediction set."""
    with torch.autocast(masks.device.type, enabled=False):
        return _match(scores.float(), masks.float(), labels, truth, points, weights)


def _match(
    scores: Tensor, masks: Tensor, labels: Tensor, truth: Tensor, points: Tensor, weights: dict[str, float]
) -> tuple[Tensor, Tensor]:
    x = sample(masks, points.expand(len(masks), -1, -1))
    t = sample(truth, points.expand(len(truth), -1, -1))
    by_class = -scores.softmax(-1)[:, labels]
    positive = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
    negative = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
    by_mask = (positive @ t.T + negative @ (1 - t).T) / x.shape[1]
    shares = x.sigmoid()
    by_dice = 1 - (2 * shares @ t.T + 1) / (shares.sum(-1)[:, None] + t.sum(-1) + 1)
    cost = weights["loss_mask"] * by_mask + weights["loss_ce"] * by_class + weights["loss_dice"] * by_dice
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


def class_loss(scores: Tensor, labels: Sequence[Tensor], pairs: Sequence[tuple], empty_weight: Tensor) -> Tensor:
    target = torch.full(scores.shape[:2], scores.shape[-1] - 1, device=scores.device)
    for image, (rows, columns) in enumerate(pairs):
        target[image, rows] = labels[image][columns]
    weight = torch.ones(scores.shape[-1], device=scores.device)
    weight[-1] = empty_weight[-1]
    return F.cross_entropy(scores.transpose(1, 2), target, weight)


def mask_losses(
    masks: Tensor,
    truth: Sequence[Tensor],
    pairs: Sequence[tuple],
    points: Sequence,
    criterion: nn.Module,
    num_masks: int,
) -> dict[str, Tensor]:
    ours = torch.cat([masks[image, rows] for image, (rows, _) in enumerate(pairs)])
    theirs = torch.cat([truth[image][columns] for image, (_, columns) in enumerate(pairs)])
    candidates, rest = (torch.cat(kind) for kind in zip(*(draw() for draw in points)))
    with torch.no_grad():
        uncertain = -sample(ours, candidates).abs()
        chosen = uncertain.topk(int(criterion.importance_ratio * criterion.num_points), dim=1).indices
        places = torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), rest], dim=1)
        t = sample(theirs, places)
    x = sample(ours, places)
    shares = x.sigmoid()
    dice = 1 - (2 * (shares * t).sum(-1) + 1) / (shares.sum(-1) + t.sum(-1) + 1)
    cross_entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1)
    return {"loss_mask": cross_entropy.sum() / num_masks, "loss_dice": dice.sum() / num_masks}
