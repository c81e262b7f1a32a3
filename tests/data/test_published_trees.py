"""Every published data set on a small tree in its true layout: registration, loading, mapping, batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fcclip.data import DATASETS, build_test_loader, build_train_loader, dataset_vocabulary, get_dataset
from fcclip.data.images import read_label_map
from fcclip.data.mappers import MAPPERS, build_train_mapper
from tests.data.published_trees import CLASSES, SIZES, template_and_split, write_tree

NAMES = sorted(name for name in DATASETS if not name.startswith("shapes_"))
FIELDS = {  # kind of ground truth -> what a record has besides file_name, image_id, height and width
    "panoptic": {"pan_seg_file_name", "sem_seg_file_name", "segments_info"},
    "semantic": {"sem_seg_file_name"},
    "instances": {"annotations"},
}
READERS = {
    "panoptic": {"coco_panoptic_lsj", "mask_former_panoptic", "mask_former_semantic"},
    "semantic": {"mask_former_semantic"},
    "instances": {"coco_instance_lsj", "mask_former_instance"},
}


def kind_of(name):
    if "sem_seg" in name and "panoptic" not in name:
        return "semantic"
    return "panoptic" if "panoptic" in name else "instances"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root whose path has a space, a dot, letters that are not ASCII, and a folder name of Cityscapes."""
    return tmp_path_factory.mktemp("datasets") / "données v1.0 leftImg8bit"


@pytest.fixture
def tree(request, root):
    """(name, data set), its files written into a root of its own."""
    name = request.param
    if not (root / name).exists():
        write_tree(name, root / name)
    return name, get_dataset(name, root / name)


every_data_set = pytest.mark.parametrize("tree", NAMES, indirect=True)


def test_there_is_a_tree_for_every_published_data_set():
    assert {template_and_split(name)[0] for name in NAMES} == set(CLASSES)


@every_data_set
def test_the_content_of_its_annotation_file_gives_the_same_records_wherever_its_files_are(tree, tmp_path):
    name, dataset = tree
    if kind_of(name) == "semantic":
        assert dataset.parse is None
        return
    source = Path(dataset.metadata["panoptic_json" if kind_of(name) == "panoptic" else "json_file"])
    content = json.loads(source.read_text())
    assert dataset.parse(content) == dataset.annotations()
    assert len(get_dataset(name, tmp_path).parse(content)) == len(dataset.annotations())


@every_data_set
def test_its_four_images_become_records_with_sizes_and_ground_truth(tree):
    name, dataset = tree
    records = [record for record in dataset.records() if record.get("annotations", True)]
    assert len(records) == 4
    assert sorted((record["height"], record["width"]) for record in records) == sorted(SIZES)
    for record in records:
        extra = set(record) - {"file_name", "image_id", "height", "width"}
        painted = {"sem_seg_file_name"} if dataset.metadata.get("sem_seg_root", "") is None else set()
        assert extra - {"not_exhaustive_category_ids", "neg_category_ids"} == FIELDS[kind_of(name)] - painted
    ids = [record["image_id"] for record in records]
    assert len(set(ids)) == 4
    kind = int if ("coco" in name and "stuff" not in name) or "lvis" in name or "bdd10k_40" in name else str
    assert {type(image_id) for image_id in ids} == {kind}


@every_data_set
def test_dataset_ids_become_contiguous_ones(tree):
    name, dataset = tree
    expected = {label.contiguous for label in CLASSES[template_and_split(name)[0]]}
    for record in dataset.records():
        if "segments_info" in record:
            assert {segment["category_id"] for segment in record["segments_info"]} == expected
        elif record.get("annotations"):
            assert {instance["category_id"] for instance in record["annotations"]} == expected
        if "sem_seg_file_name" in record:
            labels = set(np.unique(read_label_map(record["sem_seg_file_name"])).tolist())
            assert labels == expected | {dataset.metadata["ignore_label"]}


@every_data_set
def test_the_classes_are_words_that_the_metadata_name(tree):
    name, dataset = tree
    vocabulary = dataset_vocabulary(dataset)
    assert dataset.metadata["stuff_classes"] == list(vocabulary.class_names)
    for label in CLASSES[template_and_split(name)[0]]:
        id_map = dataset.metadata["stuff_dataset_id_to_contiguous_id"]
        # label maps hold contiguous ids already; in the JSON files stand those of the data set
        assert kind_of(name) == "semantic" or id_map[label.dataset_id] == label.contiguous


@pytest.mark.parametrize("mapper_name", sorted(MAPPERS))
@every_data_set
def test_each_mapper_reads_its_kind_and_names_those_that_read_the_others(tree, cfg, mapper_name):
    name, dataset = tree
    cfg.INPUT.DATASET_MAPPER_NAME = mapper_name
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.IMAGE_SIZE = 64
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    mapper = build_train_mapper(cfg, dataset.metadata)
    record = dataset.records()[0]
    if mapper_name not in READERS[kind_of(name)]:
        with pytest.raises(ValueError, match=f"'{mapper_name}' reads.* set INPUT.DATASET_MAPPER_NAME to ") as error:
            mapper(record, np.random.default_rng(0))
        named = str(error.value).rpartition(" to ")[2].rstrip(".").split(" or ")
        assert set(named) == READERS[kind_of(name)]
        return
    targets = mapper(record, np.random.default_rng(0))["targets"]
    labels = [label.contiguous for label in CLASSES[template_and_split(name)[0]]]
    crowds = record.get("segments_info") or record.get("annotations") or []
    if mapper_name != "mask_former_semantic" and any(annotation["iscrowd"] for annotation in crowds):
        labels = labels[:2]
    assert sorted(targets.labels.tolist()) == sorted(labels)
    masks = targets.expand()
    assert masks.dtype == torch.bool and masks.any(dim=(1, 2)).all()
    assert masks.sum(dim=0).max() == 1  # three quarters of the image, none over the other
    assert not masks[:, -1, -1].any()


@every_data_set
def test_it_comes_in_batches_for_training_and_testing(tree, cfg):
    name, dataset = tree
    cfg.INPUT.DATASET_MAPPER_NAME = min(READERS[kind_of(name)])
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.SIZE_DIVISIBILITY = (16, 32), 64, 64
    batch = next(build_train_loader(cfg, dataset=dataset))
    assert [len(sample["targets"]) > 0 for sample in batch] == [True, True]
    assert sum(len(batch) for batch in build_test_loader(cfg, dataset)) in (4, 5)
