"""An exported model (`fcclip.deploy`) in place of a segmenter; h x w are pixels of the image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from fcclip.deploy import Result, Runner, VocabularyFile
from fcclip.deploy.maps import Segment
from fcclip.segmenter.images import ImageInput, read_image_input
from fcclip.segmenter.result import Segmentation
from fcclip.segmenter.segmenter import Segmenter
from fcclip.segmenter.segments import NamedSegment, run_lengths
from fcclip.vocabulary import Vocabulary


class ExportedSegmenter:
    """Segments images as `Segmenter` does, with an exported folder and without its model.

    Args:
        folder, threads, providers: as for `Runner`.

    Raises:
        ImportError, FileNotFoundError, ValueError: as `Runner`.
    """

    video = Segmenter.video

    def __init__(self, folder: str | Path, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)):
        self.runner = Runner(folder, threads=threads, providers=providers)

    def __call__(
        self,
        images: Sequence[ImageInput],
        vocabulary: str | Path | VocabularyFile | None = None,
        *,
        min_score: float = 0.0,
        batch_size: int = 1,
    ) -> list[Segmentation]:
        """The result of each image, seen one at a time.

        Args:
            images: as for a call of `Segmenter`.
            vocabulary: a vocabulary file or its content; None: that of the folder.
            min_score: things with a lower score are left out; stuff always stays.
            batch_size: without effect.

        Raises:
            FileNotFoundError, ValueError: as a call of `Runner`.
        """
        pixels = map(read_image_input, images)
        return [Segmentation(image, Exported(self.runner(image, vocabulary), min_score)) for image in pixels]


@dataclass(frozen=True)
class Exported:
    """The parts of a result, of which `Segmentation` says what they are; each is made when it is asked for."""

    result: Result
    min_score: float

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        file = self.result.vocabulary
        synonyms = np.split(file.synonyms, np.flatnonzero(np.diff(file.class_of_vector)) + 1)
        marks = ("thing" if thing else "stuff" for thing in file.things)
        return Vocabulary.from_names([f"{', '.join(names)}:{mark}" for names, mark in zip(synonyms, marks)])

    @functools.cached_property
    def panoptic(self) -> np.ndarray:
        ids = self.result.panoptic
        return ids * np.isin(ids, [segment.id for segment in self._kept])

    @property
    def _kept(self) -> list[Segment]:
        return [one for one in self.result.segments if not one.isthing or one.score >= self.min_score]

    @functools.cached_property
    def segments(self) -> tuple[NamedSegment, ...]:
        return tuple(map(named, self._kept))

    @functools.cached_property
    def instances(self) -> tuple[NamedSegment, ...]:
        return tuple(named(segment) for segment in self.result.instances if segment.score >= self.min_score)

    @property
    def semantic(self) -> np.ndarray:
        return self.result.semantic

    @property
    def embeddings(self) -> np.ndarray:
        rows = self.result.region_embeddings[[segment.query for segment in self._kept]]
        return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def named(segment: Segment) -> NamedSegment:
    """A segment with its mask as run lengths, and its box."""
    [(rows, columns)] = ndimage.find_objects(segment.mask.astype(np.int8))
    mask = segment.mask[rows, columns]
    rle = run_lengths(mask, top=rows.start, left=columns.start, size=segment.mask.shape)
    return NamedSegment(
        segment.id,
        segment.category_id,
        segment.isthing,
        segment.score,
        segment.area,
        name=segment.name,
        rle=rle,
        box=(columns.start, rows.start, columns.stop, rows.stop),
    )
