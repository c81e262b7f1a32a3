import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fcclip
from fcclip.data import Dataset, build_test_loader, read_id_map
from fcclip.data.datasets.metadata import class_metadata
from fcclip.evaluation import GroundTruth, SemanticEvaluator, build_evaluators, evaluators, meter, runner
from fcclip.evaluation.runner import evaluate_augmented
from fcclip.modeling import Ensemble, architecture, text
from fcclip.modeling.augmentation import build_augmented
from fcclip.reports import PanopticSource, evaluate_predictions
from fcclip.vocabulary import Vocabulary
from tests.evaluation import tiny_world

PROGRAM = Path(__file__).with_name("tiny_world.py")


@pytest.fixture(scope="module")
def two_processes(folder, tmp_path_factory):
    """Path stem of the files that two processes wrote, which evaluated the images and then a broken copy of them."""
    broken, output = tmp_path_factory.mktemp("broken_world"), tmp_path_factory.mktemp("two") / "process"
    tiny_world.write(broken)
    Image.fromarray(np.full((40, 60), 77, np.uint8)).save(broken / "semantic" / "6.png")  # in the share of the second
    environment = os.environ | {"PYTHONPATH": str(Path(fcclip.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, folder, broken, str(rank), "2", output],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return str(output)


def panoptic_metrics(folder, predictions):
    """What another program makes of the JSON and its PNGs."""
    dataset = tiny_world.dataset(folder)
    source = PanopticSource(predictions, predictions.with_suffix(""), dataset=dataset)
    return evaluate_predictions(dataset, [source])["panoptic_seg"]


def test_two_processes_give_exactly_the_numbers_of_one(folder, two_processes):
    (first, _), (second, _) = (json.loads(Path(f"{two_processes}.{rank}").read_text()) for rank in range(2))
    alone = tiny_world.run(folder)
    assert first == repr(alone)
    assert second == "{}"
    for mode, tasks in alone.items():  # each process wrote the PNGs of its share, the first all JSON
        predictions = Path(f"{two_processes}.files/tiny_val/{mode}/predictions.json")
        metrics = panoptic_metrics(folder, predictions)
        assert metrics == {name: tasks["panoptic_seg"][name] for name in metrics}  # all but those of seen classes


def test_a_process_that_fails_stops_the_others(two_processes):
    (_, first), (_, second) = (json.loads(Path(f"{two_processes}.{rank}").read_text()) for rank in range(2))
    assert first.startswith("RuntimeError: evaluation stopped because process 1 failed: InputError")
    assert second.startswith("InputError") and "semantic/6.png: ground-truth class 77" in second


def test_every_mode_gets_every_task_from_one_pass(folder):
    cfg = tiny_world.config()
    model = tiny_world.GreyModel().train()
    results = tiny_world.evaluate(
        model,
        cfg,
        tiny_world.dataset(folder),
        modes=tiny_world.MODES,
        training_vocabulary=tiny_world.TRAINING,
        vocabulary=tiny_world.VOCABULARY,
        progress=False,
    )
    assert model.calls == tiny_world.NUM_IMAGES and model.training
    assert list(results) == ["ensemble", "in_vocabulary", "out_of_vocabulary"]
    for tasks in results.values():
        assert tasks.keys() == {"panoptic_seg", "segm", "bbox", "sem_seg"}
        groups = ("PQ", "SQ", "RQ")
        wanted = {key + suffix for key in groups for suffix in ("", "_th", "_st", "_seen", "_unseen")}
        assert wanted | {"PQ-cup", "PQ-sand", "PQ-ball", "PQ-sea"} == tasks["panoptic_seg"].keys()
        areas = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP_seen", "AP_unseen", "AP-cup", "AP-ball"}
        assert tasks["segm"].keys() == tasks["bbox"].keys() == areas
        assert {"mIoU", "mIoU_union", "fwIoU", "mACC", "pACC", "mIoU_seen", "IoU-sea"} <= tasks["sem_seg"].keys()
        assert 5 < tasks["sem_seg"]["mIoU"] < 100 and 0 < tasks["panoptic_seg"]["PQ"] < 100
    quality = results["in_vocabulary"]["panoptic_seg"]
    assert quality["PQ_seen"] == pytest.approx((quality["PQ-cup"] + quality["PQ-sea"]) / 2)
    assert quality["PQ"] > results["out_of_vocabulary"]["panoptic_seg"]["PQ"]


def test_without_modes_the_config_names_the_only_one(folder):
    results = tiny_world.run(folder, modes=None, training_vocabulary=None)
    assert list(results) == ["ensemble"]
    assert "PQ_seen" not in results["ensemble"]["panoptic_seg"]


class SizeSensitiveModel(tiny_world.GreyModel):
    """Sees the padding of a batch, as a network does."""

    def score(self, inputs, vocabulary=None):
        padded = [max(-(-sample["image"].shape[side] // 32) for sample in inputs) for side in (1, 2)]
        shift = 10 * (3 * padded[0] + padded[1])
        return super().score([{**sample, "image": sample["image"].int() + shift} for sample in inputs], vocabulary)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_only_images_of_equal_padded_size_share_a_batch_so_that_the_batch_size_changes_nothing(tmp_path, batch_size):
    tiny_world.write(tmp_path, sizes=[(40, 60), (40, 80), (60, 40), (80, 40)])
    cfg, results, calls = tiny_world.config(), [], []
    for cfg.TEST.BATCH_SIZE in (1, batch_size):
        model = SizeSensitiveModel()
        options = {"modes": tiny_world.MODES, "vocabulary": tiny_world.VOCABULARY, "progress": False}
        results.append(tiny_world.evaluate(model, cfg, tiny_world.dataset(tmp_path), **options))
        calls.append(model.calls)
    assert repr(results[0]) == repr(results[1])
    assert calls == [7, {2: 4, 100: 3}[batch_size]]  # 4 images padded to 64 x 64, 2 to 64 x 96, 1 to 96 x 64
    assert repr(results[0]) != repr(tiny_world.run(tmp_path, training_vocabulary=None))


def test_the_batch_size_changes_nothing_for_a_network_either(tmp_path, tiny_cfg, tiny_model):
    tiny_world.write(tmp_path, sizes=[(40, 60), (60, 40), (50, 90)])
    results = []
    tiny_cfg.INPUT.MIN_SIZE_TEST = 0
    for tiny_cfg.TEST.BATCH_SIZE in (1, 3):
        options = {"vocabulary": tiny_world.VOCABULARY, "progress": False}
        found = tiny_world.evaluate(tiny_model(cfg=tiny_cfg), tiny_cfg, tiny_world.dataset(tmp_path), **options)
        results.append(found["ensemble"])
    for task in ("panoptic_seg", "segm", "sem_seg"):
        assert results[0][task] == pytest.approx(results[1][task], abs=0.5, nan_ok=True)


TRAINING_WORDS = "cup; sea:stuff; car; person; train"


@pytest.fixture
def two_sets(folder):
    """The images with four classes, and for classes alone with the twenty of a vocabulary that comes with us."""
    first = tiny_world.dataset(folder)
    metadata = class_metadata(Vocabulary.builtin("pascal_voc_20"))
    second = Dataset(
        "tiny_twenty", {**metadata, "evaluator_type": "sem_seg", "ignore_label": 255}, first.load, "pascal_voc_20"
    )
    return first, second


def evaluate_both(model, cfg, sets, order, function=runner.evaluate):
    """Name -> results, in this order; only the first set is given its words."""
    training = Vocabulary.from_names(TRAINING_WORDS)
    words = {"tiny_val": tiny_world.VOCABULARY, "tiny_twenty": None}
    named = {dataset.name: dataset for dataset in sets}
    return {
        name: function(
            model, cfg, named[name], modes=tiny_world.MODES, training_vocabulary=training, vocabulary=words[name],
            progress=False,
        )
        for name in order
    }  # fmt: skip


@pytest.mark.parametrize("function", [runner.evaluate, evaluate_augmented])
def test_each_data_set_is_evaluated_with_its_own_words_whatever_came_before(
    two_sets, tiny_cfg, tiny_model, monkeypatch, function
):
    tiny_cfg.TEST.AUG.MIN_SIZES = (48,)
    encoded, encode = [], text.encode_class_names
    monkeypatch.setattr(
        text,
        "encode_class_names",
        lambda clip, words, templates: encoded.append(list(words)) or encode(clip, words, templates),
    )

    def fresh_model():
        model = tiny_model(words="none; of; these", train_words=TRAINING_WORDS)
        model.text_encoder.cache_dir = None
        return model

    alone = {}
    for dataset in two_sets:
        alone |= evaluate_both(fresh_model(), tiny_cfg, two_sets, [dataset.name], function)
    encoded.clear()
    model = fresh_model()
    for order in (("tiny_val", "tiny_twenty"), ("tiny_twenty", "tiny_val")):
        together = evaluate_both(model, tiny_cfg, two_sets, order, function)
        assert all(repr(together[name]) == repr(alone[name]) for name in order)
        model.test_vocabulary = Vocabulary.from_names("a; b; c; d; e; f; g")
    num_words = sum(map(len, Vocabulary.builtin("pascal_voc_20").synonyms))
    assert sorted(len(words) for words in encoded) == [4, num_words]  # once each

    task = "sem_seg" if function is runner.evaluate else "sem_seg_TTA"
    metrics = alone["tiny_val"]["ensemble"][task]
    assert metrics["mIoU_seen"] == pytest.approx((metrics["IoU-cup"] + metrics["IoU-sea"]) / 2)
    assert metrics["mIoU_unseen"] == pytest.approx((metrics["IoU-sand"] + metrics["IoU-ball"]) / 2)
    assert sum(name.startswith("IoU-") for name in alone["tiny_twenty"]["ensemble"][task]) == 20


def test_seen_classes_are_those_of_each_set_when_the_network_joins_its_classifiers(
    two_sets, tiny_cfg, tiny_model, monkeypatch
):
    masks, joined = [], architecture.geometric_ensemble
    monkeypatch.setattr(
        architecture,
        "geometric_ensemble",
        lambda a, b, seen, **c: masks.append(seen.tolist()) or joined(a, b, seen, **c),
    )
    evaluate_both(tiny_model(train_words=TRAINING_WORDS), tiny_cfg, two_sets, ["tiny_val", "tiny_twenty"])
    per_set = len(masks) // 2
    assert all(mask == [True, False, False, True] for mask in masks[:per_set])  # cup and sea
    names = Vocabulary.builtin("pascal_voc_20").class_names
    assert all(mask == [name in ("car", "person", "train") for name in names] for mask in masks[per_set:])


def test_augmented_evaluation_scores_the_mean_maps_under_a_name_of_its_own(
    folder, tiny_cfg, tiny_model, tmp_path, caplog
):
    tiny_cfg.TEST.AUG.MIN_SIZES = (48, 64)
    model, dataset = tiny_model().train(), tiny_world.dataset(folder, json_file=None)  # AP would need the file
    options = {"modes": tiny_world.MODES, "vocabulary": tiny_world.VOCABULARY, "progress": False}
    with caplog.at_level(logging.INFO, logger="fcclip"):
        found = evaluate_augmented(
            model, tiny_cfg, dataset, training_vocabulary=tiny_world.TRAINING, output_dir=tmp_path, **options
        )
    assert "each image of tiny_val in 4 variants, shorter side 48, 64, each mirrored too" in caplog.text
    assert model.training and tiny_cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON
    assert list(found) == list(tiny_world.MODES)
    assert all(tasks.keys() == {"sem_seg_TTA"} for tasks in found.values())
    assert {"mIoU", "mIoU_seen", "mIoU_unseen", "pACC", "IoU-cup"} <= found["ensemble"]["sem_seg_TTA"].keys()
    assert (tmp_path / "tiny_val").is_dir() and not list(tmp_path.rglob("*.*"))

    augmented = build_augmented(tiny_cfg, model.eval())
    evaluator = SemanticEvaluator(class_names=tiny_world.VOCABULARY.class_names)
    records = {record["image_id"]: record for record in dataset.records()}
    for [sample] in build_test_loader(tiny_cfg, dataset):
        assert sample["image"].shape[-2:] != (tiny_world.HEIGHT, tiny_world.WIDTH)  # variants of the resized image
        [scored] = augmented.score([sample], tiny_world.VOCABULARY)
        output = augmented.outputs(scored, ensemble=(0.0, 0.0), semantic="labels")
        evaluator.process(GroundTruth(records[sample["image_id"]]), output)
    expected = evaluator.results()["sem_seg"]
    metrics = found["in_vocabulary"]["sem_seg_TTA"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    plain = runner.evaluate(model, tiny_cfg, tiny_world.dataset(folder), **options)
    assert plain["in_vocabulary"]["sem_seg"]["pACC"] != metrics["pACC"]

    tiny_cfg.TEST.BATCH_SIZE = 3
    batched = evaluate_augmented(model, tiny_cfg, dataset, **options)["in_vocabulary"]["sem_seg_TTA"]
    assert {name: metrics[name] for name in batched} == pytest.approx(batched, abs=0.1, nan_ok=True)


def test_augmented_evaluation_without_semantic_maps_is_refused(folder, tiny_cfg, tiny_model):
    tiny_cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    with pytest.raises(ValueError, match=r"TEST\.AUG\.ENABLED .*SEMANTIC_ON is False"):
        evaluate_augmented(tiny_model(cfg=tiny_cfg), tiny_cfg, tiny_world.dataset(folder))


def test_files_of_several_modes_lie_apart(folder, tmp_path):
    tiny_world.run(folder, output_dir=tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        f"tiny_val/{mode}/coco_instances_results.json" for mode in sorted(tiny_world.MODES)
    ]


def test_saved_predictions_hold_the_ids_of_the_data_set(folder, tmp_path):
    results = tiny_world.run(folder, modes=None, training_vocabulary=None, output_dir=tmp_path, save_predictions=True)
    saved = json.loads((tmp_path / "tiny_val" / "predictions.json").read_text())
    assert saved["categories"] == json.loads((folder / "panoptic.json").read_text())["categories"]
    first = saved["annotations"][0]
    ids = np.unique(read_id_map(tmp_path / "tiny_val" / "predictions" / first["file_name"]))
    assert ids.tolist() == [segment["id"] for segment in first["segments_info"]]
    assert {segment["category_id"] for segment in first["segments_info"]} <= {2, 4, 5, 9}
    assert "isthing" not in first["segments_info"][0]
    assert panoptic_metrics(folder, tmp_path / "tiny_val" / "predictions.json") == results["ensemble"]["panoptic_seg"]


def test_only_the_first_images_are_evaluated_when_asked(folder, tmp_path):
    tiny_world.run(folder, modes=None, max_images=2, output_dir=tmp_path, save_predictions=True)
    saved = json.loads((tmp_path / "tiny_val" / "predictions.json").read_text())
    assert [annotation["image_id"] for annotation in saved["annotations"]] == [1, 4]


def test_progress_tells_the_speed_and_where_the_time_goes(folder, caplog):
    with caplog.at_level(logging.INFO, logger="fcclip"):
        tiny_world.run(folder, progress=True)
    (line,) = [record.getMessage() for record in caplog.records if "tiny_val" in record.getMessage()]
    assert "evaluated tiny_val: 7 images in" in line
    for part in ("images/s", "data", "network", "evaluation"):
        assert part in line


def test_lines_tell_the_progress_where_there_is_no_terminal(folder, caplog, monkeypatch):
    monkeypatch.setattr(meter, "_LINE_SECONDS", 0)
    with caplog.at_level(logging.INFO, logger="fcclip"):
        tiny_world.run(folder, progress=True)
    assert "evaluate tiny_val: 3/7 images, " in caplog.text


def test_a_bar_tells_the_progress_on_a_terminal(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    tiny_world.run(folder, progress=True)
    assert all(part in terminal.getvalue() for part in ("evaluate tiny_val", "7/7", "images/s"))


def test_things_are_those_of_the_data_set(folder):
    unmarked = Vocabulary.from_names([entry.name for entry in tiny_world.VOCABULARY.classes])  # all things
    assert repr(tiny_world.run(folder, vocabulary=unmarked)) == repr(tiny_world.run(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": Vocabulary.from_names("cup; sand")}, "has 2 classes, 'tiny_val' has 4; .* in the order"),
        ({"max_images": 0}, "'tiny_val' has no images to evaluate"),
        ({"save_predictions": True}, "save_predictions needs output_dir"),
    ],
)
def test_a_call_that_cannot_work_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_world.run(folder, **options)


def test_a_kind_of_data_set_that_has_no_evaluators_is_named(folder):
    dataset = tiny_world.dataset(folder, evaluator_type="cityscapes_instance")
    with pytest.raises(ValueError, match=r"unknown evaluator type 'cityscapes_instance'.* Known: .*coco_panoptic"):
        build_evaluators(tiny_world.config(), dataset, modes=["ensemble"])


def test_only_heads_that_are_on_are_evaluated(folder):
    cfg = tiny_world.config()
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    dataset = tiny_world.dataset(folder, json_file=None)
    built = build_evaluators(cfg, dataset, modes=["ensemble"])
    assert [type(evaluator).__name__ for evaluator in built["ensemble"]] == ["SemanticEvaluator"]
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    with pytest.raises(ValueError, match=r"nothing to evaluate on data set 'tiny_val' .*PANOPTIC_ON"):
        build_evaluators(cfg, dataset, modes=["ensemble"])


def test_masks_that_every_mode_calls_void_are_spared_for_panoptic_maps_alone(folder, tiny_cfg, tiny_model, monkeypatch):
    model, limits = tiny_model(cfg=tiny_cfg), []
    score = model.score
    monkeypatch.setattr(
        model,
        "score",
        lambda *inputs, void_limit=1.0: limits.append(void_limit) or score(*inputs, void_limit=void_limit),
    )
    options = {"vocabulary": tiny_world.VOCABULARY, "progress": False, "max_images": 1}
    for modes in ({"a": (0.4, 0.8)}, {"a": None, "b": Ensemble(0.4, 0.8, trust=0.2)}):
        tiny_world.evaluate(model, tiny_cfg, tiny_world.dataset(folder), modes=modes, **options)
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.SEMANTIC_ON = test.INSTANCE_ON = False
    for modes in ({"a": (0.4, 0.8)}, {"a": None, "b": Ensemble(0.4, 0.8, trust=0.2)}):
        tiny_world.evaluate(model, tiny_cfg, tiny_world.dataset(folder), modes=modes, **options)
    assert limits == [1, 1, 0.501, 0.501 / 0.8]


def test_a_data_set_without_instances_file_is_refused_for_ap(folder):
    dataset = tiny_world.dataset(folder, json_file=None, evaluator_type="mapillary_vistas_panoptic_seg")
    with pytest.raises(ValueError, match=r"'tiny_val' has no instances file.*INSTANCE_ON False"):
        build_evaluators(tiny_world.config(), dataset, modes=["ensemble"])


def test_classes_of_one_name_have_metrics_of_their_own():
    names = evaluators.distinct_names(Vocabulary.builtin("ade20k_847").class_names)
    assert len(set(names)) == 847
    assert [name for name in names if name.startswith("bag [")] and "wall" in names
