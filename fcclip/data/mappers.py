"""From a record of the catalog to what the model takes: reads the files, augments, checks.

A training mapper is called with a record and a random generator, a test mapper with a record. Both return a new dict;
every problem with a file is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fcclip.config import lookup
from fcclip.data.images import read_id_map, read_image
from fcclip.data.transforms import LargeScaleJitter, resize_image, shortest_edge_size
from fcclip.structures import Targets

__all__ = ["MAPPERS", "PanopticJitterMapper", "ShortestEdgeMapper", "build_test_mapper", "build_train_mapper"]

VOID_ID = 0  # of pixels without a segment in an id PNG
CHANNEL_ORDERS = ("RGB", "BGR")
_KEPT = ("file_name", "image_id", "pan_seg_file_name", "sem_seg_file_name")


class PanopticJitterMapper:
    """Large-scale jitter of a picture and its segments; the published `coco_panoptic_lsj`.

    Crowd segments are left out. A segment that the crop does not show stays, with an empty mask, as published.

    Args:
        jitter: draws the geometry.
        channel_order: "RGB" or "BGR", of the image that comes out.
    """

    def __init__(self, *, jitter: LargeScaleJitter, channel_order: str = "RGB") -> None:
        _check_channel_order(channel_order)
        self.jitter = jitter
        self.channel_order = channel_order

    def __call__(self, record: dict, rng: np.random.Generator | np.random.RandomState) -> dict[str, Any]:
        """-> `image` (3, S, S) uint8, `targets` with an id map, `point_seed`, which fixes where losses look, and the
        record's names and (original) size."""
        image = _read_image(record)
        id_map = _read_id_map(record, image.shape[:2])
        geometry = self.jitter.draw(*image.shape[:2], rng)
        segments = [segment for segment in record["segments_info"] if not segment.get("iscrowd", 0)]
        targets = Targets(
            labels=torch.tensor([segment["category_id"] for segment in segments], dtype=torch.int64),
            id_map=torch.from_numpy(geometry.apply_id_map(id_map)),
            ids=torch.tensor([segment["id"] for segment in segments], dtype=torch.int64),
        )
        image_tensor = _to_tensor(geometry.apply_image(image), self.channel_order)
        point_seed = int.from_bytes(rng.bytes(8), "little") >> 1  # 0..2^63 - 1, drawn last
        return {**_kept(record, image), "image": image_tensor, "targets": targets, "point_seed": point_seed}


class ShortestEdgeMapper:
    """Test-time resize of a picture; opens no ground truth.

    Args:
        min_size: the shorter side after the resize, pixels; 0 keeps the size.
        max_size: limit of the longer side, pixels.
        channel_order: "RGB" or "BGR", of the image that comes out.
    """

    def __init__(self, *, min_size: int, max_size: int, channel_order: str = "RGB") -> None:
        _check_channel_order(channel_order)
        if min_size < 0 or (min_size > 0 and max_size < 1):
            raise ValueError(
                "INPUT.MIN_SIZE_TEST must be 0 (keep the size) or more and INPUT.MAX_SIZE_TEST at least 1, "
                f"got {min_size} and {max_size}"
            )
        self.min_size = min_size
        self.max_size = max_size
        self.channel_order = channel_order

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of this size gets."""
        return shortest_edge_size(height, width, min_size=self.min_size, max_size=self.max_size)

    def __call__(self, record: dict) -> dict[str, Any]:
        """-> `image` (3, h, w) uint8, resized, and the record's names and (original) size."""
        image = _read_image(record)
        resized = resize_image(image, *self.resized(*image.shape[:2]))
        return {**_kept(record, image), "image": _to_tensor(resized, self.channel_order)}


def build_train_mapper(cfg) -> PanopticJitterMapper:
    """The mapper that `INPUT.DATASET_MAPPER_NAME` names."""
    return lookup("INPUT.DATASET_MAPPER_NAME", cfg.INPUT.DATASET_MAPPER_NAME, MAPPERS)(cfg)


def build_test_mapper(cfg) -> ShortestEdgeMapper:
    """The test-time mapper."""
    inputs = cfg.INPUT
    return ShortestEdgeMapper(min_size=inputs.MIN_SIZE_TEST, max_size=inputs.MAX_SIZE_TEST, channel_order=inputs.FORMAT)


def _build_panoptic_jitter(cfg) -> PanopticJitterMapper:
    inputs = cfg.INPUT
    jitter = LargeScaleJitter(
        size=inputs.IMAGE_SIZE, min_scale=inputs.MIN_SCALE, max_scale=inputs.MAX_SCALE, flip=inputs.RANDOM_FLIP
    )
    return PanopticJitterMapper(jitter=jitter, channel_order=inputs.FORMAT)


MAPPERS: dict[str, Callable[..., PanopticJitterMapper]] = {
    "coco_panoptic_lsj": _build_panoptic_jitter,
}


def _read_image(record: dict) -> np.ndarray:
    image = read_image(record["file_name"])
    height, width = image.shape[:2]
    stated = (record.get("height", height), record.get("width", width))
    if stated != (height, width):
        raise ValueError(
            f"{record['file_name']}: the picture is {height} x {width} pixels (height x width), but the data set's "
            f"annotations say {stated[0]} x {stated[1]}. Picture and annotations do not belong together, or the "
            "picture was resized or turned."
        )
    return image


def _read_id_map(record: dict, image_size: tuple[int, int]) -> np.ndarray:
    path = record["pan_seg_file_name"]
    id_map = read_id_map(path)
    if id_map.shape != image_size:
        raise ValueError(
            f"{path}: the id map is {id_map.shape[0]} x {id_map.shape[1]} pixels (height x width), but its picture "
            f"{record['file_name']} is {image_size[0]} x {image_size[1]}. Prepare the id map again for this picture."
        )
    known = {segment["id"] for segment in record["segments_info"]}
    unknown = sorted(_distinct(id_map) - known - {VOID_ID})
    if unknown:
        pixels = int((id_map == unknown[0]).sum())
        others = f" (and {len(unknown) - 1} more ids)" if len(unknown) > 1 else ""
        raise ValueError(
            f"{path}: id {unknown[0]} ({pixels} pixels){others} is not in the segments_info of this picture, which has "
            f"{len(known)} ids: {_few(sorted(known))}. PNG and JSON come from different runs: prepare both again "
            "together, or paint unlabelled pixels black."
        )
    return id_map


def _distinct(id_map: np.ndarray) -> set[int]:
    """The ids of an id map, looked up only where a run of equal pixels starts: segments are few and large."""
    flat = id_map.ravel()
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return {*np.unique(flat[starts]).tolist(), *flat[:1].tolist()}


def _few(values: list[int], limit: int = 8) -> str:
    shown = ", ".join(str(value) for value in values[:limit])
    return f"{shown}, ..." if len(values) > limit else shown or "none"


def _kept(record: dict, image: np.ndarray) -> dict[str, Any]:
    names = {key: record[key] for key in _KEPT if key in record}
    return {**names, "height": image.shape[0], "width": image.shape[1]}


def _to_tensor(image: np.ndarray, channel_order: str) -> torch.Tensor:
    channels = image.transpose(2, 0, 1)
    if channel_order == "BGR":
        channels = channels[::-1]
    channels = np.ascontiguousarray(channels)
    return torch.from_numpy(channels if channels.flags.writeable else channels.copy())


def _check_channel_order(channel_order: str) -> None:
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"INPUT.FORMAT must be one of {', '.join(CHANNEL_ORDERS)}, got '{channel_order}'")
