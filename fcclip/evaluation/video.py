"""Video panoptic quality: panoptic quality of tubes, the segments of several frames that have one id.

A window of k frames slides over each video; its maps, stacked, are one image to `panoptic.compare_segments`, in which
a thing counts as found only if it keeps its id. VPQ is the mean over the sizes of the window. (Kim et al., "Video
Panoptic Segmentation", CVPR 2020, section 3.2)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fcclip.errors import InputError
from fcclip.evaluation.averages import mean_of_defined
from fcclip.evaluation.ground_truth import ClassEvaluator, GroundTruth
from fcclip.evaluation.histograms import as_array
from fcclip.evaluation.panoptic import ClassCounts, PanopticEvaluator, compare_segments, sum_counts
from fcclip.files import listed

WINDOWS = (1, 2, 4, 6)  # frames, as on VIPSeg; Cityscapes-VPS has 1, 2, 3, 4 of its annotated frames

Frame = tuple[np.ndarray, Sequence[Mapping[str, Any]]]  # id map (h, w), and its segments


@dataclass(frozen=True)
class VideoTruth:
    """The ground truth of a video: of its frames, in order; a segment that is in several has one id."""

    image_id: int | str  # of the video, to an evaluator
    frames: Sequence[GroundTruth]


class VideoPanopticEvaluator(ClassEvaluator):
    """Video panoptic quality of id maps.

    Args:
        class_names, seen: as for `ClassEvaluator`.
        thing_classes: contiguous indices of the countable ones.
        windows: frames that are compared at once; a video with fewer has no part in that size.
    """

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        thing_classes: Iterable[int],
        seen: Sequence[bool] | None = None,
        windows: Sequence[int] = WINDOWS,
    ) -> None:
        self.thing_classes, self.windows = frozenset(thing_classes), tuple(windows)
        super().__init__(class_names=class_names, classes=self.thing_classes, seen=seen)
        if not self.windows or min(self.windows) < 1:
            raise InputError(f"windows are numbers of frames, each at least 1; got {self.windows}")

    def measure(
        self, ground_truth: VideoTruth, output: Sequence[Mapping[str, Any]]
    ) -> dict[int, dict[int, ClassCounts]]:
        """Counts of each category, by the size of the window.

        Args:
            ground_truth: of a video of T frames.
            output: T outputs of a model, each with `panoptic_seg`; a thing keeps its id, and where its class changes
                it counts as another one.

        Raises:
            ValueError: another number of frames, and as `compare_segments`.
        """
        name = f"video {ground_truth.image_id!r}"
        if len(output) != len(ground_truth.frames):
            raise InputError(f"{name} has {len(ground_truth.frames)} frames, but predictions for {len(output)}")
        truth = as_tubes([(frame.id_map, frame.segments) for frame in ground_truth.frames])
        frames = [(as_array(ids), segments) for ids, segments in (frame["panoptic_seg"] for frame in output)]
        for index, (ids, segments) in enumerate(frames):
            unlisted = set(np.unique(ids).tolist()) - {0, *(segment["id"] for segment in segments)}
            if unlisted:
                raise InputError(f"{name}, frame {index}: ids {listed(sorted(unlisted))} of the map have no segment")
        predicted = as_tubes(frames)
        counts = {}
        for size in self.windows:
            starts = range(len(frames) - size + 1)
            counts[size] = sum_counts(
                {
                    start: compare_segments(
                        *stacked(truth[start : start + size]),
                        *stacked(predicted[start : start + size]),
                        categories=range(len(self.class_names)),
                        name=f"{name}, frames {start} to {start + size - 1}",
                    )
                    for start in starts
                }
            )
        return counts

    def results(self) -> dict[str, dict[str, float]]:
        """VPQ, VSQ and VRQ, and the VPQ of each window as `VPQ-1`, `VPQ-2`, …, in percent."""
        options = {"class_names": self.class_names, "thing_classes": self.thing_classes, "seen": self.seen}
        by_window = {}
        for size in self.windows:
            evaluator = PanopticEvaluator(**options)
            evaluator.merge({video: counts[size] for video, counts in self.images.items()})
            by_window[size] = evaluator.results()["panoptic_seg"]
        metrics = {
            f"V{name}": mean_of_defined(metrics[name] for metrics in by_window.values())
            for name in by_window[self.windows[0]]
        }
        return {"video_panoptic_seg": metrics | {f"VPQ-{size}": values["PQ"] for size, values in by_window.items()}}


def as_tubes(frames: Sequence[Frame]) -> list[Frame]:
    """The frames of a video with numbers for ids: one a pair of id and class, from 1; what has no segment gets the
    number after the last."""
    numbers: dict[tuple[int, int], int] = {}
    for _, segments in frames:
        for segment in segments:
            numbers.setdefault((segment["id"], segment["category_id"]), len(numbers) + 1)
    tubes = []
    for ids, segments in frames:
        number = {segment["id"]: numbers[segment["id"], segment["category_id"]] for segment in segments}
        values, places = np.unique(ids, return_inverse=True)
        table = [0 if value == 0 else number.get(value, len(numbers) + 1) for value in values.tolist()]
        renumbered = np.array(table, np.int32)[places].reshape(ids.shape)
        tubes.append((renumbered, [{**segment, "id": number[segment["id"]]} for segment in segments]))
    return tubes


def stacked(frames: Sequence[Frame]) -> Frame:
    """Frames as one image: the maps below each other, areas added."""
    merged: dict[int, dict[str, Any]] = {}
    for _, segments in frames:
        for segment in segments:
            area = segment.get("area")
            if segment["id"] in merged:
                before = merged[segment["id"]]["area"]
                area = None if None in (area, before) else area + before
            merged[segment["id"]] = {**segment, "area": area}
    return np.concatenate([ids for ids, _ in frames]), list(merged.values())
