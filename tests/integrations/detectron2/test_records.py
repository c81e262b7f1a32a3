"""Ground truth and predictions in both forms."""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from fcclip import structures
from fcclip.integrations.detectron2 import instances_from_targets, output_to_detectron2, targets_from_instances

MASKS = torch.zeros(2, 6, 8, dtype=torch.bool)
MASKS[0, 1:4, 2:7] = True
LABELS = torch.tensor([3, 1], dtype=torch.int32)


def ground_truth(masks):
    return Instances((6, 8), gt_classes=LABELS, gt_masks=masks)


@pytest.mark.parametrize(
    "masks", [MASKS, MASKS.float(), MASKS.to(torch.uint8), BitMasks(MASKS)], ids=["bool", "float", "uint8", "BitMasks"]
)
def test_masks_of_every_form_become_the_same_targets(masks):
    targets = targets_from_instances(ground_truth(masks))
    assert targets.labels.dtype == torch.int64 and targets.labels.tolist() == [3, 1]
    assert torch.equal(targets.expand(), MASKS)


def test_polygons_are_drawn_at_the_size_of_the_image():
    square = [np.array([2.0, 1.0, 7.0, 1.0, 7.0, 4.0, 2.0, 4.0])]
    targets = targets_from_instances(Instances((6, 8), gt_classes=LABELS[:1], gt_masks=PolygonMasks([square])))
    assert torch.equal(targets.expand(), MASKS[:1])


def test_an_image_without_segments_stays_one():
    empty = Instances((6, 8), gt_classes=torch.zeros(0, dtype=torch.int64), gt_masks=torch.zeros(0, 6, 8))
    targets = targets_from_instances(empty)
    assert len(targets) == 0 and targets.image_size == (6, 8)
    assert len(instances_from_targets(targets)) == 0


def test_an_id_map_becomes_published_ground_truth_and_comes_back():
    id_map = torch.zeros(6, 8, dtype=torch.int32)
    id_map[1:4, 2:7] = 77
    targets = structures.Targets(torch.tensor([3, 1]), id_map=id_map, ids=torch.tensor([77, 78]))
    instances = instances_from_targets(targets)
    assert instances.image_size == (6, 8)
    assert instances.gt_masks.dtype == torch.bool and torch.equal(instances.gt_masks, MASKS)
    assert torch.equal(instances.gt_boxes.tensor, BitMasks(MASKS).get_bounding_boxes().tensor)
    back = targets_from_instances(instances)
    assert torch.equal(back.labels, targets.labels) and torch.equal(back.expand(), targets.expand())


def test_ground_truth_that_cannot_train_is_refused():
    boxes = Instances((6, 8), gt_classes=LABELS, gt_boxes=Boxes(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="needs gt_masks in 'instances', which has gt_classes, gt_boxes"):
        targets_from_instances(boxes)
    with pytest.raises(ValueError, match=r"a tensor \(n, H, W\), got \(2, 48\)"):
        targets_from_instances(ground_truth(MASKS.flatten(1)))
    with pytest.raises(ValueError, match=r"a tensor \(n, H, W\), got list"):
        targets_from_instances(ground_truth([1, 2]))


@pytest.fixture
def predicted():
    boxes = structures.boxes_of_masks(MASKS)
    return structures.Instances(torch.tensor([0.9, 0.2]), torch.tensor([0, 2]), MASKS, boxes)


def test_predictions_have_the_published_fields(predicted):
    output = output_to_detectron2({"instances": predicted, "sem_seg": MASKS, "panoptic_seg": (LABELS, [])})
    assert output["sem_seg"] is MASKS and output["panoptic_seg"] == (LABELS, [])
    instances = output["instances"]
    assert instances.image_size == (6, 8)
    assert instances.pred_masks.dtype == torch.float32 and torch.equal(instances.pred_masks.bool(), MASKS)
    assert instances.pred_boxes.tensor.tolist() == [[2, 1, 7, 4], [0, 0, 0, 0]]
    assert instances.scores is predicted.scores and instances.pred_classes is predicted.pred_classes
    assert output_to_detectron2({"sem_seg": MASKS}) == {"sem_seg": MASKS}


def test_detectron2_writes_the_predictions(predicted):
    instances = output_to_detectron2({"instances": predicted})["instances"]
    rows = instances_to_coco_json(instances, 7)
    assert [(row["image_id"], row["category_id"], row["bbox"]) for row in rows] == [
        (7, 0, [2, 1, 5, 3]),
        (7, 2, [0, 0, 0, 0]),
    ]
