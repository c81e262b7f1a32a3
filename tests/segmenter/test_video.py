import gc
import itertools
import tracemalloc

import numpy as np
import pytest

from fcclip.preparation.shapes_world import render_image
from fcclip.segmenter import Computed, Segmentation, Tracker
from fcclip.segmenter.segments import named_segments
from fcclip.vocabulary import Vocabulary

NAMES = Vocabulary.from_names("disc; ring; sand:stuff; water:stuff")
SAND = NAMES.class_names.index("sand")
SIZE = (60, 120)
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]]
RED, GREEN, BLUE = np.eye(8)[:3]


def disc(column, row=30, radius=10):
    return (ROWS - row) ** 2 + (COLUMNS - column) ** 2 < radius**2


def frame(*things, ground=SAND):
    """A result in which later things (mask, appearance, class) hide earlier ones, and sand is the rest."""
    ids = np.ones(SIZE, np.int32)
    rows = [(ground, np.eye(8)[7])]
    for number, (mask, appearance, category) in enumerate(things, start=2):
        ids[mask] = number
        rows.append((category, appearance))
    visible = [number for number in range(1, len(rows) + 1) if (ids == number).any()]
    records = [
        {
            "id": number,
            "category_id": rows[number - 1][0],
            "isthing": rows[number - 1][0] < SAND,
            "score": 1 - 0.1 * number,
            "area": int((ids == number).sum()),
        }
        for number in visible
    ]
    segments = named_segments(ids, records, NAMES.class_names)
    embeddings = np.array([rows[segment.id - 1][1] for segment in segments], np.float32)
    image = np.full((*SIZE, 3), 128, np.uint8)
    return Segmentation(image, Computed(NAMES, ids, segments, segments, ids - 1, embeddings))


def identity_at(result, row, column):
    return int(result.panoptic[row, column])


def test_things_that_cross_keep_their_identities_also_when_one_hides_the_other():
    tracker, red, blue = Tracker(), set(), set()
    for step in range(21):
        left, right = 20 + 4 * step, 100 - 4 * step
        result = tracker.update(frame((disc(left), RED, 0), (disc(right), BLUE, 0)))
        blue.add(identity_at(result, 30, right))
        if step != 10:  # then the red one is wholly behind the blue one
            red.add(identity_at(result, 30, left - 9 if step < 10 else left + 9))
    assert len(red) == len(blue) == 1
    assert red != blue


@pytest.mark.parametrize(("away", "is_back"), [(9, True), (10, False)])
def test_a_thing_that_comes_back_within_the_memory_has_its_identity_again(away, is_back):
    tracker = Tracker(memory=10)
    first = tracker.update(frame((disc(20), RED, 0), (disc(100), BLUE, 0)))
    for _ in range(away):
        tracker.update(frame((disc(100), BLUE, 0)))
    again = tracker.update(frame((disc(60), RED, 0), (disc(100), BLUE, 0)))
    assert (identity_at(again, 30, 60) == identity_at(first, 30, 20)) is is_back
    assert identity_at(again, 30, 100) == identity_at(first, 30, 100)


def test_a_new_thing_gets_an_identity_that_nothing_had():
    tracker = Tracker(memory=1)
    used = set()
    for step, appearance in enumerate((RED, GREEN, BLUE)):
        result = tracker.update(frame((disc(20 + 40 * step), appearance, 0)))
        new = identity_at(result, 30, 20 + 40 * step)
        assert new not in used
        used |= {new, identity_at(result, 0, 0)}
    assert used == {1, 2, 3, 4}


def test_the_ids_of_the_map_are_those_of_the_segments_and_no_pixel_changes_hands():
    before = frame((disc(30), RED, 0), (disc(80), BLUE, 1))
    tracker = Tracker()
    tracker.update(frame((disc(80), BLUE, 1)))
    after = tracker.update(before)
    assert set(np.unique(after.panoptic).tolist()) == {segment.id for segment in after.segments}
    for old, new in zip(before.segments, after.segments):
        np.testing.assert_array_equal(after.panoptic == new.id, before.panoptic == old.id)


def test_stuff_of_a_class_has_one_identity_for_the_whole_video():
    tracker = Tracker(memory=1)
    grounds = [tracker.update(frame(ground=ground)).segments[0].id for ground in (2, 3, 3, 3, 2)]
    assert grounds == [1, 2, 2, 2, 1]


def test_a_thing_has_the_name_that_its_scores_add_up_to():
    tracker = Tracker()
    names = []
    for category in (0, 0, 1, 0, 1, 1, 1):
        result = tracker.update(frame((disc(30), RED, category)))
        names += [(segment.name, segment.category_id) for segment in result.segments if segment.isthing]
    assert names == [("disc", 0)] * 6 + [("ring", 1)]


def test_a_frame_without_things_and_one_of_another_size_are_taken():
    tracker = Tracker()
    first = tracker.update(frame((disc(30), RED, 0)))
    tracker.update(frame())
    image = np.full((40, 40, 3), 128, np.uint8)
    ids = np.ones((40, 40), np.int32)
    record = {"id": 1, "category_id": 0, "isthing": True, "score": 0.9, "area": 1600}
    segments = named_segments(ids, [record], NAMES.class_names)
    smaller = Segmentation(image, Computed(NAMES, ids, segments, segments, ids - 1, RED[None].astype(np.float32)))
    assert tracker.update(smaller).segments[0].id == identity_at(first, 30, 30)


def test_a_thing_has_the_same_colour_in_all_frames_and_its_identity_beside_its_name():
    tracker, colors = Tracker(), []
    for step in range(4):
        things = [(disc(20 + 8 * step), RED, 0), (disc(90), BLUE, 0)][:: 1 if step % 2 else -1]
        result = tracker.update(frame(*things))
        drawing = result.draw(scores=False)
        factor = drawing.shape[0] // SIZE[0]
        colors.append(tuple(drawing[30 * factor, (20 + 8 * step - 8) * factor].tolist()))
    assert len(set(colors)) == 1
    plain = result.outputs.outputs
    assert (drawing != Segmentation(result.image, plain).draw(scores=False)).any()


def test_what_is_kept_does_not_grow_with_the_length():
    tracker = Tracker(memory=5)

    def run(frames):
        rng = np.random.default_rng(0)
        for _ in range(frames):  # always new things
            tracker.update(frame((disc(rng.integers(10, 110)), rng.standard_normal(8), 0)))
        gc.collect()

    run(20)
    tracemalloc.start()
    run(20)
    before = tracemalloc.get_traced_memory()[0]
    run(100)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000  # bytes; one mask of this size is 7200


def test_a_memory_of_no_frame_is_refused():
    with pytest.raises(ValueError, match="memory is a number of frames, at least 1; got 0"):
        Tracker(memory=0)


# ---- with the shipped weights ----


def moving_window(num_frames):
    """A view that moves over an image by 3 pixels a frame, taken one by one."""
    image = render_image(0, "val_seen", 3).image
    for step in range(num_frames):
        yield image[20:180, 3 * step : 3 * step + 192]


@pytest.fixture(scope="module")
def frames(segmenter):
    return list(segmenter.video(moving_window(8), batch_size=1))


def test_a_view_that_moves_sees_the_same_things(frames):
    sets = [{segment.id for segment in result.segments if segment.isthing} for result in frames]
    assert len(sets[0]) >= 2
    assert all(len(first & second) >= 0.5 * len(first) for first, second in itertools.pairwise(sets))


def test_frames_in_batches_are_the_same(segmenter, frames):
    batched = list(segmenter.video(moving_window(8), batch_size=4))
    for alone, result in zip(frames, batched, strict=True):
        assert [segment.id for segment in alone.segments] == [segment.id for segment in result.segments]


def test_frames_are_taken_when_they_are_needed(segmenter):
    taken = []

    def images():
        for index, image in enumerate(moving_window(3)):
            taken.append(index)
            yield image

    results = segmenter.video(images(), "red circle; sand:stuff")
    next(results)
    assert taken == [0]


def test_a_frame_cannot_be_named_anew(frames):
    with pytest.raises(ValueError, match="a frame of a video do not have"):
        frames[0].relabel("cat")


def test_a_batch_of_nothing_is_refused(segmenter):
    with pytest.raises(ValueError, match="batch_size is a number of images, at least 1; got 0"):
        next(segmenter.video(moving_window(1), batch_size=0))
