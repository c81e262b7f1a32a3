"""Every registered data set, on a small tree in its true layout, gets its evaluators; its own ground truth scores a
hundred."""

import numpy as np
import pytest
import torch

from fcclip.config import get_cfg
from fcclip.data import DATASETS, get_dataset
from fcclip.data.segmentations import fill_polygons, read_run_lengths
from fcclip.evaluation import EvaluationThreads, GroundTruth, build_evaluators
from fcclip.structures import Instances, boxes_of_masks
from tests.data.published_trees import write_tree

NAMES = sorted(
    name
    for name in DATASETS
    if name.endswith(("_val", "_val_panoptic", "_test", "_val_panoptic_with_sem_seg", "val_sem_seg"))
)
NAMES = [name for name in NAMES if not name.startswith("shapes_")]
WITHOUT_AP = ("openvocab_mapillary_vistas_panoptic_val",)


def mask_of(annotation, size):
    if isinstance(annotation["segmentation"], dict):
        return read_run_lengths([annotation["segmentation"]], size)[0]
    mask = np.zeros(size, bool)
    fill_polygons([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]], mask)
    return mask


def instances_of(ground_truth, things):
    """The true instances of an image, crowds left out."""
    record = ground_truth.record
    if "segments_info" in record:
        chosen = [entry for entry in ground_truth.segments if entry["category_id"] in things and not entry["iscrowd"]]
        masks = [ground_truth.id_map == entry["id"] for entry in chosen]
    else:
        chosen = [entry for entry in record["annotations"] if not entry["iscrowd"]]
        masks = [mask_of(entry, (record["height"], record["width"])) for entry in chosen]
    masks = torch.from_numpy(np.array(masks, bool).reshape(-1, record["height"], record["width"]))
    classes = torch.tensor([entry["category_id"] for entry in chosen], dtype=torch.int64)
    return Instances(torch.ones(len(chosen)), classes, masks, boxes_of_masks(masks))


@pytest.mark.parametrize("name", NAMES)
def test_its_own_ground_truth_scores_a_hundred(tmp_path, name):
    write_tree(name, tmp_path)
    dataset, cfg = get_dataset(name, tmp_path), get_cfg()
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.SEMANTIC_ON = True
    test.INSTANCE_ON = name not in WITHOUT_AP
    (evaluators,) = build_evaluators(cfg, dataset, modes=["ensemble"]).values()
    things = set(dataset.metadata.get("thing_dataset_id_to_contiguous_id", {}).values())
    ignore_label = dataset.metadata.get("ignore_label", 255)
    with EvaluationThreads({"": evaluators}) as threads:
        for record in dataset.records():
            ground_truth, output = GroundTruth(record, ignore_label), {}
            if "segments_info" in record:
                output["panoptic_seg"] = torch.from_numpy(ground_truth.id_map), ground_truth.segments
            if "semantic" in dataset.evaluators:
                output["sem_seg"] = np.where(ground_truth.labels == ignore_label, 0, ground_truth.labels)
            if things:
                output["instances"] = instances_of(ground_truth, things)
            threads.process(ground_truth, {"": output})
    results = {task: metrics for evaluator in evaluators for task, metrics in evaluator.results().items()}
    tasks = {"panoptic": {"panoptic_seg"}, "instance": {"segm", "bbox"}, "semantic": {"sem_seg"}}
    wanted = set().union(*(tasks[head] for head in dataset.evaluators))
    if "cityscapes" in name:
        wanted.remove("bbox")
    if name in WITHOUT_AP:
        wanted -= {"segm", "bbox"}
    assert results.keys() == wanted
    headline = {"panoptic_seg": ("PQ",), "segm": ("AP", "AP50"), "bbox": ("AP",), "sem_seg": ("mIoU", "mIoU_union")}
    for task in wanted:
        for metric in headline[task]:
            assert results[task][metric] == pytest.approx(100), (task, metric)
    if "cityscapes" in name:
        assert list(results["sem_seg"])[:4] == ["IoU", "iIoU", "IoU_sup", "iIoU_sup"]
        assert [results["sem_seg"][metric] for metric in ("IoU", "iIoU", "IoU_sup", "iIoU_sup")] == pytest.approx(
            [100] * 4
        )
    if "lvis" in name:
        assert results["segm"]["APr"] == pytest.approx(100) and np.isnan(results["segm"]["APf"])
