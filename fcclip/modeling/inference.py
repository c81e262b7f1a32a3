"""From scored masks to semantic maps, panoptic maps and instances (Mask2Former section 3; FC-CLIP section 3.2).

Legend: Q queries, K classes, h x w pixels. Class logits have K + 1 columns, the last being void.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.structures import Instances, boxes_of_masks

_LABEL_BUDGET = 2**25  # floats of class scores that are held at once while labels are computed


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


def semantic_labels(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """The class with the highest score at every pixel, without ever holding all scores.

    Args:
        class_logits, mask_logits: as in `semantic_inference`.

    Returns:
        (h, w) int64, equal to the argmax of `semantic_inference`.
    """
    probabilities = class_logits.softmax(-1)[:, :-1].T.contiguous()  # (K, Q)
    width = mask_logits.shape[-1]
    rows = max(1, _LABEL_BUDGET // max(1, probabilities.shape[0] * width))
    labels = [
        (probabilities @ part.sigmoid().flatten(1)).argmax(0).unflatten(0, (-1, width))
        for part in mask_logits.split(rows, dim=1)
    ]
    return torch.cat(labels)


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
    height, width = mask_logits.shape[-2:]
    num_classes = class_logits.shape[-1] - 1
    scores, labels = class_logits.softmax(-1).max(-1)
    keep = (labels != num_classes) & (scores > object_mask_threshold)
    scores, labels = scores[keep], labels[keep]
    if not len(scores):
        return torch.zeros(height, width, dtype=torch.int32, device=mask_logits.device), []

    probabilities = mask_logits[keep].sigmoid()  # (n, h, w)
    owner = (scores[:, None, None] * probabilities).argmax(0)  # (h, w)
    inside = probabilities.flatten(1) >= 0.5
    own_inside = inside.gather(0, owner.view(1, -1))[0].view(height, width)
    count = len(scores)
    owned = torch.bincount(owner.flatten(), minlength=count)
    region = torch.bincount(owner[own_inside], minlength=count)
    original = inside.sum(1)
    accepted = (owned > 0) & (original > 0) & (region > 0) & (owned / original.clamp(min=1) >= overlap_threshold)

    # ids in query order; a stuff class keeps the id of its first accepted query
    records, id_of_query, stuff_ids, things = [], [0] * count, {}, set(thing_classes)
    rows = zip(accepted.tolist(), labels.tolist(), scores.tolist(), region.tolist())
    for query, (wanted, label, score, area) in enumerate(rows):
        if not wanted:
            continue
        if label in stuff_ids:
            record = records[stuff_ids[label] - 1]
            record["area"] += area
            record["score"] = max(record["score"], score)
        else:
            record = {
                "id": len(records) + 1,
                "isthing": label in things,
                "category_id": label,
                "score": score,
                "area": area,
            }
            records.append(record)
            if label not in things:
                stuff_ids[label] = record["id"]
        id_of_query[query] = record["id"]
    ids = torch.tensor(id_of_query, dtype=torch.int32, device=mask_logits.device)
    return ids[owner] * own_inside, records


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
    probabilities = class_logits.softmax(-1)[:, :-1]  # (Q, K)
    num_classes = probabilities.shape[-1]
    scores, index = probabilities.flatten().topk(min(topk, probabilities.numel()), sorted=False)
    is_thing = torch.zeros(num_classes, dtype=torch.bool)
    is_thing[list(thing_classes)] = True
    labels = index % num_classes
    keep = is_thing.to(labels.device)[labels]
    scores, labels, queries = scores[keep], labels[keep], index[keep] // num_classes

    used, position = queries.unique(return_inverse=True)
    logits = mask_logits[used]
    inside = logits > 0
    mean = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    masks = inside[position]
    return Instances(
        scores=scores * mean[position],
        pred_classes=labels,
        pred_masks=masks,
        pred_boxes=torch.zeros(len(labels), 4, device=labels.device)
        if zero_boxes
        else boxes_of_masks(inside)[position],
    )
