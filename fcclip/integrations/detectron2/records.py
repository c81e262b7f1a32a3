"""Ground truth and predictions in the records of fcclip and in those of detectron2.

Records of data sets need no conversion: they are the same dicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor

from fcclip import structures
from fcclip.errors import InputError


def targets_from_instances(instances: Instances) -> structures.Targets:
    """Ground truth as a detectron2 mapper makes it -> targets.

    Args:
        instances: `gt_classes` (n,) and `gt_masks`: BitMasks, PolygonMasks, or a tensor (n, H, W) of bool, integers or
            floats, where other values than 0 are inside. Polygons are drawn at `instances.image_size`.

    Raises:
        ValueError: a field is missing, or the masks have another form.
    """
    missing = [name for name in ("gt_classes", "gt_masks") if not instances.has(name)]
    if missing:
        raise InputError(
            f"training needs {' and '.join(missing)} in 'instances', which has "
            f"{', '.join(instances.get_fields()) or 'no field'}. Boxes alone cannot train FC-CLIP: use "
            "fcclip.integrations.detectron2.DatasetMapper, or a mapper that adds masks (MODEL.MASK_ON True)."
        )
    return structures.Targets(labels=instances.gt_classes.long(), masks=_masks(instances))


def instances_from_targets(targets: structures.Targets) -> Instances:
    """Targets -> `Instances` with gt_classes (n,) int64, gt_masks (n, H, W) bool as published, and tight gt_boxes."""
    masks = targets.expand()
    return Instances(
        targets.image_size, gt_classes=targets.labels, gt_masks=masks, gt_boxes=Boxes(structures.boxes_of_masks(masks))
    )


def output_to_detectron2(output: Mapping[str, Any]) -> dict[str, Any]:
    """What the model says about one image, its instances as `Instances`: pred_masks (n, h, w) float of 0 and 1 as
    published, pred_boxes, scores, pred_classes; the other entries have the same form."""
    if "instances" not in output:
        return dict(output)
    instances = output["instances"]
    converted = Instances(
        tuple(instances.pred_masks.shape[-2:]),
        pred_masks=instances.pred_masks.float(),
        pred_boxes=Boxes(instances.pred_boxes),
        scores=instances.scores,
        pred_classes=instances.pred_classes,
    )
    return {**output, "instances": converted}


def _masks(instances: Instances) -> Tensor:
    """(n, H, W) bool."""
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    if isinstance(masks, BitMasks):
        masks = masks.tensor
    if not isinstance(masks, Tensor) or masks.dim() != 3:
        got = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise InputError(f"gt_masks must be BitMasks, PolygonMasks or a tensor (n, H, W), got {got}")
    return masks.to(instances.gt_classes.device, torch.bool)
