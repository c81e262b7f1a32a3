"""An image with its ground truth, and what every evaluator of such images has."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fcclip.data import paint_classes, read_id_map, read_label_map
from fcclip.errors import InputError
from fcclip.files import listed


@dataclass(frozen=True)
class GroundTruth:
    """One record of a data set; its ground truth is decoded at first use and once, whatever the number of evaluators.

    Args:
        record: the data set's record.
        ignore_label: what pixels without a class are in `labels` when these are painted from segments.
    """

    record: Mapping[str, Any]
    ignore_label: int = 255
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def image_id(self) -> int | str:
        return self.record["image_id"]

    @property
    def file_name(self) -> str:
        return self.record["file_name"]

    @property
    def segments(self) -> list[dict]:
        """Ground-truth segments: `id, category_id` (contiguous), `area, iscrowd`."""
        return self.record["segments_info"]

    @property
    def label_source(self) -> str:
        """The file that `labels` come from."""
        return self.record.get("sem_seg_file_name") or self.record["pan_seg_file_name"]

    @functools.cached_property
    def id_map(self) -> np.ndarray:
        """(h, w) int32, ground-truth segment id of each pixel; 0 is void."""
        return read_id_map(self.record["pan_seg_file_name"])

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """(h, w) int32, ground-truth class of each pixel: of the label map, or of the segments in the data sets that
        have none. Crowds have the class of their segment, as in the label maps made of COCO's; ids without a segment
        are ignored."""
        if self.record.get("sem_seg_file_name"):
            return read_label_map(self.record["sem_seg_file_name"])
        return paint_classes(self.id_map, self.segments, self.ignore_label)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call with this key; evaluators and modes share it."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


class Evaluator(ABC):
    """Compares predictions with ground truth, image by image.

    `measure` looks at an image and changes nothing, so that threads can do it while the network runs; `keep` takes in
    what came of it. Several processes each feed their own evaluator; `state` of the others goes into `merge` of the
    first, whose results must not depend on how the images were shared out.
    """

    @abstractmethod
    def measure(self, ground_truth: GroundTruth, output: Mapping[str, Any]) -> Any:
        """What counts of the model's output for one image.

        Args:
            ground_truth: of the image.
            output: what this evaluator looks at: `panoptic_seg` (id map (h, w) int, list of segments), `sem_seg` (h, w)
                int, `instances`. Maps may be tensors or arrays.
        """

    @abstractmethod
    def keep(self, image_id: int | str, measured: Any) -> None:
        """Takes in what `measure` returned."""

    def process(self, ground_truth: GroundTruth, output: Mapping[str, Any]) -> None:
        """Measures an image and keeps what came of it."""
        self.keep(ground_truth.image_id, self.measure(ground_truth, output))

    @property
    def per_image(self) -> dict[Hashable, float]:
        """Image id -> how good this image is, in percent, NaN where undefined; empty if it cannot be said of one."""
        return {}

    @abstractmethod
    def state(self) -> Any:
        """All that was taken in, picklable."""

    @abstractmethod
    def merge(self, state: Any) -> None:
        """Takes in what another process did."""

    @abstractmethod
    def results(self) -> dict[str, dict[str, float]]:
        """Task -> metric -> value in percent, NaN where undefined."""

    def save(self) -> None:  # noqa: B027 (most evaluators have nothing to write)
        """Writes files for other programs, after everything is merged."""


class ClassEvaluator(Evaluator):
    """An evaluator of K classes, which keeps what it measured of each image.

    Args:
        class_names: name of each of the K classes, by contiguous index.
        classes: indices of those that the evaluator tells apart from the others.
        seen: (K,) whether training knew the class; None when unknown.

    Raises:
        ValueError: an index that is not one of the K, or as many entries in `seen` as another list has classes.
    """

    def __init__(
        self, *, class_names: Sequence[str], classes: Iterable[int] = (), seen: Sequence[bool] | None = None
    ) -> None:
        self.class_names = tuple(class_names)
        self.seen = None if seen is None else tuple(seen)
        self.images: dict[Hashable, Any] = {}  # image id -> what was measured
        beyond = sorted(index for index in classes if not 0 <= index < len(self.class_names))
        if beyond:
            raise InputError(
                f"there are {len(self.class_names)} class names and a class {beyond[-1]}, counted from 0; the names "
                "must be those of the data set"
            )
        if self.seen is not None and len(self.seen) != len(self.class_names):
            raise InputError(f"there are {len(self.class_names)} class names, but `seen` has {len(self.seen)} entries")

    def keep(self, image_id: int | str, measured: Any) -> None:
        self._add_images({image_id: measured})

    def state(self) -> Any:
        return self.images

    def merge(self, state: Any) -> None:
        self._add_images(state)

    def _add_images(self, images: Mapping[Hashable, Any]) -> None:
        twice = sorted(self.images.keys() & images.keys(), key=str)
        if twice:
            raise InputError(f"image {listed(map(repr, twice))} came twice; each image may be evaluated once")
        self.images.update(images)


def in_order(image_ids: Iterable[Hashable]) -> list:
    """Image ids, numbers before strings, each ascending."""
    return sorted(image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))
