from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest

from fcclip.evaluation import PanopticEvaluator, VideoPanopticEvaluator, VideoTruth

THING, STUFF = 0, 1
OPTIONS = {"class_names": ("disc", "sand"), "thing_classes": (THING,)}


def frame(ids, classes):
    ids = np.array(ids)
    present = {number: classes[number] for number in np.unique(ids).tolist() if number}
    areas = {number: int((ids == number).sum()) for number in present}
    return ids, [{"id": n, "category_id": c, "area": areas[n], "iscrowd": 0} for n, c in present.items()]


def truth_of(frames, video="clip"):
    records = [SimpleNamespace(image_id=i, id_map=ids, segments=segments) for i, (ids, segments) in enumerate(frames)]
    return VideoTruth(video, records)


def outputs_of(frames):
    return [{"panoptic_seg": pair} for pair in frames]


def vpq(truth, predicted, **options):
    evaluator = VideoPanopticEvaluator(**OPTIONS, **options)
    evaluator.process(truth_of(truth), outputs_of(predicted))
    return evaluator.results()["video_panoptic_seg"]


def slow_vpq(truth, predicted, size):
    """The definition, with sets of (frame, row, column): PQ of the tubes of all windows, mean over classes."""

    def tubes(frames):
        pixels, classes = defaultdict(set), {}
        for t, (ids, segments) in enumerate(frames):
            for segment in segments:
                classes[segment["id"]] = segment["category_id"]
                pixels[segment["id"]] |= {(t, *place) for place in np.argwhere(ids == segment["id"]).tolist()}
        return pixels, classes

    counts = defaultdict(lambda: [0, 0, 0, 0.0])
    for start in range(len(truth) - size + 1):
        window = slice(start, start + size)
        (g_pixels, g_class), (p_pixels, p_class) = tubes(truth[window]), tubes(predicted[window])
        void = {(t, *place) for t, (ids, _) in enumerate(truth[window]) for place in np.argwhere(ids == 0).tolist()}
        matched = set()
        for g, p in ((g, p) for g in g_pixels for p in p_pixels if g_class[g] == p_class[p]):
            iou = len(g_pixels[g] & p_pixels[p]) / len(g_pixels[g] | (p_pixels[p] - void))
            if iou > 0.5:
                matched |= {("g", g), ("p", p)}
                counts[g_class[g]][0] += 1
                counts[g_class[g]][3] += iou
        for p in p_pixels:
            excused = len(p_pixels[p] & void) > 0.5 * len(p_pixels[p])
            counts[p_class[p]][1] += ("p", p) not in matched and not excused
        for g in g_pixels:
            counts[g_class[g]][2] += ("g", g) not in matched
    defined = [iou / (tp + fp / 2 + fn / 2) for tp, fp, fn, iou in counts.values() if tp + fp + fn]
    return 100 * sum(defined) / len(defined)


def random_video(seed, num_frames=7):
    """Moving blocks; the prediction shifts them and sometimes exchanges identities."""
    rng = np.random.default_rng(seed)
    classes = {1: THING, 2: THING, 3: THING, 9: STUFF}
    truth, predicted = [], []
    tops = rng.integers(0, 8, 3)
    for t in range(num_frames):
        ids = np.full((16, 24), 9)
        for number, top in enumerate(tops, start=1):
            ids[top : top + 6, 2 * t + 4 * number : 2 * t + 4 * number + 4] = number
        ids[:2] = 0 if rng.random() < 0.5 else 9
        truth.append(frame(ids, classes))
        guess = np.roll(ids, rng.integers(-1, 2, 2), (0, 1))
        if rng.random() < 0.3:
            guess = np.select([guess == 1, guess == 2], [2, 1], guess)
        guess[guess == 0] = 9
        predicted.append(frame(guess, classes))
    return truth, predicted


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_it_is_the_definition_written_out(seed, size):
    truth, predicted = random_video(seed)
    assert vpq(truth, predicted)[f"VPQ-{size}"] == pytest.approx(slow_vpq(truth, predicted, size), abs=1e-9)


def test_vpq_is_the_mean_over_the_windows():
    metrics = vpq(*random_video(0))
    assert metrics["VPQ"] == pytest.approx(np.mean([metrics[f"VPQ-{size}"] for size in (1, 2, 4, 6)]))


def test_windows_of_one_frame_are_panoptic_quality():
    truth, predicted = random_video(1)
    images = PanopticEvaluator(**OPTIONS)
    for record, output in zip(truth_of(truth).frames, outputs_of(predicted)):
        images.process(record, output)
    metrics = vpq(truth, predicted, windows=(1,))
    assert {f"V{name}": value for name, value in images.results()["panoptic_seg"].items()}.items() <= metrics.items()


def test_a_switch_of_identity_costs_in_every_window_that_sees_it():
    line = frame([[1, 1, 1, 1]], {1: THING})
    other = frame([[2, 2, 2, 2]], {2: THING})
    metrics = vpq([line] * 4, [line, line, other, other], windows=(1, 2, 4))
    assert metrics["VPQ-1"] == 100  # a frame by itself is right
    assert metrics["VPQ-2"] == pytest.approx(100 * 2 / (2 + 2 / 2 + 1 / 2))  # the middle window: 2 wrong, 1 missed
    assert metrics["VPQ-4"] == 0  # half of the tube is no match


def test_a_thing_that_changes_its_class_is_another_tube():
    line = frame([[1, 1, 1, 1]], {1: THING})
    flipped = frame([[1, 1, 1, 1]], {1: STUFF})
    assert vpq([line] * 2, [line, flipped], windows=(2,))["VPQ-2"] == 0


def test_a_video_shorter_than_a_window_has_no_part_in_it():
    line = frame([[1, 1]], {1: THING})
    metrics = vpq([line], [line])
    assert metrics["VPQ"] == metrics["VPQ-1"] == 100
    assert np.isnan(metrics["VPQ-2"])


def test_processes_merge_to_what_one_finds():
    whole, half, other = (VideoPanopticEvaluator(**OPTIONS) for _ in range(3))
    for seed, evaluator in ((0, half), (1, other)):
        truth, predicted = random_video(seed)
        for target in (whole, evaluator):
            target.process(truth_of(truth, video=seed), outputs_of(predicted))
    half.merge(other.state())
    assert half.results() == whole.results()


def test_missing_frames_and_ids_without_a_segment_are_named():
    line = frame([[1, 1]], {1: THING})
    with pytest.raises(ValueError, match="video 'clip' has 2 frames, but predictions for 1"):
        vpq([line] * 2, [line])
    with pytest.raises(ValueError, match="video 'clip', frame 1: ids 7 of the map have no segment"):
        vpq([line] * 2, [line, (np.full((1, 2), 7), [])])
