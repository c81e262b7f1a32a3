"""The Cityscapes protocol: against cityscapesScripts itself where it is installed, and against the protocol written out
in loops."""

import argparse
import contextlib
import io
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from fcclip.config import get_cfg
from fcclip.data import get_dataset
from fcclip.data.datasets.cityscapes import instance_ids_file
from fcclip.evaluation import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator, GroundTruth, build_evaluators
from fcclip.evaluation.cityscapes import pixels_by_region
from fcclip.structures import Instances

METADATA = get_dataset("openvocab_cityscapes_fine_panoptic_val").metadata
NAMES = METADATA["stuff_classes"]
THINGS = {index: label for label, index in METADATA["thing_dataset_id_to_contiguous_id"].items()}
CLASSES = {index: label for label, index in METADATA["stuff_dataset_id_to_contiguous_id"].items()}
GROUPS = {
    "flat": [7, 8], "construction": [11, 12, 13], "object": [17, 19, 20], "nature": [21, 22], "sky": [23],
    "human": [24, 25], "vehicle": [26, 27, 28, 31, 32, 33],
}  # fmt: skip
MEAN_PIXELS = {
    33: 4672.3249222261, 32: 6298.7200839748, 25: 3930.4788056518, 28: 35732.1511111111, 31: 67583.7075812274,
    26: 12794.0202738185, 24: 3462.4756337644, 27: 27855.1264367816,
}  # fmt: skip


# ---- a tree ----


def random_city(seed, num_images=5, height=60, width=90):
    """Ground truth with stuff, void, instances from tiny to large, groups, and caravans and trailers, which have
    numbers and do not count; predictions near it with ties, duplicates, other classes and empty masks."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        ids = np.kron(rng.choice([0, 3, 4, 7, 8, 11, 13, 17, 20, 21, 23, 9], (3, 3)), np.ones((20, 30), np.int64))
        for number in range(12):
            label = int(rng.choice([24, 24, 25, 26, 26, 27, 28, 29, 30, 32, 33]))
            top, left = rng.integers(0, height - 5), rng.integers(0, width - 5)
            bottom, right = top + rng.integers(3, 24), left + rng.integers(3, 30)
            ids[top:bottom, left:right] = label if rng.random() < 0.2 else 1000 * label + number
        masks, classes, scores = [], [], []
        for region in np.unique(ids).tolist():
            label = region // 1000 if region >= 1000 else region
            if label in THINGS.values():
                index = next(index for index, other in THINGS.items() if other == label)
            elif rng.random() < 0.5:
                index = int(rng.choice(list(THINGS)))
            else:
                continue
            for _ in range(rng.integers(0, 4)):
                mask = np.roll(ids == region, rng.integers(-2, 3, 2), (0, 1)) & (rng.random(ids.shape) < 0.95)
                masks.append(mask)
                classes.append(index if rng.random() < 0.8 else int(rng.choice(list(THINGS))))
                scores.append(float(rng.choice([0.25, 0.5, 0.625, 0.875])))
        masks.append(np.zeros_like(ids, bool))
        classes.append(13)
        scores.append(0.9)
        labels = np.where(ids < 1000, ids, ids // 1000)
        contiguous = np.full(34, 0)
        contiguous[list(CLASSES.values())] = list(CLASSES)
        predicted = np.where(rng.random(ids.shape) < 0.7, contiguous[labels], rng.integers(0, 19, ids.shape))
        instances = Instances(
            scores=torch.tensor(scores),
            pred_classes=torch.tensor(classes),
            pred_masks=torch.as_tensor(np.array(masks)),
            pred_boxes=torch.zeros(len(masks), 4),
        )
        images.append((ids, predicted, instances))
    return images


def write_tree(folder, images):
    """gtFine of these images; returns their records."""
    records = []
    for number, (ids, *_) in enumerate(images):
        stem = folder / f"bonn_{number:06d}_000019_gtFine"
        Image.fromarray(ids.astype(np.uint16)).save(f"{stem}_instanceIds.png")
        Image.fromarray(np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)).save(f"{stem}_labelIds.png")
        records.append({"image_id": f"bonn_{number:06d}_000019", "sem_seg_file_name": f"{stem}_labelTrainIds.png"})
        records[-1]["file_name"] = f"{folder}/bonn_{number:06d}_000019_leftImg8bit.png"
    return records


def evaluators(seen=None):
    return (
        CityscapesInstanceEvaluator(class_names=NAMES, dataset_ids=THINGS, seen=seen),
        CityscapesSemanticEvaluator(class_names=NAMES, dataset_ids=CLASSES, seen=seen),
    )


def outputs(ground_truth):
    _, predicted, instances = ground_truth
    return {"instances": instances, "sem_seg": torch.as_tensor(predicted)}


def evaluate(records, images, **options):
    both = evaluators(**options)
    for record, ground_truth in zip(records, images):
        shared = GroundTruth(record)
        for evaluator in both:
            evaluator.process(shared, outputs(ground_truth))
    return both


def results(both):
    return {task: metrics for evaluator in both for task, metrics in evaluator.results().items()}


# ---- cityscapesScripts ----


@contextlib.contextmanager
def silent():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def published_instances(folder, images, records):
    protocol = pytest.importorskip(
        "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
        reason="needs cityscapesscripts: pip install 'fcclip[cityscapes]'",
    )
    protocol.writeDict2JSON = lambda *_: None  # a file for debugging, which it cannot write with NumPy 2
    lists = []
    for number, (_, _, instances) in enumerate(images):
        lines = []
        rows = zip(instances.pred_masks, instances.pred_classes.tolist(), instances.scores.tolist())
        for index, (mask, label, score) in enumerate(rows):
            name = f"{number}_{index}.png"
            Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(folder / name)
            lines.append(f"{name} {THINGS[label]} {score}\n")
        (folder / f"{number}_pred.txt").write_text("".join(lines))
        lists.append(str(folder / f"{number}_pred.txt"))
    arguments = argparse.Namespace(**vars(protocol.args))
    arguments.predictionPath, arguments.predictionWalk = str(folder), None
    arguments.JSONOutput, arguments.colorized, arguments.quiet = False, False, True
    arguments.gtInstancesFile = str(folder / "instances.json")
    with silent():
        return protocol.evaluateImgLists(lists, [instance_ids_file(record) for record in records], arguments)


def published_semantic(folder, images, records):
    protocol = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="needs cityscapesscripts: pip install 'fcclip[cityscapes]'",
    )
    label_of_class = np.array([CLASSES[index] for index in range(19)], np.uint8)
    predictions = []
    for number, (_, predicted, _) in enumerate(images):
        predictions.append(str(folder / f"{number}_pred.png"))
        Image.fromarray(label_of_class[predicted]).save(predictions[-1])
    truth = [record["sem_seg_file_name"].replace("labelTrainIds", "labelIds") for record in records]
    arguments = argparse.Namespace(**vars(protocol.args))
    arguments.evalLabels = []
    arguments.JSONOutput, arguments.colorized, arguments.quiet = False, False, True
    with silent():
        return protocol.evaluateImgLists(predictions, truth, arguments)


@pytest.fixture
def their_world(monkeypatch):
    """cityscapesScripts calls what NumPy 2.4 no longer has."""
    if not hasattr(np, "in1d"):
        monkeypatch.setattr(np, "in1d", lambda values, known: np.isin(values, known).ravel(), raising=False)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("their_world")
def test_instance_ap_equals_cityscapesscripts(tmp_path, seed):
    images = random_city(seed)
    records = write_tree(tmp_path, images)
    expected = published_instances(tmp_path, images, records)["averages"]
    metrics = results(evaluate(records, images))["segm"]
    worst = 0.0
    pairs = [(metrics["AP"], expected["allAp"]), (metrics["AP50"], expected["allAp50%"])]
    pairs += [
        (metrics[f"AP-{NAMES[index]}"], published_class(expected, label)["ap"]) for index, label in THINGS.items()
    ]
    for found, wanted in pairs:
        assert math.isnan(found) == math.isnan(wanted)
        worst = max(worst, 0.0 if math.isnan(found) else abs(found - 100 * wanted))
    assert 0 < metrics["AP"] < 100
    print(f"instances: worst deviation from cityscapesScripts {worst:.1e} (percent)")
    assert worst < 1e-9


def published_class(averages, label):
    names = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
    return averages["classes"][names[label]]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("their_world")
def test_semantic_scores_equal_cityscapesscripts(tmp_path, seed):
    images = random_city(seed)
    records = write_tree(tmp_path, images)
    expected = published_semantic(tmp_path, images, records)
    metrics = results(evaluate(records, images))["sem_seg"]
    names = {"IoU": "Classes", "iIoU": "InstClasses", "IoU_sup": "Categories", "iIoU_sup": "InstCategories"}
    worst = max(abs(metrics[name] - 100 * expected[f"averageScore{other}"]) for name, other in names.items())
    print(f"semantic: worst deviation from cityscapesScripts {worst:.1e} (percent)")
    assert worst < 1e-9
    assert all(0 < metrics[name] < 100 for name in names)


# ---- the protocol, written out slowly ----


def slow_instance_ap(images):
    """Contiguous class -> AP at each threshold, 0..1."""
    found = {}
    for index, label in THINGS.items():
        found[index] = []
        for threshold in np.arange(0.5, 1.0, 0.05):
            points, missed, asked = [], 0, 0  # (score, right or not) of every prediction that counts
            for ids, _, instances in images:
                own = [region for region in np.unique(ids).tolist() if region == label or region // 1000 == label]
                void = [
                    region for region in np.unique(ids).tolist() if region < 1000 and region not in CLASSES.values()
                ]
                predictions = [
                    (mask.numpy(), score)
                    for mask, other, score in zip(
                        instances.pred_masks, instances.pred_classes.tolist(), instances.scores.tolist()
                    )
                    if other == index and mask.any()
                ]
                overlapping = defaultdict(list)
                for number, (mask, _) in enumerate(predictions):
                    for region in own:
                        both = (mask & (ids == region)).sum()
                        if both / (mask | (ids == region)).sum() > threshold:
                            overlapping[region].append(number)
                for region in own:
                    if region < 1000 or (ids == region).sum() < 100:
                        continue
                    asked += 1
                    scores = sorted(predictions[number][1] for number in overlapping[region])
                    missed += not scores
                    points += [(score, position == len(scores) - 1) for position, score in enumerate(scores)]
                for number, (mask, score) in enumerate(predictions):
                    if any(number in numbers for numbers in overlapping.values()):
                        continue
                    excused = sum((mask & (ids == region)).sum() for region in void)
                    excused += sum((mask & (ids == region)).sum() for region in own if region < 1000)
                    excused += sum((mask & (ids == region)).sum() for region in own if (ids == region).sum() < 100)
                    if excused / mask.sum() <= threshold:
                        points.append((score, False))
            if not asked:
                found[index].append(math.nan)
                continue
            curve = []
            for cut in sorted({score for score, _ in points}):
                right = sum(true for score, true in points if score >= cut)
                curve.append((right / sum(score >= cut for score, _ in points), right / asked))
            curve.append((1.0, 0.0))
            recalls = [curve[0][1], *(recall for _, recall in curve), 0.0]
            widths = [(before - after) / 2 for before, after in zip(recalls, recalls[2:])]
            found[index].append(sum(precision * width for (precision, _), width in zip(curve, widths)) if points else 0)
    return found


def slow_semantic_scores(images):
    pixels = [
        (region, CLASSES[index])
        for ids, predicted, _ in images
        for region, index in zip(ids.ravel().tolist(), predicted.ravel().tolist())
    ]
    pixels = [(region // 1000 if region >= 1000 else region, region, label) for region, label in pixels]
    pixels = [triple for triple in pixels if triple[0] in CLASSES.values()]

    def iou(labels):
        either = sum(true in labels or guess in labels for true, _, guess in pixels)
        return sum(true in labels and guess in labels for true, _, guess in pixels) / either if either else math.nan

    def weighted(label, group):
        right = wrong = 0.0
        for ids, predicted, _ in images:
            for region in np.unique(ids[ids // 1000 == label]).tolist():
                guesses = [CLASSES[index] for index in predicted[ids == region].tolist()]
                weight = MEAN_PIXELS[label] / len(guesses)
                right += weight * sum(guess in group for guess in guesses)
                wrong += weight * sum(guess not in group for guess in guesses)
        return right, wrong

    def instance_iou(labels, group):
        sums = [weighted(label, group) for label in labels]
        right, wrong = sum(first for first, _ in sums), sum(other for _, other in sums)
        intruders = sum(guess in group and true not in group for true, _, guess in pixels)
        whole = right + wrong + intruders
        return right / whole if whole else math.nan

    return {
        "IoU": np.nanmean([iou([label]) for label in CLASSES.values()]),
        "iIoU": np.nanmean([instance_iou([label], [label]) for label in MEAN_PIXELS]),
        "IoU_sup": np.nanmean([iou(labels) for labels in GROUPS.values()]),
        "iIoU_sup": np.nanmean([instance_iou(GROUPS[name], GROUPS[name]) for name in ("human", "vehicle")]),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_both_protocols_equal_their_rules_written_out(tmp_path, seed):
    images = random_city(seed, num_images=3)
    found = results(evaluate(write_tree(tmp_path, images), images))
    expected = slow_instance_ap(images)
    for index, values in expected.items():
        assert found["segm"][f"AP-{NAMES[index]}"] == pytest.approx(100 * np.mean(values), abs=1e-9, nan_ok=True)
    everything = np.array(list(expected.values()))
    assert found["segm"]["AP"] == pytest.approx(100 * np.nanmean(everything), abs=1e-9)
    assert found["segm"]["AP50"] == pytest.approx(100 * np.nanmean(everything[:, 0]), abs=1e-9)
    for name, value in slow_semantic_scores(images).items():
        assert found["sem_seg"][name] == pytest.approx(100 * value, abs=1e-9), name


# ---- single rules, by hand ----

HEIGHT, WIDTH = 40, 60


def canvas(*regions):
    """Ids: each region is (id, top, left, height, width), the rest road."""
    ids = np.full((HEIGHT, WIDTH), 7)
    for region, top, left, height, width in regions:
        ids[top : top + height, left : left + width] = region
    return ids


def cars(*boxes):
    """A car for each (score, top, left, height, width)."""
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (_, top, left, height, width) in zip(masks, boxes):
        mask[top : top + height, left : left + width] = True
    scores = torch.tensor([score for score, *_ in boxes])
    return Instances(scores, torch.full((len(boxes),), 13), masks, torch.zeros(len(boxes), 4))


def instance_ap(ids, instances):
    evaluator = evaluators()[0]
    evaluator.keep(1, evaluator.count(ids, instances))
    return evaluator.results()["segm"]


def test_a_car_that_is_found_scores_a_hundred_and_a_second_mask_for_it_is_a_mistake():
    found = instance_ap(canvas((26_001, 0, 0, 20, 20)), cars((0.5, 0, 0, 20, 20)))
    assert found["AP"] == found["AP50"] == found["AP-car"] == 100.0 and math.isnan(found["AP-bus"])
    ids = canvas((26_001, 0, 0, 20, 20), (26_002, 0, 30, 20, 20))
    twice = instance_ap(ids, cars((0.5, 0, 0, 20, 20), (0.75, 0, 0, 20, 20), (0.25, 0, 30, 20, 20)))
    points = [2 / 3, 1 / 2, 1, 1]  # precision at recall 1, 1/2, 1/2, 0: each stands for a quarter
    assert twice["AP"] == pytest.approx(100 * sum(points) / 4)


def test_an_overlap_of_exactly_the_threshold_is_no_match():
    metrics = instance_ap(canvas((26_001, 0, 0, 20, 20)), cars((0.5, 0, 0, 20, 10)))
    assert metrics["AP50"] == 0.0


@pytest.mark.parametrize(
    ("region", "excused"),
    [
        ((0, 20, 20, 15, 15), True),  # void
        ((26, 20, 20, 15, 15), True),  # a group of cars
        ((26_002, 20, 20, 9, 9), True),  # a tiny car
        ((27, 20, 20, 15, 15), False),  # a group of trucks
        ((29, 20, 20, 15, 15), True),  # a group of caravans is void
        ((29_001, 20, 20, 15, 15), False),  # one caravan is not
        ((24_000, 20, 20, 15, 15), False),
    ],
)
def test_a_mask_without_a_car_is_excused_by(region, excused):
    ids = canvas((26_001, 0, 0, 12, 12), region)
    _, top, left, height, width = region
    metrics = instance_ap(ids, cars((0.5, 0, 0, 12, 12), (0.75, top, left, height, width)))
    assert metrics["AP-car"] == (100.0 if excused else 25.0)  # precision 1/2, 0, 1 at recall 1, 0, 0


def test_cars_that_nobody_predicts_count_as_zero_and_classes_without_ground_truth_do_not_count():
    metrics = instance_ap(canvas((26_001, 0, 0, 12, 12)), cars())
    assert metrics["AP"] == metrics["AP50"] == metrics["AP-car"] == 0.0
    nothing = instance_ap(canvas(), cars((0.5, 0, 0, 12, 12)))
    assert all(math.isnan(value) for value in nothing.values())
    everything_excused = instance_ap(canvas((26_001, 0, 0, 12, 12), (0, 20, 20, 15, 15)), cars((0.5, 20, 20, 15, 15)))
    assert everything_excused["AP"] == 0.0


def test_iiou_weights_small_instances_up(tmp_path):
    ids = canvas((26_001, 0, 0, 20, 20), (26_002, 30, 30, 4, 5))
    predicted = np.where(ids == 26_001, 13, 0)  # the small one is not seen
    records = write_tree(tmp_path, [(ids,)])
    evaluator = evaluators()[1]
    evaluator.process(GroundTruth(records[0]), {"sem_seg": predicted})
    metrics = evaluator.results()["sem_seg"]
    assert metrics["IoU-car"] == pytest.approx(100 * 400 / 420)
    assert metrics["iIoU"] == metrics["iIoU_sup"] == pytest.approx(50.0)  # each of the two counts 12794 pixels
    assert metrics["IoU"] == metrics["mIoU"] == metrics["mIoU_union"]


# ---- how it fits the others ----


@pytest.mark.parametrize("shares", [[range(5)], [range(2), range(2, 5)], [[4, 0], [], [3, 1], [2]]])
def test_merged_shares_equal_one_process_to_the_bit(tmp_path, shares):
    images = random_city(3)
    records = write_tree(tmp_path, images)
    seen = [index % 2 == 0 for index in range(19)]
    alone = evaluate(records, images, seen=seen)
    parts = [evaluate([records[i] for i in share], [images[i] for i in share], seen=seen) for share in shares]
    for part in reversed(parts[1:]):
        for evaluator, other in zip(parts[0], part):
            evaluator.merge(other.state())
    assert repr(results(parts[0])) == repr(results(alone))
    assert {"AP_seen", "AP_unseen"} <= results(alone)["segm"].keys()
    assert parts[0][1].per_image == alone[1].per_image and len(alone[1].per_image) == 5
    if len(shares[0]) < 5:
        with pytest.raises(ValueError, match="came twice"):
            parts[0][0].merge(parts[-1][0].state())


def test_names_of_classes_play_no_part(tmp_path):
    images = random_city(4)
    records = write_tree(tmp_path, images)
    plain = results(evaluate(records, images))
    prompts = [f"{name}, {name}s: in {index}" for index, name in enumerate(NAMES)]
    renamed = CityscapesInstanceEvaluator(class_names=prompts, dataset_ids=THINGS)
    labelled = CityscapesSemanticEvaluator(class_names=prompts, dataset_ids=CLASSES)
    for record, ground_truth in zip(records, images):
        renamed.process(GroundTruth(record), outputs(ground_truth))
        labelled.process(GroundTruth(record), outputs(ground_truth))
    assert repr(list(results((renamed, labelled))["segm"].values())) == repr(list(plain["segm"].values()))
    assert repr(list(results((renamed, labelled))["sem_seg"].values())) == repr(list(plain["sem_seg"].values()))


def test_the_registered_set_gets_the_protocol_of_its_scripts():
    cfg = get_cfg()
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = test.SEMANTIC_ON = True
    (built,) = build_evaluators(cfg, get_dataset("openvocab_cityscapes_fine_panoptic_val"), modes=["m"]).values()
    names = ["PanopticEvaluator", "CityscapesInstanceEvaluator", "CityscapesSemanticEvaluator"]
    assert [type(evaluator).__name__ for evaluator in built] == names
    assert built[1].dataset_ids[13] == 26 and len(built[1].dataset_ids) == 8


def test_equal_masks_are_counted_once_and_like_others():
    region = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) // 700
    masks = torch.as_tensor(np.random.default_rng(0).random((4, HEIGHT, WIDTH)) < 0.3)[[0, 1, 0, 2, 3]]
    expected = [[int((mask.numpy() & (region == number)).sum()) for number in range(4)] for mask in masks]
    assert pixels_by_region(masks, region, 4).tolist() == expected
    assert pixels_by_region(masks[:0], region, 4).shape == (0, 4)


# ---- what is refused ----


def test_what_does_not_fit_is_refused(tmp_path):
    ids = canvas((26_001, 0, 0, 12, 12))
    instance, semantic = evaluators()
    with pytest.raises(ValueError, match=r"photo: masks are \(40, 60\) .* the ground truth is \(60, 40\)"):
        instance.count(ids.T, cars(), name="photo")
    with pytest.raises(ValueError, match="photo: classes 0 of instances are not thing classes"):
        instance.count(
            ids, Instances(torch.ones(1), torch.tensor([0]), cars((1, 0, 0, 9, 9)).pred_masks, None), name="photo"
        )
    (record,) = write_tree(tmp_path, [(ids,)])
    with pytest.raises(ValueError, match=r"instanceIds\.png: predicted class 20 is not one of the 19 classes"):
        semantic.process(GroundTruth(record), {"sem_seg": np.full(ids.shape, 20)})
    with pytest.raises(ValueError, match=r"instanceIds\.png: the prediction has shape \(60, 40\)"):
        semantic.process(GroundTruth(record), {"sem_seg": np.zeros(ids.T.shape, int)})
    with pytest.raises(ValueError, match=r"'labels/1\.png' of image 7 is not named .*_gtFine_labelTrainIds\.png"):
        semantic.process(GroundTruth({"image_id": 7, "sem_seg_file_name": "labels/1.png"}), {"sem_seg": ids})
    with pytest.raises(FileNotFoundError, match=r"ulm_gtFine_instanceIds\.png: no such file.*all of gtFine"):
        missing = {"image_id": "ulm", "sem_seg_file_name": f"{tmp_path}/ulm_gtFine_labelTrainIds.png"}
        semantic.process(GroundTruth(missing), {"sem_seg": ids})
    (broken,) = write_tree(tmp_path, [(canvas((50_001, 0, 0, 9, 9)),)])
    with pytest.raises(ValueError, match=r"label 50 is not in Cityscapes \(0\.\.33\)"):
        semantic.process(GroundTruth(broken), {"sem_seg": ids})


def test_classes_that_cityscapes_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"labels \[7, 29\] have no instances in Cityscapes"):
        CityscapesInstanceEvaluator(class_names=NAMES, dataset_ids={0: 7, 1: 29})
    with pytest.raises(ValueError, match=r"the 2 classes have the labels \[3, 7\]; Cityscapes evaluates"):
        CityscapesSemanticEvaluator(class_names=["a", "b"], dataset_ids={0: 7, 1: 3})
