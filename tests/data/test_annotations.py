"""What can be used of COCO annotations, and what is said of the rest."""

import logging
import math

import numpy as np
import pycocotools.mask
import pytest

from fcclip.data.annotations import KINDS, instance_entries, panoptic_entries, settle

CLASSES = {7: 0, 9: 1}  # category id -> class
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
CODE = {"size": [40, 60], "counts": [5, 10, 2385]}


def instances(**fields):
    """An instance file with one annotation, of which these fields are changed."""
    annotation = {"id": 3, "image_id": 1, "category_id": 7, "segmentation": [SQUARE], **fields}
    image = {"id": 1, "file_name": "a.jpg", "height": 40, "width": 60}
    return {"images": [image], "annotations": [annotation], "categories": [{"id": 8, "name": "bus"}]}


def segments(**fields):
    """A panoptic file with one segment, of which these fields are changed."""
    segment = {"id": 5, "category_id": 7, "iscrowd": 0, "area": 20, "bbox": [0, 0, 4, 5], **fields}
    image = {"id": 1, "file_name": "a.jpg", "height": 40, "width": 60}
    return {"images": [image], "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [segment]}]}


def only_instance(**fields):
    entries = instance_entries(instances(**fields), CLASSES)
    assert not entries.problems
    return entries.annotations[0]


def problem(entries):
    (problem,) = entries.problems
    return problem


# ---- one form ----


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        SQUARE,
        [[10, 10], [30, 10], [30, 30], [10, 30]],
        [[[10, 10], [30, 10], [30, 30], [10, 30]]],
    ],
)
def test_a_polygon_may_be_flat_or_of_corners_alone_or_in_a_list(segmentation):
    assert only_instance(segmentation=segmentation)["segmentation"] == [SQUARE]


def test_run_lengths_are_compressed_and_stay_so():
    code = only_instance(segmentation=CODE)["segmentation"]
    mask = pycocotools.mask.decode(code)
    assert mask.shape == (40, 60) and mask.sum() == 10
    assert only_instance(segmentation=code)["segmentation"] == code


@pytest.mark.parametrize(("value", "flag"), [(None, 0), (0, 0), (1, 1), (True, 1), (1.0, 1)])
def test_a_flag_is_0_or_1(value, flag):
    assert only_instance(iscrowd=value)["iscrowd"] == flag


def test_whole_numbers_may_be_written_as_floats():
    annotation = only_instance(image_id=1.0, category_id=7.0)
    assert type(annotation["image_id"]) is int and type(annotation["category_id"]) is int
    segment = panoptic_entries(segments(id=5.0), CLASSES).annotations[0]["segments_info"][0]
    assert segment["id"] == 5 and type(segment["id"]) is int


def test_optional_fields_may_be_missing_or_null():
    for content in (segments(area=None, bbox=None, iscrowd=None), segments()):
        segment = content["annotations"][0]["segments_info"][0]
        for key in ("area", "bbox", "iscrowd"):
            if segment[key] != 0:
                del segment[key]
        entries = panoptic_entries(content, CLASSES)
        assert entries.annotations[0]["segments_info"] == [{"id": 5, "category_id": 7, "iscrowd": 0}]
        assert not entries.problems


def test_backslashes_in_file_names_separate_folders():
    content = instances()
    content["images"][0]["file_name"] = "train\\a.jpg"
    assert instance_entries(content, CLASSES).images["1"]["file_name"] == "train/a.jpg"
    content = segments()
    content["annotations"][0]["file_name"] = "train\\a.png"
    assert panoptic_entries(content, CLASSES).annotations[0]["file_name"] == "train/a.png"


def test_what_comes_out_comes_out_again():
    for entries_of, content in ((instance_entries, instances(segmentation=CODE)), (panoptic_entries, segments())):
        entries = entries_of(content, CLASSES)
        again = entries_of(
            {**content, "images": [*entries.images.values()], "annotations": entries.annotations}, CLASSES
        )
        assert again == entries


# ---- what is wrong ----


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"segmentation": [[*SQUARE[:3], math.nan, *SQUARE[4:]]]}, "bad-polygon", "nan"),
        ({"segmentation": [[*SQUARE[:3], 3.5e8, *SQUARE[4:]]]}, "bad-polygon", "350000000.0"),
        ({"segmentation": [[*SQUARE[:3], math.inf, *SQUARE[4:]]]}, "bad-polygon", "inf"),
        ({"segmentation": [[*SQUARE[:3], "10", *SQUARE[4:]]]}, "bad-polygon", "'10'"),
        ({"segmentation": [[*SQUARE[:3], None, *SQUARE[4:]]]}, "bad-polygon", "None"),
        ({"segmentation": [[[[10, 10], [30, 10], [30, 30]]]]}, "broken-entry", "polygons"),
        ({"segmentation": "all"}, "broken-entry", "'all'"),
        ({"segmentation": {"size": [40, 60], "counts": [2400, -5, 5]}}, "bad-code", "40 x 60"),
        ({"segmentation": {"size": [40, 60], "counts": [7]}}, "bad-code", "40 x 60"),
        ({"segmentation": {"size": [60, 40], "counts": [2400]}}, "bad-code", "60 x 40 pixels .* 40 x 60"),
        ({"segmentation": {"size": [40, 60]}}, "bad-code", "counts"),
        ({"segmentation": []}, "no-mask", ""),
        ({"segmentation": None}, "no-mask", ""),
        ({"iscrowd": "0"}, "broken-entry", "iscrowd .*'0'"),
        ({"iscrowd": 2}, "broken-entry", "iscrowd .*2"),
        ({"area": "12"}, "broken-entry", "area .*'12'"),
        ({"category_id": [7]}, "broken-entry", r"category_id .*\[7\]"),
        ({"category_id": "7"}, "unknown-category", "category_id '7'.*2 classes, ids 7..9"),
        ({"category_id": 8}, "unknown-category", r"category_id 8 \('bus'\)"),
        ({"image_id": True}, "broken-entry", "image_id .*True"),
        ({"image_id": 2}, "unlisted-image", "image 2"),
        ({"category_id": 9}, "instance-of-stuff", "category_id 9"),
    ],
)  # fmt: skip
def test_an_instance_that_cannot_be_used_is_refused_with_its_name(fields, kind, text):
    entries = instance_entries(instances(**fields), CLASSES, things=[0])
    assert problem(entries).kind == kind and not entries.annotations
    with pytest.raises(ValueError, match=f"mine.json: .*{text}") as caught:
        settle("mine.json", entries.problems)
    assert "annotation 3" in str(caught.value) or "annotation 0 (id 3)" in str(caught.value)
    assert "a.jpg" in str(caught.value) or kind in ("broken-entry", "unlisted-image")


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"id": 0}, "void-id", "id 0"),
        ({"id": 2**24}, "void-id", "16777216"),
        ({"id": -1}, "void-id", "-1"),
        ({"id": "5"}, "broken-entry", "'5'"),
        ({"id": 5.5}, "broken-entry", "5.5"),
        ({"id": None}, "broken-entry", "None"),
        ({"category_id": None}, "broken-entry", "category_id"),
        ({"category_id": 8}, "unknown-category", "category_id 8"),
        ({"iscrowd": "0"}, "broken-entry", "iscrowd .*'0'"),
        ({"area": [3]}, "broken-entry", "area"),
    ],
)
def test_a_segment_that_cannot_be_used_is_refused_with_its_image(fields, kind, text):
    entries = panoptic_entries(segments(**fields), CLASSES)
    assert problem(entries).kind == kind and not entries.annotations[0]["segments_info"]
    with pytest.raises(ValueError, match=rf"mine\.json: .*{text}") as caught:
        settle("mine.json", entries.problems)
    assert "a.png, image 1" in str(caught.value)


def test_two_segments_with_one_id_are_refused():
    content = segments()
    content["annotations"][0]["segments_info"] *= 2
    entries = panoptic_entries(content, CLASSES)
    assert problem(entries).kind == "duplicate-segment-id" and "segment 5" in problem(entries).text


@pytest.mark.parametrize("area", [0, -3, 2401, math.nan, math.inf])
def test_an_area_that_cannot_be_true_is_taken_out(area):
    entries = panoptic_entries(segments(area=area), CLASSES)
    assert problem(entries).kind == "impossible-area" and str(area) in problem(entries).text
    assert "area" not in entries.annotations[0]["segments_info"][0]


@pytest.mark.parametrize("box", [[0, 0, 5], "all", [0, 0, math.nan, 5], [0, 0, 10**400, 5], [0, 0, None, 5], {}])
def test_a_box_that_is_not_four_numbers_is_taken_out(box):
    entries = instance_entries(instances(bbox=box), CLASSES)
    assert problem(entries).kind == "bad-box" and "bbox" not in entries.annotations[0]


def test_the_first_error_is_told_and_how_many_more_there_are():
    content = segments(id=0)
    content["annotations"] += [None, 7]
    with pytest.raises(ValueError, match=r"annotation 0 .*id 0.* 2 more"):
        settle("mine.json", panoptic_entries(content, CLASSES).problems)


def test_what_is_left_out_is_told_with_its_number_and_the_reason(caplog):
    content = instances(segmentation=[SQUARE, [10, 10, 30, 30]])
    content["annotations"] += [
        {**content["annotations"][0], "id": 4, "segmentation": [[1, 2, 3, 4]]},
        {**content["annotations"][0], "id": 5, "segmentation": [[1, 2, 3, 4, 5, 6, 7]]},
        {**content["annotations"][0], "id": 6, "segmentation": [], "iscrowd": 1},
    ]
    entries = instance_entries(content, CLASSES)
    assert [annotation["segmentation"] for annotation in entries.annotations] == [[SQUARE]]
    with caplog.at_level(logging.WARNING, logger="fcclip"):
        settle("mine.json", entries.problems)
    told = "\n".join(caplog.messages)
    assert f"2 {KINDS['flat-instance'].title}" in told and "annotation 4 of image 1 (a.jpg)" in told
    assert f"1 {KINDS['flat-polygon'].title}" in told and "1 of 2 polygons" in told
    assert f"1 {KINDS['crowd-without-mask'].title}" in told and "annotation 6" in told


@pytest.mark.parametrize("junk", [None, True, -1, 3.7, 10**40, math.nan, "", "\0", [], [[]], {}, {"size": 3}])
@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation"])
def test_whatever_stands_in_a_field_it_is_used_or_told(junk, key):
    entries = instance_entries(instances(**{key: junk}), CLASSES)
    settled = entries.problems or key in ("id", "iscrowd", "area", "bbox")
    assert settled and len(entries.annotations) + len([p for p in entries.problems if p.kind != "bad-box"]) >= 1


def test_masks_of_all_forms_of_a_polygon_are_the_same():
    codes = [
        pycocotools.mask.merge(pycocotools.mask.frPyObjects(only_instance(segmentation=form)["segmentation"], 40, 60))
        for form in (SQUARE, [np.reshape(SQUARE, (-1, 2)).tolist()])
    ]
    assert codes[0] == codes[1]
