"""Identities: which segments of successive frames are one thing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from fcclip.errors import InputError
from fcclip.segmenter.result import Segmentation, Tracked
from fcclip.segmenter.segments import NamedSegment

MEMORY = 10  # frames for which a thing that is not seen is remembered
# Chosen on 8 clips of 12 panning crops of shapes_tune. At 22 pixels a frame they had 27 switches of identity and 44.0 %
# association quality; by IoU > 0.1 alone 42 and 41.9 %, by IoU > 0.3 alone 259 and 22.2 %.
APPEARANCE = 0.5  # weight of the cosine of region embeddings beside the mask IoU
THRESHOLD = 0.4  # of their sum, from which on two segments are one thing


@dataclass
class Track:
    """A thing, as it was when last seen."""

    id: int
    rle: dict[str, Any]  # its mask
    embedding: np.ndarray  # (D,) unit length, a running mean
    seen: int  # number of the frame
    votes: dict[int, float]  # class -> sum of scores over all frames


class Tracker:
    """Gives the segments of one video identities, frame by frame.

    A thing is matched with the thing of earlier frames whose mask and region embedding are most like its own, whatever
    both are called, and gets the name that its scores add up to. Stuff of a class has one identity. None is used twice.
    What is kept does not grow with the length of the video.

    Args:
        memory: frames, at least 1; a thing that comes back within so many has its identity again, if it looks the same.
    """

    def __init__(self, *, memory: int = MEMORY) -> None:
        if memory < 1:
            raise InputError(f"memory is a number of frames, at least 1; got {memory}")
        self.memory = memory
        self._tracks: list[Track] = []
        self._stuff: dict[int, int] = {}  # class -> its identity
        self._frame = self._used = 0

    def update(self, result: Segmentation) -> Segmentation:
        """The next frame with identities for segment ids, in `panoptic` and `segments`."""
        self._frame += 1
        self._tracks = [track for track in self._tracks if self._frame - track.seen <= self.memory]
        things = [index for index, segment in enumerate(result.segments) if segment.isthing]
        tracks = self._matched([result.segments[i] for i in things], result.embeddings[things])
        track_of = dict(zip(things, tracks))
        numbers = np.zeros(1 + max((segment.id for segment in result.segments), default=0), np.int32)
        segments = []
        for index, segment in enumerate(result.segments):
            if index in track_of:
                track = track_of[index]
                label = max(track.votes, key=track.votes.__getitem__)
                changes = {"id": track.id, "category_id": label, "name": result.class_names[label]}
            else:
                if segment.category_id not in self._stuff:
                    self._stuff[segment.category_id] = self._next()
                changes = {"id": self._stuff[segment.category_id]}
            numbers[segment.id] = changes["id"]
            segments.append(replace(segment, **changes))
        return replace(result, outputs=Tracked(result.outputs, numbers[result.panoptic], tuple(segments)))

    def _matched(self, things: list[NamedSegment], embeddings: np.ndarray) -> list[Track]:
        """The track of each thing, known or new, with what was seen of it now."""
        known: dict[int, Track] = {}
        if things and self._tracks:
            masks, before = [dict(thing.rle) for thing in things], [track.rle for track in self._tracks]
            if masks[0]["size"] == before[0]["size"]:
                overlap = coco_mask.iou(masks, before, [False] * len(before))
            else:
                overlap = np.zeros((len(masks), len(before)))
            likeness = overlap + APPEARANCE * embeddings @ np.stack([track.embedding for track in self._tracks]).T
            likeness[likeness <= THRESHOLD] = 0  # no pair at all is worth as much as a bad one
            pairs = zip(*linear_sum_assignment(-likeness))
            known = {thing: self._tracks[track] for thing, track in pairs if likeness[thing, track] > THRESHOLD}
        tracks = []
        for index, (thing, embedding) in enumerate(zip(things, embeddings)):
            if index not in known:
                known[index] = Track(self._next(), dict(thing.rle), embedding, self._frame, {})
                self._tracks.append(known[index])
            track = known[index]
            mean = track.embedding + embedding
            track.embedding = mean / max(np.linalg.norm(mean), 1e-12)
            track.rle, track.seen = dict(thing.rle), self._frame
            track.votes[thing.category_id] = track.votes.get(thing.category_id, 0.0) + thing.score
            tracks.append(track)
        return tracks

    def _next(self) -> int:
        self._used += 1
        return self._used
