"""Pixels by hand: see downloads.py for what the images hold."""

import json

import cv2
import numpy as np
import pytest
import scipy.io
from PIL import Image
from pycocotools import mask as coco_mask

# ---- VOC ----


def test_voc_keeps_its_21_values_and_loses_its_palette(downloads, prepare, values, tmp_path):
    downloads.pascal_voc(tmp_path)
    assert prepare("pascal_voc_sem_seg") == 0
    folder = "pascal_voc_d2/annotations_pascal21"
    ground, plane = [255, 0, 0, 0, 0, 0], [255, 1, 1, 1, 1, 1]
    assert values(f"{folder}/validation/2007_000033.png") == [ground, ground, plane, plane]
    assert values(f"{folder}/training/2011_003276.png") == [[20] * 4] * 3 + [[0] * 4] * 3


def test_without_background_voc_has_20_values(downloads, prepare, values, tmp_path):
    downloads.pascal_voc(tmp_path)
    assert prepare("pascal_voc_sem_seg") == 0
    folder = "pascal_voc_d2/annotations_pascal20"
    plane = [255, 0, 0, 0, 0, 0]
    assert values(f"{folder}/training/2007_000032.png") == [[255] * 6] * 2 + [plane, plane]
    assert values(f"{folder}/validation/2011_003271.png") == [[19] * 4] * 3 + [[255] * 4] * 3


def test_images_of_voc_are_copied_as_they_are_and_only_those_of_the_split(downloads, prepare, tmp_path):
    downloads.pascal_voc(tmp_path)
    assert prepare("pascal_voc_sem_seg") == 0
    folder = tmp_path / "pascal_voc_d2" / "images"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert names == [f"training/{stem}.jpg" for stem in ("2007_000032", "2011_003276")] + [
        f"validation/{stem}.jpg" for stem in ("2007_000033", "2011_003271")
    ]
    original = tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / "2007_000033.jpg"
    assert (folder / "validation" / "2007_000033.jpg").read_bytes() == original.read_bytes()


def test_a_label_map_of_voc_that_lost_its_palette_is_refused(downloads, prepare, capsys, tmp_path):
    downloads.pascal_voc(tmp_path)
    path = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000033.png"
    Image.open(path).convert("RGB").save(path)
    assert prepare("pascal_voc_sem_seg", "--splits", "val") == 1
    message = capsys.readouterr().err
    assert "2007_000033.png: pixels are of mode RGB, expected P or L" in message and "converted" in message


# ---- Context, 59 classes ----


def test_context_59_is_painted_in_the_order_of_the_annotations(downloads, prepare, values, tmp_path):
    downloads.pascal_context(tmp_path)
    assert prepare("pascal_ctx_sem_seg") == 0
    plane, sky = [0, 0, 0, 0, 0, 255], [46, 46, 46, 46, 46, 255]  # 2 and 360, the first and the 47th of the 59
    folder = "pascal_ctx_d2/annotations_ctx59"
    assert values(f"{folder}/validation/2008_000002.png") == [plane, plane, sky, sky]
    assert values(f"{folder}/training/2010_006086.png") == [[58] * 4] * 3 + [[255] * 4] * 3
    original = tmp_path / "VOCdevkit" / "VOC2010" / "JPEGImages" / "2008_000002.jpg"
    copy = tmp_path / "pascal_ctx_d2" / "images" / "validation" / "2008_000002.jpg"
    assert copy.read_bytes() == original.read_bytes()
    assert len(list((tmp_path / "pascal_ctx_d2").rglob("*.jpg"))) == 4  # the one of phase test is left out


def change_context(root, change):
    path = root / "VOCdevkit" / "VOC2010" / "trainval_merged.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def of(content, image_id):
    return [annotation for annotation in content["annos_segmentation"] if annotation["image_id"] == image_id]


def test_a_category_that_is_none_of_the_59_is_named_unless_it_is_painted_over(downloads, prepare, capsys, tmp_path):
    downloads.pascal_context(tmp_path)
    change_context(tmp_path, lambda content: of(content, 2010006082)[0].update(category_id=457))
    assert prepare("pascal_ctx_sem_seg", "--splits", "val") == 1
    assert "2010_006082: category 457 is neither 0 nor one of the 59 classes" in capsys.readouterr().err

    def cover(content):
        everywhere = {**of(content, 2010006082)[0], "category_id": 2}
        everywhere["segmentation"] = {"size": [6, 4], "counts": [0, 24]}
        content["annos_segmentation"].append(everywhere)

    change_context(tmp_path, cover)
    assert prepare("pascal_ctx_sem_seg", "--splits", "val") == 0


def test_an_image_without_annotations_has_no_class(downloads, prepare, values, tmp_path):
    downloads.pascal_context(tmp_path)
    change_context(
        tmp_path,
        lambda content: content.update(
            annos_segmentation=[
                annotation for annotation in content["annos_segmentation"] if annotation["image_id"] != 2008000002
            ]
        ),
    )
    assert prepare("pascal_ctx_sem_seg", "--splits", "val") == 0
    assert values("pascal_ctx_d2/annotations_ctx59/validation/2008_000002.png") == [[255] * 6] * 4


def test_a_mask_of_another_size_is_named(downloads, prepare, capsys, tmp_path):
    downloads.pascal_context(tmp_path)
    rle = coco_mask.encode(np.asfortranarray(np.ones((4, 6), np.uint8)))
    code = {"size": rle["size"], "counts": rle["counts"].decode()}
    change_context(tmp_path, lambda content: of(content, 2010006082)[0].update(segmentation=code))
    assert prepare("pascal_ctx_sem_seg", "--splits", "val") == 1
    assert "2010_006082: 4 x 6 pixels (height x width), but its image" in capsys.readouterr().err


def test_another_json_file_is_no_pascal_in_detail(downloads, prepare, capsys, tmp_path):
    downloads.pascal_context(tmp_path)
    change_context(tmp_path, lambda content: content.pop("annos_segmentation"))
    assert prepare("pascal_ctx_sem_seg") == 1
    assert "these are not annotations of PASCAL in Detail: KeyError('annos_segmentation')" in capsys.readouterr().err


def test_the_60_categories_are_the_published_ones(program):
    categories = program("pascal_ctx_sem_seg").CATEGORIES
    assert len(categories) == 60 and list(categories) == sorted({*categories})
    assert sum(categories) == 12378 and categories[:3] == (0, 2, 9) and categories[-1] == 458


# ---- Context, 459 classes ----


@pytest.fixture
def context(downloads, prepare, tmp_path):
    downloads.pascal_context(tmp_path)
    assert prepare("pascal_ctx_sem_seg") == 0
    return tmp_path


def test_context_459_has_16_bits_and_65535_for_none(context, prepare, values):
    assert prepare("pascal_ctx_full_sem_seg") == 0
    above, below = [0, 0, 0, 0, 0, 65535], [458, 458, 458, 458, 458, 65535]
    path = "pascal_ctx_d2/annotations_ctx459/validation/2008_000002.tif"
    assert values(path) == [above, above, below, below]
    read = cv2.imread(str(context / path), cv2.IMREAD_UNCHANGED)
    assert read.dtype == np.uint16 and read.tolist() == [above, above, below, below]
    assert values("pascal_ctx_d2/annotations_ctx459/training/2010_006086.tif")[0] == [0, 0, 0, 65535]


def test_context_459_without_context_59_says_what_to_run_first(downloads, prepare, capsys, tmp_path):
    downloads.pascal_context(tmp_path)
    assert prepare("pascal_ctx_full_sem_seg") == 1
    message = capsys.readouterr().err
    assert "pascal_ctx_d2/images/training" in message and "prepare_pascal_ctx_sem_seg.py" in message


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"LabelMap": np.full((4, 6), 460, np.uint16)}, "value 460 stands for no class, expected 0..459"),
        ({"LabelMap": np.full((4, 6), 0.5)}, "LabelMap is float64 (4, 6), expected (height, width) whole numbers"),
        ({"LabelMap": np.ones((6, 4), np.uint16)}, "6 x 4 pixels (height x width), but its image"),
        ({"Labels": np.ones((4, 6), np.uint16)}, "cannot be read as a label map: KeyError('LabelMap')"),
        (None, "cannot be read as a label map"),
        ("gone", "no such file"),
    ],
)
def test_a_mat_file_that_is_no_label_map_is_named(content, sentence, context, prepare, capsys):
    path = context / "VOCdevkit" / "VOC2010" / "trainval" / "2008_000002.mat"
    if content is None:
        path.write_bytes(path.read_bytes()[:150])
    elif content == "gone":
        path.unlink()
    else:
        scipy.io.savemat(path, content)
    assert prepare("pascal_ctx_full_sem_seg", "--splits", "val") == 1
    assert f"2008_000002.mat: {sentence}" in capsys.readouterr().err
