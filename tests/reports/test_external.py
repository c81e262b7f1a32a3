"""Predictions of other programs: read in three formats, evaluated as a model is, and refused where they are wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcclip.data import get_dataset, read_label_map
from fcclip.reports import LabelSource, PanopticSource, ResultsSource, SavedSource, evaluate_predictions
from tests.data.published_trees import write_tree
from tests.evaluation import tiny_world


@pytest.fixture(scope="module")
def model_results(folder, tmp_path_factory):
    """(results of the runner, folder of its files)."""
    output = tmp_path_factory.mktemp("output")
    options = {"modes": None, "training_vocabulary": None, "output_dir": output, "save_predictions": True}
    return tiny_world.run(folder, **options)["ensemble"], output / "tiny_val"


@pytest.fixture
def files(model_results, tmp_path):
    """A copy of those files, to be spoilt."""
    shutil.copytree(model_results[1], tmp_path / "files")
    return tmp_path / "files"


def panoptic(files, folder):
    return PanopticSource(files / "predictions.json", dataset=tiny_world.dataset(folder))


def instances(files, folder):
    dataset = tiny_world.dataset(folder)
    return ResultsSource(files / "coco_instances_results.json", dataset=dataset, records=dataset.records())


def labels(files, folder, **options):
    dataset = tiny_world.dataset(folder)
    return LabelSource(files / "predictions" / "semantic", dataset=dataset, records=dataset.records(), **options)


def evaluate(folder, *sources, **options):
    return evaluate_predictions(tiny_world.dataset(folder), sources, **options)


def edit(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def test_every_format_gives_the_numbers_of_the_model(folder, files, model_results):
    results, _ = model_results
    metrics = evaluate(folder, panoptic(files, folder), instances(files, folder), labels(files, folder))
    assert repr({task: metrics[task] for task in results}) == repr(results)
    assert repr(evaluate(folder, SavedSource(files, dataset=tiny_world.dataset(folder)))) == repr(results)


def test_one_format_alone_gives_its_tasks(folder, files):
    assert evaluate(folder, panoptic(files, folder)).keys() == {"panoptic_seg"}
    assert evaluate(folder, instances(files, folder)).keys() == {"bbox", "segm"}
    assert evaluate(folder, labels(files, folder)).keys() == {"sem_seg"}


def test_masks_without_boxes_get_theirs(folder, files, model_results):
    edit(files / "coco_instances_results.json", lambda rows: [row.pop("bbox") for row in rows] and None)
    assert repr(evaluate(folder, instances(files, folder))["segm"]) == repr(model_results[0]["segm"])


def test_label_maps_may_have_the_ids_of_the_data_set(folder, files, model_results):
    ids = np.array([entry.id for entry in tiny_world.VOCABULARY.classes], np.uint8)
    for path in (files / "predictions" / "semantic").glob("*.png"):
        Image.fromarray(ids[read_label_map(path)]).save(path.with_name(f"{path.stem}_pred.png"))
        path.unlink()
    metrics = evaluate(folder, labels(files, folder, own_ids=True, suffix="_pred"))
    assert repr(metrics["sem_seg"]) == repr(model_results[0]["sem_seg"])


def test_pixels_without_a_prediction_are_missed_and_nothing_else_is_blamed(folder, tmp_path):
    dataset = tiny_world.dataset(folder)
    for record in dataset.records():
        labels = read_label_map(record["sem_seg_file_name"])  # whose void is 255
        labels[:20] = 255
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / f"{Path(record['file_name']).stem}.png")
    metrics = evaluate(folder, LabelSource(tmp_path, dataset=dataset, records=dataset.records()))["sem_seg"]
    pixels = {name: [0, 0] for name in tiny_world.VOCABULARY.class_names}
    for record in dataset.records():
        truth = read_label_map(record["sem_seg_file_name"])
        for index, name in enumerate(pixels):
            pixels[name][0] += int((truth[20:] == index).sum())
            pixels[name][1] += int((truth == index).sum())
    assert {name: metrics[f"IoU-{name}"] for name in pixels} == pytest.approx(
        {name: 100 * hits / every for name, (hits, every) in pixels.items()}
    )


def test_a_value_that_is_no_class_is_refused(folder, files):
    Image.fromarray(np.full((40, 60), 4, np.uint8)).save(files / "predictions" / "semantic" / "0.png")
    expected = r"semantic/0\.png: the values 4 are not classes of 'tiny_val' \(4 classes, 0\.\.3; 255 means no class\)"
    with pytest.raises(ValueError, match=expected):
        evaluate(folder, labels(files, folder))


def without(rows):
    return [row for row in rows if row["image_id"] not in (4, 10)]


def test_images_without_a_prediction_are_named(folder, files):
    edit(files / "predictions.json", lambda content: content | {"annotations": without(content["annotations"])})
    for number in (1, 3):
        (files / "predictions" / "semantic" / f"{number}.png").unlink()
    for source, output in ((panoptic(files, folder), "panoptic_seg"), (labels(files, folder), "sem_seg")):
        with pytest.raises(
            ValueError, match=f"2 of 7 images of 'tiny_val' have no {output} prediction: image_id 4, 10"
        ):
            evaluate(folder, source)


def test_an_image_without_a_row_has_no_instances(folder, files, model_results):
    edit(files / "coco_instances_results.json", without)
    assert 0 < evaluate(folder, instances(files, folder))["segm"]["AP"] < model_results[0]["segm"]["AP"]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [40, 60], "counts": [100, 50]}, "runs of 150 pixels"),
        ({"size": [39, 60], "counts": [2340]}, "39 x 60 .* 40 x 60"),
        ({"size": [40, 60]}, "'counts'"),
        (7, "int"),
    ],
)
def test_a_mask_that_cannot_be_read_is_refused(folder, files, segmentation, message):
    edit(files / "coco_instances_results.json", lambda rows: rows[0].update(segmentation=segmentation))
    with pytest.raises(ValueError, match=rf"row 0 \(image 1\): .*{message}"):
        evaluate(folder, instances(files, folder))


def test_two_predictions_for_an_image_are_refused(folder, files):
    semantic = files / "predictions" / "semantic"
    edit(files / "predictions.json", lambda content: content["annotations"].append(content["annotations"][2]))
    with pytest.raises(ValueError, match=r"predictions\.json: image 7 has two predictions"):
        panoptic(files, folder)
    shutil.copy(semantic / "2.png", semantic / "2.tif")
    with pytest.raises(ValueError, match=r"two label maps for image 7: .*2\.png and .*2\.tif"):
        labels(files, folder)


def test_predictions_for_unknown_images_are_refused(folder, files):
    semantic = files / "predictions" / "semantic"
    edit(files / "predictions.json", lambda content: content["annotations"][0].update(image_id="1"))
    with pytest.raises(ValueError, match=r"1 predictions are for images .* does not have: image_id '1'\. .*string '7'"):
        evaluate(folder, panoptic(files, folder))
    edit(files / "coco_instances_results.json", lambda rows: rows[0].update(image_id=99))
    with pytest.raises(ValueError, match=r"images that 'tiny_val' does not have: image_id 99\.$"):
        evaluate(folder, instances(files, folder))
    (semantic / "._0.png").write_bytes(b"hidden")
    shutil.copy(semantic / "0.png", semantic / "zero.png")
    with pytest.raises(ValueError, match=r"1 files belong to no image of 'tiny_val': zero\.png; expected names like"):
        labels(files, folder)


def test_categories_that_the_data_set_does_not_have_are_refused(folder, files):
    change = lambda content: content["annotations"][1]["segments_info"][0].update(category_id=3)  # noqa: E731
    edit(files / "predictions.json", change)
    with pytest.raises(ValueError, match=r"image 4: category 3 is not one of 'tiny_val' \(4 ids, 2\.\.9\)"):
        panoptic(files, folder)
    edit(files / "coco_instances_results.json", lambda rows: rows[3].update(category_id=9))  # stuff
    with pytest.raises(ValueError, match=r"row 3 \(image \d+\): category 9 is not one of 'tiny_val' \(2 ids, 4\.\.5\)"):
        instances(files, folder)


@pytest.mark.parametrize("name", ["predictions.json", "coco_instances_results.json"])
def test_half_a_json_is_refused(folder, files, name):
    path = files / name
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{name}' is not JSON: .* line 1 column"):
        panoptic(files, folder) if name == "predictions.json" else instances(files, folder)


def test_wrong_sizes_name_the_image(folder, files):
    for path in (files / "predictions" / "1.png", files / "predictions" / "semantic" / "1.png"):
        ground_truth = Image.open(path)
        ground_truth.crop((0, 0, 60, 39)).save(path)
    with pytest.raises(ValueError, match=r"image 4.*the prediction is 39 x 60 \(height x width\)"):
        evaluate(folder, panoptic(files, folder))
    with pytest.raises(ValueError, match=r"semantic/1\.png: the prediction has shape \(39, 60\)"):
        evaluate(folder, labels(files, folder))


def test_files_in_another_format_are_refused(folder, files):
    (files / "coco_instances_results.json").write_text('{"annotations": []}')
    with pytest.raises(ValueError, match="is not a list of instances"):
        instances(files, folder)
    (files / "coco_instances_results.json").write_text('[{"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 4}]')
    with pytest.raises(ValueError, match="row 0 has no 'score'"):
        instances(files, folder)
    for text, message in (
        ("[]", "has no 'annotations'"),
        ('{"annotations": [{"image_id": 1}]}', "annotation 0 has no file_name, segments_info"),
    ):
        (files / "predictions.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            panoptic(files, folder)


def test_predictions_that_the_data_set_is_not_evaluated_for_are_refused(folder, files, tmp_path):
    write_tree("openvocab_pascal20_sem_seg_val", tmp_path)
    pascal = get_dataset("openvocab_pascal20_sem_seg_val", tmp_path)
    with pytest.raises(ValueError, match=r"pascal20_sem_seg_val' is evaluated for semantic; .* panoptic"):
        evaluate_predictions(pascal, [panoptic(files, folder)])
    with pytest.raises(ValueError, match="are of data set 'tiny_val', not of 'openvocab_pascal20_sem_seg_val'"):
        SavedSource(files, dataset=pascal)
    with pytest.raises(ValueError, match="two sources give 'panoptic_seg'"):
        evaluate(folder, panoptic(files, folder), panoptic(files, folder))
