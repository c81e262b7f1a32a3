"""AP by the federated rule of LVIS, against the rule written out in loops."""

import json
import math

import numpy as np
import pytest
import torch

from fcclip.evaluation import GroundTruth, InstanceEvaluator, InstanceTruth, LvisEvaluator, encode_masks
from fcclip.structures import Instances

NAMES = ("aerosol can", "air conditioner", "bow", "zucchini", "yacht")
DATASET_IDS = {0: 1, 1: 2, 2: 7, 3: 1203, 4: 1200}
FREQUENCIES = {1: "r", 2: "c", 7: "f", 1203: "f", 1200: "c"}
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
HEIGHT, WIDTH = 120, 160


def random_mask(rng):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    side = int(rng.choice([12, 40, 110]))
    top, left = rng.integers(0, HEIGHT - 10), rng.integers(0, WIDTH - 10)
    mask[top : top + side, left : left + side] = True
    return mask


def random_world(seed, num_images=12, per_image=4):
    """An LVIS file in which classes are marked, absent, unknown or marked in part; and detections of all of them."""
    rng = np.random.default_rng(seed)
    images, annotations, detections, masks_of = [], [], {}, []
    for image_id in rng.permutation(num_images).tolist():
        shown = rng.choice(list(FREQUENCIES)[:4], rng.integers(0, 3), replace=False).tolist()
        others = [category for category in FREQUENCIES if category not in shown]
        images.append(
            {
                "id": image_id,
                "height": HEIGHT,
                "width": WIDTH,
                "neg_category_ids": rng.choice(others, 2, replace=False).tolist(),
                "not_exhaustive_category_ids": [category for category in shown if rng.random() < 0.4],
            }
        )
        masks, classes, scores = [], [], []
        for category in shown:
            for _ in range(rng.integers(1, per_image)):
                mask = random_mask(rng)
                masks_of.append(mask)
                (code,) = encode_masks(torch.as_tensor(mask)[None])
                entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category}
                annotations.append({**entry, "segmentation": code, "area": int(mask.sum()), "bbox": box_of(mask)})
                for _ in range(rng.integers(0, 3)):
                    masks.append(np.roll(mask, rng.integers(-4, 5, 2), (0, 1)))
                    classes.append(index_of(category))
        for _ in range(5):
            masks.append(random_mask(rng))
            classes.append(int(rng.integers(5)))
        scores = rng.choice([0.2, 0.4, 0.5, 0.7, 0.9], len(masks))
        left, top, width, height = np.array([box_of(mask) for mask in masks]).T
        detections[image_id] = Instances(
            torch.tensor(scores),
            torch.tensor(classes),
            torch.as_tensor(np.array(masks)),
            torch.tensor(np.stack([left, top, left + width, top + height], 1), dtype=torch.float32),
        )
    categories = [
        {"id": identifier, "name": str(identifier), "frequency": letter} for identifier, letter in FREQUENCIES.items()
    ]
    return {"images": images, "annotations": annotations, "categories": categories}, detections, masks_of


def index_of(category):
    return next(index for index, other in DATASET_IDS.items() if other == category)


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]


def add(evaluator, image_id, found):
    evaluator.process(GroundTruth({"image_id": image_id}), {"instances": found})


def evaluator_for(tmp_path, content, kind=LvisEvaluator, **options):
    path = tmp_path / "lvis_v1_val.json"
    path.write_text(json.dumps(content))
    truth = InstanceTruth.read(path, DATASET_IDS.values())
    return kind(truth=truth, class_names=NAMES, dataset_ids=DATASET_IDS, **options)


# ---- the rule, written out slowly ----


def filled(mask):
    """The whole box of a mask."""
    left, top, width, height = box_of(mask)
    box = np.zeros_like(mask)
    box[top : top + height, left : left + width] = True
    return box


def slow_precisions(content, detections, truth_masks, category, threshold, area_range, task):
    """Precision at 101 recalls of one class, or None where it has no ground truth of that size."""
    low, high = area_range
    marks, num_truth = [], 0  # (score, right), images in order, those without meaning left out
    for image in sorted(content["images"], key=lambda image: image["id"]):
        own = [
            (entry, truth_masks[index])
            for index, entry in enumerate(content["annotations"])
            if entry["image_id"] == image["id"] and entry["category_id"] == category
        ]
        if not own and category not in image["neg_category_ids"]:
            continue  # nobody looked for it here
        truths = [(mask, low <= entry["area"] <= high) for entry, mask in own]
        truths.sort(key=lambda pair: not pair[1])  # those that count first
        num_truth += sum(counts for _, counts in truths)
        found = detections[image["id"]]
        rows = sorted(range(len(found)), key=lambda row: -float(found.scores[row]))
        taken = set()
        for row in rows:
            if DATASET_IDS[int(found.pred_classes[row])] != category:
                continue
            mask, best, partner = found.pred_masks[row].numpy(), threshold, None
            area = mask.sum() if task == "segm" else np.prod(box_of(mask)[2:])
            for number, (other, counts) in enumerate(truths):
                if number in taken:
                    continue
                if partner is not None and truths[partner][1] and not counts:
                    break  # a partner that counts is not given up for one that does not
                a, b = (mask, other) if task == "segm" else (filled(mask), filled(other))
                iou = (a & b).sum() / (a | b).sum()
                if iou >= best:
                    best, partner = iou, number
            if partner is not None:
                taken.add(partner)
                if truths[partner][1]:
                    marks.append((float(found.scores[row]), True))
            elif low <= area <= high and category not in image["not_exhaustive_category_ids"]:
                marks.append((float(found.scores[row]), False))
    if not num_truth:
        return None
    marks.sort(key=lambda mark: -mark[0])  # stable: of equal scores the earlier image first
    curve, right = [], 0
    for count, (_, hit) in enumerate(marks, start=1):
        right += hit
        curve.append((right / num_truth, right / count))
    return [max((p for r, p in curve if r >= wanted - 1e-12), default=0.0) for wanted in np.linspace(0, 1, 101)]


def slow_metrics(content, detections, truth_masks, task):
    thresholds = np.linspace(0.5, 0.95, 10)
    table = {
        (category, position, suffix): slow_precisions(content, detections, truth_masks, category, threshold, area, task)
        for category in FREQUENCIES
        for position, threshold in enumerate(thresholds)
        for suffix, area in AREAS.items()
    }

    def mean(chosen):
        values = [
            precision for key, precisions in table.items() if precisions and chosen(*key) for precision in precisions
        ]
        return 100 * sum(values) / len(values) if values else math.nan

    metrics = {f"AP{suffix}": mean(lambda c, t, s, suffix=suffix: s == suffix) for suffix in AREAS}
    metrics["AP50"] = mean(lambda c, t, s: t == 0 and s == "")
    metrics["AP75"] = mean(lambda c, t, s: t == 5 and s == "")
    for letter in "rcf":
        metrics[f"AP{letter}"] = mean(lambda c, t, s, letter=letter: FREQUENCIES[c] == letter and s == "")
    for index, category in DATASET_IDS.items():
        metrics[f"AP-{NAMES[index]}"] = mean(lambda c, t, s, category=category: c == category and s == "")
    return metrics


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_the_federated_rule_written_out(tmp_path, seed):
    content, detections, truth_masks = random_world(seed)
    evaluator = evaluator_for(tmp_path, content)
    for image_id, found in detections.items():
        add(evaluator, image_id, found)
    worst = 0.0
    for task, metrics in evaluator.results().items():
        expected = slow_metrics(content, detections, truth_masks, task)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert math.isnan(value) == math.isnan(metrics[name]), name
            worst = max(worst, 0.0 if math.isnan(value) else abs(value - metrics[name]))
        assert 0 < metrics["AP"] < 100
    print(f"LVIS: worst deviation from the rule written out {worst:.1e} (percent)")
    assert worst < 1e-9
    plain = evaluator_for(tmp_path, content, InstanceEvaluator)
    for image_id, found in detections.items():
        add(plain, image_id, found)
    assert plain.results()["segm"]["AP"] < metrics["AP"]  # it punishes what nobody has looked for


# ---- single rules, by hand ----


def square(top, left, side=20):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def one_image(tmp_path, *, negative=(), partial=(), extra_class=None, **options):
    """A bow that is found, and before it a detection of another place."""
    (code,) = encode_masks(torch.as_tensor(square(0, 0))[None])
    entry = {"id": 1, "image_id": 5, "category_id": 7, "segmentation": code, "area": 400, "bbox": [0, 0, 20, 20]}
    image = {"id": 5, "height": HEIGHT, "width": WIDTH, "neg_category_ids": list(negative)}
    image["not_exhaustive_category_ids"] = list(partial)
    categories = [{"id": identifier, "frequency": letter} for identifier, letter in FREQUENCIES.items()]
    content = {"images": [image], "annotations": [entry], "categories": categories}
    evaluator = evaluator_for(tmp_path, content, **options)
    masks = torch.as_tensor(np.array([square(0, 0), square(50, 50)]))
    classes = torch.tensor([2, 2 if extra_class is None else extra_class])
    add(evaluator, 5, Instances(torch.tensor([0.5, 0.9]), classes, masks, torch.zeros(2, 4)))
    return evaluator.results()["segm"]


def test_a_wrong_detection_counts_unless_the_class_is_marked_in_part(tmp_path):
    assert one_image(tmp_path)["AP"] == pytest.approx(50.0)
    assert one_image(tmp_path, partial=[7])["AP"] == pytest.approx(100.0)


def test_a_class_without_ground_truth_has_no_ap_whether_denied_or_not(tmp_path):
    for negative in ((), (2,)):
        metrics = one_image(tmp_path, extra_class=1, negative=negative)
        assert metrics["AP"] == metrics["APf"] == pytest.approx(100.0)
        assert math.isnan(metrics["AP-air conditioner"]) and math.isnan(metrics["APc"]) and math.isnan(metrics["APr"])


def test_a_detection_in_another_image_counts_only_where_the_class_is_denied(tmp_path):
    for negative, expected in (([], 100.0), ([7], 50.0)):
        (code,) = encode_masks(torch.as_tensor(square(0, 0))[None])
        entry = {"id": 1, "image_id": 5, "category_id": 7, "segmentation": code, "area": 400, "bbox": [0, 0, 20, 20]}
        lists = {"not_exhaustive_category_ids": []}
        images = [{"id": 5, "neg_category_ids": []}, {"id": 6, "neg_category_ids": negative}]
        content = {
            "images": [{**image, **lists, "height": HEIGHT, "width": WIDTH} for image in images],
            "annotations": [entry],
            "categories": [{"id": identifier, "frequency": letter} for identifier, letter in FREQUENCIES.items()],
        }
        evaluator = evaluator_for(tmp_path, content)
        for image_id, score in ((5, 0.5), (6, 0.9)):
            masks = torch.as_tensor(square(0, 0))[None]
            add(evaluator, image_id, Instances(torch.tensor([score]), torch.tensor([2]), masks, torch.zeros(1, 4)))
        assert evaluator.results()["segm"]["AP"] == pytest.approx(expected)


def test_the_three_hundred_best_of_a_image_count(tmp_path):
    masks = torch.as_tensor(np.array([square(0, 0), *[square(50, 50)] * 300]))
    found = Instances(
        torch.linspace(0.1, 0.9, 301), torch.full((301,), 2), masks, torch.zeros(301, 4)
    )  # the right one is the last
    content, _, _ = random_world(0, num_images=1)
    evaluator = evaluator_for(tmp_path, content, folder=tmp_path)
    add(evaluator, 0, found)
    evaluator.save()
    rows = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    assert len(rows) == 300 and rows[0]["score"] == pytest.approx(0.9)
    assert min(row["score"] for row in rows) > 0.1


def test_merged_shares_equal_one_process_to_the_bit(tmp_path):
    content, detections, _ = random_world(3)
    alone, first, second = (evaluator_for(tmp_path, content, seen=[True, False] * 2 + [True]) for _ in range(3))
    for index, (image_id, found) in enumerate(detections.items()):
        add(alone, image_id, found)
        add((second, first)[index % 2], image_id, found)
    first.merge(second.state())
    assert repr(first.results()) == repr(alone.results())
    assert {"AP_seen", "AP_unseen"} <= alone.results()["bbox"].keys()


def test_a_file_without_the_lists_of_lvis_is_refused(tmp_path):
    content, _, _ = random_world(0, num_images=2)
    content["categories"][0]["frequency"] = "x"
    with pytest.raises(ValueError, match=r"category 1 has the frequency 'x', expected one of r, c, f"):
        evaluator_for(tmp_path, content)
    del content["images"][1]["neg_category_ids"]
    with pytest.raises(ValueError, match=r"lvis_v1_val\.json: image \d has no 'neg_category_ids'"):
        evaluator_for(tmp_path, content)
