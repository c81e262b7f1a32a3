"""From scored masks to semantic maps, panoptic maps and instances (Mask2Former section 3; FC-CLIP section 3.2).

Legend: Q queries, K classes, h x w pixels. Class logits have K + 1 columns, the last being void.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.errors import InputError
from fcclip.modeling.semantic_blocks import best_classes, semantic_blocks
from fcclip.structures import Instances, boxes_of_masks

# Floats of mask logits at the output size that are held at once: on a CPU, and on a GPU, which few would not keep busy.
_MASKS_CPU, _MASKS = 2**24, 2**26


def postprocess_masks(
    mask_logits: Tensor, padded_size: tuple[int, int], image_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Mask logits or scores at network stride -> at the output size: enlarged to the padded input, cropped, resized.

    Args:
        mask_logits: (n, ·, ·) float.
        padded_size, image_size, output_size: (height, width) of the network input with and without padding, and of the
            result.

    Returns:
        (n, *output_size) float.
    """
    return crop_and_resize(enlarge(mask_logits, padded_size), image_size, output_size)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, ·, ·) -> (n, *size), bilinear."""
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def crop_and_resize(maps: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
    """Padded maps (n, H, W) -> (n, *output_size), the padding cut off first, bilinear."""
    return enlarge(maps[:, : image_size[0], : image_size[1]], output_size)


def semantic_inference(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Scores of every class at every pixel.

    Args:
        class_logits: (Q, K + 1) float.
        mask_logits: (Q, h, w) float.

    Returns:
        (K, h, w) float, sum over queries of class probability times mask probability; not normalised.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    return torch.einsum("qk,qhw->khw", probabilities, mask_logits.sigmoid())


def semantic_labels(class_logits: Tensor, mask_logits: Tensor, *, class_chunk: int = 0) -> Tensor:
    """The class with the highest score at every pixel, without ever holding all scores.

    Args:
        class_logits, mask_logits: as in `semantic_inference`.
        class_chunk: classes whose scores are held at once; 0: all.

    Returns:
        (h, w) int64, equal to the argmax of `semantic_inference`.
    """
    size = tuple(mask_logits.shape[-2:])
    probabilities = class_logits.softmax(-1)[:, :-1]
    blocks = semantic_blocks(
        mask_logits,
        probabilities.shape[1],
        padded_size=size,
        image_size=size,
        output_size=size,
        masks_first=True,
        class_chunk=class_chunk,
    )
    return torch.cat([best_classes(scores, probabilities, class_chunk=class_chunk) for _, scores in blocks])


def mask_chunk(size: tuple[int, int], device: torch.device, query_chunk: int = 0) -> int:
    """How many masks of (height, width) are made at once.

    Args:
        size: of the output.
        device: where they are made.
        query_chunk: TEST.QUERY_CHUNK; 0: as many as fit into 64 MiB on a CPU, into 256 MiB elsewhere. Results are the
            same to the bit.
    """
    return query_chunk or max(1, (_MASKS_CPU if device.type == "cpu" else _MASKS) // (size[0] * size[1]))


class PanopticMerge:
    """`panoptic_inference` that takes masks a few at a time, so that few are held at the output size.

    Args:
        class_logits: (Q, K + 1) float.
        thing_classes, object_mask_threshold, overlap_threshold: as in `panoptic_inference`.

    Attributes:
        queries: (n,) int64, ascending: those that may become a segment, the only ones whose masks are needed.
    """

    def __init__(
        self,
        class_logits: Tensor,
        *,
        thing_classes: Sequence[int],
        object_mask_threshold: float,
        overlap_threshold: float,
    ) -> None:
        num_classes = class_logits.shape[-1] - 1
        scores, labels = class_logits.softmax(-1).max(-1)
        keep = (labels != num_classes) & (scores > object_mask_threshold)
        self.queries = keep.nonzero().flatten()
        self._scores, self._labels = scores[keep], labels[keep]
        self._things = set(thing_classes)
        self._overlap_threshold = overlap_threshold
        self._originals: list[Tensor] = []  # pixels inside each mask
        self._taken = 0

    def add(self, mask_logits: Tensor) -> None:
        """The masks (m, h, w) of the next m queries, in the order of `queries`."""
        count = len(mask_logits)
        if not count:
            return
        probabilities = mask_logits.sigmoid()
        inside = probabilities.flatten(1) >= 0.5
        self._originals.append(inside.sum(1))
        best, owner = (self._scores[self._taken : self._taken + count, None, None] * probabilities).max(0)
        own_inside = inside.gather(0, owner.view(1, -1))[0].view(owner.shape)
        if not self._taken:
            self._best, self._owner, self._own_inside = best, owner, own_inside
        else:
            better = best > self._best  # of equal ones the first query wins
            self._best = torch.where(better, best, self._best)
            self._owner = torch.where(better, owner + self._taken, self._owner)
            self._own_inside = torch.where(better, own_inside, self._own_inside)
        self._taken += count

    def result(self, size: tuple[int, int]) -> tuple[Tensor, list[dict]]:
        """What `panoptic_inference` returns; (height, width) of the map, for the case that there is no mask."""
        count = len(self._scores)
        if self._taken != count:
            raise InputError(f"{self._taken} of {count} masks were added")
        if not count:
            return torch.zeros(size, dtype=torch.int32, device=self._scores.device), []
        owner, own_inside = self._owner, self._own_inside
        owned = torch.bincount(owner.flatten(), minlength=count)
        region = torch.bincount(owner[own_inside], minlength=count)
        original = torch.cat(self._originals)
        share = owned / original.clamp(min=1)
        accepted = (owned > 0) & (original > 0) & (region > 0) & (share >= self._overlap_threshold)

        # ids in query order; a stuff class keeps the id of its first accepted query
        records, id_of_query, stuff_ids = [], [0] * count, {}
        rows = zip(accepted.tolist(), self._labels.tolist(), self._scores.tolist(), region.tolist())
        for query, (wanted, label, score, area) in enumerate(rows):
            if not wanted:
                continue
            if label in stuff_ids:
                record = records[stuff_ids[label] - 1]
                record["area"] += area
                record["score"] = max(record["score"], score)
            else:
                isthing = label in self._things
                record = {
                    "id": len(records) + 1,
                    "isthing": isthing,
                    "category_id": label,
                    "score": score,
                    "area": area,
                }
                records.append(record)
                if not isthing:
                    stuff_ids[label] = record["id"]
            id_of_query[query] = record["id"]
        ids = torch.tensor(id_of_query, dtype=torch.int32, device=owner.device)
        return ids[owner] * own_inside, records


def panoptic_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    thing_classes: Sequence[int],
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, list[dict]]:
    """One segment a pixel.

    Every pixel goes to the query with the highest class score times mask probability; a query keeps its pixels inside
    its own mask if enough of that mask is left to it. Segments of one stuff class share one id.

    Args:
        class_logits: (Q, K + 1) float.
        mask_logits: (Q, h, w) float.
        thing_classes: contiguous indices of the thing classes.
        object_mask_threshold: a query's class score must be above it.
        overlap_threshold: share of a mask that must remain, 0..1.

    Returns:
        (h, w) int32, 0 where nothing is; and a record a segment: `id` from 1, `isthing`, `category_id` (contiguous),
        `score` (the highest of its queries), `area` in pixels.
    """
    merge = PanopticMerge(
        class_logits,
        thing_classes=thing_classes,
        object_mask_threshold=object_mask_threshold,
        overlap_threshold=overlap_threshold,
    )
    merge.add(mask_logits[merge.queries])
    return merge.result(tuple(mask_logits.shape[-2:]))


class InstanceSelection:
    """`instance_inference` that takes masks a few at a time.

    Args:
        class_logits: (Q, K + 1) float.
        thing_classes, topk, zero_boxes: as in `instance_inference`.

    Attributes:
        queries: (n,) int64, ascending: those of the chosen pairs, the only ones whose masks are needed.
    """

    def __init__(
        self, class_logits: Tensor, *, thing_classes: Sequence[int], topk: int, zero_boxes: bool = False
    ) -> None:
        probabilities = class_logits.softmax(-1)[:, :-1]  # (Q, K)
        num_classes = probabilities.shape[-1]
        scores, index = probabilities.flatten().topk(min(topk, probabilities.numel()), sorted=False)
        is_thing = torch.zeros(num_classes, dtype=torch.bool)
        is_thing[list(thing_classes)] = True
        labels = index % num_classes
        keep = is_thing.to(labels.device)[labels]
        self._scores, self._labels = scores[keep], labels[keep]
        self.queries, self._position = (index[keep] // num_classes).unique(return_inverse=True)
        self._zero_boxes = zero_boxes
        self._inside: list[Tensor] = []
        self._means: list[Tensor] = []

    def add(self, mask_logits: Tensor) -> None:
        """The masks (m, h, w) of the next m queries, in the order of `queries`."""
        inside = mask_logits > 0
        sums = (mask_logits.sigmoid() * inside).flatten(1).sum(1)
        self._means.append(sums / (inside.flatten(1).sum(1) + 1e-6))
        self._inside.append(inside)

    def result(self, size: tuple[int, int]) -> Instances:
        """What `instance_inference` returns; (height, width) of the masks, for the case that there is none."""
        inside = torch.cat([self._scores.new_zeros(0, *size, dtype=torch.bool), *self._inside])
        mean = torch.cat([self._scores.new_zeros(0), *self._means])
        if len(inside) != len(self.queries):
            raise InputError(f"{len(inside)} of {len(self.queries)} masks were added")
        boxes = torch.zeros(len(self._labels), 4, device=inside.device)
        return Instances(
            scores=self._scores * mean[self._position],
            pred_classes=self._labels,
            pred_masks=inside[self._position],
            pred_boxes=boxes if self._zero_boxes else boxes_of_masks(inside)[self._position],
        )


def instance_inference(
    class_logits: Tensor, mask_logits: Tensor, *, thing_classes: Sequence[int], topk: int, zero_boxes: bool = False
) -> Instances:
    """The best (query, class) pairs that are things; a query may appear with several classes.

    Args:
        class_logits: (Q, K + 1) float.
        mask_logits: (Q, h, w) float.
        thing_classes: contiguous indices of the thing classes.
        topk: pairs taken before stuff is dropped, so fewer may remain.
        zero_boxes: the published all-zero boxes.

    Returns:
        Instances; a score is the class probability times the mean mask probability inside the mask.
    """
    chosen = InstanceSelection(class_logits, thing_classes=thing_classes, topk=topk, zero_boxes=zero_boxes)
    chosen.add(mask_logits[chosen.queries])
    return chosen.result(tuple(mask_logits.shape[-2:]))
