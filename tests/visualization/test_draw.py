import numpy as np
import pytest

from fcclip.structures import Segment
from fcclip.visualization import class_colors, draw, draw_instances, draw_labels, draw_panoptic
from fcclip.visualization.draw import READABLE_SIDE_PX, _place, label_font

GREY = 128


def pixels(height=800, width=800):
    return np.full((height, width, 3), GREY, np.uint8)


def square_map(height=800, width=800):
    ids = np.ones((height, width), np.int32)
    ids[: height // 4] = 0  # void
    ids[height // 2 : height * 3 // 4, width // 4 : width * 3 // 4] = 2
    return ids


SEGMENTS = [Segment(1, 0, False, 0.9, 0), Segment(2, 1, True, 0.8, 0)]
NAMES = ("sand", "red circle")


def test_void_pixels_stay_untouched_and_segments_are_tinted():
    drawn = draw_panoptic(pixels(), square_map(), SEGMENTS, NAMES)
    assert drawn.dtype == np.uint8
    assert drawn.shape == (800, 800, 3)
    assert (drawn[:195] == GREY).all()
    assert (drawn[700:790, 20:100] != GREY).any(-1).all()
    assert (drawn[420:440, 220:580] != GREY).any(-1).mean() > 0.9


def test_the_input_image_is_not_changed():
    image = pixels()
    draw_panoptic(image, square_map(), SEGMENTS, NAMES)
    assert (image == GREY).all()


@pytest.mark.parametrize("size", [(1, 1), (16, 40), (256, 256), (500, 300)])
def test_small_images_are_enlarged_by_a_whole_factor_until_names_are_readable(size):
    height, width = size
    drawn = draw_panoptic(pixels(height, width), np.ones(size, np.int32), SEGMENTS[:1], NAMES)
    assert drawn.shape[1] % width == 0
    assert max(drawn.shape[:2]) >= READABLE_SIDE_PX
    assert drawn.shape[0] == height * (drawn.shape[1] // width)


def test_a_large_image_keeps_its_size():
    drawn = draw_panoptic(pixels(1024, 2048), np.ones((1024, 2048), np.int32), SEGMENTS[:1], NAMES)
    assert drawn.shape == (1024, 2048, 3)


def test_scores_change_the_writing_only():
    without = draw_panoptic(pixels(), square_map(), SEGMENTS, NAMES, scores=False)
    with_scores = draw_panoptic(pixels(), square_map(), SEGMENTS, NAMES)
    changed = (without != with_scores).any(-1)
    assert 0 < changed.mean() < 0.02


def test_a_image_without_segments_is_drawn_as_it_is():
    np.testing.assert_array_equal(draw_panoptic(pixels(), np.zeros((800, 800), np.int32), [], NAMES), pixels())


def test_a_segment_too_small_for_a_name_is_drawn_without_one():
    ids = np.ones((800, 800), np.int32)
    ids[401, 401] = 2  # one pixel, thinner than a cell of the placement grid
    assert draw_panoptic(pixels(), ids, SEGMENTS, NAMES).shape == (800, 800, 3)


def test_names_in_any_alphabet_and_of_any_length_can_be_written():
    names = ("песок und Straße θάλασσα", "x" * 500)
    assert draw_panoptic(pixels(), square_map(), SEGMENTS, names).shape == (800, 800, 3)


def test_equal_things_have_different_shades():
    ids = np.zeros((800, 800), np.int32)
    ids[100:300, 100:700], ids[500:700, 100:700] = 1, 2
    drawn = draw_panoptic(pixels(), ids, [Segment(i, 1, True, 0.5, 120000) for i in (1, 2)], NAMES)
    assert (drawn[120, 120] != drawn[520, 120]).any()


def nothing_hidden(mask):
    return np.zeros(mask.shape, np.float32)


def test_a_name_is_placed_inside_its_segment_where_it_fits():
    mask = np.zeros((40, 60), bool)
    mask[10:30, 5:50] = True
    row, column = _place(mask, np.zeros_like(mask), nothing_hidden(mask), (12, 4))
    assert mask[row : row + 4, column : column + 12].all()


def test_a_name_that_would_hide_its_segment_stands_beside_it():
    mask = np.zeros((40, 60), bool)
    mask[20:23, 30:35] = True
    row, column = _place(mask, np.zeros_like(mask), mask / np.float32(15), (12, 4))
    assert not mask[row : row + 4, column : column + 12].any()
    grown = np.pad(mask, 1)[row : row + 6, column : column + 14]  # the name and one cell around it
    assert grown.any()


def test_names_never_overlap():
    mask = np.ones((40, 60), bool)
    taken = np.zeros_like(mask)
    for _ in range(8):
        row, column = _place(mask, taken, nothing_hidden(mask), (12, 4))
        assert not taken[row : row + 4, column : column + 12].any()
        taken[row : row + 4, column : column + 12] = True


def test_a_name_without_room_has_no_place():
    mask = np.ones((10, 10), bool)
    assert _place(mask, np.ones_like(mask), nothing_hidden(mask), (3, 2)) is None
    assert _place(mask, np.zeros_like(mask), nothing_hidden(mask), (11, 2)) is None
    assert _place(np.zeros_like(mask), np.zeros_like(mask), nothing_hidden(mask), (3, 2)) is None


def test_many_segments_have_smaller_names_that_hide_less(monkeypatch):
    sizes = []
    monkeypatch.setattr(draw, "label_font", lambda size_px: sizes.append(size_px) or label_font(size_px))
    ids = np.arange(64, dtype=np.int32).reshape(8, 8).repeat(100, 0).repeat(100, 1) + 1
    few, many = ids.clip(max=3), ids
    for found in (few, many):
        segments = [Segment(number, 1, True, 0.5, 1) for number in np.unique(found).tolist()]
        draw_panoptic(pixels(), found, segments, NAMES)
    assert sizes[1] < sizes[0] and sizes[1] >= draw.SMALLEST_LETTERS_PX


def test_in_a_video_the_identity_of_a_thing_is_its_colour_and_the_legend_is_of_stuff():
    drawn = draw_panoptic(pixels(), square_map(), SEGMENTS, NAMES, legend=True, identities=True)
    ids = np.where(square_map() == 2, 7, square_map())
    other = draw_panoptic(pixels(), ids, [SEGMENTS[0], Segment(7, 1, True, 0.8, 0)], NAMES, identities=True)
    assert (drawn[430, 300] != other[430, 300]).any()
    np.testing.assert_array_equal(drawn[700:800], other[700:])
    strip = drawn[800:].reshape(-1, 3).tolist()
    sand, circle = map(list, class_colors(NAMES))
    assert sand in strip
    assert circle not in strip


def test_a_legend_stands_below_the_image_with_the_colour_of_every_class():
    plain, with_legend = (
        draw_panoptic(pixels(), square_map(), SEGMENTS, NAMES, legend=legend) for legend in (False, True)
    )
    np.testing.assert_array_equal(with_legend[:800], plain)
    strip = with_legend[800:].reshape(-1, 3).tolist()
    assert all(list(color) in strip for color in class_colors(NAMES))


def test_a_map_with_the_large_ids_of_files_is_drawn_as_any_other():
    large = np.where(square_map() == 2, (1 << 23) + 5, square_map())
    segments = [SEGMENTS[0], Segment((1 << 23) + 5, 1, True, 0.8, 0)]
    expected = draw_panoptic(pixels(), square_map(), SEGMENTS, NAMES)
    np.testing.assert_array_equal(draw_panoptic(pixels(), large, segments, NAMES), expected)


def test_instances_may_overlap_and_the_smaller_one_is_drawn_last():
    masks = np.zeros((2, 800, 800), bool)
    masks[0, 300:500, 300:500], masks[1, 200:700, 100:700] = True, True
    segments = [Segment(1, 0, True, 0.9, 40000), Segment(2, 1, True, 0.8, 300000)]
    drawn = draw_instances(pixels(), masks, segments, NAMES)
    alone = draw_instances(pixels(), masks[:1], segments[:1], NAMES)
    assert (drawn[305:320, 400] != alone[305:320, 400]).any() and (drawn[210:290, 150] != GREY).any()
    np.testing.assert_array_equal(draw_instances(pixels(), [], [], NAMES), pixels())


def test_labels_are_drawn_like_one_segment_per_class_and_ignored_pixels_stay_untouched():
    labels = np.full((800, 800), 255, np.uint8)
    labels[400:] = 1
    drawn = draw_labels(pixels(), labels, NAMES)
    assert (drawn[:395] == GREY).all()
    assert (drawn[410:] != GREY).any(-1).mean() > 0.9


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"the map is \(4, 4\).*image \(800, 800\)"):
        draw_panoptic(pixels(), np.zeros((4, 4), np.int32), [], NAMES)


@pytest.mark.parametrize(("shape", "kind"), [((8, 8), np.uint8), ((8, 8, 4), np.uint8), ((8, 8, 3), np.float32)])
def test_a_image_that_is_not_rgb_bytes_is_refused(shape, kind):
    image = np.zeros(shape, kind)
    with pytest.raises(ValueError, match=r"\(h, w, 3\) uint8 RGB"):
        draw_panoptic(image, np.zeros((8, 8), np.int32), [], NAMES)


def test_a_class_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"segment 5 has class 2, but there are names for 0\.\.1"):
        draw_panoptic(pixels(), square_map(), [Segment(5, 2, True, 1.0, 1)], NAMES)
    with pytest.raises(ValueError, match="has class 7"):
        draw_labels(pixels(), np.full((800, 800), 7), NAMES)
