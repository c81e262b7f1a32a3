"""Large images in tiles."""

import itertools
import tracemalloc

import numpy as np
import pytest

from fcclip.segmenter import Computed
from fcclip.segmenter.segments import named_segments
from fcclip.segmenter.tiles import segment_tiles, spans
from fcclip.vocabulary import Vocabulary
from tests.segmenter.conftest import NAMES

CLASSES = Vocabulary.from_names("ball; ground:stuff")


def sees(part):
    """A segmenter of images whose red channel is the number of a thing in the scene, 0 for the ground."""
    ids = part[..., 0].astype(np.int32) + 1
    areas = enumerate(np.bincount(ids.ravel())[1:].tolist())
    records = [
        {
            "id": number + 1,
            "isthing": number > 0,
            "category_id": int(number == 0),
            "score": 0.5 + number / 1000,
            "area": area,
        }
        for number, area in areas
        if area
    ]
    segments = named_segments(ids, records, CLASSES.class_names)
    things = tuple(segment for segment in segments if segment.isthing)
    embeddings = np.array([[segment.score, 1 - segment.score] for segment in segments], np.float32)
    return Computed(CLASSES, ids, segments, things, (part[..., 0] == 0).astype(np.int32), embeddings)


def scene(height, width, balls):
    image = np.zeros((height, width, 3), np.uint8)
    rows, columns = np.ogrid[:height, :width]
    for number, (row, column, radius) in enumerate(balls, start=1):
        image[..., 0][(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = number
    return image


@pytest.mark.parametrize(("side", "tile"), [(100, 64), (64, 64), (65, 64), (1000, 100), (5000, 1024), (129, 33)])
def test_tiles_are_equal_cover_the_side_and_decide_every_pixel_once(side, tile):
    found = spans(side, tile)
    assert {span.stop - span.start for span in found} == {tile}
    assert found[0].start == 0 and found[-1].stop == side
    assert [span.core_stop for span in found[:-1]] == [span.core_start for span in found[1:]]
    assert found[0].core_start == 0 and found[-1].core_stop == side
    assert all(later.start <= earlier.stop - tile // 4 for earlier, later in itertools.pairwise(found))
    assert all(span.start <= span.core_start < span.core_stop <= span.stop for span in found)


def test_a_side_shorter_than_a_tile_is_one_tile():
    assert [(span.start, span.stop) for span in spans(40, 64)] == [(0, 40)]


BALLS = [(50, 50, 20), (100, 110, 45), (160, 40, 25), (30, 200, 12), (170, 190, 30), (110, 210, 6)]


@pytest.mark.parametrize("tile", [64, 100, 128, 1000])
def test_things_and_stuff_are_joined_across_seams(tile):
    image = scene(200, 240, BALLS)
    result, whole = segment_tiles(image, tile=tile, look=sees), sees(image)
    assert [(found.name, found.score, found.area, found.box, found.rle) for found in result.segments] == [
        (found.name, found.score, found.area, found.box, found.rle) for found in whole.segments
    ]
    assert [(found.score, found.area, found.box, found.rle) for found in result.instances] == [
        (found.score, found.area, found.box, found.rle) for found in whole.instances
    ]
    np.testing.assert_array_equal(result.semantic, whole.semantic)
    for segment in result.segments:
        np.testing.assert_array_equal(result.panoptic == segment.id, segment.mask)
    np.testing.assert_allclose(np.linalg.norm(result.embeddings, axis=1), 1, atol=1e-5)


def test_neighbours_of_one_class_stay_two_things():
    image = scene(64, 160, [])
    image[20:40, 20:75, 0], image[20:40, 75:140, 0] = 1, 2
    result = segment_tiles(image, tile=64, look=sees)
    assert sorted(found.box for found in result.segments if found.isthing) == [(20, 20, 75, 40), (75, 20, 140, 40)]


def test_eight_thousand_by_six_thousand_pixels_take_a_bounded_number_of_bytes_a_pixel():
    """The maps take 8 bytes a pixel; the largest segment, the ground, passes as a mask and as columns, a byte each.
    torch, whose memory this does not count, sees one tile at a time."""
    height, width = 6000, 8000
    image, every_tile = np.zeros((height, width, 3), np.uint8), sees(scene(2048, 2048, [(1024, 1024, 300)]))
    tracemalloc.start()
    result = segment_tiles(image, tile=2048, look=lambda part: every_tile)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.panoptic.shape == (height, width)
    assert len(result.segments) == 1 + 4 * 5 and len(result.instances) == 4 * 5
    assert peak < 20 * height * width


def test_a_segmenter_joins_what_it_sees_in_tiles(segmenter, image):
    seen = []
    score = segmenter.model.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmenter.model, "score", lambda *arguments: seen.append(arguments) or score(*arguments))
        result = segmenter(np.tile(image, (1, 2, 1)), NAMES, tile=256, unknown=True, min_score=0.2)
    assert len(seen) == 3
    assert result.class_names == ("red circle", "blue star", "sand", "unknown")
    assert sum(segment.name == "sand" for segment in result.segments) == 1
    assert sum(segment.name == "red circle" for segment in result.segments) == 2
    assert result.draw().shape[1] % 512 == 0
    with pytest.raises(ValueError, match="relabel needs the masks of all queries"):
        result.relabel("cat")


@pytest.mark.parametrize("tile", [-1, 5])
def test_a_tile_without_room_is_refused(segmenter, image, tile):
    with pytest.raises(ValueError, match=f"at least 32, got {tile}"):
        segmenter(image, NAMES, tile=tile)
