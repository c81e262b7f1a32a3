import gc
from pathlib import Path

import pytest

from fcclip.config import configs_dir, load_config
from fcclip.data import DATASETS, Dataset, get_dataset, root_folder
from fcclip.data.dataset import EVALUATORS

# name without split: (classes, things, ignore label, evaluator type), as published
PUBLISHED = {
    "openvocab_coco_2017_{}_panoptic_with_sem_seg": (133, 80, 255, "coco_panoptic_seg"),
    "openvocab_coco_2017_{}": (80, 80, None, "coco"),
    "openvocab_ade20k_panoptic_{}": (150, 100, 255, "ade20k_panoptic_seg"),
    "openvocab_ade20k_instance_{}": (100, 100, None, "coco"),
    "openvocab_ade20k_sem_seg_{}": (150, 0, 255, "sem_seg"),
    "openvocab_cityscapes_fine_panoptic_{}": (19, 8, 255, "cityscapes_panoptic_seg"),
    "openvocab_mapillary_vistas_panoptic_{}": (65, 37, 65, "mapillary_vistas_panoptic_seg"),
    "bdd10k_40_panoptic_{}": (40, 10, 255, "coco_panoptic_seg"),
    "bdd10k_{}_sem_seg": (19, 0, 255, "sem_seg"),
    "openvocab_ade20k_full_sem_seg_{}": (847, 0, 65535, "sem_seg"),
    "openvocab_pascal_ctx59_sem_seg_{}": (59, 0, 255, "sem_seg"),
    "openvocab_pascal_ctx459_sem_seg_{}": (459, 0, 65535, "sem_seg"),
    "openvocab_pascal20_sem_seg_{}": (20, 0, 255, "sem_seg"),
    "openvocab_pascal21_sem_seg_{}": (21, 0, 255, "sem_seg"),
}
STUFF = "openvocab_coco_2017_{}_stuff_sem_seg"
EVERY = sorted(DATASETS)
WITH_BUILTIN_CLASSES = [name for name in EVERY if "lvis" not in name]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        *((template.format(split), kind) for template, kind in PUBLISHED.items() for split in ("train", "val")),
        *((STUFF.format(split), (171, 0, 255, "sem_seg")) for split in ("train", "test")),
    ],
)
def test_a_published_name_has_the_published_classes(name, published):
    metadata = get_dataset(name).metadata
    described = (len(metadata["stuff_classes"]), len(metadata["thing_classes"]), metadata.get("ignore_label"))
    assert (*described, metadata["evaluator_type"]) == published


@pytest.mark.parametrize("name", WITH_BUILTIN_CLASSES)
def test_ids_and_names_follow_the_vocabulary(name):
    dataset = get_dataset(name)
    vocabulary = dataset.own_vocabulary()
    metadata = dataset.metadata
    assert dataset.name == name
    assert tuple(metadata["stuff_classes"]) == vocabulary.class_names
    assert sorted(metadata["stuff_dataset_id_to_contiguous_id"].values()) == list(range(len(vocabulary)))
    things = vocabulary.thing_classes if metadata["evaluator_type"] != "sem_seg" else ()
    assert tuple(metadata["thing_dataset_id_to_contiguous_id"].values()) == things
    assert metadata.get("ignore_label") not in range(len(vocabulary))


def test_instance_sets_number_the_things_without_gaps():
    coco = get_dataset("openvocab_coco_2017_val").metadata
    panoptic = get_dataset("openvocab_coco_2017_val_panoptic_with_sem_seg").metadata
    assert coco["thing_classes"] == panoptic["thing_classes"]
    assert coco["thing_dataset_id_to_contiguous_id"] == panoptic["thing_dataset_id_to_contiguous_id"]
    ade = get_dataset("openvocab_ade20k_instance_val").metadata
    things = get_dataset("openvocab_ade20k_panoptic_val").metadata["thing_dataset_id_to_contiguous_id"]
    assert ade["thing_dataset_id_to_contiguous_id"] == {category_id: index for index, category_id in enumerate(things)}


def test_lvis_needs_its_file_only_for_its_classes(tmp_path):
    dataset = get_dataset("openvocab_lvis_v1_val", tmp_path)
    assert dataset.metadata["evaluator_type"] == "lvis" and "ignore_label" not in dataset.metadata
    with pytest.raises(FileNotFoundError, match=r"data set 'openvocab_lvis_v1_val': .*lvis/lvis_v1_val\.json does not"):
        dataset.metadata["stuff_classes"]
    with pytest.raises(FileNotFoundError, match="lvis_v1_val"):
        dataset.own_vocabulary()


@pytest.mark.parametrize("name", EVERY)
def test_getting_a_data_set_looks_for_no_file_and_its_records_name_the_missing_one(name, tmp_path):
    dataset = get_dataset(name, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"data set '{name}': .*nowhere.* does not exist.*DETECTRON2_DATASETS"):
        dataset.records()


def test_every_data_set_of_a_fcclip_config_is_registered():
    for path in sorted(configs_dir().rglob("fcclip_*.yaml")):
        cfg = load_config(path)
        unknown = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} - set(DATASETS)
        assert not unknown, f"{path.name}: {unknown}"


def test_cityscapes_ids_become_train_ids():
    metadata = get_dataset("openvocab_cityscapes_fine_panoptic_val", "/data").metadata
    expected = {24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert metadata["thing_dataset_id_to_contiguous_id"] == expected
    assert metadata["stuff_dataset_id_to_contiguous_id"][7] == 0
    assert Path(metadata["gt_dir"]) == Path("/data/cityscapes/gtFine/val")


def test_label_values_of_the_pascal_sets_are_the_published_ones():
    def ids(name):
        return get_dataset(name).metadata["stuff_dataset_id_to_contiguous_id"]

    assert ids("openvocab_pascal20_sem_seg_val") == {index + 1: index for index in range(20)}
    assert ids("openvocab_pascal21_sem_seg_val") == {index: index for index in range(21)}
    assert ids("openvocab_pascal_ctx59_sem_seg_val") == {index: index for index in range(59)}


def test_an_unknown_name_is_answered_with_its_neighbour():
    with pytest.raises(ValueError, match=r"unknown data set 'shapes_vall'\. Did you mean 'shapes_val'\?"):
        get_dataset("shapes_vall")


def test_the_root_is_the_argument_then_the_variable_then_datasets(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/images")
    assert root_folder("~/here") == Path("/home/someone/here")
    assert root_folder() == Path("/home/someone/images")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert root_folder() == Path("datasets")
    assert get_dataset("shapes_val").metadata["image_root"] == "datasets/shapes/val"


def test_shapes_train_knows_the_seen_classes_only():
    train, val = get_dataset("shapes_train"), get_dataset("shapes_val")
    assert (train.vocabulary, val.vocabulary) == ("shapes_seen", "shapes")
    unseen = set(val.metadata["stuff_classes"]) - set(train.metadata["stuff_classes"])
    assert 0 < len(unseen) == len(val.metadata["stuff_classes"]) - len(train.metadata["stuff_classes"])
    names = {
        category_id: val.metadata["stuff_classes"][i]
        for category_id, i in val.metadata["stuff_dataset_id_to_contiguous_id"].items()
    }
    for dataset_id, index in train.metadata["stuff_dataset_id_to_contiguous_id"].items():
        assert names[dataset_id] == train.metadata["stuff_classes"][index]


@pytest.mark.parametrize("enabled", [True, False])
def test_reading_annotations_pauses_the_garbage_collector_and_leaves_it_as_it_was(enabled):
    def load():
        assert not gc.isenabled()
        raise OSError("gone")

    dataset = Dataset(name="x", metadata={}, load=load, vocabulary="coco_panoptic")
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(OSError, match="gone"):
            dataset.records()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize("name", EVERY)
def test_a_record_says_what_was_published_of_the_data_set(name):
    dataset = get_dataset(name)
    if name.startswith("shapes"):
        assert dataset.published_count is None and dataset.published_vocabulary is None
    elif name.startswith("bdd"):
        assert dataset.published_count > 0 and dataset.published_vocabulary is None
        assert dataset.own_vocabulary().is_published  # its own class names
    else:
        assert dataset.published_count > 0 and dataset.published_vocabulary.endswith("_with_prompt_eng.txt")
    assert dataset.evaluators == EVALUATORS[dataset.metadata["evaluator_type"]]
    assert dataset.test_size == ((1024, 2560) if "cityscapes" in name or "mapillary" in name else (800, 1333))


def test_colours_and_names_by_index_are_those_of_the_published_metadata():
    metadata = get_dataset("openvocab_coco_2017_val_panoptic_with_sem_seg").metadata
    assert metadata["stuff_colors"][0] == [220, 20, 60] and len(metadata["stuff_colors"]) == 133
    assert len(metadata["thing_colors"]) == 80
    assert metadata["contiguous_id_to_class_name"][2] == "car"
    assert "stuff_colors" not in get_dataset("openvocab_pascal21_sem_seg_val").metadata
