"""What the runner hands to evaluators: a picture with its ground truth, and the shape every evaluator has."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from fcclip.data import read_id_map


@dataclass(frozen=True)
class Picture:
    """One record of a data set; its ground truth is decoded at first use and once, whatever the number of evaluators.

    Args:
        record: the data set's record.
        encoded_masks: run-length codes of the masks already seen in this picture, by content. The same mask often comes
            with several classes and in several modes.
    """

    record: Mapping[str, Any]
    encoded_masks: dict[bytes, dict] = field(default_factory=dict)

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

    @functools.cached_property
    def id_map(self) -> np.ndarray:
        """(h, w) int32, ground-truth segment id of each pixel; 0 is void."""
        return read_id_map(self.record["pan_seg_file_name"])

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """(h, w) int, ground-truth class of each pixel."""
        return read_labels(self.record["sem_seg_file_name"])


class Evaluator(ABC):
    """Compares predictions with ground truth, picture by picture.

    Several processes each feed their own; `state` of the others goes into `merge` of the first, whose results must not
    depend on how the pictures were shared out.
    """

    @abstractmethod
    def process(self, picture: Picture, output: Mapping[str, Any]) -> None:
        """Takes in the model's output for one picture."""

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


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """(h, w) integers of a label picture: grey of 8, 16 or 32 bit, or palette indices.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, or a coloured one.
    """
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such label picture, though the data set lists it") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as a picture: {error}. Copy or prepare the file again.") from error
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: a label picture has one integer per pixel, got {labels.dtype} of shape {labels.shape}"
        )
    return labels
