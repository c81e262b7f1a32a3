import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcclip.data.images import read_id_map, read_image
from fcclip.data.segmentations import fill_polygons
from fcclip.data.transforms import (
    PADDING_ID,
    PADDING_VALUE,
    Geometry,
    LargeScaleJitter,
    RandomCrop,
    ShortestEdgeJitter,
    resize_image,
    shortest_edge_size,
)
from tests.parity_weights import seeded_image

RECORDED = Path(__file__).parent / "large_scale_jitter"
SAMPLES = json.loads((RECORDED / "samples.json").read_text())


def jitter_geometry(height, width, flip, resized_height, resized_width, top, left, size) -> Geometry:
    """Flip, resize, crop, pad to a square."""
    visible = min(resized_height - top, size), min(resized_width - left, size)
    return Geometry(
        height, width, resized_height, resized_width, top, left, visible, (size, size), flip, True, PADDING_ID
    )


def cropped_geometry(height, width, resized_height, resized_width, top, left, rows, columns, flip) -> Geometry:
    """Resize, crop, flip."""
    size = (rows, columns)
    return Geometry(height, width, resized_height, resized_width, top, left, size, size, flip, False, 0)


def applied(geometry: Geometry, image: np.ndarray) -> np.ndarray:
    return geometry.pad_image(geometry.view(Image.fromarray(image)))


def recorded_geometry(sample: dict) -> Geometry:
    steps = {step["name"]: step for step in sample["transforms"]}
    resize, crop = steps["ResizeTransform"], steps["CropTransform"]
    return jitter_geometry(
        height=sample["height"],
        width=sample["width"],
        flip="horizontal" if "HFlipTransform" in steps else "none",
        resized_height=resize["new_h"],
        resized_width=resize["new_w"],
        top=crop["y0"],
        left=crop["x0"],
        size=sample["output"][0],
    )


def image_and_ids(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    image = seeded_image(sample["height"], sample["width"], sample["image_seed"]).permute(1, 2, 0).numpy()
    return image, (image[..., 0] // 64 + 5 * (image[..., 1] // 64)).astype(np.int32)


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_the_recorded_transforms_give_the_published_pixels(index):
    geometry = recorded_geometry(SAMPLES[index])
    image, id_map = image_and_ids(SAMPLES[index])
    off = np.abs(applied(geometry, image).astype(int) - read_image(RECORDED / f"{index}_image.png")).max()
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
    np.testing.assert_array_equal(applied(geometry, image), expected)
    expected = step_by_step(id_map, Image.Resampling.NEAREST, PADDING_ID)
    np.testing.assert_array_equal(geometry.apply_id_map(id_map), expected)


def test_both_crop_offsets_come_from_one_number():
    rng = np.random.RandomState(0)
    jitter = LargeScaleJitter(size=10, min_scale=3.0, max_scale=3.0, flip="none")
    drawn = [jitter.draw(50, 50, rng) for _ in range(20)]
    assert all(geometry.top == geometry.left for geometry in drawn)
    assert len({geometry.top for geometry in drawn}) > 5


def test_without_flip_no_number_is_drawn_for_it():
    rng, same = np.random.RandomState(3), np.random.RandomState(3)
    drawn = LargeScaleJitter(size=100, min_scale=0.1, max_scale=2.0, flip="none").draw(100, 100, rng)
    assert drawn.flip == "none"
    assert drawn.resized_height == round(100 * same.uniform(0.1, 2.0))


def test_a_sliver_keeps_at_least_one_pixel():
    jitter = LargeScaleJitter(size=16, min_scale=0.1, max_scale=0.1)
    geometry = jitter.draw(400, 2, np.random.RandomState(0))
    assert (geometry.resized_height, geometry.resized_width) == (2, 1)
    assert applied(geometry, textured(400, 2)).shape == (16, 16, 3)


def test_geometry_refuses_an_image_of_another_size():
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


# ---- the augmentation of the mask_former_* mappers ----

ROOMY = {"min_sizes": (40, 60), "max_size": 90}


def crop_geometry(seed: int, height: int, width: int, *, kind: str = "absolute", size=(32, 40), target: int = -1):
    jitter = ShortestEdgeJitter(**ROOMY, crop=RandomCrop(kind, size), target_size=target)
    return jitter.draw(height, width, np.random.RandomState(seed))


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("target", [-1, 48])
def test_resize_crop_flip_and_pad_equal_the_steps_one_by_one(seed, target):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 90, 2).tolist()
    image = textured(height, width, seed)
    ids, labels = rng.integers(0, 1 << 24, (height, width)), rng.integers(0, 459, (height, width))
    masks = rng.integers(0, 2, (3, height, width)).astype(bool)
    drawn = crop_geometry(seed, height, width, target=target)
    size = (drawn.resized_width, drawn.resized_height)

    def finished(array: np.ndarray, padding: int) -> np.ndarray:
        array = array[drawn.top :, drawn.left :][: drawn.visible[0], : drawn.visible[1]]
        array = array[:, ::-1] if drawn.flip == "horizontal" else array
        if target < 1:
            return array
        rows, columns = array.shape[:2]
        missing = [(0, target - rows), (0, target - columns), *[(0, 0)] * (array.ndim - 2)]
        return np.pad(array, missing, constant_values=padding)

    def pillow(array: np.ndarray, resample) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize(size, resample))

    expected = finished(pillow(image, Image.Resampling.BILINEAR), 128)
    np.testing.assert_array_equal(applied(drawn, image), expected)
    colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
    resized = pillow(colours, Image.Resampling.NEAREST).astype(np.int32)
    expected = finished(resized @ np.array([1, 256, 65536]), 0)
    np.testing.assert_array_equal(drawn.apply_id_map(ids.astype(np.int32)), expected)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(labels).double()[None, None], (drawn.resized_height, drawn.resized_width), mode="nearest"
    )
    expected = finished(resized[0, 0].long().numpy(), 65535)
    np.testing.assert_array_equal(drawn.apply_label_map(labels, padding=65535), expected)
    for mask, transformed in zip(masks, drawn.apply_masks(masks)):
        np.testing.assert_array_equal(
            transformed, finished(pillow(mask.view(np.uint8), Image.Resampling.NEAREST), 0) > 0
        )


@pytest.mark.parametrize(("height", "width"), [(64, 48), (31, 97), (100, 100)])
@pytest.mark.parametrize("new", [(10, 7), (48, 64), (97, 31), (128, 96), (200, 300), (1023, 1025)])
def test_labels_are_resized_as_torch_resizes_numbers(height, width, new):
    labels = np.random.default_rng(0).integers(0, 9, (height, width))
    drawn = cropped_geometry(height, width, *new, 0, 0, *new, "none")
    expected = torch.nn.functional.interpolate(torch.from_numpy(labels).double()[None, None], new, mode="nearest")
    np.testing.assert_array_equal(drawn.apply_label_map(labels, padding=0), expected[0, 0].long().numpy())


def test_numbers_are_drawn_in_the_published_order():
    jitter = ShortestEdgeJitter(min_sizes=(30, 40, 50), max_size=100, crop=RandomCrop("absolute", (20, 24)))
    drawn, same = jitter.draw(60, 80, np.random.RandomState(5)), np.random.RandomState(5)
    side = int(same.choice((30, 40, 50)))
    assert (drawn.resized_height, drawn.resized_width) == shortest_edge_size(60, 80, min_size=side, max_size=100)
    assert drawn.top == same.randint(drawn.resized_height - 20 + 1)
    assert drawn.left == same.randint(drawn.resized_width - 24 + 1)
    assert drawn.flip == ("horizontal" if same.uniform() < 0.5 else "none")


def test_a_range_of_sizes_includes_both_ends():
    jitter = ShortestEdgeJitter(min_sizes=(30, 33), max_size=100, sampling="range")
    drawn = {jitter.draw(60, 80, np.random.default_rng(seed)).resized_height for seed in range(60)}
    assert drawn == {30, 31, 32, 33}


def test_a_size_of_zero_keeps_the_image_and_both_flips_come():
    jitter = ShortestEdgeJitter(min_sizes=(0,), max_size=10)
    drawn = [jitter.draw(60, 80, np.random.default_rng(seed)) for seed in range(20)]
    assert {geometry.canvas for geometry in drawn} == {(60, 80)}
    assert {geometry.flip for geometry in drawn} == {"none", "horizontal"}


@pytest.mark.parametrize(
    ("kind", "size", "sizes"),
    [
        ("absolute", (32, 400), {(32, 80)}),
        ("relative", (0.5, 0.25), {(30, 20)}),
        ("absolute_range", (58, 62), {(rows, columns) for rows in (58, 59, 60) for columns in range(58, 63)}),
    ],
)
def test_windows_have_the_expected_sizes_and_lie_inside(kind, size, sizes):
    rng, crop = np.random.default_rng(0), RandomCrop(kind, size)
    drawn = [crop.draw(60, 80, rng) for _ in range(300)]
    assert {(rows, columns) for _, _, rows, columns in drawn} == sizes
    assert all(0 <= top <= 60 - rows and 0 <= left <= 80 - columns for top, left, rows, columns in drawn)
    rows = max(sizes)[0]
    tops = {top for top, _, height, _ in drawn if height == rows}
    assert (min(tops), max(tops)) == (0, 60 - rows)


def test_relative_ranges_draw_each_side_between_its_share_and_the_whole():
    rng, crop = np.random.default_rng(0), RandomCrop("relative_range", (0.5, 0.9))
    drawn = np.array([crop.draw(60, 80, rng)[2:] for _ in range(300)])
    assert 30 <= drawn[:, 0].min() < 33 and 57 < drawn[:, 0].max() <= 60
    assert 72 <= drawn[:, 1].min() < 74 and 78 < drawn[:, 1].max() <= 80


def test_a_window_that_one_category_fills_is_drawn_again():
    labels = np.zeros((40, 40), np.int32)
    labels[:, 30:] = 3  # a fifth of the windows of 10 x 10 shows the border
    jitter = ShortestEdgeJitter(min_sizes=(0,), max_size=99, crop=RandomCrop("absolute", (10, 10), 0.75))
    assert jitter.reads_labels
    shares = []
    for seed in range(40):
        drawn = jitter.draw(40, 40, np.random.default_rng(seed), labels)
        shares.append((drawn.apply_label_map(labels, padding=9) == 3).mean())
    assert np.mean([0.25 < share < 0.75 for share in shares]) > 0.6  # of single windows it is an eighth


def test_the_tenth_window_is_taken_whatever_it_shows_and_ignored_pixels_do_not_count():
    labels = np.zeros((40, 40), np.int32)
    labels[::2] = 255  # one category, and pixels that count as none
    windows = []

    def window(*place):
        windows.append(place)
        return labels[place[0] : place[0] + place[2], place[1] : place[1] + place[3]]

    crop = RandomCrop("absolute", (10, 10), 0.75, ignored_label=255)
    assert crop.draw(40, 40, np.random.default_rng(0), window) == windows[9]
    assert len(windows) == 10
    assert RandomCrop("absolute", (10, 10), 0.75).draw(40, 40, np.random.default_rng(0), window) == windows[0]
    assert not RandomCrop("absolute", (10, 10), 1.0).reads_labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": "all"}, "INPUT.MIN_SIZE_TRAIN_SAMPLING must be choice or range, got 'all'"),
        ({"min_sizes": ()}, "INPUT.MIN_SIZE_TRAIN must be lengths"),
        ({"max_size": 0}, "INPUT.MAX_SIZE_TRAIN at least 1"),
        ({"sampling": "range", "min_sizes": (3, 2)}, "must be smallest and largest length .* 'range', got"),
        ({"target_size": 89}, "INPUT.SIZE_DIVISIBILITY is 89: the side .* not a divisor.* Set it to 90 or more"),
        (
            {"target_size": 32, "crop": RandomCrop("absolute", (32, 40))},
            "sides of 40 pixels. Set it to 40 or more, crop to 32",
        ),
    ],
)
def test_the_augmentation_refuses_values_that_cannot_work(change, message):
    with pytest.raises(ValueError, match=message):
        ShortestEdgeJitter(**{**ROOMY, **change})


def test_an_image_larger_than_its_target_is_refused():
    jitter = ShortestEdgeJitter(min_sizes=(0,), max_size=40, target_size=40)  # keeps the size, whatever the limit
    with pytest.raises(ValueError, match=r"SIZE_DIVISIBILITY is 40, .* this one is 30 x 50"):
        jitter.draw(30, 50, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("relativ", (0.5, 0.5), "INPUT.CROP.TYPE must be one of absolute, absolute_range, relative, relative_range"),
        (
            "absolute",
            (0, 5),
            r"INPUT.CROP.SIZE must be two numbers of pixels above 0 for type 'absolute', got \[0, 5\]",
        ),
        ("relative", (0.5, 1.5), "must be two shares of the image above 0 and up to 1 for type 'relative'"),
        ("absolute", (5,), "must be two numbers"),
        ("absolute_range", (9, 5), "must be smallest and largest side"),
    ],
)
def test_a_crop_refuses_values_that_cannot_work(kind, size, message):
    with pytest.raises(ValueError, match=message):
        RandomCrop(kind, size)


# ---- polygons ----


def filled(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    canvas = np.zeros((height, width), bool)
    fill_polygons(polygons, canvas)
    return canvas


def star(rng: np.random.Generator, centre: tuple[float, float], radius: float, corners: int) -> np.ndarray:
    """A polygon with one corner in each direction, mostly not convex; two decimals, like COCO's."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    reach = radius * rng.uniform(0.3, 1, corners)
    return np.round(centre + np.stack([np.cos(angles), np.sin(angles)], axis=-1) * reach[:, None], 2)


def test_corners_follow_the_image():
    points = np.array([[0.0, 0.0], [8.0, 0.0], [8.0, 4.0]])
    jitter = jitter_geometry(10, 20, "horizontal", 30, 60, top=0, left=6, size=64)  # flip, then three times as large
    np.testing.assert_allclose(jitter.apply_polygon(points), [[54, 0], [30, 0], [30, 12]])
    crop = cropped_geometry(10, 20, 30, 60, 0, 6, 30, 40, "horizontal")  # the flip comes last
    np.testing.assert_allclose(sorted(crop.apply_polygon(points).tolist()), [[22, 0], [22, 12], [40, 0], [40, 3]])
    upside_down = jitter_geometry(10, 20, "vertical", 10, 20, top=0, left=0, size=64)
    np.testing.assert_allclose(upside_down.apply_polygon(points), [[0, 10], [8, 10], [8, 6]])
    assert points.tolist() == [[0, 0], [8, 0], [8, 4]]


def test_a_polygon_that_the_crop_misses_or_only_touches_is_gone():
    square = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0], [0.0, 10.0]])
    for left, corners in ((0, 4), (9, 4), (10, 0), (11, 0)):
        drawn = cropped_geometry(40, 40, 40, 40, 0, left, 20, 20, "none")
        assert len(drawn.apply_polygon(square)) == corners


def test_a_clipped_polygon_covers_the_pixels_that_the_whole_one_covers_in_the_crop():
    rng = np.random.default_rng(0)
    for _ in range(60):
        points = star(rng, rng.uniform(0, 100, 2), rng.uniform(10, 60), rng.integers(3, 30))
        points = points[(points.min(axis=1) >= 0) & (points.max(axis=1) <= 100)]
        if len(points) < 3:
            continue
        top, left = rng.integers(0, 60, 2).tolist()
        drawn = cropped_geometry(100, 100, 100, 100, top, left, 40, 40, "none")
        clipped = drawn.apply_polygon(points)
        covered = filled([clipped] if len(clipped) else [], 40, 40)
        expected = filled([points], 100, 100)[top : top + 40, left : left + 40]
        assert (covered != expected).mean() < 0.01  # an edge that is cut at the border turns by a fraction of a pixel


def test_clipping_covers_the_pixels_that_shapely_would_keep():
    geometry = pytest.importorskip("shapely.geometry", reason="needs shapely, which the published code clips with")
    rng, window = np.random.default_rng(1), geometry.box(0, 0, 60, 50)
    for _ in range(200):
        points = star(rng, rng.uniform(-20, 80, 2), rng.uniform(10, 60), rng.integers(3, 40))
        polygon = geometry.Polygon(points)
        if not polygon.is_valid:
            continue
        parts = getattr(polygon.intersection(window), "geoms", [polygon.intersection(window)])
        parts = [
            np.asarray(part.exterior.coords)[:-1] for part in parts if part.geom_type == "Polygon" and not part.is_empty
        ]
        clipped = cropped_geometry(50, 60, 50, 60, 0, 0, 50, 60, "none").apply_polygon(points)
        covered = filled([clipped] if len(clipped) else [], 50, 60)
        np.testing.assert_array_equal(covered, filled(parts, 50, 60))
