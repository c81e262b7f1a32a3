import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from fcclip.data import read_id_map
from fcclip.evaluation import ClassCounts, PanopticEvaluator, compare_segments
from fcclip.evaluation.panoptic import class_quality, sum_counts

PUBLISHED = Path(__file__).parents[1] / "data" / "panoptic_quality"
THING, STUFF = 7, 8


# ---- the protocol, written out slowly ----


def slow_counts(truth_map, truth_segments, predicted_map, predicted_segments):
    """tp, fp, fn and IoU sums of one image, pixel by pixel and pair by pair."""
    truth, predicted = ({s["id"]: s for s in segments} for segments in (truth_segments, predicted_segments))
    n = defaultdict(int)
    for g, p in zip(truth_map.ravel().tolist(), predicted_map.ravel().tolist()):
        n[g, p] += 1
    area = {p: sum(count for (_, q), count in n.items() if q == p) for p in predicted}
    tp, fp, fn, iou_sum = defaultdict(int), defaultdict(int), defaultdict(int), defaultdict(float)
    matched_g, matched_p = set(), set()
    for g, p in sorted(n):
        if g not in truth or p not in predicted or truth[g]["iscrowd"] == 1:
            continue
        if truth[g]["category_id"] != predicted[p]["category_id"]:
            continue
        union = area[p] + truth[g]["area"] - n[g, p] - n.get((0, p), 0)
        if union > 0 and n[g, p] / union > 0.5:
            category = truth[g]["category_id"]
            tp[category] += 1
            iou_sum[category] += n[g, p] / union
            matched_g.add(g)
            matched_p.add(p)
    crowd_of = {}
    for g, segment in truth.items():
        if segment["iscrowd"] == 1:
            crowd_of[segment["category_id"]] = g
        elif g not in matched_g:
            fn[segment["category_id"]] += 1
    for p, segment in predicted.items():
        if p in matched_p:
            continue
        excused = n.get((0, p), 0)
        if segment["category_id"] in crowd_of:
            excused += n.get((crowd_of[segment["category_id"]], p), 0)
        if excused / area[p] <= 0.5:
            fp[segment["category_id"]] += 1
    categories = {s["category_id"] for s in (*truth.values(), *predicted.values())}
    return {c: ClassCounts(tp[c], fp[c], fn[c], iou_sum[c]) for c in categories}


def random_image(seed, size=48, num_categories=5):
    """Blocky maps: the prediction is the ground truth with shifted parts, other classes and new ids."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 3, 70_000, 300, 5, 16_000_000], (6, 6), p=[0.2, 0.2, 0.15, 0.15, 0.15, 0.15])
    truth_map = np.kron(coarse, np.ones((size // 6, size // 6), int))
    truth_segments = []
    for identifier in rng.permutation(np.unique(truth_map)).tolist():
        if identifier == 0 or rng.random() < 0.1:  # an unlisted id is background, not void
            continue
        pixels = int((truth_map == identifier).sum())
        area = pixels if rng.random() < 0.7 else int(pixels * rng.uniform(1, 2.5))
        truth_segments.append(
            {
                "id": identifier,
                "category_id": int(rng.integers(num_categories)),
                "area": area,
                "iscrowd": int(rng.random() < 0.3),
            }
        )
    truth_segments.append({"id": 999, "category_id": 0, "area": int(rng.integers(0, 9)), "iscrowd": 0})  # no pixel
    predicted_map = np.roll(truth_map, rng.integers(-1, 2, 2), (0, 1))
    noise = rng.random(truth_map.shape) < rng.uniform(0, 0.2)
    predicted_map[noise] = rng.choice(predicted_map.ravel(), noise.sum())
    category_of = {s["id"]: s["category_id"] for s in truth_segments}
    ids = rng.permutation(np.arange(1, 40))[: len(np.unique(predicted_map))].tolist()
    renamed, predicted_segments = np.zeros_like(predicted_map), []
    for old, new in zip(np.unique(predicted_map).tolist(), ids):
        if old == 0 and rng.random() < 0.5:
            continue
        renamed[predicted_map == old] = new
        category = category_of.get(old) if rng.random() < 0.7 else None
        predicted_segments.append(
            {"id": new, "category_id": int(rng.integers(num_categories)) if category is None else category}
        )
    return truth_map, truth_segments, renamed, predicted_segments


def test_counts_equal_the_written_out_protocol_on_random_maps():
    seen = ClassCounts()
    worst = 0.0
    for seed in range(200):
        ground_truth = random_image(seed)
        expected = slow_counts(*ground_truth)
        found = compare_segments(*ground_truth, categories=range(5))
        assert found.keys() == expected.keys()
        for category, counts in found.items():
            assert counts[:3] == expected[category][:3], f"seed {seed}, category {category}"
            worst = max(worst, abs(counts.iou - expected[category].iou))
            seen = ClassCounts(*(a + b for a, b in zip(seen, counts)))
    assert worst < 1e-9
    assert min(seen.tp, seen.fp, seen.fn) > 200  # the maps exercise every outcome


# ---- worked cases ----


def row(*runs):
    return np.repeat([identifier for identifier, _ in runs], [length for _, length in runs])[None]


def truth_segment(identifier, category, area, crowd=0):
    return {"id": identifier, "category_id": category, "area": area, "iscrowd": crowd}


CASES = {
    "void is removed from the union": (
        [(1, 10), (0, 8)], [truth_segment(1, THING, 10)], [(5, 18)], {5: THING},
        {THING: (1, 0, 0, 1.0)},
    ),
    "an IoU of exactly one half is no match": (
        [(1, 3), (2, 1)], [truth_segment(1, THING, 3), truth_segment(2, STUFF, 1)],
        [(9, 1), (5, 3)], {5: THING, 9: STUFF},
        {THING: (0, 1, 1, 0.0), STUFF: (0, 1, 1, 0.0)},
    ),
    "a prediction mostly on crowd and void is ignored": (
        [(0, 4), (3, 2), (2, 4)], [truth_segment(3, THING, 2, 1), truth_segment(2, STUFF, 4)], [(5, 10)], {5: THING},
        {THING: (0, 0, 0, 0.0), STUFF: (0, 0, 1, 0.0)},
    ),
    "half on crowd and void is not most": (
        [(0, 3), (3, 2), (2, 5)], [truth_segment(3, THING, 2, 1), truth_segment(2, STUFF, 5)], [(5, 10)], {5: THING},
        {THING: (0, 1, 0, 0.0), STUFF: (0, 0, 1, 0.0)},
    ),
    "only the last crowd of a class excuses": (
        [(3, 4), (4, 4), (2, 2)],
        [truth_segment(3, THING, 4, 1), truth_segment(4, THING, 4, 1), truth_segment(2, STUFF, 2)],
        [(5, 10)], {5: THING},
        {THING: (0, 1, 0, 0.0), STUFF: (0, 0, 1, 0.0)},
    ),
    "the JSON area counts, not the pixels": (
        [(1, 12), (2, 8)], [truth_segment(1, THING, 20), truth_segment(2, STUFF, 8)],
        [(5, 12), (6, 8)], {5: THING, 6: STUFF},
        {THING: (1, 0, 0, 0.6), STUFF: (1, 0, 0, 1.0)},
    ),
    "an unlisted ground-truth id is no void": (
        [(1, 4), (99, 6)], [truth_segment(1, THING, 4)], [(5, 10)], {5: THING},
        {THING: (0, 1, 1, 0.0)},
    ),
    "the same pixels as void match": (
        [(1, 4), (0, 6)], [truth_segment(1, THING, 4)], [(5, 10)], {5: THING},
        {THING: (1, 0, 0, 1.0)},
    ),
    "a listed segment without a pixel is missed": (
        [(0, 4)], [truth_segment(1, THING, 3)], [(0, 4)], {},
        {THING: (0, 0, 1, 0.0)},
    ),
    "nothing on either side counts nothing": ([(0, 4)], [], [(0, 4)], {}, {}),
    "of a repeated id the last entry counts": (
        [(1, 4)], [truth_segment(1, THING, 4), truth_segment(1, STUFF, 4)], [(5, 4)], {5: STUFF},
        {STUFF: (1, 0, 0, 1.0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_worked_case(case):
    truth_runs, truth_segments, predicted_runs, categories, expected = CASES[case]
    segments = [{"id": identifier, "category_id": category} for identifier, category in categories.items()]
    found = compare_segments(row(*truth_runs), truth_segments, row(*predicted_runs), segments, categories={7, 8})
    assert found == {category: ClassCounts(*counts) for category, counts in expected.items()}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted_map": row((5, 3), (6, 1))}, "ids 6 are in the predicted map but not in its segments_info"),
        ({"predicted_segments": [{"id": 5, "category_id": 7}, {"id": 8, "category_id": 7}]}, "ids 8 .* not in its map"),
        ({"predicted_segments": [{"id": 5, "category_id": 11}]}, "category ids 11 are not among"),
        ({"predicted_map": row((5, 3))}, "the prediction is 1 x 3 .* the ground truth 1 x 4"),
        ({"predicted_map": np.zeros((0, 0), int), "truth_map": np.zeros((0, 0), int)}, "0 x 0"),
        ({"predicted_map": row((-1, 4))}, r"0\.\.16777215, got -1\.\.-1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    ground_truth = {
        "truth_map": row((1, 4)),
        "truth_segments": [truth_segment(1, THING, 4)],
        "predicted_map": row((5, 4)),
        "predicted_segments": [{"id": 5, "category_id": 7}],
    }
    with pytest.raises(ValueError, match=f"photo 3: .*{message}"):
        compare_segments(**(ground_truth | change), categories={7, 8}, name="photo 3")


# ---- whole sets ----


def test_published_numbers_are_met():
    expected = json.loads((PUBLISHED / "expected.json").read_text())
    truth, predictions = (json.loads((PUBLISHED / f"{name}.json").read_text()) for name in ("gt", "pred"))
    index_of = {category["id"]: index for index, category in enumerate(truth["categories"])}
    things = [index_of[category["id"]] for category in truth["categories"] if category.get("isthing") == 1]
    quality = PanopticEvaluator(class_names=[str(category) for category in index_of], thing_classes=things)
    prediction_of = {annotation["image_id"]: annotation for annotation in predictions["annotations"]}
    for annotation in truth["annotations"]:
        image = []
        for folder, entry in (("gt", annotation), ("pred", prediction_of[annotation["image_id"]])):
            image.append(read_id_map(PUBLISHED / folder / entry["file_name"]))
            segments = entry["segments_info"]
            image.append([{**segment, "category_id": index_of[segment["category_id"]]} for segment in segments])
        add(quality, annotation["image_id"], image)
    metrics, worst = quality.results()["panoptic_seg"], 0.0
    for group, suffix, members in (
        ("All", "", index_of.values()),
        ("Things", "_th", things),
        ("Stuff", "_st", set(index_of.values()) - set(things)),
    ):
        defined = [index for index in members if not math.isnan(metrics[f"PQ-{quality.class_names[index]}"])]
        assert len(defined) == expected[group]["n"]
        for key in ("pq", "sq", "rq"):
            worst = max(worst, abs(metrics[key.upper() + suffix] / 100 - expected[group][key]))
    assert expected["per_class"].keys() == {str(category) for category in index_of}
    total = sum_counts(quality.images)
    for category, recorded in expected["per_class"].items():
        of_class = class_quality(total.get(index_of[int(category)], ClassCounts()))._asdict()
        for key, value in recorded.items():  # which says 0 of a class without any segment
            worst = max(worst, abs((0.0 if math.isnan(of_class[key]) else of_class[key]) - value))
    print(f"panoptic quality: worst deviation from the recording {worst:.1e}")
    assert worst < 1e-9


CATEGORIES = [{"id": index, "name": f"class {index}", "isthing": int(index < 3)} for index in range(6)]


def add(quality, image_id, image):
    quality.keep(image_id, compare_segments(*image, categories=range(len(quality.class_names))))


def evaluator(seen=None):
    return PanopticEvaluator(
        class_names=[category["name"] for category in CATEGORIES], thing_classes=range(3), seen=seen
    )


@pytest.mark.parametrize("shares", [[range(8)], [range(3), range(3, 8)], [[7, 0], [2, 5, 1], [], [3, 4, 6]]])
def test_merged_shares_equal_one_process_to_the_bit(shares):
    images = [random_image(seed) for seed in range(8)]
    alone = evaluator(seen=[True, False, True, False, True, False])
    for image_id, ground_truth in enumerate(images):
        add(alone, image_id, ground_truth)
    parts = [evaluator(seen=alone.seen) for _ in shares]
    for part, share in zip(parts, shares):
        for image_id in share:
            add(part, image_id, images[image_id])
    for part in reversed(parts[1:]):
        parts[0].merge(part.state())
    assert repr(parts[0].results()) == repr(alone.results())  # exact, and NaN equals NaN


def test_seen_and_unseen_average_the_classes_that_all_averages():
    quality = evaluator(seen=[True, False, True, False, False, True])
    for seed in range(8):
        add(quality, seed, random_image(seed))
    metrics = quality.results()["panoptic_seg"]
    per_class = [metrics[f"PQ-class {index}"] for index in range(6)]
    assert metrics["PQ_seen"] == pytest.approx((per_class[0] + per_class[2]) / 2)  # class 5 never occurs
    assert metrics["PQ_unseen"] == pytest.approx((per_class[1] + per_class[3] + per_class[4]) / 3)
    assert metrics["PQ"] == pytest.approx(sum(per_class[:5]) / 5)


def test_classes_without_any_segment_make_empty_groups_not_errors():
    quality = PanopticEvaluator(class_names=["cup", "sand"], thing_classes=[0], seen=[True, True])
    add(quality, 1, (row((1, 4)), [truth_segment(1, 0, 4)], row((9, 4)), [{"id": 9, "category_id": 0}]))
    metrics = quality.results()["panoptic_seg"]
    assert metrics["PQ"] == metrics["PQ_th"] == metrics["PQ_seen"] == 100.0
    assert math.isnan(metrics["PQ_st"]) and math.isnan(metrics["PQ_unseen"])


def test_no_image_at_all_leaves_every_score_undefined():
    assert all(math.isnan(value) for value in evaluator(seen=[True] * 6).results()["panoptic_seg"].values())


def test_a_class_that_is_only_missed_counts_as_zero():
    assert class_quality(ClassCounts(fn=2)) == (0.0, 0.0, 0.0)
    assert all(math.isnan(value) for value in class_quality(ClassCounts()))


def test_images_are_added_in_the_order_of_their_ids():
    values = [0.1, 0.2, 0.3, 1e9]
    images = {index: {0: ClassCounts(1, 0, 0, value)} for index, value in enumerate(values)}
    backwards = dict(reversed(images.items()))
    assert sum_counts(backwards)[0].iou == sum_counts(images)[0].iou == 0.1 + 0.2 + 0.3 + 1e9


def test_each_image_has_a_quality_of_its_own():
    images = {seed: random_image(seed) for seed in range(4)}
    quality = evaluator()
    for image_id, ground_truth in images.items():
        add(quality, image_id, ground_truth)
    assert quality.per_image.keys() == images.keys()
    for image_id, ground_truth in images.items():
        alone = evaluator()
        add(alone, image_id, ground_truth)
        assert quality.per_image[image_id] == pytest.approx(alone.results()["panoptic_seg"]["PQ"])


def test_an_area_that_the_json_does_not_give_or_that_is_too_small_is_counted(caplog):
    maps = {"truth_map": row((1, 6), (0, 2)), "predicted_map": row((5, 8))}
    predicted = {"predicted_segments": [{"id": 5, "category_id": THING}], "categories": {THING}}
    small = compare_segments(**maps, **predicted, truth_segments=[truth_segment(1, THING, 1)], name="photo 3")
    assert "photo 3" in caplog.text and "segments 1" in caplog.text
    counted = compare_segments(**maps, **predicted, truth_segments=[{"id": 1, "category_id": THING}])
    assert small == counted
    assert counted == compare_segments(**maps, **predicted, truth_segments=[truth_segment(1, THING, 6)])
    assert counted[THING].iou == 1
