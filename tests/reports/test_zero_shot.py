"""The table of the model zoo: settings, comparison and text."""

import json
import math
from dataclasses import replace

import pytest
import torch

from fcclip.config import configs_dir, load_config
from fcclip.data import DATASETS, dataset_vocabulary, get_dataset
from fcclip.modeling import build_model
from fcclip.reports import Outcome, Plan, Report, backbone_of_weights, plan_sets, published_results
from fcclip.reports.zero_shot import backbone_of, cells_of, default_sets, differences, logged_figures, set_config
from tests.data.published_trees import write_tree

FOLDER = "coco/panoptic-segmentation/fcclip"
BENCHMARKS = published_results()["benchmarks"]
ADE20K = "openvocab_ade20k_panoptic_val"


@pytest.fixture
def cfg():
    return load_config(f"{FOLDER}/fcclip_convnext_large_eval_ade20k.yaml")


class PublishedVocabulary:
    """All that the comparison asks of a vocabulary."""

    is_published = True


BDD = [configs_dir() / f"coco/frozenseg/convnext_large_eval_bdd_{kind}.yaml" for kind in ("panop", "sem")]


@pytest.mark.parametrize("path", [*sorted((configs_dir() / FOLDER).glob("*.yaml")), *BDD], ids=lambda path: path.stem)
def test_settings_of_each_data_set_are_those_of_its_published_config(path, cfg):
    published = load_config(path)
    (name,) = published.DATASETS.TEST
    ours = set_config(load_config(path.with_name(base_of(path))), get_dataset(name)).clone()
    ours.defrost()
    ours.DATASETS.TEST = published.DATASETS.TEST
    assert ours == published


def base_of(path):
    stem, _, backbone = path.stem.rpartition("_")
    return path.name if backbone.startswith("r") else f"{stem.partition('_eval')[0]}_eval_ade20k.yaml"


def test_there_is_a_published_config_for_every_benchmark(cfg):
    paths = [*(configs_dir() / FOLDER).glob("*.yaml"), *BDD]
    tested = {name for path in paths for name in load_config(path).DATASETS.TEST}
    assert tested == {benchmark["data_set"] for benchmark in BENCHMARKS} and tested <= DATASETS.keys()
    assert default_sets(cfg) == [benchmark["data_set"] for benchmark in BENCHMARKS]


def test_settings_that_the_user_gave_stay():
    cfg = load_config(f"{FOLDER}/fcclip_convnext_large_eval_ade20k.yaml", ["INPUT.MIN_SIZE_TEST", "64"])
    ours = set_config(cfg, get_dataset("openvocab_cityscapes_fine_panoptic_val"), given=["INPUT.MIN_SIZE_TEST"])
    assert (ours.INPUT.MIN_SIZE_TEST, ours.INPUT.MAX_SIZE_TEST) == (64, 2560)


def test_outputs_without_ground_truth_are_not_computed(cfg):
    test = set_config(cfg, get_dataset("openvocab_ade20k_sem_seg_val")).MODEL.MASK_FORMER.TEST
    assert (test.SEMANTIC_ON, test.INSTANCE_ON, test.PANOPTIC_ON) == (True, False, False)
    test = set_config(cfg, get_dataset("openvocab_lvis_v1_val")).MODEL.MASK_FORMER.TEST
    assert (test.SEMANTIC_ON, test.INSTANCE_ON, test.PANOPTIC_ON) == (False, True, False)


def test_published_figures_are_complete_and_agree_with_the_log():
    for backbone in published_results()["backbones"]:
        for benchmark in BENCHMARKS:
            table = backbone["table"].get(benchmark["data_set"], {})
            is_of_fcclip = "architecture" not in backbone and not benchmark["data_set"].startswith("bdd")
            assert not is_of_fcclip or table.keys() == benchmark["columns"].keys()
            for column, rounded in table.items():
                place = benchmark["columns"][column]
                logged = backbone["log"].get(benchmark["data_set"], {}).get(place["task"], {}).get(place["metric"])
                assert logged is None or abs(logged - rounded) <= 0.05 + 1e-9, (backbone["name"], benchmark["data_set"])
                assert 0 < rounded < 100
    large = published_results()["backbones"][-1]
    assert large["log"].keys() == {benchmark["data_set"] for benchmark in BENCHMARKS[:9]}
    assert sum(len(benchmark["columns"]) for benchmark in BENCHMARKS) == 18


@pytest.mark.parametrize("backbone", published_results()["backbones"], ids=lambda backbone: backbone["name"])
def test_a_backbone_is_told_by_its_config_and_by_the_shapes_of_its_weights(backbone):
    cfg = load_config(backbone["config"])
    assert backbone_of(cfg)["name"] == backbone["name"]
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS, cfg.MODEL.SAM_WEIGHTS, cfg.MODEL.DEVICE = "", "", "meta"
    cfg.MODEL.FC_CLIP.QUICK_GELU = "on" if backbone["clip"].startswith("RN") else "auto"
    with torch.device("meta"):
        model = build_model(cfg)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert backbone_of_weights(shapes)["name"] == backbone["name"]
    assert backbone_of_weights({**shapes, "void_embedding.weight": (1, 16)}) is None


def plan_of(name, root, cfg):
    dataset = get_dataset(name, root)
    return Plan(dataset, set_config(cfg, dataset), 4)


def why(plan, words, training=PublishedVocabulary(), num_images=2000):  # noqa: B008
    return differences(Outcome(plan, words, num_images, {}), training=training)


def test_with_published_words_and_settings_the_figures_can_be_compared(cfg, tmp_path):
    assert why(plan_of(ADE20K, tmp_path, cfg), PublishedVocabulary()) == []


def test_every_reason_against_a_comparison_is_named(cfg, tmp_path):
    ours = dataset_vocabulary(get_dataset(ADE20K, tmp_path), root=tmp_path)
    cfg = load_config(
        f"{FOLDER}/fcclip_convnext_large_eval_ade20k.yaml",
        ["MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_ALPHA", "0.5", "INPUT.MAX_SIZE_TEST", "600", "TEST.MODE", "in_vocabulary"],
    )
    dataset = get_dataset(ADE20K, tmp_path)
    plan = Plan(dataset, set_config(cfg, dataset, given=["INPUT.MAX_SIZE_TEST"]), 4)
    assert why(plan, ours, training=ours, num_images=4) == [
        "vocabulary: fcclip (not the published one)",
        "vocabulary of the training: fcclip (not the published one)",
        "4 images, published 2000",
        "INPUT.MAX_SIZE_TEST 600, published 1333",
        "MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_ALPHA 0.5, published 0.4",
        "TEST.MODE in_vocabulary, published ensemble",
    ]


def test_where_and_how_fast_it_runs_does_not_matter_for_the_comparison(tmp_path):
    keys = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "w.pth", "TEST.BATCH_SIZE", "4", "MODEL.MSDA_ENGINE", "torch"]
    cfg = load_config(f"{FOLDER}/fcclip_convnext_large_eval_ade20k.yaml", keys)
    assert why(plan_of(ADE20K, tmp_path, cfg), PublishedVocabulary()) == []


@pytest.mark.parametrize(
    ("value", "told"), [("auto", []), ("on", []), ("off", ["MODEL.FC_CLIP.QUICK_GELU off, published on"])]
)
def test_openais_activation_may_be_said(tmp_path, value, told):
    keys = ["MODEL.FC_CLIP.QUICK_GELU", value, "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "RN50.pt"]
    cfg = load_config(f"{FOLDER}/fcclip_convnext_large_eval_ade20k_r50.yaml", keys)
    assert why(plan_of(ADE20K, tmp_path, cfg), PublishedVocabulary()) == told


def logged_results(shift=0.0):
    """Data set -> mode -> results: those of the log, all moved by so many points."""
    log = published_results()["backbones"][-1]["log"]
    return {
        name: {
            "ensemble": {
                task: {key: value + shift for key, value in metrics.items()} for task, metrics in tasks.items()
            }
        }
        for name, tasks in log.items()
    }


def report_of(results, *, reasons=(), backbone=-1):
    backbone = published_results()["backbones"][backbone]
    cells = [
        cell for name, modes in results.items() for cell in cells_of(name, modes, backbone=backbone, reasons=reasons)
    ]
    return Report(cells, dict.fromkeys(results, reasons), {}, {"commit": "abc"}, backbone["name"])


def test_the_published_results_pass_and_others_fail():
    assert report_of(logged_results()).verdict == "pass"
    assert report_of(logged_results(0.19)).verdict == "pass"
    report = report_of(logged_results(-0.25))
    assert report.verdict == "FAIL"
    assert {cell.label for cell in report.cells if cell.verdict == "pass"} == {"A-847", "Cityscapes"}
    assert report_of(logged_results(math.nan)).verdict == "FAIL"


def test_what_cannot_be_compared_neither_passes_nor_fails():
    report = report_of(logged_results(20), reasons=["4 images, published 2000"])
    assert report.verdict == "not comparable"
    assert "not comparable: openvocab_ade20k_panoptic_val: 4 images, published 2000" in report.text()


def test_the_row_is_that_of_the_model_zoo():
    report = report_of({benchmark["data_set"]: logged_results()[benchmark["data_set"]] for benchmark in BENCHMARKS[:9]})
    name, values = report.rows()[0]
    assert name == "here"
    assert " ".join(values) == "26.8 16.8 34.1 44.0 26.8 56.2 18.3 27.8 14.8 58.4 18.2 81.8 95.4 54.4 44.6 63.7"
    columns = [f"{cell.label} {cell.column}" for cell in report.cells]
    assert columns[:3] == ["ADE20K PQ", "ADE20K AP", "ADE20K mIoU"] and columns[-1] == "COCO mIoU"
    assert len(columns) == 16
    text = report.text()
    assert max(map(len, text.splitlines())) <= 100
    assert "16 of 16 comparable figures are those of ConvNeXt-Large within tolerance" in text


def test_a_row_names_what_was_turned_on_beyond_the_published_model():
    results = {name: modes for name, modes in logged_results().items() if "ade20k_panoptic" in name}
    report = replace(report_of(results), options=("void trust 0.5",))
    assert report.rows()[0][0] == "here, void trust 0.5" and report.as_dict()["options"] == ["void trust 0.5"]


@pytest.mark.parametrize("shift", [0.0, -123.4])
def test_text_fits_into_a_hundred_columns(shift):
    report = report_of(
        {benchmark["data_set"]: logged_results(shift)[benchmark["data_set"]] for benchmark in BENCHMARKS[:9]}
    )
    assert max(map(len, report.text().splitlines())) <= 100


def test_results_become_json_and_markdown():
    report = report_of(logged_results(-0.25))
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    first = content["row"][0]
    assert content["verdict"] == "FAIL" and first.keys() >= {"data_set", "column", "published", "tolerance", "verdict"}
    assert f"| {first['data_set']} | panoptic_seg/PQ |" in report.markdown()
    assert "Verdict: **FAIL**" in report.markdown() and "- **commit**: abc" in report.markdown()


def test_every_figure_of_the_log_stands_beside_ours():
    large = published_results()["backbones"][-1]
    city = "openvocab_cityscapes_fine_panoptic_val"
    figures = logged_figures(city, logged_results(0.5)[city]["ensemble"], large)
    assert {figure["metric"] for figure in figures} >= {"PQ", "SQ_st", "IoU", "iIoU_sup", "AP50"}
    assert all(figure["difference"] == pytest.approx(0.5) for figure in figures)
    assert logged_figures(city, {}, published_results()["backbones"][0]) == []
    assert logged_figures("shapes_val", {}, large) == logged_figures(city, {}, None) == []


def test_sets_that_are_missing_are_told_with_their_place_and_keep_their_columns(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_tree("openvocab_pascal20_sem_seg_val", tmp_path)
    plans, missing = plan_sets(cfg)
    assert [plan.dataset.name for plan in plans] == ["openvocab_pascal20_sem_seg_val"]
    assert plans[0].num_images == 4
    assert missing[ADE20K] == str(tmp_path / "ADEChallengeData2016" / "ade20k_panoptic_val.json")
    assert len(missing) == 10
    cells = cells_of(ADE20K, {}, backbone=published_results()["backbones"][0], reasons=["it is missing"])
    assert [(cell.column, cell.verdict) for cell in cells] == [
        ("PQ", "missing"),
        ("AP", "missing"),
        ("mIoU", "missing"),
    ]


def test_a_set_that_is_asked_for_must_be_there_and_whole(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ade20k_panoptic_val.json"):
        plan_sets(cfg, [ADE20K])
    write_tree(ADE20K, tmp_path)
    (tmp_path / "ADEChallengeData2016" / "ade20k_instance_val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"ade20k_instance_val\.json does not exist"):
        plan_sets(cfg)
    with pytest.raises(ValueError, match="'openvocab_pascal20_sem_seg_val' is asked for twice"):
        write_tree("openvocab_pascal20_sem_seg_val", tmp_path)
        plan_sets(cfg, ["openvocab_pascal20_sem_seg_val"] * 2)


def test_sets_without_published_figures_have_a_row_of_their_own():
    results = {"panoptic_seg": {"PQ": 78.41}, "segm": {"AP": 76.0}, "sem_seg": {"mIoU": math.nan}}
    cells = cells_of("shapes_val", {"ensemble": results, "in_vocabulary": results}, backbone=None, reasons=[])
    report = Report(cells, {"shapes_val": ["nothing was published for this data set"]}, {}, {}, "")
    assert report.rows() == [("ensemble", ["78.4", "76.0", "-"]), ("in vocabulary", ["78.4", "76.0", "-"])]
    assert report.verdict == "not comparable" and "nothing was published" not in report.text()
