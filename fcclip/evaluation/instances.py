"""Average precision of instances by the COCO protocol: masks and boxes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pycocotools.mask
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from fcclip.data.annotations import instance_entries, is_id, settle
from fcclip.data.datasets.files import AnnotationFile
from fcclip.data.datasets.instances import NOT_INSTANCES
from fcclip.errors import InputError
from fcclip.evaluation.averages import mean_of_defined, seen_and_unseen
from fcclip.evaluation.ground_truth import ClassEvaluator, GroundTruth, in_order
from fcclip.files import listed, write_json
from fcclip.structures import Instances

logger = logging.getLogger(__name__)
LVIS_DETECTIONS = 300  # an image, all classes together
_AREAS = {"s": 1, "m": 2, "l": 3}  # suffix of the metric -> area range of the protocol, which calls all areas 0


class InstanceTruth(NamedTuple):
    """Ground truth of a COCO instances file."""

    path: str
    images: dict[Hashable, dict]  # image id -> entry
    annotations: list[dict]
    categories: dict[int, dict]  # category id -> entry

    @classmethod
    def read(cls, path: str | os.PathLike, category_ids: Iterable[int]) -> InstanceTruth:
        """Reads the file. Boxes and areas that it does not give, and categories that nothing belongs to, are added.

        Args:
            path: the file.
            category_ids: of the data set's thing classes.

        Raises:
            FileNotFoundError: no such file.
            ValueError: broken JSON, or something in it that cannot be used (see `instance_entries`).
        """
        content = AnnotationFile("instances file", Path(path), ("images", "annotations"), NOT_INSTANCES).read()
        images, annotations, problems = instance_entries(content, dict.fromkeys(category_ids, 0), need_files=False)
        settle(f"instances file '{path}'", problems, expected=NOT_INSTANCES)
        unsized = [image["id"] for image in images.values() if not {"height", "width"} <= image.keys()]
        if unsized:
            raise InputError(f"instances file '{path}': image {listed(map(repr, unsized))} has no height and width")
        of_id = {image["id"]: image for image in images.values()}
        for annotation in annotations:
            if "bbox" not in annotation or "area" not in annotation:
                code = _code(annotation["segmentation"], of_id[annotation["image_id"]])
                bounds, area = pycocotools.mask.toBbox(code).tolist(), float(pycocotools.mask.area(code))
                annotation.update({"bbox": bounds, "area": area} | annotation)
        entries = content["categories"] if isinstance(content.get("categories"), list) else ()
        named = {entry["id"]: entry for entry in entries if isinstance(entry, dict) and is_id(entry.get("id"))}
        categories = {identifier: named.get(identifier, {"id": identifier}) for identifier in category_ids}
        return cls(str(path), of_id, annotations, categories)


def _code(segmentation: Mapping | list, image: Mapping[str, int]) -> dict:
    """The run-length code of polygons or of a code."""
    if isinstance(segmentation, Mapping):
        return segmentation
    return pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, image["height"], image["width"]))


class ImageInstances(NamedTuple):
    """What AP needs to know of one image."""

    rows: list[dict]  # of COCO results
    image: dict  # id, height, width
    truth: list[dict] | None  # annotations, where they do not stand in a file


class InstanceEvaluator(ClassEvaluator):
    """COCO average precision of masks (`segm`) and boxes (`bbox`) of the thing classes.

    Args:
        truth: the ground truth, shared by evaluators of the same data set; None: the thing segments of each image's
            panoptic annotation, for data sets that have no other.
        class_names, seen: as for `ClassEvaluator`.
        dataset_ids: contiguous index of each thing class -> the data set's category id.
        folder: where `save` writes `coco_instances_results.json`; None: nowhere.
    """

    file_name = "coco_instances_results.json"

    def __init__(
        self,
        *,
        truth: InstanceTruth | None,
        class_names: Sequence[str],
        dataset_ids: Mapping[int, int],
        seen: Sequence[bool] | None = None,
        folder: str | os.PathLike | None = None,
    ) -> None:
        self.truth = truth
        self.dataset_ids = dict(sorted(dataset_ids.items()))
        super().__init__(class_names=class_names, classes=self.dataset_ids, seen=seen)
        self.folder = None if folder is None else Path(folder)

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> ImageInstances:
        image_id, truth = ground_truth.image_id, None
        if self.truth is None:
            height, width = ground_truth.id_map.shape
            image = {"id": image_id, "height": height, "width": width}
            truth = ground_truth.once("thing segments", lambda: segment_annotations(ground_truth, self.dataset_ids))
        elif image_id in self.truth.images:
            image = self.truth.images[image_id]
        else:
            raise InputError(f"image {image_id!r} is not in {self.truth.path}, which holds the ground truth of AP")
        instances, encoded_masks = output["instances"], ground_truth.once("encoded masks", dict)
        return ImageInstances(self._rows(image, instances, encoded_masks), image, truth)

    def _rows(self, image: Mapping, instances: Instances, encoded_masks: dict[bytes, dict]) -> list[dict]:
        image_id, size = image["id"], (image["height"], image["width"])
        if tuple(instances.pred_masks.shape[1:]) != size:
            where = "its annotation" if self.truth is None else self.truth.path
            raise InputError(
                f"image {image_id!r}: masks are {tuple(instances.pred_masks.shape[1:])} (height, width), the image "
                f"in {where} is {size}"
            )
        instances = self._chosen(instances)
        classes = instances.pred_classes.tolist()
        strange = sorted(set(classes) - self.dataset_ids.keys())
        if strange:
            raise InputError(f"image {image_id!r}: classes {listed(strange)} of instances are not thing classes")
        boxes = instances.pred_boxes.detach().cpu().double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()  # XYXY -> XYWH
        codes = encode_masks(instances.pred_masks, encoded_masks)
        return [
            {
                "image_id": image_id,
                "category_id": self.dataset_ids[index],
                "bbox": box,
                "score": score,
                "segmentation": code,
            }
            for index, box, score, code in zip(classes, boxes, instances.scores.tolist(), codes)
        ]

    def _chosen(self, instances: Instances) -> Instances:
        """Those of an image that count, before anything else is known."""
        return instances

    def results(self) -> dict[str, dict[str, float]]:
        return {task: self._average_precision(task) for task in ("bbox", "segm")}

    def save(self) -> None:
        if self.folder is not None:
            rows = [row for image_id in in_order(self.images) for row in self.images[image_id].rows]
            write_json(self.folder / self.file_name, rows)

    def _average_precision(self, task: str) -> dict[str, float]:
        """AP over the images that were evaluated."""
        precision = 100 * self._precision(task)
        per_class = dict.fromkeys(range(len(self.class_names)), np.nan)
        per_class |= {index: _mean(precision[:, :, row, 0]) for row, index in enumerate(self.dataset_ids)}
        metrics = {
            "AP": _mean(precision[..., 0]),
            "AP50": _mean(precision[0, ..., 0]),
            "AP75": _mean(precision[5, ..., 0]),
        }
        metrics |= {f"AP{suffix}": _mean(precision[..., area]) for suffix, area in _AREAS.items()}
        metrics |= self._more_metrics(precision)
        metrics |= seen_and_unseen("AP", list(per_class.values()), self.seen)
        return metrics | {f"AP-{self.class_names[index]}": per_class[index] for index in self.dataset_ids}

    def _more_metrics(self, precision: np.ndarray) -> dict[str, float]:
        return {}

    def _precision(self, task: str) -> np.ndarray:
        """(10 IoU thresholds, 101 recalls, thing classes, 4 areas), 0..1; NaN where there is no ground truth."""
        truth, rows = self._numbered()
        if not rows:  # without a single detection AP is undefined, as in detectron2
            return np.full((10, 101, len(self.dataset_ids), 4), np.nan)
        return protocol_precision(truth, rows, list(self.dataset_ids.values()), task)

    def _numbered(self) -> tuple[dict[str, list[dict]], list[dict]]:
        """Ground truth and detections of the evaluated images as the protocol's implementation wants them.

        It breaks ties of scores by the order of the images. Numbers stand in for the ids, which may be strings, and
        annotations are counted from 1 because 0 means unmatched there.
        """
        number = {image_id: index for index, image_id in enumerate(in_order(self.images), start=1)}
        if self.truth is not None:
            annotations = [entry for entry in self.truth.annotations if entry["image_id"] in number]
        else:
            annotations = [entry for image_id in number for entry in self.images[image_id].truth]
        truth = {
            "images": [self.images[image_id].image | {"id": index} for image_id, index in number.items()],
            "annotations": [
                entry | {"id": index, "image_id": number[entry["image_id"]]}
                for index, entry in enumerate(annotations, start=1)
            ],
        }
        rows = [row | {"image_id": index} for image_id, index in number.items() for row in self.images[image_id].rows]
        return truth, rows


def protocol_precision(
    truth: Mapping[str, list[dict]],
    rows: Sequence[dict],
    category_ids: Sequence[int],
    task: str,
    *,
    federated: bool = False,
    categories: Sequence[Mapping] | None = None,
) -> np.ndarray:
    """Precision by the COCO protocol.

    Args:
        truth: `images` and `annotations`, ids counted from 1.
        rows: detections, those of an image together, images in ascending order of their ids.
        category_ids: the classes, in the order of the result.
        task: `segm` or `bbox`.
        federated: by the rules of LVIS: up to 300 detections, and `neg_category_ids` and `not_exhaustive_category_ids`
            of the images decide which of them count.
        categories: entries of the classes in the data set's file; None: the ids alone.

    Returns:
        (10 IoU thresholds, 101 recalls, classes, 4 areas), 0..1; NaN where there is no ground truth.
    """
    categories = [{"id": identifier} for identifier in category_ids] if categories is None else list(categories)
    areas = _areas(rows, task)  # decide which of the area ranges a detection belongs to
    detections = {
        "images": truth["images"],
        "categories": categories,
        "annotations": [
            row | {"id": index, "area": area, "iscrowd": 0} for index, (row, area) in enumerate(zip(rows, areas), 1)
        ],
    }
    evaluation = COCOeval_faster(
        COCO({**truth, "categories": categories}), COCO(detections), task, print_function=logger.debug,
        lvis_style=federated,
    )  # fmt: skip
    evaluation.params.catIds = list(category_ids)
    if federated:
        evaluation.params.maxDets = [LVIS_DETECTIONS]
    evaluation.evaluate()
    evaluation.accumulate()
    order = np.argsort(np.argsort(category_ids))  # the implementation sorts by category id
    # (thresholds, recalls, classes, areas, limits of detections), -1 where there is no ground truth
    precision = np.asarray(evaluation.eval["precision"])[..., -1][:, :, order]
    return np.where(precision < 0, np.nan, precision)


def segment_annotations(ground_truth: GroundTruth, dataset_ids: Mapping[int, int]) -> list[dict]:
    """COCO annotations of the thing segments of a panoptic image.

    Args:
        ground_truth: of an image with an id map.
        dataset_ids: contiguous index of each thing class -> the data set's category id.
    """
    segments = [segment for segment in ground_truth.segments if segment["category_id"] in dataset_ids]
    masks = [torch.from_numpy(ground_truth.id_map == segment["id"]) for segment in segments]
    codes = encode_masks(torch.stack(masks)) if masks else []
    return [
        {
            "image_id": ground_truth.image_id,
            "category_id": dataset_ids[segment["category_id"]],
            "segmentation": code,
            "area": area,
            "bbox": pycocotools.mask.toBbox(code).tolist(),
            "iscrowd": int(segment.get("iscrowd", 0)),
        }
        for segment, code in zip(segments, codes)
        if (area := int(pycocotools.mask.area(code)))
    ]


def encode_masks(masks: Tensor, known: dict[bytes, dict] | None = None) -> list[dict]:
    """Run-length codes of masks in COCO's compressed form, ready for JSON.

    Args:
        masks: (n, h, w) bool.
        known: codes of masks of the same size, by content; those are not encoded again, new ones are added. The
            instances of one image repeat few masks, with other classes and in other modes.

    Returns:
        n codes {"size": [h, w], "counts": str}.
    """
    known = {} if known is None else known
    masks = np.ascontiguousarray(masks.detach().cpu().numpy())
    content = [row.tobytes() for row in np.packbits(masks.reshape(len(masks), math.prod(masks.shape[1:])), axis=1)]
    for key, mask in zip(content, masks):
        if key not in known:
            columns = cv2.transpose(mask.view(np.uint8)).T  # the code runs down the columns; OpenCV turns them fastest
            code = pycocotools.mask.encode(columns)
            known[key] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
    return [known[key] for key in content]


def _areas(rows: Sequence[dict], task: str) -> list[float]:
    if task == "bbox":
        return [row["bbox"][2] * row["bbox"][3] for row in rows]
    codes = {row["segmentation"]["counts"]: row["segmentation"] for row in rows}  # many rows share few masks
    areas = {counts: int(pycocotools.mask.area(code)) for counts, code in codes.items()}
    return [areas[row["segmentation"]["counts"]] for row in rows]


def _mean(precision: np.ndarray) -> float:
    return mean_of_defined(precision.ravel().tolist())
