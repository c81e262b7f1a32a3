import pytest


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
