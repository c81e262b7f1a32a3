"""What the check of data sets finds, what it leaves alone, and that it agrees with what loads the data."""

import io
import json
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fcclip.checks.dataset import check_dataset, in_processes
from fcclip.checks.images import areas_of
from fcclip.checks.kinds import KINDS
from fcclip.checks.preview import chosen_records
from fcclip.config import get_cfg
from fcclip.data import DATASETS, build_train_mapper, dataset_vocabulary, get_dataset
from tests.data.own_world import edit_json
from tests.data.published_trees import SIZES, write_ids, write_image, write_labels, write_tree

PANOPTIC = "openvocab_coco_2017_val_panoptic_with_sem_seg"
INSTANCES = "openvocab_coco_2017_val"
SEMANTIC = "openvocab_pascal_ctx59_sem_seg_val"
ADE20K = "openvocab_ade20k_panoptic_val"
CITYSCAPES = "openvocab_cityscapes_fine_panoptic_val"
LVIS = "openvocab_lvis_v1_val"
NAMES = sorted(name for name in DATASETS if not name.startswith("shapes_"))
HARMLESS = {"count", "unused-class"}  # of every small tree
PANOPTIC_JSON = "coco/annotations/panoptic_val2017.json"
INSTANCES_JSON = "coco/annotations/instances_val2017.json"
FIRST = "coco/val2017/000000000139.jpg"  # 48 x 64
IDS = "coco/panoptic_val2017/000000000139.png"
LABELS = "pascal_ctx_d2/annotations_ctx59/validation"


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


@pytest.fixture
def loads():
    """Function (data set, record) -> whether the mapper of training takes a record; the first file is named if not."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.INPUT.FORMAT, cfg.INPUT.IMAGE_SIZE = "cpu", "RGB", 32
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"

    def load(dataset, record):
        try:
            build_train_mapper(cfg, dataset.metadata)(record, np.random.default_rng(0))
        except (ValueError, FileNotFoundError) as error:
            assert Path(record["file_name"]).stem in str(error)
            return False
        return True

    return load


def kinds(report):
    """Kinds of issues that a whole tree does not have."""
    return {issue.kind for issue in report.issues} - HARMLESS


def of_kind(report, kind):
    return [issue for issue in report.issues if issue.kind == kind]


def only(report, kind):
    """The only issue there is."""
    assert kinds(report) == {kind}, [(issue.kind, issue.file, issue.text) for issue in report.issues]
    (issue,) = of_kind(report, kind)
    return issue


# ---- what is whole ----


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_tree_has_no_error_and_no_warning_but_the_number_of_its_images(trees, name):
    report = check_dataset(get_dataset(name, trees(name)))
    assert report.issues.count("error") == 0, [(issue.file, issue.text) for issue in report.issues]
    assert {issue.kind for issue in report.issues if issue.level == "warning"} == {"count"}
    assert report.num_images == (5 if name in ("openvocab_coco_2017_train", "openvocab_coco_2017_val") else 4)
    assert sum(entry.images > 0 for entry in report.classes) == 3


def test_classes_are_counted_in_images_segments_and_pixels(trees):
    report = check_dataset(get_dataset(PANOPTIC, trees(PANOPTIC)))
    quarter = sum((height // 2) * (width // 2) for height, width in SIZES)
    brush = next(entry for entry in report.classes if entry.name == "toothbrush")
    assert (brush.images, brush.segments, brush.pixels, brush.thing) == (4, 4, quarter, True)


@pytest.mark.parametrize("shape", [(13, 17), (1, 1), (3, 4)])
def test_areas_are_the_pixels_of_each_number(shape):
    numbers = np.random.default_rng(0).integers(0, 5, shape)
    values, counts = np.unique(numbers, return_counts=True)
    assert areas_of(numbers) == dict(zip(values.tolist(), counts.tolist()))


def test_classes_are_seen_or_not_by_the_vocabulary_of_the_training_set(trees):
    training = dataset_vocabulary(PANOPTIC)
    dataset = get_dataset(SEMANTIC, trees(SEMANTIC))
    report = check_dataset(dataset, training=training)
    seen = dataset_vocabulary(dataset).seen_by(training)
    assert [entry.seen for entry in report.classes] == seen.tolist()
    assert report.training == training.name
    assert check_dataset(dataset).classes[0].seen is None


def test_palettes_and_16_bits_are_label_maps(copy):
    dataset, root = copy(SEMANTIC)
    first, second, *_ = sorted((root / LABELS).iterdir())
    palette = Image.open(first)
    palette.putpalette(list(range(256)) * 3)
    palette.save(first)
    write_labels(second, np.array(Image.open(second)).astype(np.uint16))
    assert not kinds(check_dataset(dataset))


# ---- images and id PNGs ----


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


def deep(shape):
    """A PNG of 16 bits a channel."""
    return lambda path: path.write_bytes(cv2.imencode(".png", np.full(shape, 4095, np.uint16))[1].tobytes())


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-80])


def empty_file(path):
    path.write_bytes(b"")


# what is done to the first image: kind of the issue, a part of its text
IMAGES = {
    "missing": (Path.unlink, "missing-image", "no such file"),
    "zero bytes": (empty_file, "unreadable-image", "0 bytes"),
    "a web page": (lambda path: path.write_text("<html>"), "unreadable-image", "format"),
    "cut off": (cut_off, "unreadable-image", ""),
    "larger": (lambda path: write_image(path, (96, 128), 1), "image-size", "96 x 128"),
    "fractions": (lambda path: as_format(path, Image.new("F", (64, 48), 0.5), "TIFF"), "unreadable-image", "black"),
    "turned by EXIF, labelled as stored": (turned(6), "turned", "turned to 64 x 48"),
    "turned by EXIF, labelled upright": (turned(6, True), None, ""),
    "turned by EXIF by 180 degrees": (turned(3), "turned-unclear", "orientation 3"),
    "grey": (lambda path: as_format(path, Image.new("L", (64, 48), 9), "JPEG"), None, ""),
    "another format than its name": (lambda path: as_format(path, Image.new("RGB", (64, 48)), "PNG"), None, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_is_judged_as_the_loader_takes_it(copy, loads, case):
    damage, kind, text = IMAGES[case]
    dataset, root = copy(PANOPTIC)
    record = dataset.records()[0]
    damage(root / FIRST)
    report = check_dataset(dataset)
    if kind is None:
        assert not kinds(report)
    else:
        issue = only(report, kind)
        assert issue.file == record["file_name"] == str(root / FIRST) and text in issue.text
    assert loads(dataset, record) == (report.issues.count("error") == 0)


def shift_ids(path):
    pixels = np.asarray(Image.open(path)).astype(int)
    ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
    write_ids(path, np.where(ids > 0, ids + 1, 0))


def without_pixels(rows):
    """The first rows of the segment 3226956, 768 pixels in 24 rows, are unlabelled."""

    def damage(path):
        pixels = np.array(Image.open(path))
        pixels[:rows, :32] = 0
        Image.fromarray(pixels).save(path)

    return damage


ID_MAPS = {  # what is done to the first id PNG: kind of issue, a part of its text
    "missing": (Path.unlink, "missing-ids", "no such file"),
    "zero bytes": (empty_file, "unreadable-labels", "0 bytes"),
    "cut off": (cut_off, "unreadable-labels", ""),
    "ids higher by one": (shift_ids, "unknown-id", "; the JSON has "),
    "of another size": (lambda path: write_ids(path, np.zeros((50, 50), int)), "label-size", "50 x 50"),
    "16 bits": (deep((48, 64, 3)), "unreadable-labels", "8 bits a channel"),
    "a JPEG": (lambda path: as_format(path, Image.open(path), "JPEG"), "lossy-labels", "JPEG"),
    "a segment without a pixel": (without_pixels(24), "empty-segment", "id 3226956"),
    "a smaller segment": (without_pixels(1), "area", "id 3226956: 768 in the JSON, 736 in the PNG"),
}


@pytest.mark.parametrize("case", ID_MAPS)
def test_an_id_png_is_judged_as_the_loader_takes_it(copy, loads, case):
    damage, kind, text = ID_MAPS[case]
    dataset, root = copy(PANOPTIC)
    record = dataset.records()[0]
    damage(root / IDS)
    report = check_dataset(dataset)
    (issue,) = of_kind(report, kind)
    assert issue.file == str(root / IDS) and text in issue.text
    assert loads(dataset, record) == (report.issues.count("error") == 0)


@pytest.mark.parametrize("name", [SEMANTIC, INSTANCES])
def test_an_image_that_exif_turns_away_from_its_labels_is_an_error_of_every_kind_of_data(copy, name):
    dataset, _ = copy(name)
    record = next(entry for entry in dataset.records() if (entry["height"], entry["width"]) == (48, 64))
    turned(8)(Path(record["file_name"]))
    (issue,) = of_kind(check_dataset(dataset), "turned")
    assert issue.file == record["file_name"] and issue.level == "error"


# ---- folders, label maps, the set as a whole ----


def change_labels(number, to):
    def damage(path):
        labels = np.array(Image.open(path))
        labels[labels == number] = to
        write_labels(path, labels)

    return damage


def rename(ending):
    def damage(folder):
        for path in folder.iterdir():
            path.rename(path.with_suffix(ending))

    return damage


def add_files(root):
    write_image(root / "val2017/000000000999.jpg", (8, 8), 5)
    (root / "val2017/._000000000999.jpg").touch()
    (root / "val2017/readme.txt").touch()


def instance_ids(pattern):
    def damage(folder):
        for path in folder.glob(pattern):
            path.unlink()

    return damage


MAP = f"{LABELS}/2007_000033.png"
GT_FINE = "cityscapes/gtFine/val"
# data set, file or folder, what is done to it: kinds of issues, level of the worst, texts in them
FILES = {
    "a class that the id PNG contradicts": (
        PANOPTIC, "coco/panoptic_semseg_val2017/000000000139.png", change_labels(119, 118),
        {"labels-disagree"}, "warning", ["33%", "ceiling-merged"],
    ),
    "no label maps": (PANOPTIC, "coco/panoptic_semseg_val2017", shutil.rmtree, {"no-label-maps"}, "warning", []),
    "a missing label map": (
        PANOPTIC, "coco/panoptic_semseg_val2017/000000000285.png", Path.unlink, {"missing-labels"}, "error", [],
    ),
    "more files": (PANOPTIC, "coco", add_files, {"unlisted-file"}, "note", ["000000000139.jpg"]),
    "no instances": (PANOPTIC, INSTANCES_JSON, Path.unlink, {"no-instances-file"}, "warning", []),
    "instances of other images": (
        PANOPTIC, INSTANCES_JSON, lambda path: edit_json(path, lambda content: content["images"].pop()),
        {"other-images", "unlisted-image"}, "error", ["1 of 4"],
    ),
    "a label of no class": (
        SEMANTIC, MAP, change_labels(0, 59), {"unknown-label"}, "error",
        ["59 (768 pixels)", "0..58", "255", "begin at 1", "ignore_label: 59"],
    ),
    "coloured": (
        SEMANTIC, MAP, lambda path: Image.open(path).convert("RGB").save(path), {"unreadable-labels"}, "error", ["RGB"],
    ),
    "a JPEG": (
        SEMANTIC, MAP, lambda path: as_format(path, Image.open(path), "JPEG"), {"lossy-labels"}, "error", ["JPEG"],
    ),
    "a smaller map": (
        SEMANTIC, MAP, lambda path: Image.open(path).resize((32, 24)).save(path), {"label-size"}, "error", ["24 x 32"],
    ),
    "a map of another name": (
        SEMANTIC, MAP, lambda path: path.rename(path.with_name("other.png")),
        {"without-labels", "without-image"}, "warning", [],
    ),
    "images of another ending": (
        SEMANTIC, "pascal_ctx_d2/images/validation", rename(".jpeg"), {"no-images"}, "error", ["4 '.jpeg'"],
    ),
    "a missing folder": (
        SEMANTIC, "pascal_ctx_d2/images/validation", shutil.rmtree, {"missing-folder"}, "error", ["no such folder"],
    ),
    "a missing file of instance ids": (
        CITYSCAPES, GT_FINE, instance_ids("lindau/lindau_000000_*_instanceIds.png"),
        {"missing-instance-ids"}, "warning", [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_damaged_and_missing_files_are_named(copy, case):
    name, file, damage, expected, level, texts = FILES[case]
    dataset, root = copy(name)
    assert (root / file).exists()
    damage(root / file)
    report = check_dataset(dataset)
    assert kinds(report) == expected, [(issue.kind, issue.file, issue.text) for issue in report.issues]
    issues = [issue for issue in report.issues if issue.kind in expected]
    assert issues[0].level == level
    said = " ".join(f"{issue.text} {issue.remedy}" for issue in issues)
    assert all(text in said for text in texts), said


def test_a_map_without_a_label_is_noted_and_a_data_set_without_one_refused(copy):
    dataset, root = copy(SEMANTIC)
    for number, path in enumerate(sorted((root / LABELS).iterdir())):
        write_labels(path, np.full_like(np.array(Image.open(path)), 255))
        report = check_dataset(dataset)
        assert len(of_kind(report, "empty")) == number + 1
        assert ("nothing-labelled" in kinds(report)) == (number == 3)


def test_areas_that_ade20k_was_published_with_are_a_note(copy):
    """Areas of stuff are from before things were painted over it."""
    dataset, root = copy(ADE20K)

    def change(content):
        content["annotations"][0]["segments_info"][1]["area"] += 100

    edit_json(root / "ADEChallengeData2016/ade20k_panoptic_val.json", change)
    report = check_dataset(dataset)
    assert kinds(report) == {"area"}
    assert {issue.level for issue in report.issues if issue.kind not in HARMLESS} == {"note"}


# ---- annotation files ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "", "empty"),
        (lambda text: "[" * 100_000, ""),
        (lambda text: "[]", "no list '"),
        (lambda text: '{"annotations": 7}', "no list '"),
        (None, ""),
    ],
)
@pytest.mark.parametrize("name", [PANOPTIC, INSTANCES, LVIS])
def test_an_annotation_file_that_cannot_be_read_is_one_issue(copy, name, text, said):
    dataset, _ = copy(name)
    path = Path(dataset.metadata.get("panoptic_json") or dataset.metadata["json_file"])
    if text is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(text(path.read_text()))
    report = check_dataset(dataset)
    issue = only(report, "annotation-file")
    assert (issue.file, issue.level) == (str(path), "error") and said in issue.text
    assert report.records is None


def segment(content, image=1, number=0):
    return content["annotations"][image]["segments_info"][number]


def rename_all(content):
    for number, category in enumerate(content["categories"]):
        category["name"] = f"thing {number}"


# change of the panoptic JSON: kind, a part of its text, images that are still looked at
ENTRIES = {
    "two annotations of one image": (
        lambda content: content["annotations"][1].update(image_id=139), "duplicate-image-id", "image 139", 3,
    ),
    "a file listed twice": (
        lambda content: content["annotations"][1].update(file_name="000000000139.png"),
        "duplicate-file", "000000000139.png", 4,
    ),
    "a category that is not a class": (
        lambda content: segment(content).update(category_id=12),
        "unknown-category", "000000000285.png, image 285", 4,
    ),
    "a box of three numbers": (
        lambda content: segment(content).update(bbox=[1, 2, 3]), "bad-box", "bbox", 4,
    ),
    "an area larger than the image": (
        lambda content: segment(content).update(area=1e9), "impossible-area", "000000000285.png", 4,
    ),
    "an image without annotation": (
        lambda content: content["annotations"].pop(), "no-annotation", "000000000577.jpg", 3,
    ),
    "an annotation without image": (
        lambda content: content["images"].pop(), "unknown-size", "577", 4,
    ),
    "other names": (rename_all, "other-categories", "133 of 133: 'thing 0' for 'person'", 4),
    "a category listed twice": (
        lambda content: content["categories"].append({"id": 1, "name": "person"}), "categories", "id 1", 4,
    ),
    "two categories of one name": (
        lambda content: content["categories"][1].update(name="person"), "categories", "ids 1 and 2", 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENTRIES)
def test_a_wrong_entry_is_told_and_the_rest_is_looked_at(copy, case):
    change, kind, text, left = ENTRIES[case]
    dataset, root = copy(PANOPTIC)
    edit_json(root / PANOPTIC_JSON, change)
    report = check_dataset(dataset)
    (issue,) = of_kind(report, kind)
    assert text in issue.text and issue.file == str(root / PANOPTIC_JSON)
    assert refuses(dataset) == (issue.level == "error" and kind != "categories")  # classes go by id
    assert report.num_images == left


def refuses(dataset):
    try:
        dataset.annotations()
    except ValueError:
        return True
    return False


def test_a_segment_left_out_for_its_category_is_told_once(copy):
    dataset, root = copy(PANOPTIC)
    edit_json(root / PANOPTIC_JSON, lambda content: segment(content).update(category_id=12))
    only(check_dataset(dataset), "unknown-category")


# change of an instance: kind
INSTANCE_ENTRIES = {
    "a category that is not a class": (lambda entry: entry.update(category_id=12), "unknown-category"),
    "an image that is not listed": (lambda entry: entry.update(image_id=5), "unlisted-image"),
    "no segmentation": (lambda entry: entry.pop("segmentation"), "no-mask"),
    "a polygon of two corners": (lambda entry: entry.update(segmentation=[[0, 0, 5, 5]]), "flat-instance"),
    "a run-length code of another size": (
        lambda entry: entry.update(segmentation={"size": [5, 5], "counts": [25]}), "bad-code",
    ),
    "no category": (lambda entry: entry.pop("category_id"), "broken-entry"),
}  # fmt: skip


@pytest.mark.parametrize("case", INSTANCE_ENTRIES)
def test_a_wrong_instance_is_told_and_the_rest_is_looked_at(copy, case):
    change, kind = INSTANCE_ENTRIES[case]
    dataset, root = copy(INSTANCES)
    edit_json(root / INSTANCES_JSON, lambda content: change(content["annotations"][4]))
    report = check_dataset(dataset)
    (issue,) = of_kind(report, kind)
    assert refuses(dataset) == (issue.level == "error")
    assert report.num_images == 5


JUNK = (
    None, True, -1, 3.7, 10**30, float("nan"), "", "日本", [], [1], [[1e30] * 6], [["a"] * 6], {}, {"size": [1]},
    {"size": ["a", 2], "counts": "0"}, {"size": [48, 64], "counts": [-5, 10]}, {"size": [48, 64], "counts": None},
)  # fmt: skip
ANYWHERE = [
    *((PANOPTIC, PANOPTIC_JSON, "annotations", key) for key in ("image_id", "file_name", "segments_info")),
    *((PANOPTIC, PANOPTIC_JSON, "segments", key) for key in ("id", "category_id", "iscrowd", "area", "bbox")),
    *((INSTANCES, INSTANCES_JSON, "annotations", key) for key in (
        "id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation")),
    *((INSTANCES, INSTANCES_JSON, "images", key) for key in ("id", "file_name", "height", "width")),
    *((LVIS, "lvis/lvis_v1_val.json", "categories", key) for key in ("id", "name", "synonyms")),
    *((PANOPTIC, PANOPTIC_JSON, "categories", key) for key in ("id", "name", "isthing")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "entries", "key"), ANYWHERE)
def test_whatever_stands_in_an_annotation_file_nothing_raises(copy, name, file, entries, key):
    root = copy(name)[1]
    whole = (root / file).read_text()
    for junk in (*JUNK, "removed"):
        content = json.loads(whole)
        listed = content["annotations"][1]["segments_info"] if entries == "segments" else content[entries]
        if junk == "removed":
            listed[1].pop(key, None)
        else:
            listed[1][key] = junk
        (root / file).write_text(json.dumps(content))
        report = check_dataset(get_dataset(name, root))
        assert not of_kind(report, "checker")
        json.dumps(report.as_dict())


def test_images_without_instances_and_without_segments_are_noted(copy, trees):
    dataset, root = copy(PANOPTIC)
    edit_json(root / PANOPTIC_JSON, lambda content: content["annotations"][1]["segments_info"].clear())
    write_ids(root / "coco/panoptic_val2017/000000000285.png", np.zeros((64, 48), int))
    assert Path(only(check_dataset(dataset), "empty").file).stem == "000000000285"
    report = check_dataset(get_dataset(INSTANCES, trees(INSTANCES)))
    assert Path(only(report, "empty").file).stem == "000000000723"


# ---- own data ----


@pytest.fixture
def own_panoptic(copy):
    """Function (classes, categories=True) -> the data set of a YAML, and its root; the JSON has names of the user's."""

    def make(classes, things=("brush", "dog"), categories=True):
        root = copy(PANOPTIC)[1]
        names = {90: "brush", 187: "sky", 18: "dog"}
        entries = [{"id": number, "name": name, "isthing": int(name != "sky")} for number, name in names.items()]
        edit_json(root / PANOPTIC_JSON, lambda content: content.update(categories=entries if categories else None))
        path = root / "coco" / "mine.yaml"
        path.write_text(
            "type: panoptic\nimages: val2017\nannotations: annotations/panoptic_val2017.json\nmasks: panoptic_val2017\n"
            f"classes: {json.dumps(classes)}\nthings: {json.dumps(things)}\n"
        )
        return get_dataset(str(path)), root

    return make


def test_own_data_are_checked_by_their_yaml(own_panoptic):
    dataset, root = own_panoptic(["dog", "sky", "brush", "cow"])
    report = check_dataset(dataset)
    assert not kinds(report) and of_kind(report, "unused-class")[0].text == "1 of 4: cow"
    assert [(entry.name, entry.images, entry.thing) for entry in report.classes] == [
        ("dog", 4, True), ("sky", 4, False), ("brush", 4, True), ("cow", 0, False),
    ]  # fmt: skip
    assert report.num_published is None
    shutil.rmtree(root / "coco/val2017")
    assert of_kind(check_dataset(dataset), "missing-folder")[0].file == str(root / "coco/val2017")


def test_own_data_whose_json_has_no_categories_are_told_what_is_missing(own_panoptic):
    (issue,) = of_kind(check_dataset(own_panoptic(["dog", "sky", "brush"], categories=False)[0]), "annotation-file")
    assert "no list 'categories'" in issue.text


def test_a_category_of_own_data_that_differs_by_case_is_told_with_the_class(own_panoptic):
    dataset, _ = own_panoptic(["Dog", "sky", "brush"], things=["brush"])
    with pytest.raises(ValueError, match="'Dog'"):
        dataset.annotations()
    report = check_dataset(dataset)
    (issue,) = of_kind(report, "categories")
    assert "'dog'" in issue.text and "'Dog'" in issue.remedy
    assert report.num_images == 4


def test_names_that_are_nearly_those_of_training_or_of_another_class_are_told(own_panoptic):
    dataset, _ = own_panoptic(["dog", "sky", "brush", "Traffic-Light", "S k y", "hound, dog"])
    report = check_dataset(dataset, training=dataset_vocabulary(PANOPTIC))
    alike, issue = of_kind(report, "almost-seen")
    assert "'Traffic-Light'" in issue.text and "'traffic light'" in issue.text and issue.level == "warning"
    assert "'S k y'" in alike.text
    assert "classes 1 and 4" in of_kind(report, "similar-names")[0].text
    assert "'dog' (dog, hound)" in of_kind(report, "shared-synonym")[0].text


# ---- processes ----


def test_processes_find_what_this_one_finds(copy):
    dataset, root = copy(PANOPTIC)
    shift_ids(root / IDS)
    (root / FIRST).unlink()
    calls = []
    report = check_dataset(dataset, workers=2, progress=lambda done, total: calls.append((done, total)))
    alone = check_dataset(dataset)
    assert (report.issues, report.classes) == (alone.issues, alone.classes)
    assert calls[-1] == (4, 4)


def test_jobs_are_taken_as_processes_need_them_and_one_that_kills_its_process_ends_them():
    taken = []
    jobs = (
        taken.append(number) or f"{number} if {number} != 300 else __import__('os')._exit(3)" for number in range(999)
    )
    results = in_processes(eval, jobs, workers=1)
    assert [next(results) for _ in range(256)] == list(range(256)) == taken
    with pytest.raises(BrokenProcessPool):
        list(results)


def test_an_image_whose_process_died_is_an_error(copy, monkeypatch):
    def die(function, jobs, *, workers):
        yield function(next(jobs))
        raise BrokenProcessPool

    dataset, _ = copy(PANOPTIC)
    monkeypatch.setattr("fcclip.checks.dataset.in_processes", die)
    (issue,) = of_kind(check_dataset(dataset), "process-died")
    assert (Path(issue.file).name, issue.level) == ("000000000285.jpg", "error")
    assert "3 images were not looked at" in issue.text


def test_a_mistake_of_the_check_does_not_end_it(copy, monkeypatch):
    dataset, _ = copy(PANOPTIC)
    monkeypatch.setattr("fcclip.checks.images.read_id_map", lambda path: 1 / 0)
    report = check_dataset(dataset)
    assert {issue.kind for issue in report.issues if issue.level == "error"} == {"checker"}
    assert report.issues.count("error") == 4


# ---- reports ----


def test_errors_come_first_and_json_has_every_issue_and_class(copy):
    dataset, root = copy(PANOPTIC)
    for path in (root / "coco/val2017").iterdir():
        path.write_bytes(b"")
    report = check_dataset(dataset)
    levels = [("error", "warning", "note").index(issue.level) for issue in report.issues]
    assert levels == sorted(levels) and [issue.kind for issue in report.issues][:4] == ["unreadable-image"] * 4
    content = json.loads(json.dumps(report.as_dict()))
    assert content["errors"] == 4 and len(content["issues"]) == len(report.issues)
    assert len(content["classes"]) == 133 and content["vocabulary"]["sha256"] == report.vocabulary.hash


def test_every_kind_says_what_to_do():
    assert all(kind.level in ("error", "warning", "note") and kind.title and kind.remedy for kind in KINDS.values())


def test_images_to_look_at_are_spread_and_are_good(copy):
    dataset, root = copy(SEMANTIC)
    folder = root / "pascal_ctx_d2"
    for number in range(40):
        write_image(folder / f"images/validation/z_{number:02d}.jpg", (8, 8), number)
        write_labels(root / LABELS / f"z_{number:02d}.png", np.full((8, 8), 3, np.uint8))
    (folder / "images/validation/z_17.jpg").write_bytes(b"")
    report = check_dataset(dataset)
    names = [record["file_name"] for record in chosen_records(report, 8)]
    assert len(set(names)) == 8 and names == sorted(names)
    everything = [Path(record["file_name"]).stem for record in chosen_records(report, 1000)]
    assert len(everything) == 43 and "z_17" not in everything
