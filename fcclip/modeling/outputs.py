"""From scored masks to semantic maps, panoptic maps and instances (Mask2Former section 3; FC-CLIP section 3.2).

Legend: Q queries, K classes, h x w pixels. Class logits have K + 1 columns, the last being void.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fcclip.errors import InputError
from fcclip.modeling.output_masks import OutputMasks, semantic_blocks, weighted_sum
from fcclip.ops import output_maps
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
    return _run(masks, {"": _Semantic(class_logits, masks, masks_first=masks_first, labels=False)})[""]


def semantic_labels(class_logits: Tensor, masks: OutputMasks, *, masks_first: bool = True) -> Tensor:
    """(h, w) int64, the argmax of `semantic_inference` without ever holding all scores; the first of equal ones."""
    return _run(masks, {"": _Semantic(class_logits, masks, masks_first=masks_first, labels=True)})[""]


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
    head = _Panoptic(
        class_logits,
        masks,
        thing_classes=thing_classes,
        object_mask_threshold=object_mask_threshold,
        overlap_threshold=overlap_threshold,
    )
    return _run(masks, {"": head})[""]


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
    return _run(masks, {"": _Instances(class_logits, masks, thing_classes=thing_classes, topk=topk)})[""]


class _Head(Protocol):
    """One kind of output, made of some rows after the other.

    Attributes:
        queries: (n,) int64, ascending: whose masks it looks at.
        maps: how many maps it makes of them at once.
    """

    queries: Tensor
    maps: int

    def add(self, rows: slice, mask_logits: Tensor, probabilities: Tensor, places: Tensor | None) -> None:
        """Takes some rows (m, number of rows, width); `places` are those of its queries among the m, None: all."""

    def result(self) -> Any:
        """The output, after all rows."""


def _run(masks: OutputMasks, heads: Mapping[str, _Head]) -> dict[str, Any]:
    """What heads make of masks that are enlarged once for all of them."""
    total = len(masks.mask_logits)
    wanted = torch.zeros(total, dtype=torch.bool, device=masks.mask_logits.device)
    for head in heads.values():
        wanted[head.queries] = True
    queries = wanted.nonzero().flatten()
    if len(queries):
        of_head = [
            (head, None if len(head.queries) == len(queries) else torch.searchsorted(queries, head.queries))
            for head in heads.values()
            if len(head.queries)
        ]
        chosen = None if len(queries) == total else queries
        for block in masks.rows(chosen, maps=max(head.maps for head in heads.values())):
            for head, places in of_head:
                head.add(*block, places)
            del block  # before the next one is made
    return {name: head.result() for name, head in heads.items()}


class _Semantic:
    """See `semantic_inference` and `semantic_labels`."""

    def __init__(self, class_logits: Tensor, masks: OutputMasks, *, masks_first: bool, labels: bool) -> None:
        self.shares = class_logits.softmax(-1)[:, :-1]
        self.maps, self.labels = self.shares.shape[1], labels
        shape = masks.output_size if labels else (self.maps, *masks.output_size)
        self.map = self.shares.new_empty(shape, dtype=torch.int64 if labels else None)
        self.queries = torch.arange(len(class_logits), device=class_logits.device)
        if not masks_first and masks.image_size != masks.output_size:  # others cannot share what it enlarges
            for rows, scores in semantic_blocks(masks, self.shares, masks_first=False):
                self._write(rows, scores)
            self.queries = self.queries[:0]

    def add(self, rows: slice, mask_logits: Tensor, probabilities: Tensor, places: Tensor | None) -> None:
        self._write(rows, weighted_sum(self.shares, probabilities))  # it looks at all queries

    def _write(self, rows: slice, scores: Tensor) -> None:
        self.map[..., rows, :] = output_maps.highest(scores) if self.labels else scores

    def result(self) -> Tensor:
        return self.map


class _Panoptic:
    """See `panoptic_inference`."""

    maps = 0

    def __init__(
        self,
        class_logits: Tensor,
        masks: OutputMasks,
        *,
        thing_classes: Sequence[int],
        object_mask_threshold: float,
        overlap_threshold: float,
    ) -> None:
        scores, labels = class_logits.softmax(-1).max(-1)
        self.queries = ((labels != class_logits.shape[-1] - 1) & (scores > object_mask_threshold)).nonzero().flatten()
        self.scores, self.labels = scores[self.queries], labels[self.queries]
        self.things, self.overlap_threshold = set(thing_classes), overlap_threshold
        self.owner = self.queries.new_zeros(masks.output_size)  # of each pixel, which of these queries wins it
        self.inside_own = self.queries.new_zeros(
            masks.output_size, dtype=torch.bool
        )  # whether it is in that one's mask
        self.areas = self.queries.new_zeros(len(self.queries))

    def add(self, rows: slice, mask_logits: Tensor, probabilities: Tensor, places: Tensor | None) -> None:
        self.owner[rows], self.inside_own[rows], areas = output_maps.winners(self.scores, probabilities, places)
        self.areas += areas

    def result(self) -> tuple[Tensor, list[dict]]:
        if not len(self.queries):
            return torch.zeros_like(self.owner, dtype=torch.int32), []
        pairs = torch.add(self.inside_own, self.owner, alpha=2)  # of owner and whether inside its mask, counted at once
        numbers = torch.bincount(pairs.flatten(), minlength=2 * len(self.queries)).view(-1, 2)
        owned, region = numbers.sum(1), numbers[:, 1]
        share = owned / self.areas.clamp(min=1)
        accepted = (owned > 0) & (self.areas > 0) & (region > 0) & (share >= self.overlap_threshold)

        # ids in query order; a stuff class keeps the id of its first accepted query
        records, id_of_query, stuff_ids = [], [0] * len(self.queries), {}
        rows = zip(*torch.stack([accepted.long(), self.labels, region]).tolist(), self.scores.tolist())
        for query, (is_accepted, label, area, score) in enumerate(rows):
            if not is_accepted:
                continue
            if label in stuff_ids:
                record = records[stuff_ids[label] - 1]
                record["area"] += area
                record["score"] = max(record["score"], score)
            else:
                record = {"id": len(records) + 1, "isthing": label in self.things, "category_id": label}
                record |= {"score": score, "area": area}
                records.append(record)
                if label not in self.things:
                    stuff_ids[label] = record["id"]
            id_of_query[query] = record["id"]
        ids = torch.tensor(id_of_query, dtype=torch.int32).to(self.owner.device, non_blocking=self.owner.is_cuda)
        return ids[self.owner] * self.inside_own, records


class _Instances:
    """See `instance_inference`."""

    maps = 0

    def __init__(self, class_logits: Tensor, masks: OutputMasks, *, thing_classes: Sequence[int], topk: int) -> None:
        probabilities = class_logits.softmax(-1)[:, :-1]  # (Q, K)
        num_classes = probabilities.shape[-1]
        scores, index = probabilities.flatten().topk(min(topk, probabilities.numel()), sorted=False)
        is_thing = torch.zeros(num_classes, dtype=torch.bool)
        is_thing[list(thing_classes)] = True
        labels = index % num_classes
        keep = is_thing.to(labels.device, non_blocking=labels.is_cuda)[labels].nonzero().flatten()
        self.scores, self.labels = scores[keep], labels[keep]
        self.queries, self.position = (index[keep] // num_classes).unique(return_inverse=True)
        self.inside = self.scores.new_empty(len(self.queries), *masks.output_size, dtype=torch.bool)
        self.areas = self.queries.new_zeros(len(self.queries))
        self.sums = self.scores.new_zeros(len(self.queries))  # of the mask probability inside

    def add(self, rows: slice, mask_logits: Tensor, probabilities: Tensor, places: Tensor | None) -> None:
        output_maps.measure(mask_logits, probabilities, places, self.inside[:, rows], self.areas, self.sums)

    def result(self) -> Instances:
        means = self.sums / (self.areas + 1e-6)
        return Instances(
            scores=self.scores * means[self.position],
            pred_classes=self.labels,
            pred_masks=self.inside[self.position],
            pred_boxes=boxes_of_masks(self.inside)[self.position],
        )


def make_outputs(
    class_logits: Tensor | Mapping[str, Tensor],
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
        class_logits, masks, thing_classes: as for the functions above; class logits may be given for each head.
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
    of_head = class_logits if isinstance(class_logits, Mapping) else dict.fromkeys(heads, class_logits)
    made: dict[str, _Head] = {}
    if "semantic" in heads:
        labels = semantic == "labels"
        made["sem_seg"] = _Semantic(of_head["semantic"], masks, masks_first=settings.masks_first, labels=labels)
    if "panoptic" in heads:
        made["panoptic_seg"] = _Panoptic(
            of_head["panoptic"],
            masks,
            thing_classes=thing_classes,
            object_mask_threshold=settings.object_mask_threshold,
            overlap_threshold=settings.overlap_threshold,
        )
    if "instances" in heads:
        made["instances"] = _Instances(of_head["instances"], masks, thing_classes=thing_classes, topk=settings.topk)
    outputs = _run(masks, made)
    if "recall" in heads:
        outputs["recall_seg"] = [masks]
    return outputs
