"""Reader of COCO instance annotations, and LVIS, whose class names come from the user's file."""

import json

import pycocotools.mask
import pytest

from fcclip.data import dataset_vocabulary, get_dataset
from tests.data.published_trees import write_tree

COCO, LVIS = "openvocab_coco_2017_val", "openvocab_lvis_v1_val"


@pytest.fixture
def coco_instances(tmp_path):
    write_tree(COCO, tmp_path)
    return get_dataset(COCO, tmp_path)


@pytest.fixture
def edit(tmp_path):
    """Changes the instance JSON."""

    def edit(change):
        path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def test_a_record_has_detectron2s_fields(coco_instances, tmp_path):
    record = coco_instances.records()[0]
    assert {key: record[key] for key in ("file_name", "image_id", "height", "width")} == {
        "file_name": f"{tmp_path}/coco/val2017/000000000139.jpg",
        "image_id": 139,
        "height": 48,
        "width": 64,
    }
    assert record["annotations"][0] == {
        "iscrowd": 0,
        "bbox": [0.0, 0.0, 32.0, 24.0],
        "bbox_mode": 1,  # BoxMode.XYWH_ABS
        "category_id": 79,
        "segmentation": [[0.0, 0.0, 32.0, 0.0, 32.0, 24.0, 0.0, 24.0]],
    }


def test_records_come_in_the_order_of_their_ids_and_empty_images_stay(coco_instances):
    records = coco_instances.records()
    assert [record["image_id"] for record in records] == [139, 285, 431, 577, 723]
    assert records[-1]["annotations"] == []


def test_run_lengths_given_as_a_list_become_a_string(coco_instances):
    crowd = coco_instances.records()[0]["annotations"][2]
    assert crowd["iscrowd"] == 1 and isinstance(crowd["segmentation"]["counts"], bytes)
    mask = pycocotools.mask.decode(crowd["segmentation"])
    assert mask.shape == (48, 64) and mask[24:, :32].all() and mask.sum() == 24 * 32


@pytest.mark.parametrize("rest", [[], [[0, 0, 9, 0, 9, 9]]], ids=["alone", "with a whole one"])
def test_polygons_without_an_area_are_left_out_and_instances_with_none_left(coco_instances, edit, rest):
    broken = [[1, 1, 5, 5], [0, 0, 4, 0, 4, 4, 1]]
    edit(lambda content: content["annotations"][0].update(segmentation=broken + rest))
    annotations = coco_instances.records()[0]["annotations"]
    assert len(annotations) == (3 if rest else 2)
    assert not rest or annotations[0]["segmentation"] == rest


def test_an_annotation_may_have_no_box(coco_instances, edit):
    edit(lambda content: content["annotations"][0].pop("bbox"))
    assert "bbox_mode" not in coco_instances.records()[0]["annotations"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), r"has no list 'images'\. Expected COCO instance annotations"),
        (lambda c: c.update(annotations={}), r"has no list 'annotations'"),
        (
            lambda c: c["annotations"][1].pop("category_id"),
            r"annotation 1 \(id 900000000002\).*category_id.*Expected COCO instance",
        ),
        (lambda c: c["images"][1].pop("file_name"), r"entry 1 of 'images'.*577.*file_name"),
        (lambda c: c["images"][1].update(id=139), r"id 139: 000000000577\.jpg and 000000000139\.jpg"),
        (lambda c: c["images"][1].update(id="139"), r"id 139: 000000000577\.jpg and 000000000139\.jpg"),
        (lambda c: c["annotations"][1].update(image_id=7), r"annotation 900000000002: its image 7 .*'images'"),
        (
            lambda c: c["annotations"][1].update(category_id=91),
            r"category_id 91 .*80 classes, ids 1\.\.90.*annotation 900000000002 of image 139 \(000000000139\.jpg\)",
        ),
        (
            lambda c: c["annotations"][2].update(segmentation={"size": [48, 64]}),
            r"annotation 900000000003 of image 139 \(000000000139\.jpg\).*'counts'",
        ),
        (
            lambda c: c["images"].clear() or c["annotations"].clear(),
            r"has no records: .*instances_val2017\.json lists no",
        ),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(coco_instances, edit, change, message):
    edit(change)
    with pytest.raises(ValueError, match=rf"data set '{COCO}'.*{message}"):
        coco_instances.records()


@pytest.fixture
def lvis(tmp_path):
    write_tree(LVIS, tmp_path)
    return get_dataset(LVIS, tmp_path)


def test_lvis_takes_its_classes_from_the_file_and_writes_them_with_spaces(lvis):
    vocabulary = dataset_vocabulary(lvis)
    assert len(vocabulary) == 1203 and vocabulary.thing_classes == tuple(range(1203))
    assert vocabulary.synonyms[0] == ("aerosol can", "spray can")
    assert vocabulary.class_names[6] == "bow (weapon)"
    assert lvis.metadata["thing_dataset_id_to_contiguous_id"][1203] == 1202
    assert dict(lvis.metadata)["json_file"].endswith("lvis_v1_val.json")


def test_lvis_images_lie_in_both_folders_of_coco_and_records_say_what_was_looked_for(lvis, tmp_path):
    records = lvis.records()
    assert [record["file_name"].removeprefix(f"{tmp_path}/coco/") for record in records[:2]] == [
        "val2017/000000000139.jpg",
        "train2017/000000000285.jpg",
    ]
    assert records[0]["neg_category_ids"] == [2, 3] and records[0]["not_exhaustive_category_ids"] == [7]


def test_a_changed_file_of_lvis_is_read_again(lvis, tmp_path):
    path = tmp_path / "lvis" / "lvis_v1_val.json"
    before = lvis.metadata["stuff_classes"]
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "categories": content["categories"][:2]}))
    assert lvis.metadata["stuff_classes"] == before[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), r"has no list 'categories'\. Expected LVIS v1 annotations"),
        (lambda c: c["categories"].clear(), "has no categories"),
        (lambda c: c["categories"][3].pop("name"), "a category has no 'name'"),
    ],
)
def test_an_lvis_file_without_classes_is_named(lvis, tmp_path, change, message):
    path = tmp_path / "lvis" / "lvis_v1_val.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"lvis_v1_val\.json.*{message}|{message}"):
        lvis.metadata["stuff_classes"]


def test_published_words_of_lvis_replace_those_of_the_file(lvis, tmp_path):
    (tmp_path / "lvis_1203_with_prompt_eng.txt").write_text("".join(f"{n}:word {n}\n" for n in range(1, 1204)))
    assert dataset_vocabulary(lvis, tmp_path).class_names[-1] == "word 1203"
