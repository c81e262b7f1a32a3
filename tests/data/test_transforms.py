import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcclip.data.images import read_id_map, read_image
from fcclip.data.transforms import (
    PADDING_ID,
    PADDING_VALUE,
    JitterGeometry,
    LargeScaleJitter,
    resize_image,
    shortest_edge_size,
)
from tests.parity_weights import seeded_image

RECORDED = Path(__file__).parent / "large_scale_jitter"
SAMPLES = json.loads((RECORDED / "samples.json").read_text())


def recorded_geometry(sample: dict) -> JitterGeometry:
    steps = {step["name"]: step for step in sample["transforms"]}
    resize, crop = steps["ResizeTransform"], steps["CropTransform"]
    return JitterGeometry(
        height=sample["height"],
        width=sample["width"],
        flip="horizontal" if "HFlipTransform" in steps else "none",
        resized_height=resize["new_h"],
        resized_width=resize["new_w"],
        top=crop["y0"],
        left=crop["x0"],
        size=sample["output"][0],
    )


def picture_and_ids(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    image = seeded_image(sample["height"], sample["width"], sample["image_seed"]).permute(1, 2, 0).numpy()
    return image, (image[..., 0] // 64 + 5 * (image[..., 1] // 64)).astype(np.int32)


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_the_recorded_transforms_give_the_published_pixels(index):
    geometry = recorded_geometry(SAMPLES[index])
    image, id_map = picture_and_ids(SAMPLES[index])
    off = np.abs(geometry.apply_image(image).astype(int) - read_image(RECORDED / f"{index}_image.png")).max()
    off_ids = np.abs(geometry.apply_id_map(id_map) - read_id_map(RECORDED / f"{index}_ids.png")).max()
    print(f"large-scale jitter {index}: worst deviation of a pixel {off}, of an id {off_ids}")
    assert (off, off_ids) == (0, 0)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"seed {sample['numpy_seed']}")
def test_the_recorded_seed_draws_the_recorded_transforms(sample):
    jitter = LargeScaleJitter(size=256, min_scale=0.1, max_scale=2.0)
    drawn = jitter.draw(sample["height"], sample["width"], np.random.RandomState(sample["numpy_seed"]))
    assert drawn == recorded_geometry(sample)


@pytest.mark.parametrize("seed", range(24))
def test_resize_and_crop_equal_pillow_step_by_step(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(5, 90, 2).tolist()
    image, id_map = textured(height, width, seed), rng.integers(0, 1 << 24, (height, width)).astype(np.int32)
    flip = ("none", "horizontal", "vertical")[seed % 3]
    geometry = LargeScaleJitter(size=64, min_scale=0.1, max_scale=2.0, flip=flip).draw(height, width, rng)

    def step_by_step(array, resample, padding):
        flipped = {"none": array, "horizontal": array[:, ::-1], "vertical": array[::-1]}[geometry.flip]
        size = (geometry.resized_width, geometry.resized_height)
        resized = np.asarray(Image.fromarray(np.ascontiguousarray(flipped)).resize(size, resample))
        cropped = resized[geometry.top :, geometry.left :][:64, :64]
        canvas = np.full((64, 64, *array.shape[2:]), padding, array.dtype)
        canvas[: cropped.shape[0], : cropped.shape[1]] = cropped
        return canvas

    expected = step_by_step(image, Image.Resampling.BILINEAR, PADDING_VALUE)
    np.testing.assert_array_equal(geometry.apply_image(image), expected)
    expected = step_by_step(id_map, Image.Resampling.NEAREST, PADDING_ID)
    np.testing.assert_array_equal(geometry.apply_id_map(id_map), expected)


def test_both_crop_offsets_come_from_one_number():
    rng = np.random.RandomState(0)
    jitter = LargeScaleJitter(size=10, min_scale=3.0, max_scale=3.0, flip="none")
    drawn = [jitter.draw(50, 50, rng) for _ in range(20)]
    assert all(one.top == one.left for one in drawn)
    assert len({one.top for one in drawn}) > 5


def test_without_flip_no_number_is_drawn_for_it():
    rng, same = np.random.RandomState(3), np.random.RandomState(3)
    drawn = LargeScaleJitter(size=100, min_scale=0.1, max_scale=2.0, flip="none").draw(100, 100, rng)
    assert drawn.flip == "none"
    assert drawn.resized_height == round(100 * same.uniform(0.1, 2.0))


def test_a_sliver_keeps_at_least_one_pixel():
    jitter = LargeScaleJitter(size=16, min_scale=0.1, max_scale=0.1)
    geometry = jitter.draw(400, 2, np.random.RandomState(0))
    assert (geometry.resized_height, geometry.resized_width) == (2, 1)
    assert geometry.apply_image(textured(400, 2)).shape == (16, 16, 3)


def test_geometry_refuses_a_picture_of_another_size():
    geometry = LargeScaleJitter(size=16, min_scale=1.0, max_scale=1.0).draw(8, 8, np.random.RandomState(0))
    with pytest.raises(ValueError, match=r"drawn for 8 x 8 pixels, applied to \(8, 9\)"):
        geometry.apply_id_map(np.zeros((8, 9), np.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "INPUT.IMAGE_SIZE must be at least 1"),
        ({"min_scale": 3.0}, "INPUT.MIN_SCALE and INPUT.MAX_SCALE"),
        ({"min_scale": 0.0}, "INPUT.MIN_SCALE and INPUT.MAX_SCALE"),
        ({"flip": "diagonal"}, "INPUT.RANDOM_FLIP must be one of none, horizontal, vertical, got 'diagonal'"),
    ],
)
def test_jitter_refuses_values_that_cannot_work(change, message):
    with pytest.raises(ValueError, match=message):
        LargeScaleJitter(**{"size": 16, "min_scale": 0.1, "max_scale": 2.0, **change})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((640, 480), (1067, 800)),
        ((427, 640), (800, 1199)),  # 1199.06
        ((500, 500), (800, 800)),
        ((200, 1000), (267, 1333)),  # the longer side is limited
    ],
)
def test_the_shorter_side_becomes_800_unless_the_longer_exceeds_1333(size, expected):
    assert shortest_edge_size(*size, min_size=800, max_size=1333) == expected


def test_min_size_zero_keeps_the_size():
    assert shortest_edge_size(3000, 4000, min_size=0, max_size=1333) == (3000, 4000)


def test_test_time_resize_is_pillows_bilinear():
    image = textured(30, 20)
    expected = np.asarray(Image.fromarray(image).resize((50, 75), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_image(image, 75, 50), expected)
    assert resize_image(image, 30, 20) is image
