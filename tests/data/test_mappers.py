import copy

import cv2
import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image

from fcclip.data.images import read_id_map, read_image
from fcclip.data.mappers import ShortestEdgeMapper, build_test_mapper, build_train_mapper
from fcclip.data.transforms import PADDING_ID, LargeScaleJitter, RandomCrop, ShortestEdgeJitter


@pytest.fixture
def record(coco_val):
    return coco_val.records()[0]  # 24 x 36: person 70001, sky 70002, crowd 70003, void


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_training_sample_has_image_targets_and_names(cfg, record):
    sample = build_train_mapper(cfg)(record, rng())
    assert set(sample) == {
        *("image", "targets", "file_name", "image_id", "height", "width", "pan_seg_file_name", "sem_seg_file_name"),
        "point_seed",
    }
    assert (sample["image"].dtype, sample["image"].shape) == (torch.uint8, (3, 32, 32))
    assert (sample["height"], sample["width"], sample["image_id"]) == (24, 36, 100)
    targets = sample["targets"]
    assert (targets.id_map.dtype, targets.id_map.shape) == (torch.int32, (32, 32))
    assert targets.labels.tolist() == [0, 119]  # the crowd is no target
    assert targets.ids.tolist() == [70001, 70002]
    assert targets.masks is None


def test_image_and_id_map_get_the_drawn_geometry(cfg, record):
    sample = build_train_mapper(cfg)(record, rng(5))
    geometry = LargeScaleJitter(size=32, min_scale=0.1, max_scale=2.0).draw(24, 36, rng(5))
    expected = geometry.pad_image(geometry.view(Image.open(record["file_name"])))
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), expected)
    padded = (sample["targets"].id_map == PADDING_ID).numpy()
    assert (expected[padded] == 128).all()
    assert (~padded).sum() == min(geometry.resized_height, 32) * min(geometry.resized_width, 32)


def test_a_mapper_changes_no_record(cfg, record):
    before = copy.deepcopy(record)
    build_train_mapper(cfg)(record, rng())
    build_test_mapper(cfg)(record)
    assert record == before


def test_a_segment_outside_the_crop_stays_with_an_empty_mask(cfg, record):
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 20.0
    cfg.INPUT.RANDOM_FLIP = "none"
    mapper = build_train_mapper(cfg)
    areas = [mapper(record, rng(seed))["targets"].expand().sum((1, 2)).tolist() for seed in range(6)]
    assert all(len(pair) == 2 for pair in areas)
    assert any(0 in pair for pair in areas)


def test_a_image_of_crowds_gives_zero_targets(cfg, record):
    for segment in record["segments_info"]:
        segment["iscrowd"] = 1
    targets = build_train_mapper(cfg)(record, rng())["targets"]
    assert len(targets) == 0
    assert targets.labels.dtype == targets.ids.dtype == torch.int64
    assert (targets.expand().dtype, targets.expand().shape) == (torch.bool, (0, 32, 32))


def test_an_id_of_the_json_that_the_png_lacks_is_an_empty_mask(cfg, record):
    record["segments_info"].append({"id": 9, "category_id": 5, "isthing": True, "iscrowd": 0})
    targets = build_train_mapper(cfg)(record, rng())["targets"]
    assert targets.expand()[2].sum() == 0


def test_bgr_is_rgb_reversed(cfg, record):
    rgb = build_train_mapper(cfg)(record, rng())["image"]
    rgb_test = build_test_mapper(cfg)(record)["image"]
    cfg.INPUT.FORMAT = "BGR"
    assert torch.equal(build_train_mapper(cfg)(record, rng())["image"], rgb.flip(0))
    assert torch.equal(build_test_mapper(cfg)(record)["image"], rgb_test.flip(0))


def test_a_test_sample_is_resized_and_keeps_the_original_size(cfg, record):
    sample = build_test_mapper(cfg)(record)
    assert sample["image"].shape == (3, 32, 48)
    assert (sample["height"], sample["width"]) == (24, 36)
    expected = Image.fromarray(read_image(record["file_name"])).resize((48, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_min_size_test_zero_keeps_the_pixels(cfg, record):
    cfg.INPUT.MIN_SIZE_TEST = 0
    image = build_test_mapper(cfg)(record)["image"]
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), read_image(record["file_name"]))


def test_the_test_mapper_opens_no_ground_truth(cfg, record, coco_root):
    for path in (coco_root / "coco" / "panoptic_val2017").iterdir():
        path.unlink()
    assert "targets" not in build_test_mapper(cfg)(record)


@pytest.mark.parametrize("build", [build_train_mapper, build_test_mapper])
def test_a_listed_image_that_is_absent_is_named(cfg, record, coco_root, build):
    (coco_root / "coco" / "val2017" / "000000000100.jpg").unlink()
    mapper = build(cfg)
    with pytest.raises(FileNotFoundError, match=r"000000000100\.jpg: no such image, though the data set lists it"):
        mapper(record, rng()) if build is build_train_mapper else mapper(record)


def test_a_image_of_another_size_than_the_json_says_is_named(cfg, record):
    record.update(height=36, width=24)
    with pytest.raises(ValueError, match=r"000000000100\.jpg: the image is 24 x 36 pixels .* annotations say 36 x 24"):
        build_train_mapper(cfg)(record, rng())
    with pytest.raises(ValueError, match="annotations say 36 x 24"):
        build_test_mapper(cfg)(record)


def test_an_id_map_of_another_size_than_its_image_is_named(cfg, record):
    Image.new("RGB", (35, 24)).save(record["pan_seg_file_name"])
    with pytest.raises(ValueError, match=r"100\.png: the id map is 24 x 35 pixels .*100\.jpg is 24 x 36"):
        build_train_mapper(cfg)(record, rng())


def test_a_png_id_that_is_not_in_the_json_is_named_with_its_area(cfg, record):
    del record["segments_info"][0]
    message = (
        r"100\.png: id 70001 \(216 pixels\) is not in the segments_info .* 2 ids: 70002, 70003\. .*prepare both again"
    )
    with pytest.raises(ValueError, match=message):
        build_train_mapper(cfg)(record, rng())


def test_several_unknown_ids_are_counted(cfg, record):
    record["segments_info"] = []
    with pytest.raises(ValueError, match=r"id 70001 \(216 pixels\) \(and 2 more ids\) .* 0 ids: none"):
        build_train_mapper(cfg)(record, rng())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "DATASET_MAPPER_NAME",
            "coco_panoptic_lsi",
            "unknown INPUT.DATASET_MAPPER_NAME .*Did you mean 'coco_panoptic_lsj'",
        ),
        ("FORMAT", "YUV", "INPUT.FORMAT must be one of RGB, BGR, got 'YUV'"),
        ("RANDOM_FLIP", "both", "INPUT.RANDOM_FLIP must be one of"),
        ("IMAGE_SIZE", 0, "INPUT.IMAGE_SIZE must be at least 1"),
    ],
)
def test_bad_values_are_refused_by_their_key(cfg, key, value, message):
    cfg.INPUT[key] = value
    with pytest.raises(ValueError, match=message):
        build_train_mapper(cfg)


@pytest.mark.parametrize("sizes", [(-1, 100), (800, 0)])
def test_test_sizes_that_cannot_work_are_refused(sizes):
    with pytest.raises(ValueError, match=r"INPUT\.MIN_SIZE_TEST must be 0 .* INPUT\.MAX_SIZE_TEST at least 1"):
        ShortestEdgeMapper(min_size=sizes[0], max_size=sizes[1])


def test_a_record_without_the_ground_truth_that_is_read_is_named_with_the_mappers_that_would_do(cfg, record):
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    message = (
        r"000000000100\.jpg: the ground truth has no annotations, which INPUT\.DATASET_MAPPER_NAME 'coco_instance_lsj' "
        r"reads\. .* set INPUT\.DATASET_MAPPER_NAME to coco_panoptic_lsj or mask_former_semantic or mask_former_panop"
    )
    with pytest.raises(ValueError, match=message):
        build_train_mapper(cfg)(record, rng())
    with pytest.raises(ValueError, match="For this data set, no mapper can read it"):
        build_train_mapper(cfg)({"file_name": record["file_name"]}, rng())


# ---- mask_former_panoptic and mask_former_semantic ----


@pytest.fixture
def former(cfg):
    """Resize to a shorter side of 20 or 40, crop to 24 x 28, pad to 32."""
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_panoptic"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (20, 40), 100
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [24, 28]
    cfg.INPUT.SIZE_DIVISIBILITY = 32
    return cfg


@pytest.fixture
def labelled(record, coco_root):
    """The record with a label map: person 0, sky 119, dog 16, void 255."""
    path = coco_root / "coco" / "panoptic_semseg_val2017" / "000000000100.png"
    save_labels(path, 24, 36)
    return record


def save_labels(path, height, width, dtype=np.uint8, void=255):
    labels = np.full((height, width), void, dtype)
    labels[: height // 2, : width // 2], labels[: height // 2, width // 2 :] = 0, 119
    labels[height // 2 :, : width // 2] = 16
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
    return labels


def drawn_geometry(cfg, seed, height=24, width=36):
    crop = RandomCrop("absolute", (24, 28)) if cfg.INPUT.CROP.ENABLED else None
    jitter = ShortestEdgeJitter(
        min_sizes=tuple(cfg.INPUT.MIN_SIZE_TRAIN), max_size=100, crop=crop, target_size=cfg.INPUT.SIZE_DIVISIBILITY
    )
    return jitter.draw(height, width, rng(seed))


@pytest.mark.parametrize("seed", range(4))
def test_mask_former_panoptic_gives_image_and_ids_the_drawn_geometry(former, record, seed):
    sample = build_train_mapper(former)(record, rng(seed))
    geometry = drawn_geometry(former, seed)
    expected = geometry.pad_image(geometry.view(Image.open(record["file_name"])))
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), expected)
    expected = geometry.apply_id_map(read_id_map(record["pan_seg_file_name"]))
    np.testing.assert_array_equal(sample["targets"].id_map.numpy(), expected)
    assert sample["targets"].ids.tolist() == [70001, 70002]
    assert sample["targets"].labels.tolist() == [0, 119]
    outside = np.ones((32, 32), bool)
    outside[: geometry.visible[0], : geometry.visible[1]] = False
    assert (sample["targets"].id_map.numpy()[outside] == 0).all() and (sample["image"].numpy()[:, outside] == 128).all()


@pytest.mark.parametrize("seed", range(6))
def test_mask_former_semantic_has_one_mask_for_each_class_that_is_left(former, labelled, seed):
    former.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    metadata = {"ignore_label": 255, "stuff_classes": ["class"] * 133}
    targets = build_train_mapper(former, metadata)(labelled, rng(seed))["targets"]
    shown = drawn_geometry(former, seed).apply_label_map(
        np.asarray(Image.open(labelled["sem_seg_file_name"])).astype(np.int32), padding=255
    )
    classes = sorted(set(np.unique(shown).tolist()) - {255})
    assert targets.labels.tolist() == classes
    for mask, label in zip(targets.expand().numpy(), classes):
        np.testing.assert_array_equal(mask, shown == label)


def test_a_label_map_of_void_gives_zero_targets(former, labelled):
    former.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    Image.new("L", (36, 24), 255).save(labelled["sem_seg_file_name"])
    targets = build_train_mapper(former)(labelled, rng())["targets"]
    assert (len(targets), targets.labels.dtype, targets.expand().shape) == (0, torch.int64, (0, 32, 32))


def test_the_value_of_unlabelled_pixels_is_that_of_the_training_set(former, labelled, coco_root):
    former.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    former.INPUT.CROP.ENABLED = False
    former.INPUT.SIZE_DIVISIBILITY = -1
    save_labels(coco_root / "16.tif", 24, 36, np.uint16, void=65535)
    labelled["sem_seg_file_name"] = str(coco_root / "16.tif")
    former.DATASETS.TRAIN = ("openvocab_pascal_ctx459_sem_seg_train",)
    assert build_train_mapper(former)(labelled, rng())["targets"].labels.tolist() == [0, 16, 119]
    former.DATASETS.TRAIN = ("openvocab_pascal_ctx59_sem_seg_train",)
    message = (
        r"16\.tif: label 119 \(216 pixels\) is not a class: .* labels 0\.\.58, and 255 for unlabelled pixels\. .*ignore"
    )
    with pytest.raises(ValueError, match=message):
        build_train_mapper(former)(labelled, rng())
    former.DATASETS.TRAIN = ("mine",)  # not fcclip's: nothing is known but IGNORE_VALUE
    former.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 65535
    assert build_train_mapper(former)(labelled, rng())["targets"].labels.tolist() == [0, 16, 119]


def test_label_maps_that_do_not_fit_are_named(former, labelled):
    former.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    mapper = build_train_mapper(former)
    Image.new("L", (24, 36)).save(labelled["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"100\.png: the label map is 36 x 24 pixels .*100\.jpg is 24 x 36\. Prepare"):
        mapper(labelled, rng())
    Image.new("RGB", (36, 24)).save(labelled["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"100\.png: .*a label map has one whole number a pixel"):
        mapper(labelled, rng())
    Image.fromarray(np.full((24, 36), -3, np.int32)).save(labelled["sem_seg_file_name"], format="TIFF")
    with pytest.raises(ValueError, match=r"100\.png: label -3 is negative"):
        mapper(labelled, rng())


@pytest.mark.parametrize("name", ["mask_former_semantic", "mask_former_panoptic"])
def test_crops_are_drawn_until_no_category_fills_them(former, labelled, name):
    former.INPUT.DATASET_MAPPER_NAME = name
    former.INPUT.CROP.SIZE = [6, 6]

    def single(seed):
        targets = build_train_mapper(former)(labelled, rng(seed))["targets"]
        return sum(bool(mask.any()) for mask in targets.expand()) < 2

    before = sum(single(seed) for seed in range(30))
    former.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.9
    assert before > 20 and sum(single(seed) for seed in range(30)) < before - 5  # a crowd is a category, no target


def test_without_a_label_map_crops_are_judged_by_the_segments(former, labelled):
    former.INPUT.CROP.SIZE, former.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = [8, 8], 0.75
    with_file = [build_train_mapper(former)(labelled, rng(seed)) for seed in range(10)]
    del labelled["sem_seg_file_name"]
    without = [build_train_mapper(former)(labelled, rng(seed)) for seed in range(10)]
    # pixels of the two are resized by slightly different rules, which may judge a window at a border differently
    assert sum(torch.equal(first["image"], second["image"]) for first, second in zip(with_file, without)) >= 8


def test_colours_change_the_image_and_nothing_else(former, record):
    plain = [build_train_mapper(former)(record, rng(seed)) for seed in range(4)]
    former.INPUT.COLOR_AUG_SSD = True
    coloured = [build_train_mapper(former)(record, rng(seed)) for seed in range(4)]
    assert any(not torch.equal(first["image"], second["image"]) for first, second in zip(plain, coloured))
    for first, second in zip(plain, coloured):
        assert torch.equal(first["targets"].id_map, second["targets"].id_map)
    geometry = drawn_geometry(former, 0)
    outside = np.ones((32, 32), bool)
    outside[: geometry.visible[0], : geometry.visible[1]] = False
    assert (coloured[0]["image"].numpy()[:, outside] == 128).all()  # the padding keeps its value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MIN_SIZE_TRAIN_SAMPLING", "some", "INPUT.MIN_SIZE_TRAIN_SAMPLING"),
        ("SIZE_DIVISIBILITY", 16, "INPUT.SIZE_DIVISIBILITY is 16"),
    ],
)
def test_values_that_cannot_work_are_refused_when_the_mapper_is_built(former, key, value, message):
    former.INPUT[key] = value
    with pytest.raises(ValueError, match=message):
        build_train_mapper(former)


# ---- instances ----

SQUARE = [4.0, 4.0, 16.0, 4.0, 16.0, 16.0, 4.0, 16.0]


@pytest.fixture
def annotated(record):
    """Two overlapping polygons, a run-length code and a crowd on the 24 x 36 image."""
    mask = np.zeros((24, 36), np.uint8, order="F")
    mask[12:20, 20:30] = 1
    code = pycocotools.mask.encode(mask)
    annotations = [
        {"category_id": 3, "iscrowd": 0, "segmentation": [SQUARE, [20.0, 0.0, 24.0, 0.0, 24.0, 4.0]]},
        {"category_id": 5, "iscrowd": 0, "segmentation": [[10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]]},
        {"category_id": 7, "iscrowd": 0, "segmentation": code},
        {"category_id": 9, "iscrowd": 1, "segmentation": code},
    ]
    return {key: record[key] for key in ("file_name", "image_id", "height", "width")} | {"annotations": annotations}


def whole_masks(annotations):
    """(n, 24, 36) bool of all that is no crowd, untransformed."""
    masks = []
    for annotation in annotations:
        if annotation["iscrowd"]:
            continue
        codes = annotation["segmentation"]
        codes = pycocotools.mask.frPyObjects(codes, 24, 36) if isinstance(codes, list) else [codes]
        masks.append(pycocotools.mask.decode(pycocotools.mask.merge(codes)).astype(bool))
    return np.array(masks)


@pytest.fixture
def untouched(cfg):
    """Every mapper of instances leaves the pixels as they are, on a canvas of 40."""
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.RANDOM_FLIP = 36, "none"
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.SIZE_DIVISIBILITY = (0,), 36, 36
    return cfg


@pytest.mark.parametrize("name", ["coco_instance_lsj", "mask_former_instance"])
def test_overlapping_instances_are_masks_of_their_own(untouched, annotated, name):
    untouched.INPUT.DATASET_MAPPER_NAME = name
    sample = build_train_mapper(untouched)(annotated, rng(2))
    targets = sample["targets"]
    assert targets.labels.tolist() == [3, 5, 7]  # the crowd is no target
    assert (targets.masks.dtype, targets.masks.shape, targets.id_map) == (torch.bool, (3, 36, 36), None)
    expected = whole_masks(annotated["annotations"])
    masks = targets.masks.numpy()
    image = read_image(annotated["file_name"])
    if (sample["image"].permute(1, 2, 0).numpy()[:24] != image).any():  # mirrored
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy()[:24], image[:, ::-1])
        masks = masks[:, :, ::-1]
    np.testing.assert_array_equal(masks[:, :24], expected)
    assert not masks[:, 24:].any() and (expected[0] & expected[1]).any()


@pytest.mark.parametrize("name", ["coco_instance_lsj", "mask_former_instance"])
@pytest.mark.parametrize("seed", range(6))
def test_polygons_and_run_lengths_follow_the_image(former, annotated, name, seed):
    former.INPUT.DATASET_MAPPER_NAME = name
    former.INPUT.IMAGE_SIZE = 64
    mapper = build_train_mapper(former)
    geometry = mapper.augmentation.draw(24, 36, rng(seed))
    targets = mapper(annotated, rng(seed))["targets"]
    moved = geometry.apply_masks(whole_masks(annotated["annotations"]))
    kept = dict(zip(targets.labels.tolist(), targets.masks.numpy()))
    assert set(kept) == {3, 5, 7} if name == "mask_former_instance" else set(kept) <= {3, 5, 7}
    for label, mask in zip((3, 5, 7), moved):
        mine = kept.get(label, np.zeros_like(mask))
        # filled at the new size, an outline lies up to half an old pixel from that of the resized mask
        near = cv2.dilate(mask.view(np.uint8), np.ones((5, 5))) > cv2.erode(mask.view(np.uint8), np.ones((5, 5)))
        assert not (mine != mask)[~near].any()
    np.testing.assert_array_equal(kept.get(7, np.zeros_like(moved[2])), moved[2])


def test_an_instance_that_the_crop_misses_is_left_out_or_stays_empty(former, annotated):
    former.INPUT.CROP.SIZE, former.INPUT.SIZE_DIVISIBILITY = [2, 2], -1
    former.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
    stays = [build_train_mapper(former)(annotated, rng(seed))["targets"] for seed in range(8)]
    assert all(len(targets) == 3 for targets in stays)
    assert any(not targets.masks.any(dim=(1, 2)).all() for targets in stays)
    former.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    former.INPUT.MIN_SCALE = former.INPUT.MAX_SCALE = 20.0
    left = [build_train_mapper(former)(annotated, rng(seed))["targets"] for seed in range(8)]
    assert {len(targets) for targets in left} > {0}
    assert all(len(targets.labels) == len(targets.masks) for targets in left)


@pytest.mark.parametrize("name", ["coco_instance_lsj", "mask_former_instance"])
def test_a_image_without_instances_gives_zero_targets(cfg, annotated, name):
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    annotated["annotations"] = annotated["annotations"][3:]
    targets = build_train_mapper(cfg)(annotated, rng())["targets"]
    assert (len(targets), targets.labels.dtype, targets.masks.dtype) == (0, torch.int64, torch.bool)
    assert targets.masks.shape[1:] == targets.image_size


def test_annotations_that_give_no_mask_are_named(cfg, annotated):
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    mapper = build_train_mapper(cfg)
    annotated["annotations"][0].pop("segmentation")
    with pytest.raises(ValueError, match=r"100\.jpg: an annotation of this image has no segmentation, and its box"):
        mapper(annotated, rng())
    annotated["annotations"][0]["segmentation"] = pycocotools.mask.encode(np.zeros((36, 24), np.uint8, order="F"))
    with pytest.raises(ValueError, match=r"100\.jpg: a run-length code is 36 x 24 .*its image 24 x 36\. .* together"):
        mapper(annotated, rng())


def test_mappers_take_numpys_global_generator_too(former, record):
    np.random.seed(3)
    first = build_train_mapper(former)(record, np.random)
    second = build_train_mapper(former)(record, np.random.RandomState(3))
    assert torch.equal(first["image"], second["image"]) and first["point_seed"] == second["point_seed"]
