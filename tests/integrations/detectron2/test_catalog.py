"""Data sets and their vocabularies in detectron2's catalogs, and the mapper of its loaders."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.data import (
    DatasetCatalog,
    Metadata,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import META_ARCH_REGISTRY

import fcclip
from fcclip.data import DATASETS, build_test_mapper, build_train_mapper, get_dataset
from fcclip.integrations.detectron2 import DatasetMapper, instances_from_targets, metadata_vocabulary, register
from fcclip.integrations.detectron2.catalog import catalog_vocabulary
from fcclip.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("detectron2_knows_fcclip")
ADE = "openvocab_ade20k_panoptic_val"


def test_every_data_set_is_in_both_catalogs_and_a_second_call_changes_nothing():
    before = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    register()
    assert (dict(DatasetCatalog.data), dict(MetadataCatalog.data)) == before
    for name in DATASETS:
        assert name in DatasetCatalog
        if name.startswith("openvocab_lvis"):  # its classes stand in a file of the user's
            continue
        assert MetadataCatalog.get(name).as_dict() == {"name": name, **get_dataset(name).metadata}


def test_records_are_those_of_fcclip(shapes):
    assert DatasetCatalog.get("shapes_val") == get_dataset("shapes_val").records()


def test_the_root_folder_is_read_when_it_is_needed(tmp_path, monkeypatch):
    metadata = MetadataCatalog.get("shapes_val")
    for name in ("first", "second"):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / name))
        assert metadata.panoptic_json == str(tmp_path / name / "shapes/annotations/panoptic_val.json")
        with pytest.raises(FileNotFoundError, match=f"{name}/shapes"):
            DatasetCatalog.get("shapes_val")


def test_metadata_behave_like_detectron2s():
    metadata = copy.deepcopy(MetadataCatalog.get(ADE))
    assert metadata.name == ADE and metadata.get("no_such_thing", 3) == 3
    assert len(metadata.thing_classes) == 100 and len(metadata.stuff_classes) == 150
    metadata.keypoint_names = [(1, 2, 3)]
    assert metadata.keypoint_names == [(1, 2, 3)] and "keypoint_names" in metadata.as_dict()
    metadata.ignore_label = 255  # as it is
    with pytest.raises(AssertionError, match="cannot be set to a different value"):
        metadata.ignore_label = 0
    with pytest.raises(AttributeError, match=f"'{ADE}' has no 'gt_dir' in its metadata. It has: .*stuff_classes, "):
        _ = metadata.gt_dir


def test_a_name_that_is_taken_is_an_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(META_ARCH_REGISTRY._obj_map, "FCCLIP", object)
        with pytest.raises(ValueError, match="'FCCLIP' in detectron2's registry META_ARCH is <class 'object'>"):
            register()
    monkeypatch.setitem(DatasetCatalog.data, "shapes_tune", list)
    with pytest.raises(ValueError, match="data set 'shapes_tune' is in detectron2's catalogs already"):
        register()
    assert DatasetCatalog["shapes_tune"] is list


def test_metadata_of_another_are_a_taken_name_and_an_empty_entry_is_not(monkeypatch):
    monkeypatch.setitem(MetadataCatalog.data, ADE, Metadata(name=ADE))  # what MetadataCatalog.get makes of any name
    register()
    assert MetadataCatalog.get(ADE).evaluator_type == "ade20k_panoptic_seg"
    monkeypatch.setitem(MetadataCatalog.data, ADE, Metadata(name=ADE, stuff_classes=["wall"]))
    with pytest.raises(ValueError, match=f"data set '{ADE}' is in detectron2's catalogs already"):
        register()


# ---- vocabularies ----


def test_vocabularies_of_fcclips_data_sets_are_its_own():
    vocabulary = metadata_vocabulary(MetadataCatalog.get(ADE), need_things=True)
    assert vocabulary == Vocabulary.builtin("ade20k_150")
    assert catalog_vocabulary("shapes_train", folder="") == Vocabulary.builtin("shapes_seen")


def test_published_vocabulary_files_are_taken_from_their_folder(tmp_path):
    lines = [f"{index}:name {index},other {index}" for index in range(1, 151)]
    (tmp_path / "ade20k_150_with_prompt_eng.txt").write_text("\n".join(lines))
    vocabulary = catalog_vocabulary(ADE, folder=str(tmp_path))
    assert vocabulary.synonyms[0] == ("name 1", "other 1")
    assert vocabulary.thing_classes == Vocabulary.builtin("ade20k_150").thing_classes


def test_class_names_of_a_users_data_set_are_read_as_published():
    metadata = Metadata(
        name="mine",
        stuff_classes=["cat,kitty, tom cat", "grass, ", "dog"],
        thing_dataset_id_to_contiguous_id={17: 0, 18: 2},
    )
    vocabulary = metadata_vocabulary(metadata, need_things=True)
    assert vocabulary.name == "mine"
    assert vocabulary.synonyms == (("cat", "kitty", "tom cat"), ("grass",), ("dog",))
    assert vocabulary.thing_classes == (0, 2)


def test_without_stuff_classes_the_thing_classes_are_all_classes():
    vocabulary = metadata_vocabulary(Metadata(name="mine", thing_classes=["cat", "dog"]), need_things=True)
    assert vocabulary.class_names == ("cat", "dog") and vocabulary.thing_classes == (0, 1)


def test_classes_that_detectron2_learns_from_the_file_are_known(tmp_path):
    categories = [{"id": 7, "name": "hen"}, {"id": 9, "name": "cow"}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    register_coco_instances("farm_of_the_test", {}, str(tmp_path / "coco.json"), str(tmp_path))
    try:
        vocabulary = catalog_vocabulary("farm_of_the_test", folder="", need_things=True)
    finally:
        DatasetCatalog.remove("farm_of_the_test")
        MetadataCatalog.remove("farm_of_the_test")
    assert vocabulary.class_names == ("hen", "cow") and vocabulary.thing_classes == (0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "have neither stuff_classes nor thing_classes"),
        ({"stuff_classes": ["cat", "grass"]}, "do not say which of the stuff_classes are things"),
        ({"stuff_classes": ["sky"], "thing_dataset_id_to_contiguous_id": {1: 79}}, "have 1 classes, but .* up to 79"),
        (
            {"stuff_classes": ["cat", " , "], "thing_dataset_id_to_contiguous_id": {}},
            "data set 'mine' cannot be read as class names: .*class 1 has no synonym",
        ),
    ],
)
def test_metadata_without_usable_classes_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        metadata_vocabulary(Metadata(name="mine", **content), need_things=True)


def test_things_need_not_be_known_for_semantic_maps_alone():
    vocabulary = metadata_vocabulary(Metadata(name="mine", stuff_classes=["sky", "grass"]))
    assert vocabulary.thing_classes == ()


def test_an_unknown_data_set_is_refused_with_its_neighbour():
    with pytest.raises(ValueError, match="unknown data set .* 'shapes_vall'. Did you mean 'shapes_val'"):
        catalog_vocabulary("shapes_vall", folder="")


# ---- mapper and loaders ----


def test_training_samples_are_fcclips_with_instances(shapes, both_cfgs):
    cfg, ours = both_cfgs()
    record = get_dataset("shapes_train").records()[0]
    np.random.seed(3)
    sample = DatasetMapper(cfg)(record)
    expected = build_train_mapper(ours)(record, np.random.RandomState(3))
    instances = instances_from_targets(expected.pop("targets"))
    mapped = sample.pop("instances")
    assert torch.equal(mapped.gt_masks, instances.gt_masks) and torch.equal(mapped.gt_classes, instances.gt_classes)
    assert torch.equal(sample.pop("image"), expected.pop("image"))
    assert sample == expected


def test_a_published_mapper_is_that_of_its_name_whatever_the_config_says(shapes, both_cfgs):
    cfg, _ = both_cfgs()
    record = get_dataset("shapes_train").records()[0]
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"
    np.random.seed(3)
    expected = DatasetMapper(cfg)(record)
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    np.random.seed(3)
    sample = fcclip.COCOPanopticNewBaselineDatasetMapper(cfg)(record)
    assert torch.equal(sample["image"], expected["image"])
    assert torch.equal(sample["instances"].gt_masks, expected["instances"].gt_masks)


def test_test_samples_are_fcclips(shapes, both_cfgs):
    cfg, ours = both_cfgs()
    record = get_dataset("shapes_val").records()[0]
    sample, expected = DatasetMapper(cfg, is_train=False)(record), build_test_mapper(ours)(record)
    assert torch.equal(sample.pop("image"), expected.pop("image")) and sample == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_detectron2s_loaders_take_the_mapper(shapes, detectron2_cfg, num_workers):
    cfg = detectron2_cfg(DATALOADER__NUM_WORKERS=num_workers, SOLVER__IMS_PER_BATCH=2)
    batches = build_detection_train_loader(cfg, mapper=DatasetMapper(cfg))
    (batch,) = itertools.islice(batches, 1)
    assert [sample["image"].shape for sample in batch] == [(3, 64, 64)] * 2
    assert all(len(sample["instances"]) and sample["instances"].has("gt_boxes") for sample in batch)
    loader = build_detection_test_loader(cfg, "shapes_val", mapper=DatasetMapper(cfg, is_train=False))
    assert [sample["image_id"] for batch in loader for sample in batch] == [1, 2, 3, 4]


def test_records_without_the_ground_truth_of_the_mapper_are_refused(detectron2_cfg):
    with pytest.raises(ValueError, match="a.jpg: the ground truth has no pan_seg_file_name and no segments_info, "):
        DatasetMapper(detectron2_cfg())({"file_name": "a.jpg", "annotations": []})


def test_detectron2s_own_instance_records_train_with_the_instance_mappers(shapes, detectron2_cfg):
    name = "instances_for_a_test"
    register_coco_instances(name, {}, shapes / "shapes/annotations/instances_val.json", shapes / "shapes/val")
    try:
        for mapper in ("coco_instance_lsj", "mask_former_instance"):
            cfg = detectron2_cfg(INPUT__DATASET_MAPPER_NAME=mapper, DATASETS__TRAIN=(name,))
            sample = DatasetMapper(cfg)(DatasetCatalog.get(name)[0])
            assert len(sample["instances"].gt_classes) and sample["instances"].gt_masks.any()
    finally:
        DatasetCatalog.remove(name), MetadataCatalog.remove(name)


def test_labels_of_a_users_semantic_set_are_judged_by_its_metadata(shapes, detectron2_cfg, tmp_path):
    name = "labels_for_a_test"
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "a.jpg")
    record = {"file_name": str(tmp_path / "a.jpg"), "sem_seg_file_name": str(tmp_path / "a.png")}
    MetadataCatalog.get(name).set(stuff_classes=["wall", "floor"], ignore_label=7)
    cfg = detectron2_cfg(INPUT__DATASET_MAPPER_NAME="mask_former_semantic", DATASETS__TRAIN=(name,))
    try:
        labels = np.full((64, 64), 7, np.uint8)
        labels[:32] = 1
        Image.fromarray(labels).save(tmp_path / "a.png")
        assert DatasetMapper(cfg)(record)["instances"].gt_classes.tolist() in ([1], [])
        labels[:32] = 2
        Image.fromarray(labels).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"a.png: label 2 \(2048 pixels\) is not a class: .*0..1, and 7 "):
            DatasetMapper(cfg)(record)
    finally:
        MetadataCatalog.remove(name)
