"""From scored masks to semantic maps, panoptic maps and instances (Mask2Former section 3; FC-CLIP section 3.2).

Legend: Q queries, K classes, h x w pixels. Class logits have K + 1 columns, the last being void.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fcclip.errors import InputError
from fcclip.modeling.output_masks import OutputMasks, semantic_blocks
from fcclip.structures import Instances, boxes_of_masks

HEADS = ("semantic", "panoptic", "instances", "recall")


@dataclass(frozen=True)
class OutputSettings:
    """How outputs are made of scored masks; the keys of MODEL.MASK_FORMER.TEST.

    Args:
        object_mask_threshold, overlap_threshold: of `panoptic_inference`.
        topk: of `instance_inference`.
        masks_first: of `semantic_inference`.
    """

    object_mask_threshold: float
    overlap_threshold: float
    topk: int
    masks_first: bool = False


def semantic_inference(class_logits: Tensor, masks: OutputMasks, *, masks_first: bool = True) -> Tensor:
    """Scores of every class at every pixel.

    Args:
        class_logits: (Q, K + 1) float.
        masks: of the Q queries.
        masks_first: resize mask logits to the output size and then take their probabilities, as for panoptic maps;
            else the scores at the size of the input are resized.

    Returns:
        (K, h, w) float, sum over queries of class probability times mask probability; not normalised.
    """
    shares = class_logits.softmax(-1)[:, :-1]
    result = shares.new_empty((shares.shape[1], *masks.output_size))
    for rows, scores in semantic_blocks(masks, shares, masks_first=masks_first):
        result[:, rows] = scores
    return result


def semantic_labels(class_logits: Tensor, masks: OutputMasks, *, masks_first: bool = True) -> Tensor:
    """(h, w) int64, the argmax of `semantic_inference` without ever holding all scores; the first of equal ones."""
    blocks = semantic_blocks(masks, class_logits.softmax(-1)[:, :-1], masks_first=masks_first)
    return torch.cat([scores.max(0).indices for _, scores in blocks])  # faster than argmax on a CPU


def panoptic_inference(
    class_logits: Tensor,
    masks: OutputMasks,
    *,
    thing_classes: Sequence[int],
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, list[dict]]:
    """One segment a pixel.

    Every pixel goes to the query with the highest class score times mask probability, of equal ones to the first; a
    query keeps its pixels inside its own mask if enough of that mask is left to it. Segments of one stuff class share
    one id.

    Args:
        class_logits: (Q, K + 1) float.
        masks: of the Q queries.
        thing_classes: contiguous indices of the thing classes.
        object_mask_threshold: a query's class score must be above it.
        overlap_threshold: share of a mask that must remain, 0..1.

    Returns:
        (h, w) int32, 0 where nothing is; and a record a segment: `id` from 1, `isthing`, `category_id` (contiguous),
        `score` (the highest of its queries), `area` in pixels.
    """
    scores, labels = class_logits.softmax(-1).max(-1)
    keep = (labels != class_logits.shape[-1] - 1) & (scores > object_mask_threshold)
    scores, labels = scores[keep], labels[keep]
    if not len(scores):
        return torch.zeros(masks.output_size, dtype=torch.int32, device=scores.device), []

    owner, inside_own, areas = _owners(scores, masks.of(keep.nonzero().flatten()))
    owned = torch.bincount(owner.flatten(), minlength=len(scores))
    region = torch.bincount(owner[inside_own], minlength=len(scores))
    share = owned / areas.clamp(min=1)
    accepted = (owned > 0) & (areas > 0) & (region > 0) & (share >= overlap_threshold)

    # ids in query order; a stuff class keeps the id of its first accepted query
    things, records, id_of_query, stuff_ids = set(thing_classes), [], [0] * len(scores), {}
    rows = zip(accepted.tolist(), labels.tolist(), scores.tolist(), region.tolist())
    for query, (is_accepted, label, score, area) in enumerate(rows):
        if not is_accepted:
            continue
        if label in stuff_ids:
            record = records[stuff_ids[label] - 1]
            record["area"] += area
            record["score"] = max(record["score"], score)
        else:
            record = {"id": len(records) + 1, "isthing": label in things, "category_id": label}
            record |= {"score": score, "area": area}
            records.append(record)
            if label not in things:
                stuff_ids[label] = record["id"]
        id_of_query[query] = record["id"]
    ids = torch.tensor(id_of_query, dtype=torch.int32, device=owner.device)
    return ids[owner] * inside_own, records


def _owners(scores: Tensor, mask_chunks: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel the query (h, w) that wins it and whether it lies inside that one's mask; area (n,) of each mask.

    Args:
        scores: (n,) class score of each query.
        mask_chunks: their mask logits, a few queries at a time.
    """
    areas, start = [], 0
    best = owner = inside_own = None
    for mask_logits in mask_chunks:
        stop = start + len(mask_logits)
        probabilities = mask_logits.sigmoid()
        inside = probabilities >= 0.5
        areas.append(inside.flatten(1).sum(1))
        chunk_best, chunk_owner = (scores[start:stop, None, None] * probabilities).max(0)
        chunk_inside = inside.gather(0, chunk_owner[None])[0]
        if best is None:
            best, owner, inside_own = chunk_best, chunk_owner, chunk_inside
        else:
            better = chunk_best > best
            best = torch.where(better, chunk_best, best)
            owner = torch.where(better, chunk_owner + start, owner)
            inside_own = torch.where(better, chunk_inside, inside_own)
        start = stop
    return owner, inside_own, torch.cat(areas)


def instance_inference(
    class_logits: Tensor, masks: OutputMasks, *, thing_classes: Sequence[int], topk: int
) -> Instances:
    """The best (query, class) pairs that are things; a query may appear with several classes.

    Args:
        class_logits: (Q, K + 1) float.
        masks: of the Q queries.
        thing_classes: contiguous indices of the thing classes.
        topk: pairs taken before stuff is dropped, so fewer may remain.

    Returns:
        Instances; a score is the class probability times the mean mask probability inside the mask.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]  # (Q, K)
    num_classes = probabilities.shape[-1]
    scores, index = probabilities.flatten().topk(min(topk, probabilities.numel()), sorted=False)
    is_thing = torch.zeros(num_classes, dtype=torch.bool)
    is_thing[list(thing_classes)] = True
    labels = index % num_classes
    keep = is_thing.to(labels.device)[labels]
    scores, labels = scores[keep], labels[keep]
    queries, position = (index[keep] // num_classes).unique(return_inverse=True)

    inside = [scores.new_zeros(0, *masks.output_size, dtype=torch.bool)]
    means = [scores.new_zeros(0)]
    for mask_logits in masks.of(queries):
        inside.append(mask_logits > 0)
        sums = (mask_logits.sigmoid() * inside[-1]).flatten(1).sum(1)
        means.append(sums / (inside[-1].flatten(1).sum(1) + 1e-6))
    inside = torch.cat(inside)
    return Instances(
        scores=scores * torch.cat(means)[position],
        pred_classes=labels,
        pred_masks=inside[position],
        pred_boxes=boxes_of_masks(inside)[position],
    )


def make_outputs(
    class_logits: Tensor,
    masks: OutputMasks,
    thing_classes: Sequence[int],
    *,
    heads: Sequence[str],
    settings: OutputSettings,
    semantic: str = "scores",
) -> dict[str, Any]:
    """What a model gives for an image: `sem_seg`, `panoptic_seg`, `instances` and `recall_seg`, a list of all masks, as
    far as `heads` ask for them.

    Args:
        class_logits, masks, thing_classes: as for the functions above.
        heads: of `HEADS`.
        settings: their arguments.
        semantic: "scores" for (K, h, w) float, "labels" for (h, w) int64.

    Raises:
        ValueError: another head, or another kind of semantic map.
    """
    unknown = set(heads) - set(HEADS)
    if unknown:
        raise InputError(f"heads must be of {', '.join(HEADS)}, got {', '.join(sorted(unknown))}")
    if semantic not in ("scores", "labels"):
        raise InputError(f"semantic must be 'scores' or 'labels', got {semantic!r}")
    outputs: dict[str, Any] = {}
    if "semantic" in heads:
        infer = semantic_labels if semantic == "labels" else semantic_inference
        outputs["sem_seg"] = infer(class_logits, masks, masks_first=settings.masks_first)
    if "panoptic" in heads:
        outputs["panoptic_seg"] = panoptic_inference(
            class_logits,
            masks,
            thing_classes=thing_classes,
            object_mask_threshold=settings.object_mask_threshold,
            overlap_threshold=settings.overlap_threshold,
        )
    if "instances" in heads:
        outputs["instances"] = instance_inference(class_logits, masks, thing_classes=thing_classes, topk=settings.topk)
    if "recall" in heads:
        outputs["recall_seg"] = [masks]
    return outputs
