"""Recall of masks: by hand, against sets of pixels, in an evaluation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fcclip.evaluation import MaskRecallEvaluator, evaluate
from fcclip.evaluation.recall import best_ious
from fcclip.modeling import build_model
from fcclip.modeling.output_masks import OutputMasks
from tests.conftest import tiny_config, tiny_frozenseg
from tests.evaluation import tiny_world

TRUTH = np.array([[0, 0, 0, 0], [0, 1, 1, 255], [1, 1, 1, 255]])


def results(masks, truth=TRUTH, *, seen=(True, False), name="x"):
    evaluator = MaskRecallEvaluator(class_names=("cup", "sea"), seen=seen)
    logits = torch.as_tensor(np.stack(masks)).float() * 2 - 1
    ground_truth = SimpleNamespace(labels=truth, image_id=name)
    evaluator.process(ground_truth, {"recall_seg": [OutputMasks.whole(logits[:1]), OutputMasks.whole(logits[1:])]})
    return evaluator, evaluator.results()["recall"]


def test_a_class_is_found_by_the_best_mask_above_each_threshold():
    """The first class is met exactly; the second by four of its five pixels and one ignored one: 4 / 6."""
    second = (TRUTH == 1) & (np.arange(4) != 0) | (np.arange(12).reshape(3, 4) == 7)
    evaluator, found = results([TRUTH == 0, np.zeros((3, 4)), second])
    assert evaluator.images == {"x": [(0, 1.0), (1, pytest.approx(4 / 6))]}
    assert found == {
        **{"Recall@IoU=0.50": 100, "Recall@IoU=0.75": 50, "Recall@IoU=0.90": 50},
        **{"S_Recall@IoU=0.50": 100, "S_Recall@IoU=0.75": 100, "S_Recall@IoU=0.90": 100},
        **{"U_Recall@IoU=0.50": 100, "U_Recall@IoU=0.75": 0, "U_Recall@IoU=0.90": 0},
    }


def test_without_an_unseen_class_its_recall_is_undefined_and_without_knowledge_not_there():
    found = results([TRUTH == 0, TRUTH == 1], seen=(True, True))[1]
    assert found["S_Recall@IoU=0.90"] == 100 and math.isnan(found["U_Recall@IoU=0.50"])
    assert list(results([TRUTH == 0], seen=None)[1]) == [f"Recall@IoU={value}" for value in ("0.50", "0.75", "0.90")]
    assert math.isnan(results([TRUTH == 0], np.full((3, 4), 255))[1]["Recall@IoU=0.50"])


def test_the_counts_of_two_processes_add_up():
    first, second = results([TRUTH == 0])[0], results([TRUTH == 1], name="y")[0]
    first.merge(second.state())
    assert first.results()["recall"]["Recall@IoU=0.50"] == 50


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_ious_are_those_of_sets_of_pixels(at_once, monkeypatch):
    monkeypatch.setattr("fcclip.modeling.output_masks._MASKS_CPU", at_once * 9 * 11)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 6, (9, 11), generator=generator)
    logits = torch.randn(7, 9, 11, generator=generator)
    found = best_ious(labels, [OutputMasks.whole(logits)], num_classes=5)
    assert [index for index, _ in found] == [0, 1, 2, 3, 4]
    for index, iou in found:
        region = labels == index
        expected = [((mask > 0) & region).sum() / ((mask > 0) | region).sum() for mask in logits]
        assert iou == pytest.approx(float(max(expected)))


def test_masks_of_another_size_and_missing_proposals_are_refused():
    with pytest.raises(ValueError, match=r"masks have the size \(2, 2\), the ground truth \(3, 4\)"):
        best_ious(torch.zeros(3, 4, dtype=torch.long), [OutputMasks.whole(torch.ones(1, 2, 2))], num_classes=1)
    with pytest.raises(ValueError, match="evaluate without --resume"):
        MaskRecallEvaluator(class_names=("cup",)).measure(SimpleNamespace(labels=TRUTH), {"sem_seg": TRUTH})


@pytest.mark.parametrize("config", [tiny_config, tiny_frozenseg])
def test_an_evaluation_tells_recall_beside_the_other_metrics(config, tmp_path):
    tiny_world.write(tmp_path, sizes=[(40, 60), (60, 40)])
    cfg = config()
    cfg.MODEL.MASK_FORMER.TEST.RECALL_ON = True
    model = build_model(cfg, train_vocabulary=tiny_world.VOCABULARY, test_vocabulary=tiny_world.VOCABULARY)
    options = {"vocabulary": tiny_world.VOCABULARY, "training_vocabulary": tiny_world.VOCABULARY}
    tasks = evaluate(model, cfg, tiny_world.dataset(tmp_path), **options)["ensemble"]
    assert set(tasks) >= {"panoptic_seg", "sem_seg", "recall"}
    assert 0 <= tasks["recall"]["S_Recall@IoU=0.90"] <= tasks["recall"]["S_Recall@IoU=0.50"] <= 100
    assert math.isnan(tasks["recall"]["U_Recall@IoU=0.50"])
