"""The three losses of FC-CLIP with deep supervision (FC-CLIP section 3; Mask2Former section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fcclip.errors import InputError
from fcclip.losses.matching import match, match_costs
from fcclip.losses.points import point_sources, sample_cells, sample_maps, sample_targets, uncertain_points
from fcclip.structures import Targets


class SetCriterion(nn.Module):
    """Matches queries to segments and scores classes and masks, for every supervised prediction set.

    Masks enter as embeddings and features (their product is the mask): matching samples the features once, and only
    matched queries ever get a whole mask. Both are exact, because sampling is linear.

    Args:
        num_classes: training classes; the size of the class weights.
        class_weight, mask_weight, dice_weight: weights of the losses and of the matching costs.
        no_object_weight: weight of void in the class loss.
        num_points: points a mask.
        oversample_ratio, importance_ratio: see `uncertain_points`.
        deep_supervision: losses for every prediction set, not only the last.
        global_class_norm: divide the class loss by the weights of all processes, not by this one's.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        class_weight: float,
        mask_weight: float,
        dice_weight: float,
        no_object_weight: float,
        num_points: int,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
        deep_supervision: bool = True,
        global_class_norm: bool = False,
    ) -> None:
        super().__init__()
        if oversample_ratio < 1 or not 0 <= importance_ratio <= 1:
            raise InputError(
                f"OVERSAMPLE_RATIO must be at least 1 and IMPORTANCE_SAMPLE_RATIO in 0..1, got {oversample_ratio} "
                f"and {importance_ratio}"
            )
        self.num_classes = num_classes
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_ratio = importance_ratio
        self.deep_supervision = deep_supervision
        self.global_class_norm = global_class_norm
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    def forward(
        self,
        class_logits: Sequence[Tensor],
        mask_embeddings: Sequence[Tensor],
        mask_features: Tensor,
        targets: Sequence[Targets],
        *,
        padded_size: tuple[int, int],
        point_seeds: Sequence[int] | None = None,
        segment_counts: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """The weighted losses of S prediction sets, the final one last.

        Args:
            class_logits: S tensors (B, Q, K + 1).
            mask_embeddings: S tensors (B, Q, D).
            mask_features: (B, D, h, w); mask logits are the product over D.
            targets: B records.
            padded_size: (height, width) of the network input in pixels.
            point_seeds: a seed an image, which makes its points independent of the batch and of other processes; None
                draws from torch's global generator.
            segment_counts: number of segments of each image of the whole batch that this one is a part of; the losses
                of the parts then add up to those of the whole. None: this batch is whole.

        Returns:
            scalars `loss_ce`, `loss_mask`, `loss_dice` of the last set and, with deep supervision, the same with suffix
            `_0`, `_1`, … of the earlier ones; already weighted.
        """
        if not self.deep_supervision:
            class_logits, mask_embeddings = class_logits[-1:], mask_embeddings[-1:]
        with torch.autocast(mask_features.device.type, enabled=False):
            return self._losses(
                torch.stack(list(class_logits)).float(),
                torch.stack(list(mask_embeddings)).float(),
                mask_features.float(),
                targets,
                padded_size,
                point_sources(point_seeds, len(targets), mask_features.device),
                [len(target) for target in targets] if segment_counts is None else segment_counts,
            )

    def _losses(self, class_logits, embeddings, features, targets, padded_size, sources, counts) -> dict[str, Tensor]:
        assignments = self.assign(class_logits, embeddings, features, targets, padded_size, sources)
        num_masks = _world_mean(features.new_tensor(float(sum(counts)))).clamp(min=1)
        class_losses = self._class_losses(class_logits, targets, assignments, counts)  # (S,)
        mask_losses, dice_losses = self._mask_losses(embeddings, features, targets, assignments, padded_size, sources)
        num_sets = len(class_logits)
        losses = {}
        for index in range(num_sets):
            suffix = "" if index == num_sets - 1 else f"_{index}"
            losses[f"loss_ce{suffix}"] = self.weights["loss_ce"] * class_losses[index]
            losses[f"loss_mask{suffix}"] = self.weights["loss_mask"] * mask_losses[index] / num_masks
            losses[f"loss_dice{suffix}"] = self.weights["loss_dice"] * dice_losses[index] / num_masks
        return losses

    @torch.no_grad()
    def assign(self, class_logits, embeddings, features, targets, padded_size, sources):
        """[image][set] -> (queries, segments); each set is matched on fresh points, shared by the queries of a
        image.
        """
        costs = []
        for index, target in enumerate(targets):
            points = sources[index](len(class_logits), self.num_points)  # (S, P, 2)
            cells = features[index].flatten(1).T.contiguous()  # (h * w, D)
            segments = torch.arange(len(target), device=features.device)
            per_set = [
                match_costs(
                    logits,
                    embedding @ sample_cells(cells, features.shape[-2:], places).T,
                    target.labels,
                    sample_targets(target, segments, places[None], padded_size),
                    class_weight=self.weights["loss_ce"],
                    mask_weight=self.weights["loss_mask"],
                    dice_weight=self.weights["loss_dice"],
                )
                for logits, embedding, places in zip(class_logits[:, index], embeddings[:, index], points)
            ]
            costs.append(torch.stack(per_set))
        return match(costs)

    def _class_losses(self, class_logits: Tensor, targets: Sequence[Targets], assignments, counts) -> Tensor:
        """(S,) cross entropy; queries without a segment are void, the last class."""
        num_sets, batch, queries, num_logits = class_logits.shape
        class_of_query = torch.full((num_sets, batch, queries), num_logits - 1, dtype=torch.long)
        for index, per_set in enumerate(assignments):
            labels = targets[index].labels.cpu() if per_set else None
            for level, (rows, columns) in enumerate(per_set):
                class_of_query[level, index, rows] = labels[columns]
        class_of_query = class_of_query.to(class_logits.device, non_blocking=True)
        # the vocabulary decides how many logits there are; the stored buffer keeps the configured size
        weight = class_logits.new_ones(num_logits)
        weight[-1] = self.empty_weight[-1]
        nll = -class_logits.log_softmax(-1).gather(-1, class_of_query[..., None])[..., 0]
        query_weight = weight[class_of_query]  # (S, B, Q)
        # the sum of all weights of the whole batch: matched queries count 1, as many as there are segments to match
        matched = sum(min(count, queries) for count in counts)
        total = matched + (len(counts) * queries - matched) * weight[-1]
        return (nll * query_weight).sum(dim=(1, 2)) / (_world_mean(total) if self.global_class_norm else total)

    def _mask_losses(self, embeddings, features, targets, assignments, padded_size, sources) -> tuple[Tensor, Tensor]:
        """Two (S,) sums over the matched masks: mean binary cross entropy, and dice."""
        num_sets = len(embeddings)
        logits, masks_at_points, set_of_mask = [], [], []
        for index, per_set in enumerate(assignments):
            sets = torch.cat([torch.full((len(rows),), level) for level, (rows, _) in enumerate(per_set)])
            if not len(sets):
                continue
            rows = torch.cat([rows for rows, _ in per_set]).to(features.device)
            columns = torch.cat([columns for _, columns in per_set]).to(features.device)
            sets = sets.to(features.device)
            masks = torch.einsum("nd,dhw->nhw", embeddings[sets, index, rows], features[index])
            points = uncertain_points(
                masks,
                self.num_points,
                self.oversample_ratio,
                self.importance_ratio,
                partial(sources[index], len(sets)),
            )
            logits.append(sample_maps(masks[:, None], points)[:, 0])
            masks_at_points.append(sample_targets(targets[index], columns, points, padded_size))
            set_of_mask.append(sets)
        if not logits:  # nothing to match: zeros that keep every parameter in the graph, as DDP wants
            zero = (embeddings.sum() + features.sum()) * 0
            return zero.expand(num_sets), zero.expand(num_sets)
        x, t, sets = torch.cat(logits), torch.cat(masks_at_points), torch.cat(set_of_mask)
        cross_entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1)
        probability = x.sigmoid()
        dice = 1 - (2 * (probability * t).sum(1) + 1) / (probability.sum(1) + t.sum(1) + 1)
        start = x.new_zeros(num_sets)
        return start.index_add(0, sets, cross_entropy), start.index_add(0, sets, dice)


def _world_mean(value: Tensor) -> Tensor:
    """The mean of `value` over all processes; itself without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
