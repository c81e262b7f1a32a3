import copy

import numpy as np
import pytest
import torch
from PIL import Image

from fcclip.data.images import read_image
from fcclip.data.mappers import ShortestEdgeMapper, build_test_mapper, build_train_mapper
from fcclip.data.transforms import PADDING_ID, LargeScaleJitter


@pytest.fixture
def record(coco_val):
    return coco_val.records()[0]  # 24 x 36: person 70001, sky 70002, crowd 70003, void


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_training_sample_has_picture_targets_and_names(cfg, record):
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


def test_picture_and_id_map_get_the_drawn_geometry(cfg, record):
    sample = build_train_mapper(cfg)(record, rng(5))
    geometry = LargeScaleJitter(size=32, min_scale=0.1, max_scale=2.0).draw(24, 36, rng(5))
    expected = geometry.apply_image(read_image(record["file_name"]))
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
    assert all(len(one) == 2 for one in areas)
    assert any(0 in one for one in areas)


def test_a_picture_of_crowds_gives_zero_targets(cfg, record):
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


def test_a_test_sample_needs_nothing_but_a_file_name(cfg, record):
    sample = build_test_mapper(cfg)({"file_name": record["file_name"]})
    assert (sample["height"], sample["width"]) == (24, 36)


@pytest.mark.parametrize("build", [build_train_mapper, build_test_mapper])
def test_a_listed_picture_that_is_absent_is_named(cfg, record, coco_root, build):
    (coco_root / "coco" / "val2017" / "000000000100.jpg").unlink()
    mapper = build(cfg)
    with pytest.raises(FileNotFoundError, match=r"000000000100\.jpg: no such picture, though the data set lists it"):
        mapper(record, rng()) if build is build_train_mapper else mapper(record)


def test_an_id_png_of_zero_bytes_is_named(cfg, record):
    open(record["pan_seg_file_name"], "w").close()
    with pytest.raises(ValueError, match=r"000000000100\.png: .*the file is empty \(0 bytes\)"):
        build_train_mapper(cfg)(record, rng())


def test_a_picture_of_another_size_than_the_json_says_is_named(cfg, record):
    record.update(height=36, width=24)
    with pytest.raises(
        ValueError, match=r"000000000100\.jpg: the picture is 24 x 36 pixels .* annotations say 36 x 24"
    ):
        build_train_mapper(cfg)(record, rng())
    with pytest.raises(ValueError, match="annotations say 36 x 24"):
        build_test_mapper(cfg)(record)


def test_an_id_map_of_another_size_than_its_picture_is_named(cfg, record):
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
