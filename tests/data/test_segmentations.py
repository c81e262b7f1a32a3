import numpy as np
import pycocotools.mask
import pytest

from fcclip.data.segmentations import compressed, fill_polygons, has_area, paint_classes, read_run_lengths, run_lengths
from tests.data.published_trees import counts_of


def blob(seed, height=12, width=17):
    return np.random.default_rng(seed).random((height, width)) < 0.4


def encoded(mask):
    return pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_three_corners_make_a_polygon():
    assert has_area([0, 0, 1, 0, 1, 1])
    assert not has_area([0, 0, 1, 0])
    assert not has_area([0, 0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize("form", ["bytes", "text", "list"])
def test_run_lengths_of_every_form_become_masks(form):
    masks = [blob(0), blob(1), np.zeros((12, 17), bool)]
    codes = [encoded(mask) for mask in masks]
    if form == "text":
        codes = [{**code, "counts": code["counts"].decode()} for code in codes]
    if form == "list":
        codes = [{"size": [12, 17], "counts": counts_of(mask)} for mask in masks]
    decoded = read_run_lengths(codes, (12, 17))
    assert decoded.dtype == bool and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, masks)


def test_no_code_gives_no_mask():
    assert read_run_lengths([], (3, 4)).shape == (0, 3, 4)


def test_a_code_of_another_size_is_refused():
    with pytest.raises(ValueError, match="a run-length code is 12 x 17 pixels .*, its image 17 x 12"):
        read_run_lengths([encoded(blob(0))], (17, 12))


@pytest.mark.parametrize("code", [{"counts": "x"}, {"size": [1, 2]}, {"size": 3, "counts": [1]}])
def test_an_incomplete_code_is_refused(code):
    with pytest.raises(ValueError, match=r"needs 'size' \[height, width\] and 'counts'"):
        compressed(code)


def test_filled_polygons_are_those_of_the_coco_tools_also_over_the_border():
    rng = np.random.default_rng(0)
    for _ in range(30):
        polygons = [rng.uniform(-3, 40, (rng.integers(3, 9), 2)) for _ in range(rng.integers(1, 4))]
        canvas = np.zeros((30, 36), bool)
        fill_polygons(polygons, canvas)
        codes = pycocotools.mask.frPyObjects([corners.ravel().tolist() for corners in polygons], 30, 36)
        np.testing.assert_array_equal(canvas, pycocotools.mask.decode(pycocotools.mask.merge(codes)))


def test_filling_keeps_what_is_there():
    canvas = np.zeros((4, 4), bool)
    canvas[3] = True
    fill_polygons([np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])], canvas)
    assert canvas.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    fill_polygons([], canvas)
    assert canvas.sum() == 8


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_run_length_codes_are_read_as_they_were_written(share):
    mask = np.random.default_rng(0).random((300, 200)) < share
    mask[:, 60:160] = False  # a run that needs several digits
    np.testing.assert_array_equal(run_lengths(encoded(mask)["counts"]), counts_of(mask) if mask.any() else [mask.size])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("55", r"runs of \d+ pixels in all, its size 12 x 17 has 204"),  # pycocotools decodes it to unset memory
        ("0" * 50, "runs of 0 pixels in all"),
        ("P" * 9, "the 'counts' are not a run-length code"),
        ("\x00 ", "the 'counts' are not a run-length code"),
        ("", "the 'counts' are not a run-length code"),
    ],
)
def test_a_run_length_code_that_does_not_fill_its_image_is_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        read_run_lengths([{"size": [12, 17], "counts": counts}], (12, 17))


def test_segments_are_painted_with_their_classes_and_all_else_with_the_ignore_label():
    id_map = np.random.default_rng(0).choice([0, 3, 70_000, 2**24 - 1, 9], (7, 5)).astype(np.int32)
    id_map[2:4] = 3
    class_of = {2**24 - 1: 0, 3: 132, 70_000: 5, 8: 1}  # 8 is nowhere, 0 and 9 are no segment
    painted = paint_classes(
        id_map, [{"id": segment_id, "category_id": index} for segment_id, index in class_of.items()], 255
    )
    assert painted.dtype == np.int32
    assert painted.tolist() == [[class_of.get(segment_id, 255) for segment_id in row] for row in id_map.tolist()]
    assert (paint_classes(id_map, [], 7) == 7).all()
