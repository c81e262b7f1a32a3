import contextlib
import io
import json
import math

import numpy as np
import pycocotools.mask
import pytest
import torch
from faster_coco_eval.core.mask import decode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fcclip.evaluation import GroundTruth, InstanceEvaluator, InstanceTruth, encode_masks, write_id_map
from fcclip.structures import Instances

NAMES = ("sand", "cup", "ball", "kite", "sea", "drum")
DATASET_IDS = {1: 40, 2: 7, 3: 23, 5: 9}  # neither contiguous nor in the order of the classes


def random_mask(rng, height, width):
    mask = np.zeros((height, width), bool)
    top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
    mask[top : top + rng.integers(2, height), left : left + rng.integers(2, width)] = True
    return mask & (rng.random((height, width)) < rng.choice([1.0, 0.9]))


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0.0, 0.0, 0.0, 0.0]
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def instances_of(masks, classes, scores):
    return Instances(
        scores=torch.tensor(scores, dtype=torch.float32),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
        pred_masks=torch.as_tensor(np.asarray(masks, bool)),
        pred_boxes=torch.tensor([box_of(mask) for mask in masks], dtype=torch.float32).reshape(-1, 4),
    )


def random_world(seed, num_images=9, string_ids=False):
    """Ground truth in the three mask formats, some of it crowds, and detections near it with ties and empty masks."""
    rng = np.random.default_rng(seed)
    things = list(DATASET_IDS)[:3]  # class 5 stays without ground truth
    images, annotations, detections = [], [], {}
    for index in rng.permutation(num_images).tolist():
        height, width = int(rng.integers(40, 160)), int(rng.integers(40, 160))
        image_id = f"photo_{index}" if string_ids else 10 * index
        images.append({"id": image_id, "height": height, "width": width})
        masks, classes, scores = [], [], []
        for _ in range(rng.integers(0, 6)):
            mask, label = random_mask(rng, height, width), int(rng.choice(things))
            code = pycocotools.mask.encode(np.asfortranarray(mask, np.uint8))
            crowd, form = int(rng.random() < 0.2), rng.integers(3)
            left, top, right, bottom = box_of(mask)
            if form == 0:
                segmentation = {"size": code["size"], "counts": code["counts"].decode()}
            elif form == 1:
                values, starts = mask.T.ravel(), np.flatnonzero(np.diff(mask.T.ravel().astype(int))) + 1
                counts = np.diff([0, *starts, values.size]).tolist()
                segmentation = {"size": [height, width], "counts": [0, *counts] if values[0] else counts}
            else:
                crowd = 0
                segmentation = [[left, top, right, top, right, bottom, left, bottom]]
            annotations.append(
                {
                    "id": len(annotations),  # from 0: the protocol takes 0 for unmatched
                    "image_id": image_id,
                    "category_id": DATASET_IDS[label],
                    "segmentation": segmentation,
                    "area": int(mask.sum()),
                    "bbox": [left, top, right - left, bottom - top],
                    "iscrowd": crowd,
                }
            )
            for _ in range(rng.integers(0, 4)):
                masks.append(np.roll(mask, rng.integers(-4, 5, 2), (0, 1)))
                classes.append(label if rng.random() < 0.8 else int(rng.choice(list(DATASET_IDS))))
                scores.append(float(rng.choice([0.2, 0.4, 0.5, 0.9])))
        if rng.random() < 0.3:
            masks.append(np.zeros((height, width), bool))
            classes.append(things[0])
            scores.append(0.0)
        detections[image_id] = instances_of(np.reshape(masks, (-1, height, width)), classes, scores)
    categories = [{"id": identifier, "name": "-"} for identifier in DATASET_IDS.values()]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def add(evaluator, image_id, found):
    evaluator.process(GroundTruth({"image_id": image_id}), {"instances": found})


def evaluator_for(tmp_path, content, **options):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    truth = InstanceTruth.read(path, DATASET_IDS.values())
    return InstanceEvaluator(truth=truth, class_names=NAMES, dataset_ids=DATASET_IDS, **options)


def pycocotools_metrics(content, detections, task):
    """The metrics of the reference implementation, and AP for each data-set category."""
    number = {image_id: index for index, image_id in enumerate(sorted(detections), start=1)}
    truth, rows = COCO(), []
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = {
            "images": [{**image, "id": number[image["id"]]} for image in content["images"]],
            "categories": content["categories"],
            "annotations": [
                {**entry, "id": entry["id"] + 1, "image_id": number[entry["image_id"]]}
                for entry in content["annotations"]
            ],
        }
        truth.createIndex()
        for image_id, found in detections.items():
            for mask, label, score, box in zip(found.pred_masks, found.pred_classes, found.scores, found.pred_boxes):
                left, top, right, bottom = box.tolist()
                geometry = (
                    {"segmentation": pycocotools.mask.encode(np.asfortranarray(mask.numpy(), np.uint8))}
                    if task == "segm"
                    else {"bbox": [left, top, right - left, bottom - top]}
                )
                rows.append(
                    {
                        "image_id": number[image_id],
                        "category_id": DATASET_IDS[int(label)],
                        "score": float(score),
                        **geometry,
                    }
                )
        rows.sort(key=lambda row: row["image_id"])
        evaluation = COCOeval(truth, truth.loadRes(rows), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluation.stats))
    for position, category in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, position, 0, -1]
        metrics[category] = precision[precision > -1].mean() if (precision > -1).any() else -1
    return {key: math.nan if value == -1 else 100 * value for key, value in metrics.items()}


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_equals_pycocotools(tmp_path, seed):
    content, detections = random_world(seed, string_ids=seed % 2 == 1)
    evaluator = evaluator_for(tmp_path, content)
    for image_id, found in detections.items():
        add(evaluator, image_id, found)
    results = evaluator.results()
    assert results.keys() == {"segm", "bbox"}
    worst = 0.0
    for task, metrics in results.items():
        expected = pycocotools_metrics(content, detections, task)
        pairs = [(metrics[key], expected[key]) for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        pairs += [(metrics[f"AP-{NAMES[index]}"], expected[category]) for index, category in DATASET_IDS.items()]
        for found, wanted in pairs:
            assert math.isnan(found) == math.isnan(wanted)
            worst = max(worst, 0.0 if math.isnan(found) else abs(found - wanted))
        assert 0 < metrics["AP"] < 100 and math.isnan(metrics["AP-drum"])
    print(f"AP: worst deviation from pycocotools {worst:.1e} (percent)")
    assert worst < 1e-9


def test_merged_shares_equal_one_process(tmp_path):
    content, detections = random_world(3)
    alone, first, second = (evaluator_for(tmp_path, content, seen=[True, False] * 3) for _ in range(3))
    for index, (image_id, found) in enumerate(detections.items()):
        add(alone, image_id, found)
        add((second, first)[index % 2], image_id, found)
    first.merge(second.state())
    assert repr(first.results()) == repr(alone.results())
    with pytest.raises(ValueError, match="came twice"):
        first.merge(second.state())
    with pytest.raises(ValueError, match="came twice"):
        add(first, image_id, found)


def test_only_images_that_were_evaluated_count(tmp_path):
    content, detections = random_world(4)
    some = dict(list(detections.items())[:4])
    part = {
        "images": [image for image in content["images"] if image["id"] in some],
        "annotations": [entry for entry in content["annotations"] if entry["image_id"] in some],
    }
    everything = evaluator_for(tmp_path, content)
    for image_id, found in some.items():
        add(everything, image_id, found)
    limited = pycocotools_metrics({**content, **part}, some, "segm")
    assert everything.results()["segm"]["AP"] == pytest.approx(limited["AP"], abs=1e-9)


def square(top, left, size, height=40, width=60):
    mask = np.zeros((height, width), bool)
    mask[top : top + size, left : left + size] = True
    return mask


def two_squares(tmp_path, **options):
    """One image with a cup and a ball."""
    annotations = [
        {
            "id": index + 1,
            "image_id": 1,
            "category_id": DATASET_IDS[label],
            "segmentation": encode_masks(torch.as_tensor(mask)[None])[0],
            "area": int(mask.sum()),
            "bbox": [box_of(mask)[0], box_of(mask)[1], 10.0, 10.0],
            "iscrowd": 0,
        }
        for index, (label, mask) in enumerate(((1, square(2, 3, 10)), (2, square(20, 30, 10))))
    ]
    content = {
        "images": [{"id": 1, "height": 40, "width": 60}],
        "annotations": annotations,
        "categories": [{"id": identifier} for identifier in DATASET_IDS.values()],
    }
    return evaluator_for(tmp_path, content, **options)


def panoptic_image(folder, image_id, masks, classes, crowds):
    """A record whose segments are these masks, later ones on top, and a stuff segment below them."""
    ids, segments = np.full(masks[0].shape, 1), [{"id": 1, "category_id": 0, "area": 1, "iscrowd": 0}]
    for index, (mask, label, crowd) in enumerate(zip(masks, classes, crowds), start=70_000):
        ids[mask] = index
        segments.append({"id": index, "category_id": label, "area": 5, "iscrowd": crowd})
    write_id_map(folder / f"{image_id}.png", ids)
    files = {"pan_seg_file_name": str(folder / f"{image_id}.png"), "file_name": f"{image_id}.jpg"}
    return GroundTruth({"image_id": image_id, "segments_info": segments, **files})


def test_without_an_instances_file_the_thing_segments_are_the_ground_truth(tmp_path):
    content, detections = random_world(5, string_ids=True)
    annotations, from_file, from_segments = [], None, []
    for image_id, found in detections.items():
        masks = [mask.numpy() for mask in found.pred_masks if mask.any()][:4]
        if not masks:
            masks = [square(0, 0, 9, *found.pred_masks.shape[1:])]
        classes, crowds = [(1, 2, 3, 1)[index] for index in range(len(masks))], [0, 1, 0, 0][: len(masks)]
        ground_truth = panoptic_image(tmp_path, image_id, masks, classes, crowds)
        from_segments.append((ground_truth, found))
        for segment in ground_truth.segments[1:]:
            mask = ground_truth.id_map == segment["id"]
            if mask.any():  # covered by the others
                left, top, right, bottom = box_of(mask)
                entry = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": segment["iscrowd"]}
                entry |= {"category_id": DATASET_IDS[segment["category_id"]], "area": int(mask.sum())}
                entry |= {"segmentation": encode_masks(torch.as_tensor(mask)[None])[0]}
                annotations.append(entry | {"bbox": [left, top, right - left, bottom - top]})
    from_file = evaluator_for(tmp_path, content | {"annotations": annotations})
    alone, first, second = (
        InstanceEvaluator(truth=None, class_names=NAMES, dataset_ids=DATASET_IDS, seen=None) for _ in range(3)
    )
    for index, (ground_truth, found) in enumerate(from_segments):
        add(from_file, ground_truth.image_id, found)
        alone.process(ground_truth, {"instances": found})
        (second, first)[index % 2].process(ground_truth, {"instances": found})
    first.merge(second.state())
    assert repr(alone.results()) == repr(first.results())
    assert alone.results()["segm"] == pytest.approx(from_file.results()["segm"], nan_ok=True)
    assert alone.results()["bbox"] == pytest.approx(from_file.results()["bbox"], nan_ok=True)
    assert 0 < alone.results()["segm"]["AP"] < 100


def test_masks_of_another_size_than_the_panoptic_annotation_are_refused(tmp_path):
    evaluator = InstanceEvaluator(truth=None, class_names=NAMES, dataset_ids=DATASET_IDS)
    ground_truth = panoptic_image(tmp_path, 4, [square(0, 0, 9)], [1], [0])
    with pytest.raises(ValueError, match=r"image 4: masks are \(60, 40\) .* in its annotation is \(40, 60\)"):
        evaluator.process(ground_truth, {"instances": instances_of(np.zeros((1, 60, 40)), [1], [0.5])})


def test_ground_truth_without_an_instance_leaves_every_score_undefined(tmp_path):
    content, detections = random_world(4)
    evaluator = evaluator_for(tmp_path, content | {"annotations": []}, seen=[True] * 6)
    for image_id, found in detections.items():
        add(evaluator, image_id, found)
    for metrics in evaluator.results().values():
        assert all(math.isnan(value) for value in metrics.values())


def test_seen_and_unseen_average_the_classes_with_ground_truth(tmp_path):
    evaluator = two_squares(tmp_path, seen=[True, True, False, True, True, False])
    add(evaluator, 1, instances_of([square(2, 3, 10), square(0, 0, 5)], [1, 2], [0.9, 0.8]))
    metrics = evaluator.results()["segm"]
    assert metrics["AP_seen"] == metrics["AP-cup"] == pytest.approx(100.0)
    assert metrics["AP_unseen"] == metrics["AP-ball"] == 0.0
    assert metrics["AP"] == pytest.approx(50.0)
    assert math.isnan(metrics["AP-kite"]) and math.isnan(metrics["APm"])


def test_without_a_detection_every_score_is_undefined(tmp_path):
    evaluator = two_squares(tmp_path, seen=[True] * 6)
    add(evaluator, 1, instances_of(np.zeros((0, 40, 60)), [], []))
    for metrics in evaluator.results().values():
        assert all(math.isnan(value) for value in metrics.values())


def test_results_are_written_with_the_ids_of_the_data_set(tmp_path):
    evaluator = two_squares(tmp_path, folder=tmp_path)
    add(evaluator, 1, instances_of([square(2, 3, 10)], [2], [0.5]))
    evaluator.save()
    (saved,) = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert saved["category_id"] == DATASET_IDS[2]
    assert saved["bbox"] == [3.0, 2.0, 10.0, 10.0]
    assert saved["score"] == 0.5
    np.testing.assert_array_equal(decode(saved["segmentation"]), square(2, 3, 10))


@pytest.mark.parametrize(
    ("image_id", "masks", "label", "message"),
    [
        (2, np.zeros((1, 40, 60)), 1, r"image 2 is not in .*instances\.json"),
        ("1", np.zeros((1, 40, 60)), 1, "image '1' is not in"),
        (1, np.zeros((1, 60, 40)), 1, r"masks are \(60, 40\) .* is \(40, 60\)"),
        (1, np.zeros((1, 40, 60)), 0, "classes 0 of instances are not thing classes"),
    ],
)
def test_instances_that_do_not_fit_the_image_are_refused(tmp_path, image_id, masks, label, message):
    with pytest.raises(ValueError, match=message):
        add(two_squares(tmp_path), image_id, instances_of(masks, [label], [0.5]))


def test_ground_truth_with_other_categories_is_refused(tmp_path):
    content, _ = random_world(0)
    content["annotations"][0]["category_id"] = 3
    with pytest.raises(ValueError, match=r"instances\.json.*category_id 3 .*: 1 instances"):
        evaluator_for(tmp_path, content)


def test_a_file_that_is_not_instance_ground_truth_is_refused(tmp_path):
    path = tmp_path / "instances.json"
    with pytest.raises(FileNotFoundError, match=r"instances\.json does not exist"):
        InstanceTruth.read(path, [])
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        InstanceTruth.read(path, [])
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"instances\.json has no list 'annotations'"):
        InstanceTruth.read(path, [])


def test_masks_survive_encoding_and_equal_ones_are_encoded_once(monkeypatch):
    rng = np.random.default_rng(0)
    masks = torch.as_tensor(rng.random((5, 13, 9)) < 0.4)[[0, 1, 0, 2, 3, 4, 2]]
    known = {}
    codes = encode_masks(masks, known)
    assert len(codes) == 7 and len(known) == 5 and codes[0] is codes[2]
    for mask, code in zip(masks.numpy(), codes):
        np.testing.assert_array_equal(decode(code), mask)
    monkeypatch.delattr(pycocotools.mask, "encode")
    assert encode_masks(masks.flip(0), known) == codes[::-1]


def test_no_masks_give_no_codes():
    assert encode_masks(torch.zeros(0, 4, 5, dtype=torch.bool)) == []


def test_what_a_file_leaves_out_is_computed_from_the_masks(tmp_path):
    square = [10.0, 10.0, 110.0, 10.0, 110.0, 110.0, 10.0, 110.0]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [square]},
        {"id": 2, "image_id": 1, "category_id": 3, "segmentation": [square], "area": 7, "bbox": [0, 0, 1, 1]},
        {"id": 3, "image_id": 1, "category_id": 3, "segmentation": [[1, 1, 5, 5]]},  # the reader leaves it out too
    ]
    content = {"images": [{"id": 1, "file_name": "1.jpg", "height": 200, "width": 200}], "annotations": annotations}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    truth = InstanceTruth.read(tmp_path / "labels.json", [3, 4])
    assert [(entry["id"], entry["area"], entry["bbox"]) for entry in truth.annotations] == [
        (1, 10_000, [10, 10, 100, 100]),
        (2, 7, [0, 0, 1, 1]),
    ]
    assert truth.categories.keys() == {3, 4}
