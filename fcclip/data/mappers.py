"""From a record of the catalog to what the model takes: reads the files, augments, checks.

A training mapper is called with a record and a random generator, a test mapper with a record. Both return a new dict;
every problem with a file is an error that names it. A training sample has

    image       (3, H, W) uint8
    targets     `structures.Targets`: an id map, or masks where instances may overlap
    point_seed  int, fixes where losses look
    height, width  of the image before augmentation, pixels

and the names of the record. The same record and the same random numbers give the same sample.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from fcclip.config import lookup
from fcclip.data.catalog import DATASETS, get_dataset
from fcclip.data.color_jitter import ColorJitter
from fcclip.data.images import read_id_map, read_label_map, read_pil_image
from fcclip.data.own_description import is_own_data
from fcclip.data.pair_augmentation import PairAugmentation, PairGeometry
from fcclip.data.segmentations import distinct_values, fill_polygons, has_area, paint_classes, read_run_lengths
from fcclip.data.transforms import (
    Geometry,
    LargeScaleJitter,
    RandomCrop,
    RandomNumbers,
    ShortestEdgeJitter,
    resize_image,
    shortest_edge_size,
)
from fcclip.errors import InputError
from fcclip.files import listed
from fcclip.structures import Targets
from fcclip.vocabulary import ClassEntry, Vocabulary

VOID_ID = 0  # of pixels without a segment in an id PNG
CHANNEL_ORDERS = ("RGB", "BGR")
_KEPT = ("file_name", "image_id", "pan_seg_file_name", "sem_seg_file_name")
_SMALLEST_BOX_PX = 1e-5  # published limit below which a box counts as empty


@dataclass(kw_only=True, eq=False)
class JitterMapper(ABC):
    """What the training mappers share: the image, its geometry and its colours.

    Args:
        name: as INPUT.DATASET_MAPPER_NAME spells it.
        augmentation: draws the geometry.
        colors: changes the colours of the image; None: they stay.
        channel_order: "RGB" or "BGR", of the image that comes out.
    """

    needs: ClassVar[tuple[tuple[str, ...], ...]]  # the fields of a record that it reads; each tuple is enough

    name: str
    augmentation: LargeScaleJitter | ShortestEdgeJitter | PairAugmentation
    colors: ColorJitter | None = None
    channel_order: str = "RGB"

    def __post_init__(self) -> None:
        _check_channel_order(self.channel_order)

    def __call__(self, record: dict, rng: RandomNumbers) -> dict[str, Any]:
        """A record and the source of every random number -> a sample.

        Raises:
            FileNotFoundError: a file of the record is missing.
            ValueError: the record lacks the ground truth that is needed, or a file is broken or does not fit the rest.
        """
        check_ground_truth(record, self, where=str(record.get("file_name", "a record")))
        pil_image = _read_pil_image(record)
        size = (pil_image.height, pil_image.width)
        truth = self.read(record, size)
        labels = self.category_map(record, truth) if self.augmentation.reads_labels else None
        geometry = self.augmentation.draw(*size, rng, labels)
        image = geometry.view(pil_image)
        if self.colors is not None:
            image = self.colors(image, rng)
        targets = self.targets(record, truth, geometry)
        image_tensor = _to_tensor(geometry.pad_image(image), self.channel_order)
        point_seed = int.from_bytes(rng.bytes(8), "little") >> 1  # 0..2^63 - 1, drawn last
        return {**_kept(record, size), "image": image_tensor, "targets": targets, "point_seed": point_seed}

    @abstractmethod
    def read(self, record: dict, size: tuple[int, int]) -> Any:
        """The ground truth of a record, checked against the (height, width) of its image."""

    @abstractmethod
    def targets(self, record: dict, truth: Any, geometry: Geometry) -> Targets:
        """The ground truth after the transform."""

    def category_map(self, record: dict, truth: Any) -> np.ndarray:
        """(height, width) category of each pixel, 0 or more: what a crop is judged by."""
        raise NotImplementedError


@dataclass(kw_only=True, eq=False)
class PanopticJitterMapper(JitterMapper):
    """Segments of an id PNG; the published `coco_panoptic_lsj` and `mask_former_panoptic`.

    Crowd segments are left out. A segment that the crop does not show stays, with an empty mask, as published.

    Args:
        ignored_label: category of the pixels without a segment, for the crop.
    """

    needs = (("pan_seg_file_name", "segments_info"),)

    ignored_label: int = 255

    def read(self, record: dict, size: tuple[int, int]) -> np.ndarray:
        return _read_id_map(record, size)

    def targets(self, record: dict, truth: np.ndarray, geometry: Geometry) -> Targets:
        segments = [segment for segment in record["segments_info"] if not segment.get("iscrowd", 0)]
        return Targets(
            labels=torch.tensor([segment["category_id"] for segment in segments], dtype=torch.int64),
            id_map=torch.from_numpy(geometry.apply_id_map(truth)),
            ids=torch.tensor([segment["id"] for segment in segments], dtype=torch.int64),
        )

    def category_map(self, record: dict, truth: np.ndarray) -> np.ndarray:
        """The semantic label map of the record, as published; made of the segments where the record has none."""
        if "sem_seg_file_name" in record:
            return _read_labels(record, truth.shape)
        return paint_classes(truth, record["segments_info"], self.ignored_label)


@dataclass(kw_only=True, eq=False)
class SemanticJitterMapper(JitterMapper):
    """One segment for each class that the label map shows after the transform; the published `mask_former_semantic`.

    The label map of a record that has none is painted from its panoptic segments, crowds like any other, as the
    published ones of COCO are.

    Args:
        ignore_label: value of unlabelled pixels.
        num_classes: labels must be below it; None: any label is a class.
    """

    needs = (("sem_seg_file_name",), ("pan_seg_file_name", "segments_info"))

    ignore_label: int
    num_classes: int | None = None

    def read(self, record: dict, size: tuple[int, int]) -> np.ndarray:
        if "sem_seg_file_name" not in record:
            return paint_classes(_read_id_map(record, size), record["segments_info"], self.ignore_label)
        labels = _read_labels(record, size)
        known = None if self.num_classes is None else {*range(self.num_classes), self.ignore_label}
        unknown = [] if known is None else sorted({*distinct_values(labels)} - known)
        if unknown:
            raise InputError(
                f"{record['sem_seg_file_name']}: label {unknown[0]} ({int((labels == unknown[0]).sum())} pixels) is "
                f"not a class: the data set has the labels 0..{self.num_classes - 1}, and {self.ignore_label} for "
                "unlabelled pixels. Prepare the label maps again, or set the ignore_label of the data set if "
                f"{unknown[0]} means unlabelled."
            )
        return labels

    def targets(self, record: dict, truth: np.ndarray, geometry: Geometry) -> Targets:
        id_map = geometry.apply_label_map(truth, padding=self.ignore_label)
        classes = torch.tensor(
            [value for value in distinct_values(id_map) if value != self.ignore_label], dtype=torch.int64
        )
        return Targets(labels=classes, id_map=torch.from_numpy(id_map), ids=classes.clone())

    def category_map(self, record: dict, truth: np.ndarray) -> np.ndarray:
        return truth


@dataclass(kw_only=True, eq=False)
class PairMapper(JitterMapper):
    """An image and one of its classes, which alone is prompted: everything else is a negative.

    A sample has that class as its `vocabulary`, and `ignored`, (H, W) bool, pixels that no loss looks at. A crop may
    leave nothing of the class.
    """

    needs = (("sem_seg_file_name", "mask_value", "class_name"),)

    ignore_label: int

    def __call__(self, record: dict, rng: RandomNumbers) -> dict[str, Any]:
        sample = super().__call__(record, rng)
        return {**sample, "ignored": sample["targets"].id_map == self.ignore_label}

    def read(self, record: dict, size: tuple[int, int]) -> np.ndarray:
        return _read_labels(record, size)

    def targets(self, record: dict, truth: np.ndarray, geometry: PairGeometry) -> Targets:
        labels = geometry.apply_label_map(truth, padding=self.ignore_label)
        id_map = np.where(labels == self.ignore_label, labels, labels == record["mask_value"]).astype(np.int32)
        return Targets(labels=torch.tensor([0]), id_map=torch.from_numpy(id_map), ids=torch.tensor([1]))


@dataclass(kw_only=True, eq=False)
class InstanceJitterMapper(JitterMapper):
    """Instances of COCO annotations, which may overlap, as masks; `coco_instance_lsj` and `mask_former_instance`.

    Crowd annotations are left out. Polygons are transformed, clipped by the crop and then filled, run-length codes are
    decoded and then transformed.

    Args:
        drops_empty: leave out an instance that the crop does not show, as `coco_instance_lsj` does; else it stays with
            an empty mask.
    """

    needs = (("annotations",),)

    drops_empty: bool = True

    def read(self, record: dict, size: tuple[int, int]) -> list[dict]:
        """The annotations that are no crowd, run-length codes decoded: `segmentation` is a list of polygons (k, 2)
        float64 or a mask (height, width) bool."""
        instances = [annotation for annotation in record["annotations"] if not annotation.get("iscrowd", 0)]
        if any(not instance.get("segmentation") for instance in instances):
            raise InputError(
                f"{record['file_name']}: an annotation of this image has no segmentation, and its box alone gives no "
                "mask to train on. Leave it out of the annotations, or mark it iscrowd."
            )
        segmentations = [instance["segmentation"] for instance in instances]
        try:
            masks = iter(read_run_lengths([code for code in segmentations if isinstance(code, Mapping)], size))
            return [
                {**instance, "segmentation": next(masks) if isinstance(code, Mapping) else _polygons(code)}
                for instance, code in zip(instances, segmentations)
            ]
        except ValueError as error:
            raise InputError(
                f"{record['file_name']}: {error}. Image and annotations do not belong together."
            ) from error

    def targets(self, record: dict, truth: list[dict], geometry: Geometry) -> Targets:
        segmentations = [instance["segmentation"] for instance in truth]
        decoded = [mask for mask in segmentations if isinstance(mask, np.ndarray)]
        transformed = iter(geometry.apply_masks(np.stack(decoded)) if decoded else ())
        masks = np.zeros((len(truth), *geometry.canvas), bool)
        shown = []
        for segmentation, mask in zip(segmentations, masks):
            if isinstance(segmentation, np.ndarray):
                mask[:] = next(transformed)
                shown.append(bool(mask.any()))
            else:
                polygons = [geometry.apply_polygon(points) for points in segmentation]
                polygons = [points for points in polygons if len(points)]
                fill_polygons(polygons, mask)
                shown.append(_has_box(polygons))
        kept = np.array(shown, bool) if self.drops_empty else np.ones(len(truth), bool)
        labels = torch.tensor([instance["category_id"] for instance in truth], dtype=torch.int64)
        return Targets(
            labels=labels[torch.from_numpy(kept)],
            masks=torch.from_numpy(masks if kept.all() else masks[kept]),
        )


@dataclass(kw_only=True, eq=False)
class ShortestEdgeMapper:
    """Test-time resize of an image; opens no ground truth.

    Args:
        min_size: the shorter side after the resize, pixels; 0 keeps the size.
        max_size: limit of the longer side, pixels.
        square: side of the square that every image is squashed to instead; 0: none.
        channel_order: "RGB" or "BGR", of the image that comes out.
    """

    min_size: int
    max_size: int
    square: int = 0
    channel_order: str = "RGB"

    def __post_init__(self) -> None:
        _check_channel_order(self.channel_order)
        if self.min_size < 0 or (self.min_size > 0 and self.max_size < 1):
            raise InputError(
                "INPUT.MIN_SIZE_TEST must be 0 (keep the size) or more and INPUT.MAX_SIZE_TEST at least 1, "
                f"got {self.min_size} and {self.max_size}"
            )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this size gets."""
        if self.square:
            return self.square, self.square
        return shortest_edge_size(height, width, min_size=self.min_size, max_size=self.max_size)

    def __call__(self, record: dict) -> dict[str, Any]:
        """-> `image` (3, h, w) uint8, resized, and the record's names and (original) size."""
        image = np.asarray(_read_pil_image(record))
        resized = resize_image(image, *self.resized(*image.shape[:2]))
        return {**_kept(record, image.shape[:2]), "image": _to_tensor(resized, self.channel_order)}


def build_train_mapper(cfg, metadata: Mapping[str, Any] | None = None) -> JitterMapper:
    """The mapper that `INPUT.DATASET_MAPPER_NAME` names.

    Args:
        cfg: reads INPUT, MODEL.SEM_SEG_HEAD.IGNORE_VALUE and DATASETS.TRAIN.
        metadata: of the data set to train on, for its label maps; None: of the first of DATASETS.TRAIN. With a name
            there that fcclip does not know, IGNORE_VALUE is the label of unlabelled pixels and labels are not checked.

    Raises:
        ValueError: an unknown mapper, or values of INPUT that cannot work.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    kind, augmentation = lookup("INPUT.DATASET_MAPPER_NAME", name, MAPPERS)
    if metadata is None:
        first = next(iter(cfg.DATASETS.TRAIN), "")
        metadata = get_dataset(first).metadata if first in DATASETS or is_own_data(first) else {}
    options: dict[str, Any] = {"name": name, "channel_order": cfg.INPUT.FORMAT}
    ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if kind is PanopticJitterMapper:
        options["ignored_label"] = ignore_value
    if kind is SemanticJitterMapper:
        options["ignore_label"] = metadata.get("ignore_label", ignore_value)
        options["num_classes"] = len(metadata["stuff_classes"]) if "ignore_label" in metadata else None
    if kind is PairMapper:
        pairs = {"probability": "AUG_PROB", "scales": "SCALE_RANGE", "jitter": "JITTER", "rotate": "ROTATE"}
        values = {name: cfg.INPUT.PAIRS[key] for name, key in {**pairs, "border": "BORDER"}.items()}
        options["ignore_label"] = metadata.get("ignore_label", ignore_value)
        return kind(augmentation=PairAugmentation(side=cfg.INPUT.IMAGE_SIZE, **values), **options)
    if augmentation is LargeScaleJitter:
        inputs = cfg.INPUT
        scales = {"min_scale": inputs.MIN_SCALE, "max_scale": inputs.MAX_SCALE}
        jitter = LargeScaleJitter(size=inputs.IMAGE_SIZE, flip=inputs.RANDOM_FLIP, **scales)
        return kind(augmentation=jitter, **options)
    if kind is InstanceJitterMapper:
        options["drops_empty"] = False
    augmentation = _shortest_edge_jitter(cfg, judges_crops=kind is not InstanceJitterMapper)
    return kind(augmentation=augmentation, colors=ColorJitter() if cfg.INPUT.COLOR_AUG_SSD else None, **options)


def build_test_mapper(cfg) -> ShortestEdgeMapper:
    """The test-time mapper."""
    inputs = cfg.INPUT
    sizes = {"min_size": inputs.MIN_SIZE_TEST, "max_size": inputs.MAX_SIZE_TEST, "square": inputs.SQUARE_TEST}
    return ShortestEdgeMapper(**sizes, channel_order=inputs.FORMAT)


# INPUT.DATASET_MAPPER_NAME -> what reads the ground truth, and what draws the geometry.
MAPPERS: dict[str, tuple[type[JitterMapper], type]] = {
    "coco_panoptic_lsj": (PanopticJitterMapper, LargeScaleJitter),
    "coco_instance_lsj": (InstanceJitterMapper, LargeScaleJitter),
    "mask_former_semantic": (SemanticJitterMapper, ShortestEdgeJitter),
    "mask_former_panoptic": (PanopticJitterMapper, ShortestEdgeJitter),
    "mask_former_instance": (InstanceJitterMapper, ShortestEdgeJitter),
    "fusioner_pairs": (PairMapper, PairAugmentation),
}


def check_ground_truth(record: Mapping[str, Any], mapper: JitterMapper, *, where: str) -> None:
    """Refuses a record without the kind of ground truth that a mapper reads.

    Args:
        record: of the data set.
        mapper: what it will be given to.
        where: data set or file, for the message.

    Raises:
        ValueError: a field is missing; the message names the mappers that can read what there is.
    """
    if _can_read(mapper, record):
        return
    missing = [key for key in mapper.needs[0] if key not in record]
    others = [name for name, (kind, _) in MAPPERS.items() if _can_read(kind, record)]
    remedy = f"set INPUT.DATASET_MAPPER_NAME to {' or '.join(others)}" if others else "no mapper can read it"
    raise InputError(
        f"{where}: the ground truth has no {' and no '.join(missing)}, which INPUT.DATASET_MAPPER_NAME '{mapper.name}' "
        f"reads. For this data set, {remedy}."
    )


def _can_read(mapper: JitterMapper | type[JitterMapper], record: Mapping[str, Any]) -> bool:
    return any(all(key in record for key in fields) for fields in mapper.needs)


def _shortest_edge_jitter(cfg, *, judges_crops: bool) -> ShortestEdgeJitter:
    inputs, crop = cfg.INPUT, None
    if inputs.CROP.ENABLED:
        crop = RandomCrop(
            kind=inputs.CROP.TYPE,
            size=tuple(inputs.CROP.SIZE),
            max_category_share=inputs.CROP.SINGLE_CATEGORY_MAX_AREA if judges_crops else 1.0,
            ignored_label=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        )
    sizes = inputs.MIN_SIZE_TRAIN
    return ShortestEdgeJitter(
        min_sizes=(sizes,) if isinstance(sizes, int) else tuple(sizes),
        max_size=inputs.MAX_SIZE_TRAIN,
        sampling=inputs.MIN_SIZE_TRAIN_SAMPLING,
        crop=crop,
        target_size=inputs.SIZE_DIVISIBILITY,
    )


def _read_pil_image(record: dict) -> Image.Image:
    pil_image = read_pil_image(record["file_name"])
    height, width = pil_image.height, pil_image.width
    stated = (record.get("height", height), record.get("width", width))
    if stated != (height, width):
        raise InputError(
            f"{record['file_name']}: the image is {height} x {width} pixels (height x width), but the data set's "
            f"annotations say {stated[0]} x {stated[1]}. Image and annotations do not belong together, or the "
            "image was resized or turned."
        )
    return pil_image


def _read_id_map(record: dict, image_size: tuple[int, int]) -> np.ndarray:
    path = record["pan_seg_file_name"]
    id_map = read_id_map(path)
    _check_size(record, path, "id map", id_map.shape, image_size)
    known = {segment["id"] for segment in record["segments_info"]}
    unknown = sorted({*distinct_values(id_map)} - known - {VOID_ID})
    if unknown:
        pixels = int((id_map == unknown[0]).sum())
        others = f" (and {len(unknown) - 1} more ids)" if len(unknown) > 1 else ""
        raise InputError(
            f"{path}: id {unknown[0]} ({pixels} pixels){others} is not in the segments_info of this image, which has "
            f"{len(known)} ids: {listed(sorted(known), 8) or 'none'}. PNG and JSON come from different runs: prepare "
            "both again together, or paint unlabelled pixels black."
        )
    return id_map


def _read_labels(record: dict, image_size: tuple[int, int]) -> np.ndarray:
    path = record["sem_seg_file_name"]
    labels = read_label_map(path)
    _check_size(record, path, "label map", labels.shape, image_size)
    if labels.size and labels.min() < 0:
        raise InputError(f"{path}: label {labels.min()} is negative. Prepare the label map again.")
    return labels


def _check_size(record: dict, path: str, kind: str, size: tuple[int, ...], image_size: tuple[int, int]) -> None:
    if size != image_size:
        raise InputError(
            f"{path}: the {kind} is {size[0]} x {size[1]} pixels (height x width), but its image "
            f"{record['file_name']} is {image_size[0]} x {image_size[1]}. Prepare the {kind} again for this image."
        )


def _polygons(segmentation: Iterable[Sequence[float]]) -> list[np.ndarray]:
    return [np.asarray(corners, np.float64).reshape(-1, 2) for corners in segmentation if has_area(corners)]


def _has_box(polygons: Sequence[np.ndarray]) -> bool:
    """Whether the box around all of them is larger than nothing."""
    if not polygons:
        return False
    corners = np.concatenate(polygons)
    return bool((np.ptp(corners, axis=0) > _SMALLEST_BOX_PX).all())


def _kept(record: dict, size: tuple[int, int]) -> dict[str, Any]:
    names = {key: record[key] for key in _KEPT if key in record}
    prompt = {"vocabulary": one_class(record["class_name"])} if "class_name" in record else {}
    return {**names, **prompt, "height": size[0], "width": size[1]}


@functools.cache
def one_class(name: str) -> Vocabulary:
    """The vocabulary of a pair of an image and one class, which is all that is asked for."""
    return Vocabulary(name, (ClassEntry(0, name, (name,), thing=False),))


def _to_tensor(image: np.ndarray, channel_order: str) -> torch.Tensor:
    channels = image.transpose(2, 0, 1)
    if channel_order == "BGR":
        channels = channels[::-1]
    channels = np.ascontiguousarray(channels)
    return torch.from_numpy(channels if channels.flags.writeable else channels.copy())


def _check_channel_order(channel_order: str) -> None:
    if channel_order not in CHANNEL_ORDERS:
        raise InputError(f"INPUT.FORMAT must be one of {', '.join(CHANNEL_ORDERS)}, got '{channel_order}'")
