"""Average precision by the federated rule of LVIS (Gupta, Dollar, Girshick 2019, section 3).

Nobody has looked for every one of 1203 classes in every image. An image counts for a class only if its annotation
has instances of it, or says that there are none (`neg_category_ids`); where not all instances are marked
(`not_exhaustive_category_ids`), a detection without a partner is not a mistake. 300 detections of an image count, and
the classes are also averaged by how many images of the training split show them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from fcclip.errors import InputError
from fcclip.evaluation.averages import mean_of_defined
from fcclip.evaluation.instances import LVIS_DETECTIONS, InstanceEvaluator, InstanceTruth, protocol_precision
from fcclip.structures import Instances

_FREQUENCIES = ("r", "c", "f")  # rare, common, frequent: 1-10, 11-100, more than 100 images


class LvisEvaluator(InstanceEvaluator):
    """AP, AP50, AP75, APs, APm, APl, APr, APc, APf of masks (`segm`) and boxes (`bbox`) by the rule of LVIS.

    Args:
        truth, class_names, dataset_ids, seen, folder: as for `InstanceEvaluator`; `truth` is that of an LVIS file.
            Results are written to `lvis_instances_results.json`.

    Raises:
        ValueError: a file without the lists that federated evaluation needs, and what `InstanceEvaluator` refuses.
    """

    file_name = "lvis_instances_results.json"

    def __init__(self, *, truth: InstanceTruth, **options: Any) -> None:
        super().__init__(truth=truth, **options)
        for name in ("neg_category_ids", "not_exhaustive_category_ids"):
            lacking = [image_id for image_id, image in truth.images.items() if name not in image]
            if lacking:
                raise InputError(
                    f"{truth.path}: image {lacking[0]!r} has no '{name}', which the federated rule of LVIS needs. "
                    "Expected LVIS v1 annotations, e.g. lvis_v1_val.json."
                )
        for category in self.dataset_ids.values():
            frequency = truth.categories[category].get("frequency")
            if frequency not in _FREQUENCIES:
                raise InputError(
                    f"{truth.path}: category {category} has the frequency {frequency!r}, expected one of "
                    f"{', '.join(_FREQUENCIES)}. Expected LVIS v1 annotations, e.g. lvis_v1_val.json."
                )

    def _chosen(self, instances: Instances) -> Instances:
        """The 300 with the highest scores; of equal ones those that come first."""
        best = torch.sort(instances.scores, descending=True, stable=True).indices[:LVIS_DETECTIONS]
        return Instances(**{name: value[best] for name, value in vars(instances).items()})

    def _precision(self, task: str) -> np.ndarray:
        """Class after class: of the 24 million pairs of image and class in the val split, few count."""
        truth, rows = self._numbered()
        shape = (10, 101, len(self.dataset_ids), 4)
        if not rows:
            return np.full(shape, np.nan)
        images = {image["id"]: image for image in truth["images"]}
        annotations, detections = _by_class(truth["annotations"]), _by_class(rows)
        precision = np.full(shape, np.nan)
        for position, category in enumerate(self.dataset_ids.values()):
            if category not in annotations:
                continue  # without ground truth a class has no AP
            present = {entry["image_id"] for entry in annotations[category]}
            counted = [
                row
                for row in detections.get(category, ())
                if row["image_id"] in present or category in images[row["image_id"]]["neg_category_ids"]
            ]
            shown = sorted(present | {row["image_id"] for row in counted})
            part = {
                "images": [images[index] for index in shown],
                "annotations": [entry | {"id": index} for index, entry in enumerate(annotations[category], start=1)],
            }
            precision[:, :, position : position + 1] = protocol_precision(
                part, counted, [category], task, federated=True, categories=[self.truth.categories[category]]
            )
        return precision

    def _more_metrics(self, precision: np.ndarray) -> dict[str, float]:
        groups = [self.truth.categories[category]["frequency"] for category in self.dataset_ids.values()]
        return {
            f"AP{letter}": mean_of_defined(precision[:, :, [group == letter for group in groups], 0].ravel().tolist())
            for letter in _FREQUENCIES
        }


def _by_class(entries: list[dict]) -> dict[int, list[dict]]:
    classes: dict[int, list[dict]] = defaultdict(list)
    for entry in entries:
        classes[entry["category_id"]].append(entry)
    return classes
