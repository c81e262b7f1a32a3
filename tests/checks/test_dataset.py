"""What the checker of data sets finds, what it leaves alone, and that it agrees with what loads the data."""

import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fcclip.checks.dataset import check_dataset, choose_images
from fcclip.checks.findings import KINDS, SEVERITIES
from fcclip.checks.images import regions
from fcclip.checks.processes import Death, map_in_processes
from fcclip.data import DATASETS, build_train_mapper, dataset_vocabulary, get_dataset
from tests.data.published_trees import SIZES, write_ids, write_image, write_labels, write_tree

PANOPTIC = "openvocab_coco_2017_val_panoptic_with_sem_seg"
INSTANCES = "openvocab_coco_2017_val"
SEMANTIC = "openvocab_pascal_ctx59_sem_seg_val"
DEEP = "openvocab_ade20k_full_sem_seg_val"
ADE20K = "openvocab_ade20k_panoptic_val"
CITYSCAPES = "openvocab_cityscapes_fine_panoptic_val"
NAMES = sorted(name for name in DATASETS if not name.startswith("shapes_"))
HARMLESS = {"count", "unused-class", "grey"}  # of every small tree: its fourth image is grey


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Function name -> a tree of that data set, which nobody changes; its path has spaces and letters like ü and 日."""
    folder = tmp_path_factory.mktemp("trees")

    def tree(name):
        root = folder / f"Daten für {name} 日本"
        if not root.exists():
            write_tree(name, root)
        return root

    return tree


@pytest.fixture
def copy(trees, tmp_path):
    """Function name -> (data set, its root), to be damaged."""

    def make(name):
        root = tmp_path / "été 1"
        shutil.copytree(trees(name), root)
        return get_dataset(name, root), root

    return make


def kinds(report):
    """Kinds of findings that a whole tree does not have."""
    return {one.kind for one in report.findings} - HARMLESS


def only(report, kind, count=1):
    """The findings of the only kind there is."""
    assert kinds(report) == {kind}, [(one.kind, one.file, one.what) for one in report.findings]
    found = [one for one in report.findings if one.kind == kind]
    assert len(found) == count
    return found[0] if count == 1 else found


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---- what is whole ----


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_tree_has_no_error_and_no_warning_but_the_number_of_its_images(trees, name, fast):
    report = check_dataset(get_dataset(name, trees(name)), fast=fast)
    assert report.count("error") == 0, [(one.file, one.what) for one in report.findings]
    assert {one.kind for one in report.findings if one.severity == "warning"} == {"count"}
    assert report.num_images == (5 if name in ("openvocab_coco_2017_train", "openvocab_coco_2017_val") else 4)
    assert sum(one.images > 0 for one in report.classes) == (3 if report.knows_classes else 0)
    assert report.knows_classes == (not fast or report.kind != "semantic")


def test_classes_are_counted_in_images_segments_and_pixels(trees):
    report = check_dataset(get_dataset(PANOPTIC, trees(PANOPTIC)))
    quarter = sum((height // 2) * (width // 2) for height, width in SIZES)
    brush = next(one for one in report.classes if one.name == "toothbrush")
    assert (brush.images, brush.segments, brush.pixels, brush.thing) == (4, 4, quarter, True)
    assert report.num_crowds == 4
    fast = check_dataset(get_dataset(PANOPTIC, trees(PANOPTIC)), fast=True)
    assert fast.classes == report.classes  # areas in the JSON are right


def test_classes_are_seen_or_not_by_the_words_of_the_training_set(trees):
    training = dataset_vocabulary(PANOPTIC)
    dataset = get_dataset(SEMANTIC, trees(SEMANTIC))
    report = check_dataset(dataset, fast=True, training=training)
    seen = dataset_vocabulary(dataset).seen_by(training)
    assert [one.seen for one in report.classes] == seen.tolist()
    assert report.training == training.name
    assert check_dataset(dataset, fast=True).classes[0].seen is None


def test_every_kind_has_a_severity_and_says_what_to_do():
    assert all(one.severity in SEVERITIES and one.title and one.remedy for one in KINDS.values())


# ---- images ----

FIRST = "coco/val2017/000000000139.jpg"  # 48 x 64


def as_format(path, image, file_format, **options):
    """Writes an image in a format that its name does not tell."""
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    path.write_bytes(stream.getvalue())


def turned(orientation, transposed=False):
    """A JPEG with an EXIF orientation; `transposed`: stored as 64 x 48, so that the turn makes 48 x 64 of it."""

    def damage(path):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.open(path).convert("RGB")
        as_format(path, image.transpose(Image.Transpose.ROTATE_90) if transposed else image, "JPEG", exif=exif)

    return damage


def deep_image(path):
    ramp = np.linspace(0, 65535, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint16)
    path.write_bytes(cv2.imencode(".png", ramp)[1].tobytes())


def dark_image(path):
    path.write_bytes(cv2.imencode(".png", np.full((48, 64), 4095, np.uint16))[1].tobytes())


def with_alpha(value):
    return lambda path: as_format(path, Image.new("RGBA", (64, 48), (10, 20, 30, value)), "PNG")


# what is done to the first image: kind of the finding with pixels and without, words in it, whether it can be loaded
IMAGES = {
    "missing": (Path.unlink, "missing-image", "missing-image", "no such file", False),
    "zero bytes": (lambda path: path.write_bytes(b""), "unreadable-image", "unreadable-image", "0 bytes", False),
    "a web page": (
        lambda path: path.write_text("<html>not found</html>"),
        "unreadable-image", "unreadable-image", "no known image format", False,
    ),
    "cut off": (
        lambda path: path.write_bytes(path.read_bytes()[:-500]), "unreadable-image", "cut-off", "", False,
    ),
    "larger": (lambda path: write_image(path, (96, 128), 1), "image-size", "image-size", "96 x 128", False),
    "fractions": (
        lambda path: as_format(path, Image.new("F", (64, 48), 0.5), "TIFF"),
        "unreadable-image", "unreadable-image", "black", False,
    ),
    "turned by EXIF, labelled as stored": (turned(6), "turned", "turned", "turned to 64 x 48", False),
    "turned by EXIF, labelled upright": (turned(6, True), "turned-right", "turned-right", "turned to 48 x 64", True),
    "turned by EXIF by 180 degrees": (turned(3), "turned-unclear", "turned-unclear", "orientation 3", True),
    "grey": (lambda path: as_format(path, Image.new("L", (64, 48), 9), "JPEG"), None, None, "", True),
    "CMYK": (lambda path: as_format(path, Image.new("CMYK", (64, 48)), "JPEG"), "cmyk", "cmyk", "", True),
    "16 bits": (deep_image, "deep", "deep", "16 bits a channel", True),
    "12 of 16 bits": (dark_image, "deep", "deep", "16 bits a channel", True),
    "opaque alpha": (with_alpha(255), "alpha", "alpha", "alpha channel", True),
    "transparent": (with_alpha(90), "transparent", "alpha", "", True),
    "another format than its name": (
        lambda path: as_format(path, Image.new("RGB", (64, 48)), "PNG"), None, None, "", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("case", IMAGES)
def test_a_image_is_judged_as_the_loader_takes_it(copy, cfg, case, fast):
    damage, slow_kind, fast_kind, words, loads = IMAGES[case]
    dataset, root = copy(PANOPTIC)
    record = dataset.records()[0]
    damage(root / FIRST)
    report = check_dataset(dataset, fast=fast)
    kind = fast_kind if fast else slow_kind
    if kind is None:
        assert not kinds(report)
    else:
        found = only(report, kind)
        assert found.file == record["file_name"] == str(root / FIRST)
        assert words in found.what
        assert fast or (found.severity == "error") == (not loads)
    mapper = build_train_mapper(cfg, dataset.metadata)
    if loads:
        assert mapper(record, np.random.default_rng(0))["image"].shape[0] == 3
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=Path(FIRST).name):
            mapper(record, np.random.default_rng(0))


def test_a_image_of_12_bits_is_said_to_be_nearly_black(copy):
    dataset, root = copy(PANOPTIC)
    dark_image(root / FIRST)
    assert "brightest value that is left is 15 of 255: nearly black" in only(check_dataset(dataset), "deep").what


def test_a_missing_image_is_told_with_the_file_that_was_probably_meant(copy):
    dataset, root = copy(PANOPTIC)
    (root / FIRST).rename((root / FIRST).with_suffix(".JPEG"))
    report = check_dataset(dataset)
    assert kinds(report) == {"missing-image", "unlisted-file"}
    (found,) = (one for one in report.findings if one.kind == "missing-image")
    assert found.what == "no such file, but there is 000000000139.JPEG"
    assert found.remedy == "rename it, or the entry"


@pytest.mark.parametrize("name", [SEMANTIC, INSTANCES])
def test_a_image_that_exif_turns_away_from_its_labels_is_an_error_of_every_kind_of_data(copy, name):
    dataset, _ = copy(name)
    record = next(one for one in dataset.records() if (one["height"], one["width"]) == (48, 64))
    turned(8)(Path(record["file_name"]))
    found = [one for one in check_dataset(dataset).findings if one.kind == "turned"]
    assert [one.file for one in found] == [record["file_name"]]
    assert "stored and labelled as 48 x 64 (height x width), turned to 64 x 48" in found[0].what


def test_files_that_nobody_lists_are_noted(copy):
    dataset, root = copy(PANOPTIC)
    write_image(root / "coco/val2017/000000000999.jpg", (8, 8), 5)
    write_ids(root / "coco/panoptic_val2017/000000000999.png", np.ones((8, 8), int))
    (root / "coco/val2017/._000000000999.jpg").touch()
    (root / "coco/val2017/readme.txt").touch()
    report = check_dataset(dataset)
    assert kinds(report) == {"unlisted-file", "unlisted-labels"}
    assert {Path(one.file).name for one in report.findings if one.kind.startswith("unlisted")} == {
        "000000000999.jpg", "000000000999.png",
    }  # fmt: skip
    assert report.count("error") == 0


# ---- id PNGs ----

IDS = "coco/panoptic_val2017/000000000139.png"


def shift_ids(step):
    def damage(path):
        pixels = np.asarray(Image.open(path)).astype(int)
        ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
        write_ids(path, np.where(ids > 0, ids + step, 0))

    return damage


def without_a_segment(path):
    pixels = np.array(Image.open(path))
    pixels[:24, :32] = 0
    Image.fromarray(pixels).save(path)


def smaller_segment(path):
    pixels = np.array(Image.open(path))
    pixels[0, :32] = 0
    Image.fromarray(pixels).save(path)


ID_MAPS = {  # what is done to the first id PNG: kind of finding, words in it, whether it can be loaded
    "missing": (Path.unlink, "missing-ids", "no such file", False),
    "zero bytes": (lambda path: path.write_bytes(b""), "unreadable-labels", "0 bytes", False),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-80]), "unreadable-labels", "", False),
    "ids higher by one": (shift_ids(1), "unknown-id", "every id is higher by one", False),
    "ids lower by one": (shift_ids(-1), "unknown-id", "every id is lower by one", False),
    "of another size": (lambda path: write_ids(path, np.zeros((50, 50), int)), "label-size", "50 x 50", False),
    "16 bits": (
        lambda path: path.write_bytes(cv2.imencode(".png", np.ones((48, 64, 3), np.uint16))[1].tobytes()),
        "unreadable-labels", "16 bits", False,
    ),
    "a JPEG": (lambda path: as_format(path, Image.open(path), "JPEG"), "lossy-labels", "a JPEG file", False),
    "a segment without a pixel": (without_a_segment, "empty-segment", "id 3226956", True),
}  # fmt: skip


@pytest.mark.parametrize("case", ID_MAPS)
def test_an_id_png_is_judged_as_the_loader_takes_it(copy, cfg, case):
    damage, kind, words, loads = ID_MAPS[case]
    dataset, root = copy(PANOPTIC)
    record = dataset.records()[0]
    damage(root / IDS)
    report = check_dataset(dataset)
    found = [one for one in report.findings if one.kind == kind]
    assert [one.file for one in found] == [str(root / IDS)], kinds(report)
    assert words in found[0].what
    assert found[0].severity == ("warning" if loads else "error")
    mapper = build_train_mapper(cfg, dataset.metadata)
    if loads:
        mapper(record, np.random.default_rng(0))
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=Path(IDS).name):
            mapper(record, np.random.default_rng(0))


def test_areas_and_boxes_are_compared_with_the_pixels(copy):
    dataset, root = copy(PANOPTIC)
    smaller_segment(root / IDS)
    report = check_dataset(dataset)
    assert only(report, "area").what == "id 3226956: 768 in the JSON, 736 in the PNG"


def test_a_box_of_a_segment_in_another_form_is_noted(copy):
    dataset, root = copy(PANOPTIC)
    change = lambda content: content["annotations"][0]["segments_info"][1].update(bbox=[32, 0, 64, 24])  # noqa: E731
    edit(root / "coco/annotations/panoptic_val2017.json", change)
    found = only(check_dataset(dataset), "box-of-segment")
    assert "[32, 0, 64, 24] in the JSON, [32, 0, 32, 24] around its pixels" in found.what


def test_what_ade20k_was_published_with_is_a_note(copy):
    """Areas of stuff from before things were painted over it, and two segments with one id."""
    dataset, root = copy(ADE20K)

    def change(content):
        segments = content["annotations"][0]["segments_info"]
        segments[1]["area"] += 100
        segments.append({**segments[0], "category_id": 3})

    edit(root / "ADEChallengeData2016/ade20k_panoptic_val.json", change)
    report = check_dataset(dataset)
    assert kinds(report) == {"area", "duplicate-segment-id"}
    assert {one.severity for one in report.findings if one.kind not in HARMLESS} == {"note"}


def test_a_label_map_that_contradicts_the_id_png_is_found(copy):
    dataset, root = copy(PANOPTIC)
    path = root / "coco/panoptic_semseg_val2017/000000000139.png"
    labels = np.array(Image.open(path))
    labels[labels == 119] = 118
    write_labels(path, labels)
    found = only(check_dataset(dataset), "labels-disagree")
    assert found.what.startswith(
        "33% of the pixels with a class, e.g. 'ceiling-merged' where the id PNG has 'sky-other-"
    )


def test_panoptic_data_without_label_maps_can_be_used(copy):
    dataset, root = copy(PANOPTIC)
    shutil.rmtree(root / "coco/panoptic_semseg_val2017")
    assert only(check_dataset(dataset), "no-label-maps").severity == "warning"


def test_one_missing_label_map_is_an_error(copy):
    dataset, root = copy(PANOPTIC)
    (root / "coco/panoptic_semseg_val2017/000000000285.png").unlink()
    assert only(check_dataset(dataset), "missing-labels").severity == "error"


# ---- label maps ----


def labels_of(root):
    return sorted((root / "pascal_ctx_d2/annotations_ctx59/validation").iterdir())


def test_a_label_that_is_no_class_is_told_with_what_it_may_mean(copy):
    dataset, root = copy(SEMANTIC)
    first = labels_of(root)[0]
    labels = np.array(Image.open(first))
    labels[labels == 0] = 59
    write_labels(first, labels)
    found = only(check_dataset(dataset), "unknown-label")
    assert found.file == str(first)
    assert "59 (768 pixels); classes are 0..58, unlabelled is 255" in found.what
    assert "if labels begin at 1, subtract 1 from all; if 59 means unlabelled, set ignore_label: 59" in found.remedy


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda path: Image.open(path).convert("RGB").save(path), "coloured-labels", "three channels"),
        (lambda path: Image.open(path).convert("RGBA").save(path), "coloured-labels", "four channels"),
        (lambda path: Image.open(path).convert("1").save(path), "coloured-labels", "one bit a pixel"),
        (lambda path: as_format(path, Image.open(path), "JPEG"), "lossy-labels", "JPEG"),
        (lambda path: Image.open(path).resize((32, 24)).save(path), "label-size", "24 x 32"),
        (lambda path: path.write_bytes(b""), "unreadable-labels", "0 bytes"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_label_maps_of_the_wrong_type_or_size_are_errors(copy, damage, kind, words, fast):
    dataset, root = copy(SEMANTIC)
    damage(labels_of(root)[0])
    found = only(check_dataset(dataset, fast=fast), kind)
    assert (found.severity, found.file) == ("error", str(labels_of(root)[0]))
    assert words in found.what


def test_palettes_and_16_bits_are_label_maps(copy):
    dataset, root = copy(SEMANTIC)
    first, second, *_ = labels_of(root)
    palette = Image.open(first)
    palette.putpalette(list(range(256)) * 3)
    palette.save(first)
    write_labels(second, np.array(Image.open(second)).astype(np.uint16))
    assert not kinds(check_dataset(dataset))


def test_a_map_without_a_label_is_noted_and_a_data_set_without_one_refused(copy):
    dataset, root = copy(SEMANTIC)
    for number, path in enumerate(labels_of(root)):
        write_labels(path, np.full_like(np.array(Image.open(path)), 255))
        report = check_dataset(dataset)
        assert sum(one.kind == "empty" for one in report.findings) == number + 1
        assert ("nothing-labelled" in kinds(report)) == (number == 3)


def test_images_and_label_maps_without_a_partner_are_named(copy):
    dataset, root = copy(SEMANTIC)
    labels_of(root)[0].rename(labels_of(root)[0].with_name("other.png"))
    report = check_dataset(dataset)
    assert {(one.kind, Path(one.file).name) for one in report.findings if one.kind not in HARMLESS} == {
        ("without-labels", "2007_000033.jpg"),
        ("without-image", "other.png"),
    }


def test_a_folder_of_files_with_another_ending_is_told(copy):
    dataset, root = copy(SEMANTIC)
    for path in (root / "pascal_ctx_d2/images/validation").iterdir():
        path.rename(path.with_suffix(".jpeg"))
    found = only(check_dataset(dataset), "no-images")
    assert "4 '.jpeg'" in found.what


def test_missing_folders_are_one_finding_each(tmp_path):
    report = check_dataset(get_dataset(SEMANTIC, tmp_path))
    assert len(only(report, "missing-folder", count=2)) == 2
    assert report.records is None


def test_a_missing_folder_of_own_data_is_one_finding(copy):
    _, root = copy(PANOPTIC)
    edit(root / PANOPTIC_JSON, of_three_categories)
    shutil.rmtree(root / "coco/val2017")
    report = check_dataset(get_dataset(str(own_panoptic(root, ["dog", "sky", "brush"]))))
    assert only(report, "missing-folder").file == str(root / "coco/val2017")


def test_a_missing_file_of_instance_ids_of_cityscapes_is_named(copy):
    dataset, root = copy(CITYSCAPES)
    folder = root / "cityscapes/gtFine/val"
    path = folder / "lindau/lindau_000000_000019_gtFine_instanceIds.png"
    path.unlink()
    assert only(check_dataset(dataset), "missing-instance-ids").file == str(path)
    for path in folder.glob("*/*_gtFine_instanceIds.png"):
        path.unlink()
    found = only(check_dataset(dataset, fast=True), "missing-instance-ids")
    assert (found.file, found.what) == (str(folder), "none of 4 *_gtFine_instanceIds.png is there")
    assert found.severity == "warning"


# ---- annotation files ----

PANOPTIC_JSON = "coco/annotations/panoptic_val2017.json"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "", "not valid JSON"),
        (lambda text: "[" * 100_000, ""),
        (lambda text: "[]", "has no list 'annotations'"),
        (lambda text: '{"annotations": 7}', "has no list 'annotations'"),
    ],
)
@pytest.mark.parametrize("name", [PANOPTIC, INSTANCES, "openvocab_lvis_v1_val"])
def test_an_annotation_file_that_cannot_be_read_is_one_finding(copy, name, text, words):
    dataset, _ = copy(name)
    path = Path(dataset.metadata.get("panoptic_json") or dataset.metadata["json_file"])
    path.write_text(text(path.read_text()))
    report = check_dataset(dataset)
    found = only(report, "annotation-file")
    assert (found.file, found.severity) == (str(path), "error")
    assert words.replace("'annotations'", "'") in found.what
    assert report.records is None


def test_an_annotation_file_that_is_a_image_or_a_folder_is_one_finding(copy):
    dataset, root = copy(PANOPTIC)
    (root / PANOPTIC_JSON).write_bytes((root / FIRST).read_bytes())
    only(check_dataset(dataset), "annotation-file")
    (root / PANOPTIC_JSON).unlink()
    (root / PANOPTIC_JSON).mkdir()
    only(check_dataset(dataset), "annotation-file")


def segment(content, image=1, number=0):
    return content["annotations"][image]["segments_info"][number]


# change of the panoptic JSON: kind, words, whether the reader refuses the file, images that are still looked at
ENTRIES = {
    "two annotations of one image": (
        lambda content: content["annotations"][1].update(image_id=139), "duplicate-image-id", "image_id 139", True, 3,
    ),
    "a file listed twice": (
        lambda content: content["annotations"][1].update(file_name="000000000139.png"),
        "duplicate-file", "000000000139.png", False, 3,
    ),
    "a category that is no class": (
        lambda content: segment(content).update(category_id=12),
        "unknown-category", "category_id 12: 1 segment, first in 000000000285.png", True, 4,
    ),
    "no segments": (
        lambda content: content["annotations"][2].pop("segments_info"), "broken-entry", "annotation 2", True, 3,
    ),
    "segments that are none": (
        lambda content: content["annotations"][2].update(segments_info=[7]), "broken-entry", "no object", True, 4,
    ),
    "an annotation that is none": (lambda content: content["annotations"].append(None), "broken-entry", "", True, 4),
    "an id that is a text": (lambda content: segment(content).update(id="7"), "broken-entry", "'7'", False, 4),
    "an area that is a text": (lambda content: segment(content).update(area="7"), "broken-entry", "area '7'", False, 4),
    "a box of three numbers": (
        lambda content: segment(content).update(bbox=[1, 2, 3]), "broken-entry", "bbox", False, 4,
    ),
    "the id of unlabelled pixels": (lambda content: segment(content).update(id=0), "void-id", "id 0", False, 4),
    "two segments with one id": (
        lambda content: content["annotations"][1]["segments_info"].append(dict(segment(content))),
        "duplicate-segment-id", "000000000285.png", False, 4,
    ),
    "an image without annotation": (
        lambda content: content["annotations"].pop(), "no-annotation", "000000000577.jpg", False, 3,
    ),
    "an annotation without image": (
        lambda content: content["images"].pop(), "unlisted-image", "000000000577.png", False, 4,
    ),
    "no sizes": (lambda content: content["images"][0].pop("height"), "size-not-told", "1 image: ", False, 4),
    "a negative size": (lambda content: content["images"][0].update(height=-1), "broken-entry", "-1", False, 4),
    "a thing that is stuff": (
        lambda content: content["categories"][0].update(isthing=0), "isthing", "'person' (id 1) is stuff in", False, 4,
    ),
    "a category that is not listed": (
        lambda content: content["categories"].pop(79), "category-not-listed", "90", False, 4,
    ),
    "no categories": (lambda content: content.pop("categories"), "category-not-listed", "no list", False, 4),
    "a name of other case": (
        lambda content: content["categories"][0].update(name="Person"),
        "category-spelling", "'Person' (id 1)", False, 4,
    ),
    "another name": (
        lambda content: content["categories"][0].update(name="human"),
        "category-name", "'human' for 'person'", False, 4,
    ),
    "a category listed twice": (
        lambda content: content["categories"].append({"id": 1, "name": "person"}), "categories", "id 1", False, 4,
    ),
    "two categories of one name": (
        lambda content: content["categories"][1].update(name="person"), "categories", "ids 1 and 2", False, 4,
    ),
}  # fmt: skip


def test_a_segment_left_out_for_its_category_is_told_once(copy):
    dataset, root = copy(PANOPTIC)
    edit(root / PANOPTIC_JSON, lambda content: segment(content).update(category_id=12))
    only(check_dataset(dataset), "unknown-category")


JUNK = (
    None, True, -1, 3.7, 10**30, float("nan"), "", "日本", [], [1], [[1e30] * 6], [["a"] * 6], {}, {"size": [1]},
    {"size": ["a", 2], "counts": "0"}, {"size": [48, 64], "counts": [-5, 10]}, {"size": [48, 64], "counts": None},
)  # fmt: skip
ANYWHERE = [
    *((PANOPTIC, PANOPTIC_JSON, "annotations", key) for key in ("image_id", "file_name", "segments_info")),
    *((PANOPTIC, PANOPTIC_JSON, "segments", key) for key in ("id", "category_id", "iscrowd", "area", "bbox")),
    *((INSTANCES, "coco/annotations/instances_val2017.json", "annotations", key) for key in (
        "id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation")),
    *((INSTANCES, "coco/annotations/instances_val2017.json", "images", key) for key in (
        "id", "file_name", "height", "width")),
    *(("openvocab_lvis_v1_val", "lvis/lvis_v1_val.json", "categories", key) for key in ("id", "name", "synonyms")),
    *((PANOPTIC, PANOPTIC_JSON, "categories", key) for key in ("id", "name", "isthing")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "entries", "key"), ANYWHERE)
def test_whatever_stands_in_an_annotation_file_nothing_raises(copy, name, file, entries, key):
    root = copy(name)[1]
    whole = (root / file).read_text()
    for junk in JUNK:
        content = json.loads(whole)
        listed = content["annotations"][1]["segments_info"] if entries == "segments" else content[entries]
        for value in (junk, "removed"):
            if value == "removed":
                listed[1].pop(key, None)
            else:
                listed[1][key] = value
            (root / file).write_text(json.dumps(content))
            report = check_dataset(get_dataset(name, root))
            assert not [one.what for one in report.findings if one.kind == "checker"]
            json.dumps(report.as_dict())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("case", ENTRIES)
def test_a_wrong_entry_is_told_and_the_rest_is_looked_at(copy, case, fast):
    change, kind, words, refused, left = ENTRIES[case]
    dataset, root = copy(PANOPTIC)
    edit(root / PANOPTIC_JSON, change)
    if refused:
        with pytest.raises((ValueError, TypeError)):
            dataset.annotations()
    report = check_dataset(dataset, fast=fast)
    found = [one for one in report.findings if one.kind == kind]
    assert len(found) == 1 and words in found[0].what, [(one.kind, one.what) for one in report.findings]
    assert found[0].file == str(root / PANOPTIC_JSON)
    assert not refused or found[0].severity == "error"
    assert report.num_images == left


def test_names_that_are_mostly_others_are_those_of_another_data_set(copy):
    dataset, root = copy(PANOPTIC)

    def change(content):
        for number, category in enumerate(content["categories"]):
            category["name"] = f"thing {number}"

    edit(root / PANOPTIC_JSON, change)
    assert "133 of 133: 'thing 0' for 'person'" in only(check_dataset(dataset), "other-categories").what


def test_missing_files_of_the_first_record_do_not_end_the_check(copy):
    dataset, root = copy(PANOPTIC)
    (root / FIRST).unlink()
    (root / IDS).unlink()
    with pytest.raises(FileNotFoundError):
        dataset.annotations()
    report = check_dataset(dataset)
    assert kinds(report) == {"missing-image", "missing-ids"}
    assert report.num_images == 4
    with pytest.raises(FileNotFoundError):
        dataset.annotations()  # as before


def test_the_instances_of_a_panoptic_set_are_looked_at_too(copy):
    dataset, root = copy(PANOPTIC)
    path = root / "coco/annotations/instances_val2017.json"
    edit(path, lambda content: content["images"].pop())
    report = check_dataset(dataset)
    assert kinds(report) == {"other-images", "unlisted-image"}
    path.unlink()
    assert only(check_dataset(dataset), "no-instances-file").severity == "warning"


# ---- instances ----

INSTANCE_ENTRIES = {
    "a category that is no class": (lambda one: one.update(category_id=12), "unknown-category", True),
    "an image that is not listed": (lambda one: one.update(image_id=5), "unlisted-image", True),
    "an id used twice": (lambda one: one.update(id=900_000_000_001), "duplicate-annotation-id", False),
    "no segmentation": (lambda one: one.pop("segmentation"), "no-mask", False),
    "a polygon of two corners": (lambda one: one.update(segmentation=[[0, 0, 5, 5]]), "bad-polygon", False),
    "a run-length code without size": (lambda one: one.update(segmentation={"counts": "abc"}), "bad-code", True),
    "a run-length code of another size": (
        lambda one: one.update(segmentation={"size": [5, 5], "counts": [25]}), "bad-code", False,
    ),
    "a run-length code that is too short": (
        lambda one: one.update(segmentation={"size": [64, 48], "counts": "55"}), "bad-code", False,
    ),
    "a run-length code of other letters": (
        lambda one: one.update(segmentation={"size": [64, 48], "counts": "\x00~é"}), "bad-code", False,
    ),
    "a segmentation that is none": (lambda one: one.update(segmentation="all"), "broken-entry", None),
    "no category": (lambda one: one.pop("category_id"), "broken-entry", True),
    "a box out of the image": (lambda one: one.update(bbox=[40, 0, 60, 24]), "box", False),
    "a box without a size": (lambda one: one.update(bbox=[3, 3, 0, 5]), "box", False),
    "a box elsewhere": (lambda one: one.update(bbox=[0, 24, 5, 5]), "box", False),
    "an area far off": (lambda one: one.update(area=10), "instance-area", False),
}  # fmt: skip


@pytest.mark.parametrize("case", INSTANCE_ENTRIES)
def test_a_wrong_instance_is_told_and_the_rest_is_looked_at(copy, case):
    change, kind, refused = INSTANCE_ENTRIES[case]
    dataset, root = copy(INSTANCES)
    edit(root / "coco/annotations/instances_val2017.json", lambda content: change(content["annotations"][4]))
    if refused:
        with pytest.raises(ValueError):
            dataset.annotations()
    report = check_dataset(dataset)
    found = [one for one in report.findings if one.kind == kind]
    assert len(found) == 1, [(one.kind, one.what) for one in report.findings]
    assert not refused or found[0].severity == "error"
    assert report.num_images == 5


def test_images_without_instances_and_with_crowds_only_are_told_apart(copy):
    dataset, root = copy(INSTANCES)

    def change(content):
        for one in content["annotations"]:
            one["iscrowd"] = int(one["image_id"] == 139 or one["iscrowd"])

    edit(root / "coco/annotations/instances_val2017.json", change)
    report = check_dataset(dataset)
    assert kinds(report) == {"empty", "crowd-only"}
    assert {(one.kind, Path(one.file).stem) for one in report.findings if one.kind not in HARMLESS} == {
        ("empty", "000000000723"), ("crowd-only", "000000000139"),
    }  # fmt: skip


def test_a_panoptic_image_of_crowds_and_one_without_segments_are_noted(copy):
    dataset, root = copy(PANOPTIC)

    def change(content):
        for one in content["annotations"][0]["segments_info"]:
            one["iscrowd"] = 1
        content["annotations"][1]["segments_info"].clear()

    edit(root / PANOPTIC_JSON, change)
    write_ids(root / "coco/panoptic_val2017/000000000285.png", np.zeros((64, 48), int))
    assert kinds(check_dataset(dataset)) == {"crowd-only", "empty"}


# ---- own data ----


def own_panoptic(root, classes, things="[brush, dog]"):
    path = root / "coco" / "mine.yaml"
    path.write_text(
        f"type: panoptic\nimages: val2017\nannotations: annotations/panoptic_val2017.json\nmasks: panoptic_val2017\n"
        f"classes: {json.dumps(classes)}\nthings: {things}\n"
    )
    return path


def of_three_categories(content):
    """What the tree uses, with names of the user's own."""
    content["categories"] = [
        {"id": 90, "name": "brush", "isthing": 1}, {"id": 187, "name": "sky", "isthing": 0},
        {"id": 18, "name": "dog", "isthing": 1},
    ]  # fmt: skip


def test_own_data_are_checked_by_their_yaml(copy):
    _, root = copy(PANOPTIC)
    edit(root / PANOPTIC_JSON, of_three_categories)
    report = check_dataset(get_dataset(str(own_panoptic(root, ["dog", "sky", "brush", "cow"]))))
    assert only(report, "class-not-listed").what == "cow"
    assert [(one.name, one.images, one.thing) for one in report.classes] == [
        ("dog", 4, True), ("sky", 4, False), ("brush", 4, True), ("cow", 0, False),
    ]  # fmt: skip
    assert report.num_published is None


def test_own_data_whose_json_has_no_categories_are_told_what_is_missing(copy):
    _, root = copy(PANOPTIC)
    edit(root / PANOPTIC_JSON, lambda content: content.pop("categories"))
    report = check_dataset(get_dataset(str(own_panoptic(root, ["dog", "sky", "brush"]))))
    found = [one.what for one in report.findings if one.kind == "annotation-file"]
    assert len(found) == 1 and "has no list 'categories'" in found[0]


def test_a_category_of_own_data_that_differs_by_case_is_told_with_the_class(copy):
    _, root = copy(PANOPTIC)
    edit(root / PANOPTIC_JSON, of_three_categories)
    dataset = get_dataset(str(own_panoptic(root, ["Dog", "sky", "brush"], things="[brush]")))
    with pytest.raises(ValueError, match="'Dog' differs only by case"):
        dataset.annotations()
    report = check_dataset(get_dataset(str(own_panoptic(root, ["Dog", "sky", "brush"], things="[brush]"))))
    found = {one.kind: one for one in report.findings if one.severity == "error"}
    assert "category_id 18 ('dog'): 4 segments" in found["unknown-category"].what
    assert found["unknown-category"].remedy == "write 'Dog' in both"
    assert report.num_images == 4


def test_a_class_that_training_spells_otherwise_is_told(copy):
    _, root = copy(PANOPTIC)
    edit(root / PANOPTIC_JSON, of_three_categories)
    dataset = get_dataset(str(own_panoptic(root, ["dog", "sky", "brush", "Traffic-Light"])))
    report = check_dataset(dataset, training=dataset_vocabulary(PANOPTIC))
    (found,) = (one for one in report.findings if one.kind == "almost-seen")
    assert found.what == "'Traffic-Light': its word 'Traffic-Light' is 'traffic light' in training"
    assert found.severity == "warning"


def test_own_label_maps_are_checked(copy):
    _, root = copy(SEMANTIC)
    path = root / "mine.yml"
    folder = "pascal_ctx_d2/{}/validation"
    names = json.dumps([f"class {number}" for number in range(59)])
    path.write_text(
        f"type: semantic\nimages: {folder.format('images')}\nannotations: {folder.format('annotations_ctx59')}\n"
        f"classes: {names}\nignore_label: 200\n"
    )
    found = only(check_dataset(get_dataset(str(path))), "unknown-label", count=4)
    assert all(one.remedy.endswith("if 255 means unlabelled, set ignore_label: 255") for one in found)


# ---- processes ----


def test_processes_find_what_this_one_finds(copy):
    dataset, root = copy(PANOPTIC)
    shift_ids(1)(root / IDS)
    (root / FIRST).unlink()
    calls = []
    report = check_dataset(dataset, workers=2, progress=lambda done, total: calls.append((done, total)))
    alone = check_dataset(dataset)
    assert report.findings == alone.findings
    assert report.classes == alone.classes
    assert calls[-1] == (4, 4)


def test_a_file_that_kills_its_process_is_named_and_the_others_are_done():
    jobs = ["1 + 1", "__import__('os')._exit(3)", "2 + 2", "__import__('os').kill(__import__('os').getpid(), 9)", "3"]
    results = dict(map_in_processes(eval, jobs, workers=1, chunk=3))
    assert results == {0: 2, 1: Death(3), 2: 4, 3: Death(-9), 4: 3}
    assert str(results[1]) == "exit code 3"
    assert str(results[3]) == "signal 9 (SIGKILL), which the system sends when memory runs out"


def test_jobs_are_taken_as_they_are_needed():
    taken = []
    jobs = (taken.append(number) or str(number) for number in range(1000))
    results = map_in_processes(eval, jobs, workers=1, chunk=4)
    next(results)
    assert len(taken) == 4
    results.close()


def test_the_order_in_which_images_are_done_changes_nothing(trees, monkeypatch):
    dataset = get_dataset("openvocab_coco_2017_val", trees("openvocab_coco_2017_val"))
    monkeypatch.setattr("fcclip.checks.dataset._EXAMPLES", 2)
    expected = check_dataset(dataset)
    backwards = lambda function, jobs, **_: [*enumerate(map(function, jobs))][::-1]  # noqa: E731
    monkeypatch.setattr("fcclip.checks.dataset.map_in_processes", backwards)
    report = check_dataset(dataset)
    assert (report.classes, report.findings) == (expected.classes, expected.findings)
    assert {one.examples for one in report.classes if one.images} == {(0, 1)}


def test_a_process_that_died_is_a_finding(copy, monkeypatch):
    dataset, _ = copy(PANOPTIC)
    monkeypatch.setattr("fcclip.checks.dataset.map_in_processes", lambda *_, **__: [(2, Death(-11))])
    found = [one for one in check_dataset(dataset).findings if one.kind == "process-died"]
    assert [(Path(one.file).name, one.severity) for one in found] == [("000000000431.jpg", "error")]
    assert "signal 11 (SIGSEGV)" in found[0].what


def test_a_mistake_of_the_checker_does_not_end_the_check(copy, monkeypatch):
    dataset, _ = copy(PANOPTIC)
    monkeypatch.setattr("fcclip.checks.images.read_id_map", lambda path: 1 / 0)
    report = check_dataset(dataset)
    assert {one.kind for one in report.findings if one.severity == "error"} == {"checker"}
    assert report.count("error") == 4


def test_a_negative_number_of_processes_is_refused(copy):
    with pytest.raises(ValueError, match="the number of workers must be 0 or more, got -1"):
        check_dataset(copy(PANOPTIC)[0], workers=-1)


# ---- regions and reports ----


def test_regions_have_the_area_and_the_box_of_their_pixels():
    numbers = np.random.default_rng(0).integers(0, 5, (13, 17))
    numbers[4:9, 3:16] = 7
    found = regions(numbers)
    assert found.values.tolist() == np.unique(numbers).tolist()
    for value, area, (x, y, width, height) in zip(found.values, found.areas, found.boxes):
        rows, columns = np.nonzero(numbers == value)
        assert area == len(rows)
        assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert found.lengths.sum() == numbers.size
    np.testing.assert_array_equal(numbers.ravel()[found.starts], found.values[found.which])


def test_a_map_of_one_number_is_one_region():
    found = regions(np.full((3, 4), 9))
    assert (found.values.tolist(), found.areas.tolist(), found.boxes.tolist()) == ([9], [12], [[0, 0, 4, 3]])


def test_findings_of_one_kind_and_remedy_are_a_group_and_errors_come_first(copy):
    dataset, root = copy(PANOPTIC)
    for path in (root / "coco/val2017").iterdir():
        path.write_bytes(b"")
    report = check_dataset(dataset)
    groups = report.groups()
    assert (groups[0][0].kind, len(groups[0])) == ("unreadable-image", 4)
    order = [SEVERITIES.index(one.severity) for group in groups for one in group]
    assert order == sorted(order)
    content = json.loads(json.dumps(report.as_dict()))
    assert content["errors"] == 4 and len(content["findings"]) == len(report.findings)
    assert len(content["classes"]) == 133 and content["vocabulary"]["sha256"] == report.vocabulary.hash


def test_images_to_look_at_show_rare_classes_are_spread_and_are_good(copy):
    dataset, root = copy(SEMANTIC)
    folder = root / "pascal_ctx_d2"
    for number in range(40):
        write_image(folder / f"images/validation/z_{number:02d}.jpg", (8, 8), number)
        labels = np.full((8, 8), 3, np.uint8)
        labels[0, 0] = 40 if number in (17, 23) else 3
        write_labels(folder / f"annotations_ctx59/validation/z_{number:02d}.png", labels)
    (folder / "images/validation/z_17.jpg").write_bytes(b"")
    report = check_dataset(dataset)
    names = [Path(report.records[one]["file_name"]).stem for one in choose_images(report, 8)]
    assert len(names) == len(set(names)) == 8
    assert "z_23" in names and "z_17" not in names
    assert sum(name.startswith("z_") for name in names) >= 5  # spread over the set
    assert choose_images(report, 8) == choose_images(check_dataset(dataset), 8)
    assert len(choose_images(report, 1000)) == 43
    assert choose_images(report, 0) == []
