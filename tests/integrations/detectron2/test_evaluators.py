"""detectron2's evaluators on the shipped shapes model: fcclip's numbers."""

import math
import sys

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from fcclip.data import get_dataset
from fcclip.evaluation import evaluate
from fcclip.integrations.detectron2 import Checkpointer, InstanceSegEvaluator, Trainer, build_evaluator
from fcclip.modeling import build_model as build_own_model
from fcclip.weights import load_weights
from tests.integrations.detectron2.conftest import ADE20K

pytestmark = pytest.mark.usefixtures("detectron2_knows_fcclip", "shapes")
WEIGHTS = "shapes_fcclip.safetensors"


def same(value, expected, tolerance=1e-11):
    """Equal, or both undefined; sums of 64-bit floats in another order differ by some 1e-14."""
    return (math.isnan(value) and math.isnan(expected)) or value == pytest.approx(expected, abs=tolerance)


@pytest.fixture
def shapes_model(detectron2_cfg, tmp_path):
    """Function (**changes) -> the shipped model as detectron2 builds it, and its config."""

    def build(**changes):
        cfg = detectron2_cfg(tiny=False, OUTPUT_DIR=str(tmp_path), DATALOADER__NUM_WORKERS=0, **changes)
        model = build_model(cfg)
        Checkpointer(model).load(WEIGHTS)
        return model, cfg

    return build


@pytest.fixture
def own_results(both_cfgs):
    """Function (data set) -> fcclip's numbers of the shipped model."""

    def evaluate_own(name):
        _, cfg = both_cfgs(tiny=False, DATALOADER__NUM_WORKERS=0)
        model = build_own_model(cfg)
        load_weights(model, WEIGHTS)
        return evaluate(model, cfg, get_dataset(name), progress=False)["ensemble"]

    return evaluate_own


def test_panoptic_quality_ap_and_miou_are_fcclips(shapes_model, own_results):
    pytest.importorskip("panopticapi", reason="panopticapi is not installed")
    model, cfg = shapes_model(DATASETS__TEST=("shapes_val",))
    results, expected = Trainer.test(cfg, model), own_results("shapes_val")
    assert results["panoptic_seg"]["PQ"] > 30  # nothing agrees about noise
    for task, metrics in (
        ("panoptic_seg", ("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st")),
        ("sem_seg", ("mIoU", "fwIoU", "mACC", "pACC")),
        ("segm", ("AP", "AP50", "AP75", "APs", "APm", "APl")),
        ("bbox", ("AP", "AP50", "AP75", "APs", "APm", "APl")),
    ):
        for metric in metrics:
            assert same(results[task][metric], expected[task][metric]), (task, metric)
    for name in MetadataCatalog.get("shapes_val").stuff_classes:
        assert same(results["sem_seg"][f"IoU-{name}"], expected["sem_seg"][f"IoU-{name}"])
    for name in MetadataCatalog.get("shapes_val").thing_classes:
        assert same(results["segm"][f"AP-{name}"], expected["segm"][f"AP-{name}"])


def test_every_test_set_is_evaluated_with_its_own_vocabulary(shapes_model, own_results):
    semantic = {"MODEL__MASK_FORMER__TEST__PANOPTIC_ON": False, "MODEL__MASK_FORMER__TEST__INSTANCE_ON": False}
    model, cfg = shapes_model(DATASETS__TEST=("shapes_train", "shapes_val"), **semantic)
    vocabulary = model.test_vocabulary
    results = Trainer.test(cfg, model)
    assert list(results) == ["shapes_train", "shapes_val"]
    for name, classes in (("shapes_train", 40), ("shapes_val", 60)):
        assert sum(key.startswith("IoU-") for key in results[name]["sem_seg"]) == classes
        assert results[name]["sem_seg"]["pACC"] > 50
    assert model.test_vocabulary is vocabulary
    assert cfg.DATASETS.TEST == ("shapes_train", "shapes_val")


def test_things_among_stuff_are_evaluated_as_detectron2_does_the_first_classes(shapes_model, monkeypatch, tmp_path):
    model, cfg = shapes_model(DATASETS__TEST=("shapes_val",))
    loader = Trainer.build_test_loader(cfg, "shapes_val")
    usual = inference_on_dataset(model, loader, COCOEvaluator("shapes_val", output_dir=str(tmp_path)))

    metadata, shift = MetadataCatalog.get("shapes_val"), 12  # stuff first, things behind
    names = [*metadata.stuff_classes[48:], *metadata.stuff_classes[:48]]
    things = {key: index + shift for key, index in metadata.thing_dataset_id_to_contiguous_id.items()}
    moved = Metadata(name="moved", stuff_classes=names, json_file=metadata.json_file)
    moved.thing_dataset_id_to_contiguous_id = things
    monkeypatch.setitem(MetadataCatalog.data, "moved", moved)

    class Moved(InstanceSegEvaluator):
        def process(self, inputs, outputs):
            for output in outputs:
                output["instances"].pred_classes = output["instances"].pred_classes + shift
            super().process(inputs, outputs)

    results = inference_on_dataset(model, loader, Moved("moved", output_dir=str(tmp_path)))
    for task in ("bbox", "segm"):
        assert results[task].keys() == usual[task].keys()
        assert all(same(results[task][key], value, 0) for key, value in usual[task].items())


def test_an_instance_of_a_stuff_class_is_refused(tmp_path):
    evaluator = InstanceSegEvaluator("shapes_val", output_dir=str(tmp_path))
    evaluator.reset()
    wrong = Instances((4, 4), pred_classes=torch.tensor([50]), scores=torch.ones(1), pred_boxes=Boxes(torch.ones(1, 4)))
    with pytest.raises(ValueError, match=r"classes \[50\], which are not things of 'shapes_val'"):
        evaluator.process([{"image_id": 1}], [{"instances": wrong}])


# ---- which evaluators ----


def kinds(evaluator):
    parts = evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]
    return [type(part).__name__ for part in parts]


@pytest.fixture
def kind_of(monkeypatch):
    """Function (evaluator type, **metadata) -> the name of a data set like shapes_val, of that type."""

    def name_of(kind, **changes):
        content = {**MetadataCatalog.get("shapes_val").as_dict(), "name": "other", "evaluator_type": kind, **changes}
        monkeypatch.setitem(MetadataCatalog.data, "other", Metadata(**content))
        monkeypatch.setattr("detectron2.data.DatasetCatalog.get", lambda name: [])
        return "other"

    return name_of


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("coco_panoptic_seg", ["COCOPanopticEvaluator", "InstanceSegEvaluator", "SemSegEvaluator"]),
        ("ade20k_panoptic_seg", ["COCOPanopticEvaluator", "InstanceSegEvaluator", "SemSegEvaluator"]),
        ("mapillary_vistas_panoptic_seg", ["COCOPanopticEvaluator", "InstanceSegEvaluator", "SemSegEvaluator"]),
        ("sem_seg", ["SemSegEvaluator"]),
        ("coco", ["InstanceSegEvaluator"]),
    ],
)
def test_every_kind_of_data_set_has_its_published_evaluators(detectron2_cfg, kind_of, kind, expected):
    pytest.importorskip("panopticapi", reason="panopticapi is not installed")
    assert kinds(Trainer.build_evaluator(detectron2_cfg(ADE20K), kind_of(kind))) == expected


def test_only_heads_that_are_on_are_evaluated(detectron2_cfg, kind_of):
    cfg = detectron2_cfg(ADE20K, MODEL__MASK_FORMER__TEST__PANOPTIC_ON=False)
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    assert kinds(build_evaluator(cfg, kind_of("ade20k_panoptic_seg"))) == ["InstanceSegEvaluator"]
    with pytest.raises(ValueError, match="nothing to evaluate .* switch on at least one of .*TEST.SEMANTIC_ON"):
        build_evaluator(cfg, kind_of("sem_seg"))


def test_panoptic_quality_without_panopticapi_is_refused_before_anything_is_computed(detectron2_cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "panopticapi", None)
    with pytest.raises(ValueError, match="needs panopticapi .* fcclip.evaluation computes the same numbers without"):
        build_evaluator(detectron2_cfg(), "shapes_val")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("cityscapes_panoptic_seg", {}, "internal to Meta.*Set MODEL.MASK_FORMER.TEST.SEMANTIC_ON and INSTANCE_ON"),
        ("mapillary_vistas_panoptic_seg", {"json_file": None}, "has no instances file"),
        ("coco", {"thing_dataset_id_to_contiguous_id": None}, "has no thing_dataset_id_to_contiguous_id"),
        ("ade20k_panoptic", {}, "unknown evaluator type .* Did you mean 'ade20k_panoptic_seg'"),
        (None, {}, "has no evaluator_type in its metadata"),
    ],
)
def test_what_detectron2_cannot_evaluate_is_refused(detectron2_cfg, kind_of, kind, changes, message):
    cfg = detectron2_cfg(ADE20K, MODEL__MASK_FORMER__TEST__PANOPTIC_ON=False)
    with pytest.raises(ValueError, match=message):
        build_evaluator(cfg, kind_of(kind, **changes))


def test_a_wrong_number_of_evaluators_is_refused(shapes_model):
    model, cfg = shapes_model()
    with pytest.raises(ValueError, match="1 evaluators for the 3 data sets"):
        Trainer.test(cfg, model, InstanceSegEvaluator("shapes_val", output_dir=cfg.OUTPUT_DIR))
