import json

import pytest
from PIL import Image

from fcclip.data import get_dataset


def test_a_record_has_detectron2s_fields(coco_val, coco_root):
    records = coco_val.records()
    coco = coco_root / "coco"
    assert len(records) == 6
    assert records[1] == {
        "file_name": f"{coco}/val2017/000000000101.jpg",
        "pan_seg_file_name": f"{coco}/panoptic_val2017/000000000101.png",
        "sem_seg_file_name": f"{coco}/panoptic_semseg_val2017/000000000101.png",
        "image_id": 101,
        "height": 40,
        "width": 20,
        "segments_info": [
            {"id": 70001, "category_id": 0, "isthing": True, "area": 200, "bbox": [0, 0, 1, 1], "iscrowd": 0},
            {"id": 70002, "category_id": 119, "isthing": False, "area": 200, "bbox": [0, 0, 1, 1], "iscrowd": 0},
            {"id": 70003, "category_id": 16, "isthing": True, "area": 200, "bbox": [0, 0, 1, 1], "iscrowd": 1},
        ],
    }


def test_records_keep_the_order_of_the_annotations(coco_val, edit_json):
    edit_json(lambda content: content["annotations"].reverse())
    assert [record["image_id"] for record in coco_val.records()] == [105, 104, 103, 102, 101, 100]


def test_image_ids_may_be_numbers_in_one_list_and_strings_in_the_other(coco_val, edit_json):
    edit_json(lambda content: [image.update(id=str(image["id"])) for image in content["images"]])
    record = coco_val.records()[0]
    assert (record["image_id"], record["height"], record["width"]) == (100, 24, 36)


def test_sizes_that_the_json_lacks_come_from_the_images(coco_val, edit_json):
    edit_json(lambda content: content.pop("images"))
    assert [(r["height"], r["width"]) for r in coco_val.records()] == [(24, 36), (40, 20)] * 3


def test_ids_of_ade20k_stay_strings(tmp_path):
    ade = tmp_path / "ADEChallengeData2016"
    for folder, name in (
        ("images/validation", "ADE_val_00000001.jpg"),
        ("ade20k_panoptic_val", "ADE_val_00000001.png"),
    ):
        (ade / folder).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(ade / folder / name)
    annotation = {"image_id": "ADE_val_00000001", "file_name": "ADE_val_00000001.png"}
    annotation["segments_info"] = [{"id": 5, "category_id": 7, "iscrowd": 0}]
    content = {"images": [{"id": "ADE_val_00000001", "height": 6, "width": 8}], "annotations": [annotation]}
    (ade / "ade20k_panoptic_val.json").write_text(json.dumps(content))
    (record,) = get_dataset("openvocab_ade20k_panoptic_val", tmp_path).records()
    assert record["image_id"] == "ADE_val_00000001"
    assert record["sem_seg_file_name"] == f"{ade}/annotations_detectron2/validation/ADE_val_00000001.png"
    assert record["segments_info"][0]["isthing"] is True  # bed


def test_images_of_cityscapes_lie_in_folders_of_cities(tmp_path):
    city = tmp_path / "leftImg8bit.v1" / "cityscapes"  # a root that must not be mistaken for a part of a file name
    stem = "bonn_000001_000019"
    for file in (
        f"leftImg8bit/val/bonn/{stem}_leftImg8bit.png",
        f"gtFine/cityscapes_panoptic_val/{stem}_gtFine_panoptic.png",
    ):
        (city / file).parent.mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(city / file)
    annotation = {"image_id": stem, "file_name": f"{stem}_gtFine_panoptic.png"}
    annotation["segments_info"] = [
        {"id": 26001, "category_id": 26, "iscrowd": 0},
        {"id": 7, "category_id": 7, "iscrowd": 0},
    ]
    (city / "gtFine" / "cityscapes_panoptic_val.json").write_text(json.dumps({"annotations": [annotation]}))
    (record,) = get_dataset("openvocab_cityscapes_fine_panoptic_val", city.parent).records()
    assert record["image_id"] == stem
    assert record["sem_seg_file_name"] == f"{city}/gtFine/val/bonn/{stem}_gtFine_labelTrainIds.png"
    assert [(segment["category_id"], segment["isthing"]) for segment in record["segments_info"]] == [
        (13, True),
        (0, False),
    ]
    assert (record["height"], record["width"]) == (6, 8)


def test_a_missing_json_is_named_with_the_variable_to_set(coco_val, coco_root):
    (coco_root / "coco" / "annotations" / "panoptic_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"panoptic_val2017\.json does not exist\. .*\$DETECTRON2_DATASETS"):
        coco_val.records()


def test_a_json_cut_in_half_is_named(coco_val, coco_root):
    path = coco_root / "coco" / "annotations" / "panoptic_val2017.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"panoptic_val2017\.json' is not JSON"):
        coco_val.records()


@pytest.mark.parametrize("content", ["[]", "{}", '{"annotations": {}}'])
def test_a_json_of_another_kind_is_refused(coco_val, coco_root, content):
    (coco_root / "coco" / "annotations" / "panoptic_val2017.json").write_text(content)
    with pytest.raises(ValueError, match=r"has no list 'annotations'\. Expected COCO panoptic annotations"):
        coco_val.records()


@pytest.mark.parametrize("field", ["image_id", "file_name", "segments_info"])
def test_an_annotation_without_a_field_is_refused(coco_val, edit_json, field):
    edit_json(lambda content: content["annotations"][2].pop(field))
    with pytest.raises(ValueError, match=rf"panoptic_val2017\.json: annotation 2: .*{field}"):
        coco_val.records()


def test_a_class_id_outside_the_vocabulary_is_named(coco_val, edit_json):
    edit_json(lambda content: content["annotations"][3]["segments_info"][1].update(category_id=12))
    message = r"category_id 12 .*133 classes, ids 1\.\.200.*000000000103\.png, image 103"
    with pytest.raises(ValueError, match=message):
        coco_val.records()


def test_two_annotations_of_one_image_are_refused(coco_val, edit_json):
    edit_json(lambda content: content["annotations"][2].update(image_id=101))
    with pytest.raises(ValueError, match=r"panoptic_val2017\.json: annotation 2 \(000000000102\.png, image 101\)"):
        coco_val.records()


def test_a_json_without_images_is_refused(coco_val, edit_json):
    edit_json(lambda content: content["annotations"].clear())
    with pytest.raises(ValueError, match=r"with_sem_seg' has no records: .*panoptic_val2017\.json lists no image"):
        coco_val.records()


@pytest.mark.parametrize(
    ("folder", "kind"), [("val2017/000000000100.jpg", "image"), ("panoptic_val2017/000000000100.png", "id PNG")]
)
def test_a_wrong_folder_shows_at_the_first_record(coco_val, coco_root, folder, kind):
    (coco_root / "coco" / folder).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lists the {kind} .*{folder}, which does not exist"):
        coco_val.records()


def test_semantic_label_maps_are_not_asked_for(coco_val, coco_root):
    assert not (coco_root / "coco" / "panoptic_semseg_val2017").exists()
    assert len(coco_val.records()) == 6
