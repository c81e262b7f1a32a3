"""True masks with predicted classes, and predicted masks with true classes."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fcclip.data import get_dataset
from fcclip.evaluation.ground_truth import GroundTruth
from fcclip.modeling import test_modes
from fcclip.reports.oracle import (
    ORACLES,
    EveryOracle,
    TrueMaskModel,
    best_queries,
    coverage,
    inside,
    oracle_modes,
    oracle_table,
    true_labels,
    true_panoptic,
)
from fcclip.reports.zero_shot import set_config
from tests.data.published_trees import write_tree
from tests.evaluation import tiny_world
from tests.modeling.test_fcclip import sample_image


def test_a_predicted_segment_gets_the_class_of_the_true_one_it_overlaps_by_more_than_half():
    truth_map = np.array([[7, 7, 7, 7, 9, 9, 0, 0]])
    predicted = np.array([[1, 1, 1, 2, 2, 3, 3, 3]])
    truth = [{"id": 7, "category_id": 0}, {"id": 9, "category_id": 1}]
    segments = [{"id": number, "category_id": 3, "isthing": False} for number in (1, 2, 3)]
    _, corrected = true_panoptic(predicted, segments, truth_map, truth, thing_classes={0})
    # 1: 3 of 4 of segment 7; 2: 1 of 5 and 1 of 3; 3: 1 of 4 of segment 9
    assert [(segment["category_id"], segment["isthing"]) for segment in corrected] == [
        (0, True),
        (3, False),
        (3, False),
    ]


def test_an_iou_of_just_one_half_is_not_enough():
    truth, segments = [{"id": 7, "category_id": 0}], [{"id": 1, "category_id": 2, "isthing": False}]
    _, corrected = true_panoptic(np.array([[1, 1]]), segments, np.array([[7, 0]]), truth, thing_classes=())
    assert corrected[0]["category_id"] == 2


def test_a_class_of_a_label_map_is_a_segment_and_ignored_pixels_do_not_count():
    truth = np.array([[4, 4, 4, 1, 255, 255, 255]])
    predicted = np.array([[2, 2, 2, 2, 2, 2, 2]])
    assert true_labels(predicted, truth, ignore_label=255).tolist() == [[4] * 7]
    assert true_labels(predicted, np.full_like(truth, 255), ignore_label=255).tolist() == [[2] * 7]


class Mistaken(tiny_world.GreyModel):
    """Finds every segment and calls it by a wrong name."""

    def find(self, image, vocabulary, alpha):
        found = super().find(image, vocabulary, 0.0)
        things = set(vocabulary.thing_classes)
        for segment in found["panoptic_seg"][1]:
            segment["category_id"] = (segment["category_id"] + 1) % 4
            segment["isthing"] = segment["category_id"] in things
        found["sem_seg"] = (found["sem_seg"] + 1) % 4
        return found


def evaluate(folder, model, **options):
    settings = {"vocabulary": tiny_world.VOCABULARY, "progress": False}
    (results,) = tiny_world.evaluate(
        model, tiny_world.config(), tiny_world.dataset(folder), **settings | options
    ).values()
    return results


def test_with_true_classes_only_the_masks_count(folder):
    wrong, right = evaluate(folder, Mistaken()), evaluate(folder, tiny_world.GreyModel(), modes={"": (0.0, 0.0)})
    assert wrong["sem_seg"]["mIoU"] < 5 and wrong["panoptic_seg"]["PQ"] < 5
    corrected = evaluate(folder, Mistaken(), oracle=ORACLES["classes"])
    assert corrected.keys() == {"sem_seg", "panoptic_seg"}
    for task, metric in (("sem_seg", "mIoU"), ("panoptic_seg", "PQ")):
        assert corrected[task][metric] == pytest.approx(right[task][metric], abs=1e-9), task


@pytest.fixture
def small_cfg(tiny_cfg):
    tiny_cfg.INPUT.MIN_SIZE_TEST = tiny_cfg.INPUT.MAX_SIZE_TEST = 64
    return tiny_cfg


def test_with_true_masks_every_segment_is_whole_and_only_classes_can_be_wrong(folder, tiny_model, small_cfg):
    options = {"vocabulary": tiny_world.VOCABULARY, "progress": False, "oracle": ORACLES["masks"]}
    model, dataset = tiny_model(cfg=small_cfg), tiny_world.dataset(folder)
    results = tiny_world.evaluate(model, small_cfg, dataset, modes=tiny_world.MODES, **options)
    assert results.keys() == tiny_world.MODES.keys()
    for found in results.values():
        quality = found["panoptic_seg"]
        matched = [quality[f"PQ-{name}"] > 0 for name in tiny_world.VOCABULARY.class_names]
        assert quality["SQ"] == pytest.approx(100 * np.mean(matched))
        assert 0 < found["sem_seg"]["pACC"] < 100


def test_a_network_that_knows_every_class_is_perfect_with_true_masks(folder, tiny_model, small_cfg, monkeypatch):
    dataset, model = tiny_world.dataset(folder), tiny_model(cfg=small_cfg)
    segments = []

    def score_masks(scored, queries, mask_logits):
        classes = torch.tensor([segment["category_id"] for segment in segments[-1]])
        assert len(queries) == len(mask_logits) == len(classes)
        logits = torch.nn.functional.one_hot(classes, len(scored.vocabulary) + 1).float() * 9
        masks = dataclasses.replace(scored.masks, mask_logits=mask_logits)
        return dataclasses.replace(scored, in_logits=logits, out_logits=logits[:, :-1], masks=masks)

    original = TrueMaskModel.segments

    def watched(self, ground_truth):
        segments.append(ground_truth.segments)
        return original(self, ground_truth)

    monkeypatch.setattr(model, "score_masks", score_masks)
    monkeypatch.setattr(TrueMaskModel, "segments", watched)
    (results,) = tiny_world.evaluate(
        model, small_cfg, dataset, vocabulary=tiny_world.VOCABULARY, progress=False, oracle=ORACLES["masks"]
    ).values()
    for task, metric in (("panoptic_seg", "PQ"), ("sem_seg", "mIoU")):
        assert results[task][metric] == pytest.approx(100), task


def test_with_true_void_the_best_mask_of_each_segment_is_something_and_nothing_else(folder, tiny_model, small_cfg):
    model, dataset = tiny_model(cfg=small_cfg), tiny_world.dataset(folder)
    record = dataset.records()[0]
    truth = GroundTruth(record, 255)
    [own] = model.score([sample_image()], tiny_world.VOCABULARY)
    ids = [segment["id"] for segment in truth.segments]
    size = tuple(own.masks.mask_logits.shape[-2:])
    covered = inside(coverage(truth.id_map, ids, own.masks.image_size, own.masks.padded_size, size))
    logits = own.masks.mask_logits.clone()
    logits[3] = torch.where(covered[0], 5.0, -5.0)  # one mask is right
    logits[[0, 1, 2, 4, 5, 6, 7]] = -5.0
    own = dataclasses.replace(own, masks=dataclasses.replace(own.masks, mask_logits=logits))
    model.score = lambda *_: [own]
    oracle = ORACLES["void"](model, lambda _: truth, dataset)
    [scored] = oracle.score([{"image_id": record["image_id"]}], tiny_world.VOCABULARY)
    void = scored.class_logits((0.4, 0.8)).softmax(-1)[:, -1]
    assert void[3] < 1e-6 and (torch.cat([void[:3], void[4:]]) > 1 - 1e-6).all()
    assert torch.equal(scored.out_logits, own.out_logits)


def test_one_pass_gives_what_each_oracle_gives_alone(folder, tiny_model, small_cfg, monkeypatch):
    options = {"vocabulary": tiny_world.VOCABULARY, "progress": False}
    model, dataset = tiny_model(cfg=small_cfg), tiny_world.dataset(folder)
    modes = oracle_modes(test_modes(small_cfg))
    together = tiny_world.evaluate(model, small_cfg, dataset, modes=modes, oracle=EveryOracle, **options)
    assert next(iter(together)) == "predicted, ensemble" and list(together)[-1] == "true masks, out_of_vocabulary"
    for name, (oracle, ensemble) in modes.items():
        alone = tiny_world.evaluate(
            model, small_cfg, dataset, modes={name: ensemble}, oracle=ORACLES.get(oracle), **options
        )
        for task, metrics in together[name].items():
            assert metrics == pytest.approx(alone[name][task], nan_ok=True), (name, task)
    lines = oracle_table(together).splitlines()
    assert len(lines) == 1 + len(modes) and lines[0].split()[:3] == ["PQ", "SQ", "RQ"] and lines[1].endswith(" 0.0")


def test_saved_predictions_of_true_masks_are_not_mixed_with_the_models_own(folder, tmp_path, tiny_model, small_cfg):
    model, dataset = tiny_model(cfg=small_cfg), tiny_world.dataset(folder)
    options = {"vocabulary": tiny_world.VOCABULARY, "progress": False, "output_dir": tmp_path, "save_predictions": True}
    whole = tiny_world.evaluate(model, small_cfg, dataset, oracle=ORACLES["masks"], **options)
    assert repr(
        tiny_world.evaluate(model, small_cfg, dataset, oracle=ORACLES["masks"], resume=True, **options)
    ) == repr(whole)
    with pytest.raises(ValueError, match="oracle was 'masks', now None"):
        tiny_world.evaluate(model, small_cfg, dataset, resume=True, **options)


@pytest.mark.parametrize("name", ["openvocab_pascal20_sem_seg_val", "openvocab_ade20k_panoptic_val"])
def test_true_masks_of_label_maps_and_of_crowds(name, tmp_path, tiny_model, small_cfg):
    write_tree(name, tmp_path)
    dataset, model = get_dataset(name, tmp_path), tiny_model(cfg=small_cfg)
    cfg = set_config(small_cfg, dataset, given=["INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"])
    (found,) = tiny_world.evaluate(model, cfg, dataset, progress=False, oracle=ORACLES["masks"]).values()
    assert 0 <= found["sem_seg"]["mIoU"] <= 100


def test_instances_alone_have_no_oracle(tmp_path):
    write_tree("openvocab_coco_2017_val", tmp_path)
    dataset = get_dataset("openvocab_coco_2017_val", tmp_path)
    with pytest.raises(ValueError, match="'openvocab_coco_2017_val' is evaluated for instances, which have no oracle"):
        tiny_world.evaluate(tiny_world.GreyModel(), tiny_world.config(), dataset, oracle=ORACLES["masks"])


def test_coverage_of_a_grid_cell_is_counted_in_the_padded_image():
    id_map = np.zeros((4, 4), int)
    id_map[:2] = 5
    id_map[3, 3] = 6
    covered = coverage(id_map, [5, 6], (8, 8), (8, 16), (2, 4))
    assert covered[0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert covered[1].tolist() == [[0, 0, 0, 0], [0, 0.25, 0, 0]]
    assert inside(covered).flatten(1).sum(1).tolist() == [2, 1]  # the small one keeps the cell that it covers most


def test_the_query_that_overlaps_most_speaks_for_a_segment():
    own = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 1]], [[1, 1, 1, 1]]]).bool()
    truth = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 1, 0]], [[0, 0, 1, 1]]]).bool()
    assert best_queries(own, truth).tolist() == [0, 2, 1]
    assert not math.isnan(float(best_queries(own & False, truth)[0]))
