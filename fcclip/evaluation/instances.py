"""Average precision of instances by the COCO protocol: masks and boxes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycocotools.mask
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from fcclip.engine.checkpoint import write_atomically
from fcclip.evaluation.averages import mean_of_defined, seen_and_unseen
from fcclip.evaluation.pictures import Evaluator, Picture
from fcclip.structures import Instances

logger = logging.getLogger(__name__)
_AREAS = {"s": 1, "m": 2, "l": 3}  # suffix of the metric -> area range of the protocol, which calls all areas 0


class InstanceTruth(NamedTuple):
    """Ground truth of a COCO instances file."""

    path: str
    images: dict[Hashable, dict]  # image id -> entry
    annotations: list[dict]
    category_ids: frozenset[int]

    @classmethod
    def read(cls, path: str | os.PathLike) -> InstanceTruth:
        """Reads the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: broken JSON, or one that is not in the format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            images = {image["id"]: image for image in content["images"]}
            return cls(str(path), images, content["annotations"], frozenset(one["id"] for one in content["categories"]))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"instances file '{path}' does not exist; it holds the ground truth of AP"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"instances file '{path}' is broken JSON at line {error.lineno}: {error.msg}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"instances file '{path}' is not in the COCO instances format: {error!r} is missing"
            ) from error


class InstanceEvaluator(Evaluator):
    """COCO average precision of masks (`segm`) and boxes (`bbox`) of the thing classes.

    Args:
        truth: the ground truth, shared by evaluators of the same data set.
        class_names: name of each of the K classes, by contiguous index.
        dataset_ids: contiguous index of each thing class -> the data set's category id.
        seen: (K,) whether training knew the class; None when unknown.
        folder: where `save` writes `coco_instances_results.json`; None: nowhere.

    Raises:
        ValueError: the file has annotations of a category that is no thing class of the data set, or lacks a thing
            class.
    """

    def __init__(
        self,
        *,
        truth: InstanceTruth,
        class_names: Sequence[str],
        dataset_ids: Mapping[int, int],
        seen: Sequence[bool] | None = None,
        folder: str | os.PathLike | None = None,
    ) -> None:
        self.truth = truth
        self.class_names = tuple(class_names)
        self.dataset_ids = dict(sorted(dataset_ids.items()))
        self.seen = None if seen is None else tuple(seen)
        self.folder = None if folder is None else Path(folder)
        self.pictures: dict[Hashable, list[dict]] = {}  # image id -> rows of COCO results
        lacking = sorted(set(self.dataset_ids.values()) - truth.category_ids)
        strange = sorted({one["category_id"] for one in truth.annotations} - set(self.dataset_ids.values()))
        if lacking or strange:
            problem = f"has no categories {lacking[:5]}" if lacking else f"annotates unknown categories {strange[:5]}"
            raise ValueError(f"{truth.path} {problem}; its category ids must be those of the data set's thing classes")

    def add(self, image_id: int | str, instances: Instances, *, encoded_masks: dict[bytes, dict] | None = None) -> None:
        """Takes in the instances of one picture; `encoded_masks` as for `encode_masks`.

        Raises:
            ValueError: a picture the ground truth does not have or that came before, masks of another size, a stuff
                class.
        """
        if image_id in self.pictures:
            raise ValueError(f"picture {image_id!r} came twice; each picture may be evaluated once")
        if image_id not in self.truth.images:
            raise ValueError(f"picture {image_id!r} is not in {self.truth.path}, which holds the ground truth of AP")
        image = self.truth.images[image_id]
        size = (image["height"], image["width"])
        if tuple(instances.pred_masks.shape[1:]) != size:
            raise ValueError(
                f"picture {image_id!r}: masks are {tuple(instances.pred_masks.shape[1:])} (height, width), the picture "
                f"in {self.truth.path} is {size}"
            )
        classes = instances.pred_classes.tolist()
        strange = sorted(set(classes) - self.dataset_ids.keys())
        if strange:
            raise ValueError(f"picture {image_id!r}: instances of the classes {strange}, which are no thing classes")
        boxes = instances.pred_boxes.detach().cpu().double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)  # XYXY -> XYWH
        self.pictures[image_id] = [
            {
                "image_id": image_id,
                "category_id": self.dataset_ids[index],
                "bbox": box,
                "score": score,
                "segmentation": code,
            }
            for index, box, score, code in zip(
                classes, boxes.tolist(), instances.scores.tolist(), encode_masks(instances.pred_masks, encoded_masks)
            )
        ]

    def process(self, picture: Picture, output: Mapping) -> None:
        self.add(picture.image_id, output["instances"], encoded_masks=picture.encoded_masks)

    def state(self) -> dict[Hashable, list[dict]]:
        return self.pictures

    def merge(self, state: Mapping[Hashable, list[dict]]) -> None:
        twice = sorted(self.pictures.keys() & state.keys(), key=str)
        if twice:
            raise ValueError(f"pictures {twice[:5]} came twice; each picture may be evaluated once")
        self.pictures.update(state)

    def results(self) -> dict[str, dict[str, float]]:
        return {task: self._average_precision(task) for task in ("bbox", "segm")}

    def save(self) -> None:
        if self.folder is not None:
            rows = [row for rows in self.pictures.values() for row in rows]
            content = json.dumps(rows).encode()
            write_atomically(self.folder / "coco_instances_results.json", lambda file: file.write(content))

    def _average_precision(self, task: str) -> dict[str, float]:
        """AP over the pictures that were evaluated."""
        # The protocol breaks ties of scores by the order of the pictures. Numbers stand in for the ids, which may be
        # strings, and annotations are counted from 1 because 0 means unmatched there.
        number = {image_id: index for index, image_id in enumerate(sorted(self.pictures), start=1)}
        truth = {
            "images": [self.truth.images[image_id] | {"id": index} for image_id, index in number.items()],
            "categories": [{"id": category} for category in self.dataset_ids.values()],
            "annotations": [
                one | {"id": index, "image_id": number[one["image_id"]]}
                for index, one in enumerate(self.truth.annotations, start=1)
                if one["image_id"] in number
            ],
        }
        rows = [row | {"image_id": number[image_id]} for image_id in number for row in self.pictures[image_id]]
        areas = _areas(rows, task)  # decide which of the area ranges a detection belongs to
        detections = {
            "images": truth["images"],
            "categories": truth["categories"],
            "annotations": [
                row | {"id": index, "area": area, "iscrowd": 0}
                for index, (row, area) in enumerate(zip(rows, areas), start=1)
            ],
        }
        # (10 IoU thresholds, 101 recalls, classes, 4 areas, 3 limits of detections), -1 where there is no ground truth
        precision = np.full((10, 1, len(self.dataset_ids), 4, 1), -1.0)
        if rows:  # without a single detection AP is undefined, as in detectron2
            evaluation = COCOeval_faster(COCO(truth), COCO(detections), task, print_function=logger.debug)
            evaluation.params.catIds = list(self.dataset_ids.values())
            evaluation.evaluate()
            evaluation.accumulate()
            order = np.argsort(np.argsort(list(self.dataset_ids.values())))  # the protocol sorts by category id
            precision = np.asarray(evaluation.eval["precision"])[:, :, order]
        precision = 100 * np.where(precision < 0, np.nan, precision)[..., -1]
        per_class = dict.fromkeys(range(len(self.class_names)), np.nan)
        per_class |= {index: _mean(precision[:, :, row, 0]) for row, index in enumerate(self.dataset_ids)}
        metrics = {
            "AP": _mean(precision[..., 0]),
            "AP50": _mean(precision[0, ..., 0]),
            "AP75": _mean(precision[5, ..., 0]),
        }
        metrics |= {f"AP{suffix}": _mean(precision[..., area]) for suffix, area in _AREAS.items()}
        metrics |= seen_and_unseen("AP", list(per_class.values()), self.seen)
        return metrics | {f"AP-{self.class_names[index]}": per_class[index] for index in self.dataset_ids}


def encode_masks(masks: Tensor, known: dict[bytes, dict] | None = None) -> list[dict]:
    """Run-length codes of masks in COCO's compressed form, ready for JSON.

    Args:
        masks: (n, h, w) bool.
        known: codes of masks of the same size, by content; those are not encoded again, new ones are added. The
            instances of one picture repeat few masks, with other classes and in other modes.

    Returns:
        n codes {"size": [h, w], "counts": str}.
    """
    known = {} if known is None else known
    masks = masks.detach().cpu()
    content = [row.tobytes() for row in np.packbits(masks.flatten(1).numpy(), axis=1)]
    new = {key: index for index, key in enumerate(content) if key not in known}
    if new:
        columns = masks[list(new.values())].transpose(1, 2).contiguous().numpy()  # the code runs down the columns
        for key, code in zip(new, pycocotools.mask.encode(columns.view(np.uint8).T)):
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
