"""PASCAL-5^i and COCO-20^i on four images each."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fcclip.data import get_dataset
from fcclip.data.catalog import PAIRS
from fcclip.data.datasets.folds import COCO_20I, NUM_FOLDS, PASCAL_5I, fold_dataset
from fcclip.vocabulary import Vocabulary

IMAGES = ["2007_000001", "2007_000002", "2008_000003", "2008_000004"]
LISTED = {0: [(0, 1), (1, 5)], 1: [(0, 6), (2, 8)], 2: [(1, 15)], 3: [(2, 20), (3, 20)]}  # fold -> (image, class)


def write_pascal(root, *, masks="SegmentationClassAug", ending="\n"):
    for folder in (masks, "VOCdevkit/VOC2012/JPEGImages", "pascal_5i/trn", "pascal_5i/val"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in IMAGES:
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / "VOCdevkit/VOC2012/JPEGImages" / f"{name}.jpg")
        Image.fromarray(np.zeros((20, 30), np.uint8)).save(root / masks / f"{name}.png")
    for kind in ("trn", "val"):
        for fold, pairs in LISTED.items():
            lines = "\n".join(f"{IMAGES[image]}__{label:02d}" for image, label in pairs)
            (root / "pascal_5i" / kind / f"fold{fold}.txt").write_text(lines + ending)


@pytest.fixture(params=["SegmentationClassAug", "VOCdevkit/VOC2012/SegmentationClassAug"])
def root(tmp_path, request):
    write_pascal(tmp_path, masks=request.param)
    return tmp_path


@pytest.mark.parametrize("folds", [PASCAL_5I, COCO_20I], ids=lambda folds: folds.name)
@pytest.mark.parametrize("names", ["", "readable_"])
def test_novel_and_base_classes_partition_the_classes(tmp_path, folds, names):
    novel_everywhere = Counter()
    for fold in range(NUM_FOLDS):
        train, val = (
            get_dataset(f"{folds.name}_{names}fold{fold}_{split}", tmp_path).own_vocabulary().class_names
            for split in ("train", "val")
        )
        assert set(train).isdisjoint(val) and len(train) == 3 * len(val)
        novel_everywhere.update(val)
    assert set(novel_everywhere.values()) == {1}
    assert set(novel_everywhere) == set(Vocabulary.builtin(f"{folds.name}_{names}".rstrip("_")).class_names)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("pascal_5i_fold2_val", "diningtable, dog, horse, motorbike, person"),
        ("pascal_5i_readable_fold3_val", "potted plant, sheep, sofa, train, tv monitor"),
        ("coco_20i_fold0_val", "person, aeroplane, boat, parkingmeter, dog, elephant, backpack, suitcase, sportsball"),
        ("coco_20i_fold3_val", "motorbike, truck, stopsign, cat, cow, giraffe, tie, snowboard, baseballglove, bottle"),
        ("coco_20i_readable_fold1_val", "bicycle, bus, traffic light, bench"),
    ],
)
def test_folds_have_the_published_classes(name, classes):
    assert ", ".join(get_dataset(name).own_vocabulary().class_names).startswith(classes)


def test_folds_have_the_published_numbers_of_pairs():
    def counts(template):
        return [get_dataset(template.format(fold)).published_count for fold in range(NUM_FOLDS)]

    assert counts("pascal_5i_fold{}_train") == [12_670, 11_739, 9_026, 13_230]
    assert counts("pascal_5i_fold{}_val") == [346, 451, 725, 346]
    assert counts("coco_20i_fold{}_train") == [95_476, 133_927, 141_054, 141_016]
    assert counts("coco_20i_fold{}_val") == [35_783, 17_912, 14_563, 14_315]


def pairs_of(name, root):
    return [record["image_id"] for record in get_dataset(name, root).records()]


def test_a_training_set_has_the_pairs_of_the_other_folds_and_a_test_set_its_own(root):
    assert pairs_of("pascal_5i_fold3_val", root) == ["2008_000003__20", "2008_000004__20"]
    assert pairs_of("pascal_5i_fold3_train", root) == [
        f"{IMAGES[image]}__{label:02d}" for fold in range(3) for image, label in LISTED[fold]
    ]


def test_a_record_says_what_is_prompted_and_which_value_it_has_in_the_mask(root):
    record = get_dataset("pascal_5i_fold1_val", root).records()[1]
    assert {key: record[key] for key in ("category_id", "mask_value", "class_name", "height", "width")} == {
        "category_id": 2,
        "mask_value": 8,
        "class_name": "cat",
        "height": 20,
        "width": 30,
    }
    readable = get_dataset("pascal_5i_readable_fold3_val", root).records()[0]
    assert readable["class_name"] == "tv monitor" and "SegmentationClassAug" in readable["sem_seg_file_name"]


def test_pascal_voc_is_split_by_the_folds_of_coco_for_the_transfer(root):
    names = [get_dataset(f"pascal_voc_of_coco_20i_fold{fold}_val").own_vocabulary().class_names for fold in range(4)]
    assert names == [
        ("aeroplane", "boat", "chair", "diningtable", "dog", "person"),
        ("bicycle", "bus", "horse", "sofa"),
        ("bird", "car", "pottedplant", "sheep", "train", "tvmonitor"),
        ("bottle", "cat", "cow", "motorbike"),
    ]
    pairs = get_dataset("pascal_voc_of_coco_20i_fold3_val", root).records()
    assert [(pair["image_id"], pair["mask_value"], pair["class_name"]) for pair in pairs] == [
        ("2007_000002__05", 5, "bottle"),
        ("2008_000003__08", 8, "cat"),
    ]


def test_the_images_of_a_fold_come_once_with_the_values_of_all_its_novel_classes(root):
    records = get_dataset("pascal_5i_fold3_val_multiclass", root).records()
    assert [record["image_id"] for record in records] == IMAGES[2:]
    assert records[0]["mask_values"] == [16, 17, 18, 19, 20] and "class_name" not in records[0]


def test_the_strict_split_leaves_out_images_with_novel_objects(root):
    assert pairs_of("pascal_5i_fold0_train_strict", root) == ["2008_000003__08", "2008_000003__20", "2008_000004__20"]


@pytest.mark.parametrize("ending", ["\n", ""])
def test_every_line_is_read_unless_the_published_reader_is_asked_for(tmp_path, ending):
    write_pascal(tmp_path, ending=ending)
    assert len(pairs_of("pascal_5i_fold0_train", tmp_path)) == 5
    assert pairs_of("pascal_5i_fold0_train_published", tmp_path) == ["2007_000001__06", "2008_000003__20"]


def test_the_first_thousand_are_the_first_of_the_sorted_pairs(tmp_path):
    lists = tmp_path / "coco_20i" / "val"
    lists.mkdir(parents=True)
    pairs = [(f"COCO_val2014_{number:012d}", label) for number in range(700, 0, -1) for label in (4, 0)]
    (lists / "fold0.txt").write_text("".join(f"{image}__{label:02d}\n" for image, label in pairs))
    write_coco(tmp_path, {image for image, _ in pairs})
    published = pairs_of("coco_20i_fold0_val_first1000", tmp_path)
    assert published == [f"{image}__{label:02d}" for image, label in sorted(pairs)[:1000]]
    uniform = pairs_of("coco_20i_fold0_val_uniform1000", tmp_path)
    assert uniform == pairs_of("coco_20i_fold0_val_uniform1000", tmp_path) and len(set(uniform)) == 1000
    assert 400 < sum(name.endswith("__00") for name in uniform) < 600
    assert len(pairs_of("coco_20i_fold0_val", tmp_path)) == 1400


def write_coco(root, images):
    picture, mask = Image.fromarray(np.zeros((2, 3, 3), np.uint8)), Image.fromarray(np.zeros((2, 3), np.uint8))
    for folder in ("val2014", "annotation/val2014"):
        (root / folder).mkdir(parents=True)
    for image in images:
        picture.save(root / "val2014" / f"{image}.jpg")
        mask.save(root / "annotation" / "val2014" / f"{image}.png")


def test_a_fold_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="folds 0 to 3, got 4"):
        fold_dataset(None, name="x", split="val", folds=PASCAL_5I, fold=4)
    with pytest.raises(ValueError, match="Did you mean 'pascal_5i_fold"):
        get_dataset("pascal_5i_fold4_val")
    assert "coco_20i_fold3_val_first1000" in PAIRS


def test_missing_lists_masks_and_broken_lines_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_pascal_5i.py makes the lists"):
        get_dataset("pascal_5i_fold0_val", tmp_path).records()
    write_pascal(tmp_path)
    (tmp_path / "SegmentationClassAug" / f"{IMAGES[0]}.png").unlink()
    with pytest.raises(FileNotFoundError) as error:
        get_dataset("pascal_5i_fold0_val", tmp_path).records()
    assert str(error.value).count(f"SegmentationClassAug/{IMAGES[0]}.png") == 2
    (tmp_path / "pascal_5i" / "val" / "fold0.txt").write_text("2007_000001__06\n")
    with pytest.raises(ValueError, match=r"fold0.txt, line 1: expected <image>__<class> with a class of fold 0"):
        get_dataset("pascal_5i_fold0_val", tmp_path).records()
