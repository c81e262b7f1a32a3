"""Data sets of the user's YAML files in detectron2's catalogs, loaders, trainer and evaluators."""

import copy

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Instances

from fcclip.data import get_dataset
from fcclip.data.images import read_label_map
from fcclip.integrations.detectron2 import Trainer, build_evaluator, metadata_vocabulary, register_own_data
from fcclip.integrations.detectron2.catalog import catalog_vocabulary
from tests.data.own_world import CAR, PERSON, classes_of, edit_json, write_own

pytestmark = pytest.mark.usefixtures("detectron2_knows_fcclip")
HEADS = ("PANOPTIC", "INSTANCE", "SEMANTIC")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Function (type) -> (name in the catalogs, YAML); the catalogs are as before after the test."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))

    def make(kind):
        path = write_own(tmp_path, kind)
        return register_own_data(path), path

    return make


@pytest.mark.parametrize("kind", ["panoptic", "instances", "semantic"])
def test_a_yaml_is_in_both_catalogs_under_the_name_of_its_file(own, kind):
    name, path = own(kind)
    dataset = get_dataset(str(path))
    assert name == f"own_{kind}" == dataset.name
    assert DatasetCatalog.get(name) == dataset.records()
    metadata = MetadataCatalog.get(name)
    names_of_instances = {"thing_classes": dataset.metadata["stuff_classes"]} if kind == "instances" else {}
    assert metadata.as_dict() == {"name": name, **dataset.metadata, **names_of_instances}
    assert copy.deepcopy(metadata).stuff_classes == ["grass", "car", "sky", "person"]
    assert metadata_vocabulary(metadata, need_things=True) == dataset.own_vocabulary()
    assert catalog_vocabulary(name, folder="") == dataset.own_vocabulary()


def test_a_path_may_be_registered_again_and_a_name_stands_for_a_single_yaml(own, tmp_path):
    name, path = own("semantic")
    path.write_text(path.read_text().replace("sky", "heaven"))
    assert register_own_data(path) == name and "heaven" in MetadataCatalog.get(name).stuff_classes
    with pytest.raises(ValueError, match=r"'own_semantic' is in detectron2's catalogs already.* Rename the YAML"):
        register_own_data(write_own(tmp_path / "other", "semantic"))
    with pytest.raises(ValueError, match="'shapes_val' is in detectron2's catalogs already"):
        register_own_data(path.rename(tmp_path / "shapes_val.yaml"))
    assert "heaven" in MetadataCatalog.get(name).stuff_classes


def test_a_yaml_that_is_not_a_data_set_or_not_registered_is_refused(own, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("type: boxes")
    with pytest.raises(ValueError, match="broken.yaml: key 'images' is missing"):
        register_own_data(broken)
    assert "broken" not in DatasetCatalog.data
    with pytest.raises(ValueError, match=r"call register_own_data\('my.yaml'\)"):
        catalog_vocabulary("my.yaml", folder="")


def test_own_data_are_trained_on(own, detectron2_cfg, tmp_path):
    name, _ = own("panoptic")
    sets = {"DATASETS__TRAIN": (name,), "DATASETS__TEST": (), "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 4}
    cfg = detectron2_cfg(**sets, SOLVER__MAX_ITER=1, SOLVER__STEPS=(), OUTPUT_DIR=str(tmp_path / "out"))
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer.model.train_vocabulary.class_names == ("grass", "car", "sky", "person")
    assert (tmp_path / "out" / "model_final.pth").is_file()


# ---- evaluation ----


def only(head):
    """Settings with this head on alone."""
    return {f"MODEL__MASK_FORMER__TEST__{name}_ON": name == head for name in HEADS}


def perfect(number):
    """The instances of an image of `own_world`."""
    labels = classes_of(number)
    classes = [index for index in (CAR, PERSON) if (labels == index).any()]
    instances = Instances(labels.shape)
    instances.pred_masks = torch.stack([torch.from_numpy(labels == index) for index in classes])
    instances.pred_boxes = BitMasks(instances.pred_masks).get_bounding_boxes()
    instances.pred_classes, instances.scores = torch.tensor(classes), torch.ones(len(classes))
    return instances


def test_average_precision_of_own_instances_counts_the_things_of_the_json(own, detectron2_cfg, tmp_path):
    name, _ = own("instances")
    cfg = detectron2_cfg(DATASETS__TEST=(name,), OUTPUT_DIR=str(tmp_path), **only("INSTANCE"))
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for number, record in enumerate(DatasetCatalog.get(name)[:4]):
        evaluator.process([record], [{"instances": perfect(number)}])
    metrics = evaluator.evaluate()["segm"]
    assert metrics["AP"] == metrics["AP-car"] == metrics["AP-person"] == pytest.approx(100)


def test_miou_of_own_label_maps(own, detectron2_cfg, tmp_path):
    name, _ = own("semantic")
    cfg = detectron2_cfg(DATASETS__TEST=(name,), OUTPUT_DIR=str(tmp_path), **only("SEMANTIC"))
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        labels = torch.from_numpy(read_label_map(record["sem_seg_file_name"])).long()
        evaluator.process([record], [{"sem_seg": torch.nn.functional.one_hot(labels % 4, 4).permute(2, 0, 1)}])
    assert evaluator.evaluate()["sem_seg"]["IoU-car"] == pytest.approx(100)


def test_what_detectron2_cannot_evaluate_of_own_panoptic_data_is_refused_before_it_computes(own, detectron2_cfg):
    pytest.importorskip("panopticapi", reason="panopticapi is not installed")
    name, path = own("panoptic")
    for head, message in (
        ("PANOPTIC", r"4 of 4 categories do not say 'isthing' \(e.g. 'zebra'\)"),
        ("INSTANCE", "no instances file"),
        ("SEMANTIC", "no semantic label maps, .*SEMANTIC_ON False"),
    ):
        with pytest.raises(ValueError, match=message):
            build_evaluator(detectron2_cfg(DATASETS__TEST=(name,), **only(head)), name)

    def say_what_is_a_thing(content):
        for category in content["categories"]:
            category["isthing"] = int(category["name"] != "grass")

    edit_json(path.parent / "labels.json", say_what_is_a_thing)
    assert build_evaluator(detectron2_cfg(DATASETS__TEST=(name,), **only("PANOPTIC")), name) is not None
