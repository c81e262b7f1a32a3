"""A data set of the user's own, described by a YAML file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fcclip import vocabulary
from fcclip.data import (
    build_train_loader,
    build_train_mapper,
    dataset_vocabulary,
    distinct_datasets,
    get_dataset,
    joined,
)
from fcclip.data.datasets.files import AnnotationFile
from tests.data.own_world import CAR, CLASSES, GRASS, NUM_IMAGES, PERSON, classes_of, edit_json, write_own

KINDS = ("panoptic", "instances", "semantic")
ANNOTATIONS = {"panoptic": "labels.json", "instances": "instances.json"}
MAPPERS = {
    "panoptic": ("coco_panoptic_lsj", "mask_former_semantic", "mask_former_panoptic"),
    "instances": ("coco_instance_lsj", "mask_former_instance"),
    "semantic": ("mask_former_semantic",),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def own(tmp_path):
    """(type, **keys of the YAML) -> the path of the YAML; the folder has a space and an umlaut."""
    return lambda kind, **keys: str(write_own(tmp_path / "meine Bäume", kind, **keys))


def refusal(path, error=ValueError, of=lambda dataset: None):
    """The text of the error that reading the YAML raises, or else the one of a function of the data set."""
    with pytest.raises(error) as raised:
        of(get_dataset(path))
    return str(raised.value)


def records_of(dataset):
    return dataset.records()


# ---- what it is ----


def test_a_yaml_is_a_data_set_with_the_name_of_the_file(own, kind, tmp_path):
    dataset = get_dataset(own(kind))
    assert dataset.name == f"own_{kind}"
    assert dataset.metadata["stuff_classes"] == ["grass", "car", "sky", "person"]
    vocabulary = dataset_vocabulary(dataset)
    assert vocabulary.name == f"own_{kind}" and not vocabulary.is_published
    assert vocabulary.synonyms[CAR] == ("car", "automobile")
    assert vocabulary.thing_classes == (CAR, PERSON)
    assert [entry.id for entry in vocabulary.classes] == [0, 1, 2, 3]
    records = dataset.records()
    assert len(records) == NUM_IMAGES
    assert {record["file_name"] for record in records} == {
        f"{tmp_path}/meine Bäume/images/{number} ä.jpg" for number in range(NUM_IMAGES)
    }
    assert (records[1]["height"], records[1]["width"]) == (64, 48)


def test_metadata_are_those_of_the_type(own):
    panoptic, instances, semantic = (get_dataset(own(kind)).metadata for kind in KINDS)
    assert (panoptic["evaluator_type"], panoptic["json_file"], panoptic["sem_seg_root"]) == (
        "coco_panoptic_seg",
        None,
        None,
    )
    assert panoptic["panoptic_json"].endswith("labels.json") and panoptic["panoptic_root"].endswith("/labels")
    assert instances["evaluator_type"] == "coco" and instances["json_file"].endswith("instances.json")
    assert semantic["evaluator_type"] == "sem_seg" and semantic["thing_dataset_id_to_contiguous_id"] == {}
    assert panoptic["ignore_label"] == semantic["ignore_label"] == 255 and "ignore_label" not in instances


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
def test_category_ids_are_matched_by_name_and_a_class_that_the_json_lacks_gets_a_free_id(own, kind):
    metadata = get_dataset(own(kind)).metadata
    assert metadata["thing_dataset_id_to_contiguous_id"] == {7: CAR, 3: PERSON}
    assert metadata["stuff_dataset_id_to_contiguous_id"] == {90: GRASS, 7: CAR, 91: 2, 3: PERSON}


def test_panoptic_records_have_the_ids_of_the_classes_and_no_label_map(own):
    records = get_dataset(own("panoptic")).records()
    segments = [(segment["id"], segment["category_id"], segment["isthing"]) for segment in records[0]["segments_info"]]
    assert segments == [(512, GRASS, False), (513, CAR, True), (515, PERSON, True)]
    assert records[-1]["segments_info"] == [] and "sem_seg_file_name" not in records[0]
    assert records[0]["image_id"] == 0 and records[0]["pan_seg_file_name"].endswith("meine Bäume/labels/0.png")


def test_instance_records_keep_polygons_run_lengths_and_images_without_a_label(own):
    records = get_dataset(own("instances")).records()
    car, person = records[0]["annotations"]
    assert (car["category_id"], person["category_id"]) == (CAR, PERSON)
    assert isinstance(car["segmentation"], dict) and isinstance(person["segmentation"], list)
    assert records[-1]["annotations"] == []


def test_the_mask_folder_may_be_named_and_a_json_without_images_means_jpg(own, tmp_path):
    path = own("panoptic", masks="ids")
    folder = tmp_path / "meine Bäume"
    (folder / "labels").rename(folder / "ids")
    edit_json(folder / "labels.json", lambda content: content.update(images=[]))  # nothing but the stem is known then
    for number in range(NUM_IMAGES):
        (folder / "images" / f"{number} ä.jpg").rename(folder / "images" / f"{number}.jpg")
    record = get_dataset(path).records()[2]
    assert record["file_name"] == str(folder / "images" / "2.jpg")
    assert record["pan_seg_file_name"] == str(folder / "ids" / "2.png")


def test_label_maps_belong_to_the_images_of_the_same_name_in_folders_too(own, tmp_path, caplog):
    path, folder = own("semantic"), tmp_path / "meine Bäume"
    for name in ("images", "masks"):
        (folder / name / "a.b").mkdir()
        for file in (folder / name).glob("3 ä.*"):
            file.rename(folder / name / "a.b" / f"x.y{file.suffix.upper()}")
    (folder / "masks" / "2 ä.png").unlink()
    (folder / "images" / ".2 ä.jpg").write_bytes(b"hidden")
    records = get_dataset(path).records()
    assert [record["image_id"] for record in records] == ["0 ä", "1 ä", "4 ä", "a.b/x.y"]
    assert records[-1]["sem_seg_file_name"] == str(folder / "masks" / "a.b" / "x.y.PNG")
    assert "1 of 5 images" in caplog.text and "images/2 ä.jpg; left out" in caplog.text


def test_paths_start_at_the_yaml_or_at_home(own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "meine Bäume"))
    monkeypatch.chdir(tmp_path)
    own("semantic", images="~/images", annotations=str(tmp_path / "meine Bäume" / "masks"))
    assert len(get_dataset("meine Bäume/own_semantic.yaml").records()) == NUM_IMAGES
    assert len(get_dataset("~/own_semantic.yaml").records()) == NUM_IMAGES


def test_a_name_like_that_of_a_registered_set_is_no_clash(own, tmp_path):
    shutil.copy(own("semantic"), tmp_path / "meine Bäume" / "shapes_val.yaml")
    dataset = get_dataset(str(tmp_path / "meine Bäume" / "shapes_val.yaml"))
    assert len(dataset_vocabulary(dataset)) == 4 and len(get_dataset("shapes_val").own_vocabulary()) == 60
    with pytest.raises(ValueError, match=r"'shapes_val' and '.*shapes_val\.yaml', are named 'shapes_val'.*rename its"):
        distinct_datasets(["shapes_val", dataset.metadata["yaml_file"]])


def test_the_json_is_read_once_for_records_and_ids(own, monkeypatch):
    dataset, reads = get_dataset(own("panoptic")), []
    read = AnnotationFile.read
    monkeypatch.setattr(AnnotationFile, "read", lambda file: reads.append(1) or read(file))
    assert dataset.metadata["stuff_classes"] and not reads
    dataset.records()
    assert dataset.metadata["thing_dataset_id_to_contiguous_id"] and len(reads) == 1


def test_a_published_vocabulary_never_takes_the_place_of_own_classes(own, tmp_path):
    shutil.copy(own("semantic"), tmp_path / "meine Bäume" / "cityscapes.yaml")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "cityscapes_with_prompt_eng.txt").write_text("0:road\n")
    dataset = get_dataset(str(tmp_path / "meine Bäume" / "cityscapes.yaml"))
    assert dataset_vocabulary(dataset, tmp_path / "words").class_names == ("grass", "car", "sky", "person")


# ---- classes ----

LINES = "\ufeffgrass:stuff\ncar, automobile\n\nsky:stuff\nperson\n"
PUBLISHED = "0:invalid_class_id\n1:grass\n8:car, automobile\n9:sky\n4:person\n"
OURS = {
    "name": "mine",
    "classes": [
        {"id": 5, "name": "grass", "thing": False},
        {"id": 6, "name": "car", "synonyms": ["automobile"]},
        {"name": "sky", "thing": False},
        {"name": "person"},
    ],
}


@pytest.mark.parametrize(
    ("file", "text", "things"),
    [
        ("classes.txt", LINES, None),
        ("classes.txt", PUBLISHED, ["car, automobile", "person"]),
        ("classes.json", json.dumps(OURS), None),
        ("classes.json", json.dumps(OURS), ["car", "person"]),
    ],
)
def test_classes_may_stand_in_a_file(own, tmp_path, file, text, things):
    path = own("panoptic", classes=f"lists/{file}", things=things)
    (tmp_path / "meine Bäume" / "lists").mkdir()
    (tmp_path / "meine Bäume" / "lists" / file).write_text(text, encoding="utf-8")
    vocabulary = dataset_vocabulary(path)
    assert vocabulary.class_names == ("grass", "car", "sky", "person") and vocabulary.thing_classes == (CAR, PERSON)
    assert vocabulary.synonyms[CAR] == ("car", "automobile") and vocabulary.name == "own_panoptic"
    assert [entry.id for entry in vocabulary.classes] == [0, 1, 2, 3]
    assert get_dataset(path).vocabulary == get_dataset(own("panoptic")).vocabulary  # the same classes


def test_things_of_the_yaml_replace_those_of_a_vocabulary_file(own, tmp_path):
    path = own("panoptic", classes="classes.json", things=["grass"])
    (tmp_path / "meine Bäume" / "classes.json").write_text(json.dumps(OURS))
    assert dataset_vocabulary(path).thing_classes == (GRASS,)


def test_all_classes_of_instances_are_things_unless_told_otherwise(own):
    assert dataset_vocabulary(own("instances", classes=["car, automobile", "person"])).thing_classes == (0, 1)


def test_more_classes_than_an_8_bit_map_holds_move_the_ignore_label(own):
    names = [f"class {index}" for index in range(256)]
    assert get_dataset(own("semantic", classes=names)).metadata["ignore_label"] == 65535
    assert get_dataset(own("semantic", classes=names[:255])).metadata["ignore_label"] == 255
    assert get_dataset(own("semantic", ignore_label=4)).metadata["ignore_label"] == 4


# ---- what the YAML is refused for ----


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"clases": ["x"]}, r"unknown key 'clases'\. Did you mean 'classes'\? Known: type, images"),
        ({"images": None}, r"key 'images' is missing: the folder of the images\. Add it"),
        (
            {"type": "panoptik"},
            r"'type': expected panoptic, instances or semantic, got 'panoptik'\. Did you mean 'panop",
        ),
        ({"images": 3}, r"'images': expected a path, the folder of the images; got 3"),
        ({"masks": []}, r"'masks': expected a path, the folder of the id PNGs, with type panoptic; got \[\]"),
        ({"classes": {"car": 0}}, r"'classes': expected a list of names or the path of a file, got {'car': 0}"),
        ({"classes": []}, r"'classes': no class names given"),
        ({"classes": ["car", " , "]}, r"'classes': entry 1 \(' , '\) has no name"),
        ({"classes": ["car", False]}, r"'classes': entry 1 is False for YAML, not a text\. Put it into quotes"),
        ({"classes": ["car", "a", "car:stuff"]}, r"'classes': classes 0 and 2 are 'car' twice\. Names tell"),
        ({"classes": ["car", "Car:stuff"]}, r"classes 0 and 1 are 'car' and 'Car'"),
        ({"classes": ["car", "sky"]}, r"nothing says which classes are things.*Add `things: \[car, \.\.\.\]`"),
        ({"things": "car"}, r"'things': expected a list of class names, such as \[car\], got 'car'"),
        (
            {"things": ["Car"]},
            r"'things': 'Car' is not a class\. Did you mean 'car'\? Expected names of `classes`: grass, ",
        ),
        ({"things": ["car", "sky"]}, r"'things': 'sky' is in it, but is marked :stuff in `classes`"),
        ({"classes": ["car:thing", "sky"], "things": []}, r"'things': 'car' is not in it, but is marked :thing"),
        ({"ignore_label": "255"}, r"'ignore_label': expected a whole number 0\.\.65535, got '255'"),
        ({"ignore_label": 70000}, r"'ignore_label': expected a whole number 0\.\.65535, got 70000"),
        ({"ignore_label": 3}, r"'ignore_label': 3 is the id of a class: the 4 classes have the ids 0\.\.3"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_expected(own, keys, message):
    path = own("panoptic", **keys)
    with pytest.raises(ValueError, match=message) as raised:
        get_dataset(path)
    assert path in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [("semantic", "masks", "x"), ("instances", "masks", "x"), ("instances", "ignore_label", 255)],
)
def test_a_key_of_another_type_is_refused(own, kind, key, value):
    assert f"key '{key}': type {kind} has no " in refusal(own(kind, **{key: value}))


def test_a_yaml_runs_no_code(tmp_path):
    (tmp_path / "a.yaml").write_text(f"type: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert "is not a plain YAML file" in refusal(str(tmp_path / "a.yaml")) and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.getcwd []", "type: [panoptic", "type: \xff", "- a\n- b", "", "panoptic"]
)
def test_what_is_no_plain_mapping_is_refused(tmp_path, text):
    path = tmp_path / "a.yml"
    path.write_bytes(text.encode("latin-1"))
    assert str(path) in refusal(str(path))


def test_a_missing_yaml_is_named_with_its_neighbour(own):
    path = own("semantic").replace("own_semantic", "own_semantik")
    text = refusal(path, FileNotFoundError)
    assert f"'{path}' does not exist" in text and "Did you mean 'own_semantic.yaml'?" in text


def test_a_path_of_something_else_tells_what_is_expected(own, tmp_path):
    own("panoptic")
    text = refusal(str(tmp_path / "meine Bäume" / "labels.json"))
    assert "is a path, but not of a YAML file" in text and '"Your own data"' in text


def test_a_missing_or_broken_file_of_classes_is_named(own, tmp_path):
    path = own("semantic", classes="classes.txt")
    text = refusal(path, FileNotFoundError)
    assert f"{path}: key 'classes': the file {tmp_path}/meine Bäume/classes.txt does not exist. Paths in" in text
    (tmp_path / "meine Bäume" / "classes.txt").write_bytes("Straße".encode("latin-1"))
    assert "is not UTF-8 text" in refusal(path)
    (tmp_path / "meine Bäume" / "classes.txt").write_text("{")
    assert "key 'classes': vocabulary file" in refusal(path)
    (tmp_path / "meine Bäume" / "classes.txt").write_text("")
    assert "key 'classes': " in refusal(path)


# ---- what the files are refused for ----


@pytest.mark.parametrize(
    ("kind", "missing", "key"),
    [
        ("panoptic", "images", "images"),
        ("panoptic", "labels", "masks"),
        ("panoptic", "labels.json", "annotations"),
        ("instances", "images", "images"),
        ("instances", "instances.json", "annotations"),
        ("semantic", "images", "images"),
        ("semantic", "masks", "annotations"),
    ],
)
def test_missing_files_are_named_with_the_key_and_where_paths_begin(own, tmp_path, kind, missing, key):
    path, folder = own(kind), tmp_path / "meine Bäume"
    (folder / missing).rename(folder / "elsewhere")
    text = refusal(path, FileNotFoundError, records_of)
    assert text.startswith(f"{path}: key '{key}': ") and f"{folder / missing} does not exist" in text
    assert f"Paths in {path} are relative to its folder, {folder}." in text


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
def test_an_image_that_is_not_there_is_named_without_the_folder_of_registered_sets(own, tmp_path, kind):
    path = own(kind)
    (tmp_path / "meine Bäume" / "images" / "0 ä.jpg").unlink()
    text = refusal(path, FileNotFoundError, records_of)
    assert "0 ä.jpg, which does not exist. Paths in" in text and "DETECTRON2_DATASETS" not in text


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder_are_refused(own):
    own("semantic")  # writes the folders
    text = refusal(own("instances", annotations="masks"), of=records_of)
    assert "masks is a folder" in text and "Label maps with one number a pixel have type semantic" in text
    assert "is a file" in refusal(own("semantic", annotations="own_semantic.yaml"), of=records_of)
    assert "is the folder of the images too" in refusal(own("semantic", annotations="images"), of=records_of)


def test_folders_without_a_pair_are_refused(own, tmp_path):
    path, masks = own("semantic"), tmp_path / "meine Bäume" / "masks"
    shutil.copy(masks / "0 ä.png", masks / "0 ä.tif")
    assert "have the same name but for the ending" in refusal(path, of=records_of)
    (masks / "0 ä.tif").unlink()
    for file in masks.iterdir():
        file.rename(masks / f"mask {file.name}")
    text = refusal(path, of=records_of)
    assert "no image in" in text and "Names must be the same but for the ending" in text
    shutil.rmtree(masks)
    masks.mkdir()
    assert "no file in" in refusal(path, of=records_of)


def _with_a_list_as_category(content):
    first = content["annotations"][0]
    (first["segments_info"][0] if "segments_info" in first else first)["category_id"] = [1]


@pytest.mark.parametrize("kind", ["panoptic", "instances"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["categories"][1].update(name="truck"),
            r"of categories that are not a class: 'truck' \(4 annotations\)\. Names are compared letter by letter",
        ),
        (
            lambda content: content["categories"][1].update(name="Car"),
            r"'Car' \(4 annotations\)\. Did you mean 'car'\?",
        ),
        (
            lambda content: content["categories"][1].update(name="cars"),
            r"'cars' \(4 annotations\)\. Did you mean 'car'\?",
        ),
        (
            lambda content: content["categories"].pop(1),
            r"4 annotations have category_id 7, which is not in its 'categories'",
        ),
        (lambda content: content["annotations"].insert(0, "car"), r"Expected COCO (panoptic|instance) annotations"),
        (lambda content: content.pop("categories"), r"has no list 'categories'\. Expected COCO"),
        (_with_a_list_as_category, r"a category_id is neither a number nor a text: .*list"),
        (
            lambda content: content["categories"].append({"id": 7, "name": "x"}),
            r"'automobile' and 'x' have the same id 7",
        ),
        (
            lambda content: content["categories"].append({"id": "8", "name": "x"}),
            r"'id': '8', 'name': 'x'} has no whole number",
        ),
        (
            lambda content: content["categories"][3].update(name="car"),
            r"the categories 'automobile' \(7\) and 'car' \(3\) both belong to the class 'car'",
        ),
    ],
)
def test_categories_that_do_not_fit_the_classes_are_named(own, tmp_path, kind, change, message):
    path = own(kind)
    edit_json(tmp_path / "meine Bäume" / ANNOTATIONS[kind], change)
    with pytest.raises(ValueError, match=message) as raised:
        get_dataset(path).records()
    assert f"{path}: key 'annotations': " in str(raised.value)


def test_a_category_that_two_classes_have_among_their_synonyms_is_named(own):
    path = own("instances", classes=["car, automobile", "person", "truck, automobile"])
    assert "'automobile' (4 annotations). Several classes have it" in refusal(path, of=records_of)


def test_of_two_categories_of_a_class_the_one_that_is_used_counts(own, tmp_path):
    path = own("instances")
    edit_json(
        tmp_path / "meine Bäume" / "instances.json",
        lambda content: content["categories"].insert(0, {"id": 1, "name": "car"}),
    )
    assert get_dataset(path).metadata["thing_dataset_id_to_contiguous_id"] == {7: CAR, 3: PERSON}


def test_instances_of_stuff_are_refused(own):
    text = refusal(own("instances", classes=["car, automobile", "person:stuff"]), of=records_of)
    assert "'person'" in text and "`things`" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["images"][1].pop("height"),
            "does not say the size of image 10: it needs height and width",
        ),
        (lambda content: content["annotations"][2].pop("segmentation"), "image 10 ("),
        (
            lambda content: content["annotations"][2].update(segmentation=[]),
            "has no segmentation, and its box alone gives no",
        ),
    ],
)
def test_instances_without_a_size_or_a_mask_are_refused(own, tmp_path, change, message):
    path = own("instances")
    edit_json(tmp_path / "meine Bäume" / "instances.json", change)
    assert message in refusal(path, of=records_of)


# ---- training on it ----


@pytest.mark.parametrize(("kind", "mapper"), [(kind, mapper) for kind in KINDS for mapper in MAPPERS[kind]])
def test_every_mapper_that_fits_gives_targets(own, cfg, kind, mapper):
    path = own(kind)
    cfg.DATASETS.TRAIN = (path,)
    cfg.INPUT.DATASET_MAPPER_NAME = mapper
    cfg.INPUT.MIN_SIZE_TRAIN = (32,)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [30, 30]
    records = get_dataset(path).records()
    mapper = build_train_mapper(cfg)  # asks DATASETS.TRAIN[0] for its metadata
    samples = [mapper(record, np.random.default_rng(0)) for record in records]
    assert {*samples[0]["targets"].labels.tolist()} <= {GRASS, CAR, PERSON}
    assert len(samples[0]["targets"]) > 0 and len(samples[-1]["targets"]) == 0


def test_the_mapper_knows_the_ignore_label_of_the_yaml(own, cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.DATASETS.TRAIN = (own("semantic", ignore_label=9),)
    mapper = build_train_mapper(cfg)
    assert (mapper.ignore_label, mapper.num_classes) == (9, 4)


def test_panoptic_labels_painted_for_a_semantic_training_are_the_label_maps(own, cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    painted, stored = (get_dataset(own(kind)) for kind in ("panoptic", "semantic"))
    for number, (record, other) in enumerate(zip(painted.records(), stored.records())):
        size = classes_of(number).shape
        labels = build_train_mapper(cfg, painted.metadata).read(record, size)
        np.testing.assert_array_equal(labels, classes_of(number))
        np.testing.assert_array_equal(labels, build_train_mapper(cfg, stored.metadata).read(other, size))


def test_a_mapper_that_does_not_fit_names_those_that_do(own, cfg, kind):
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj" if kind == "instances" else "coco_instance_lsj"
    with pytest.raises(
        ValueError, match=rf"data set 'own_{kind}': .*DATASET_MAPPER_NAME to {' or '.join(MAPPERS[kind])}"
    ):
        build_train_loader(cfg, dataset=get_dataset(own(kind)))


def test_sets_with_the_same_classes_are_trained_on_together(own, tmp_path, cfg):
    first = own("panoptic")
    second = str(write_own(tmp_path / "second", "panoptic", classes="classes.txt"))
    (tmp_path / "second" / "classes.txt").write_text(LINES)
    both = joined([get_dataset(first), get_dataset(second)])
    assert both.name == "own_panoptic+own_panoptic" and len(both.records()) == 2 * NUM_IMAGES
    assert len(next(build_train_loader(cfg, dataset=both))) == 2


def test_an_own_set_with_the_classes_of_a_registered_one_goes_with_it(own, tmp_path):
    classes = Path(vocabulary.__file__).with_name("names") / "shapes_seen.json"
    mine, registered = get_dataset(own("panoptic", classes=str(classes))), get_dataset("shapes_train")
    assert joined([registered, mine]).name == "shapes_train+own_panoptic"


def test_sets_with_other_classes_or_ignore_labels_are_not(own, tmp_path):
    first = get_dataset(own("semantic"))
    other = get_dataset(write_own(tmp_path / "b", "semantic", classes=[*CLASSES[:3], "people"]))
    with pytest.raises(
        ValueError, match=r"'own_semantic' has 4 and 'own_semantic' has 4, and class 3 is 'person:thing' th"
    ):
        joined([first, other])
    with pytest.raises(ValueError, match=r"have different classes.*'own_semantic' has 4 and 'shapes_train' has 40"):
        joined([first, get_dataset("shapes_train")])
    other = get_dataset(write_own(tmp_path / "b", "semantic", ignore_label=9))
    with pytest.raises(ValueError, match=r"have the ignore labels 255 and 9"):
        joined([first, other])


def test_sets_of_two_types_are_refused_with_the_image_that_does_not_fit(own, tmp_path, cfg):
    panoptic = get_dataset(own("panoptic"))
    instances = get_dataset(str(write_own(tmp_path / "instances", "instances")))
    for both in ([panoptic, instances], [instances, panoptic]):
        with pytest.raises(ValueError, match=r"instances/images/0 ä\.jpg: the ground truth has no pan_seg_file_name"):
            build_train_loader(cfg, dataset=joined(both))
