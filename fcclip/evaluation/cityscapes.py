"""The Cityscapes protocol in memory: instance AP, and IoU and instance-weighted iIoU of classes and categories.

Everything comes from one file of the ground truth, `<image>_gtFine_instanceIds.png`. A pixel holds a label id
(0..33), or label id x 1000 + number for one instance of a class; a class id without a number is a group that could not
be told apart. Classes are matched by these ids, never by names, which are the user's to choose.

Legend: G ground-truth regions and P predictions of one image.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcclip.data import read_label_map
from fcclip.data.datasets.cityscapes import instance_ids_file
from fcclip.errors import InputError, MissingFileError
from fcclip.evaluation.averages import mean_of_defined, seen_and_unseen
from fcclip.evaluation.ground_truth import ClassEvaluator, GroundTruth, in_order
from fcclip.evaluation.histograms import JointHistogram, as_array, compact, joint_histogram, summed
from fcclip.evaluation.semantic import SemanticEvaluator
from fcclip.files import listed
from fcclip.structures import Instances

THRESHOLDS = np.arange(0.5, 1.0, 0.05)
MIN_PIXELS = 100  # smaller instances are not asked for
_FIRST_INSTANCE = 1000  # ids below are labels: stuff, void, or groups of things
_NUM_LABELS = 34
# Evaluated labels of each category.
_CATEGORIES = {
    "flat": (7, 8),
    "construction": (11, 12, 13),
    "object": (17, 19, 20),
    "nature": (21, 22),
    "sky": (23,),
    "human": (24, 25),
    "vehicle": (26, 27, 28, 31, 32, 33),
}
_EVALUATED = frozenset(label for labels in _CATEGORIES.values() for label in labels)
_INSTANCE_CATEGORIES = ("human", "vehicle")  # all of whose labels have instances
# Mean pixels of an instance, over the training split.
_MEAN_PIXELS = {
    24: 3462.4756337644,  # person
    25: 3930.4788056518,  # rider
    26: 12794.0202738185,  # car
    27: 27855.1264367816,  # truck
    28: 35732.1511111111,  # bus
    31: 67583.7075812274,  # train
    32: 6298.7200839748,  # motorcycle
    33: 4672.3249222261,  # bicycle
}


def read_instance_ids(ground_truth: GroundTruth) -> np.ndarray:
    """(h, w) int32 of `instance_ids_file`, read once an image.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a label map, or one with ids that Cityscapes does not have.
    """

    def read() -> np.ndarray:
        path = instance_ids_file(ground_truth.record)
        if not Path(path).is_file():
            raise MissingFileError(
                f"{path}: no such file. The Cityscapes protocol reads the instance ids of gtFine_trainvaltest.zip; "
                "copy all of gtFine, not the label maps alone."
            )
        ids = read_label_map(path)
        highest = int(_labels_of(ids).max())
        if highest >= _NUM_LABELS:
            raise InputError(
                f"{path}: label {highest} is not in Cityscapes (0..{_NUM_LABELS - 1}); is it a file of instance ids?"
            )
        return ids

    return ground_truth.once("instance ids", read)


class InstanceCounts(NamedTuple):
    """What the instance protocol needs to know of one image."""

    truth: np.ndarray  # (G, 3) int64: contiguous class, pixels, 1 if it is an instance that has to be found
    predicted: np.ndarray  # (P, 3) int64: contiguous class, pixels, pixels that excuse a mistake
    scores: np.ndarray  # (P,) float64
    pairs: np.ndarray  # (n, 3) int64: row of truth, row of predicted, common pixels; of equal classes


class CityscapesInstanceEvaluator(ClassEvaluator):
    """AP and AP50 of instance masks by the rules of cityscapesScripts.

    A prediction counts for an instance that it overlaps by more than the threshold; further ones for the same instance
    are mistakes. One without such an instance is a mistake, unless void, groups and tiny instances of its class make
    up more of it than the threshold.

    Args:
        class_names, seen: as for `ClassEvaluator`.
        dataset_ids: contiguous index of each thing class -> its label id in Cityscapes.

    Raises:
        ValueError: a label without instances in Cityscapes.
    """

    def __init__(
        self, *, class_names: Sequence[str], dataset_ids: Mapping[int, int], seen: Sequence[bool] | None = None
    ) -> None:
        self.dataset_ids = dict(sorted(dataset_ids.items()))
        super().__init__(class_names=class_names, classes=self.dataset_ids, seen=seen)
        strange = sorted(set(self.dataset_ids.values()) - _MEAN_PIXELS.keys())
        if strange:
            raise InputError(f"labels {strange} have no instances in Cityscapes; those with are {sorted(_MEAN_PIXELS)}")

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> InstanceCounts:
        name = f"image {ground_truth.image_id!r}"
        return self.count(read_instance_ids(ground_truth), output["instances"], name=name)

    def count(self, instance_ids: np.ndarray, instances: Instances, *, name: str = "the image") -> InstanceCounts:
        """Compares one image with its ground truth.

        Args:
            instance_ids: (h, w) int.
            instances: masks of the same size; empty ones do not count.
            name: what errors call the image.

        Raises:
            ValueError: masks of another size, a class without instances.
        """
        if tuple(instances.pred_masks.shape[1:]) != instance_ids.shape:
            raise InputError(
                f"{name}: masks are {tuple(instances.pred_masks.shape[1:])} (height, width), the ground truth is "
                f"{instance_ids.shape}"
            )
        classes = as_array(instances.pred_classes).astype(np.int64)
        strange = sorted(set(classes.tolist()) - self.dataset_ids.keys())
        if strange:
            raise InputError(f"{name}: classes {listed(strange)} of instances are not thing classes")
        ids, region = compact(instance_ids)
        common = pixels_by_region(instances.pred_masks, region, len(ids))  # (n, regions)
        size = common.sum(axis=1)
        kept = np.flatnonzero(size)
        classes, size, common = classes[kept], size[kept], common[kept]

        labels = _labels_of(ids)
        num_pixels = np.bincount(region.ravel(), minlength=len(ids))
        class_of_label = np.full(_NUM_LABELS, -1)
        class_of_label[list(self.dataset_ids.values())] = list(self.dataset_ids)
        things = np.flatnonzero(class_of_label[labels] >= 0)  # rows of ids
        thing_class, group = class_of_label[labels[things]], ids[things] < _FIRST_INSTANCE
        tiny = num_pixels[things] < MIN_PIXELS
        void = (ids < _FIRST_INSTANCE) & ~np.isin(labels, list(_EVALUATED))

        same = classes[:, None] == thing_class[None]  # (P, G)
        on_things = common[:, things] * same
        # The protocol asks "is it a group?" and "is it tiny?" one after the other: a tiny group excuses twice.
        excused = common[:, void].sum(axis=1) + on_things @ (group.astype(np.int64) + tiny)
        row, column = np.nonzero(on_things)
        return InstanceCounts(
            truth=np.stack([thing_class, num_pixels[things], ~group & ~tiny], axis=1),
            predicted=np.stack([classes, size, excused], axis=1),
            scores=as_array(instances.scores).astype(np.float64)[kept],
            pairs=np.stack([column, row, on_things[row, column]], axis=1),
        )

    def results(self) -> dict[str, dict[str, float]]:
        together = _joined(self.images[image_id] for image_id in in_order(self.images))
        precision = {  # class -> AP at each threshold, percent
            index: [100 * value for value in _average_precisions(together, index)] for index in self.dataset_ids
        }
        per_class = [mean_of_defined(precision.get(index, ())) for index in range(len(self.class_names))]
        metrics = {
            "AP": mean_of_defined(value for values in precision.values() for value in values),
            "AP50": mean_of_defined(values[0] for values in precision.values()),
        }
        metrics |= seen_and_unseen("AP", per_class, self.seen)
        return {"segm": metrics | {f"AP-{self.class_names[index]}": per_class[index] for index in self.dataset_ids}}


class SemanticCounts(NamedTuple):
    """What the semantic protocol needs to know of one image."""

    pairs: JointHistogram  # pixels by (true class, predicted class)
    instances: np.ndarray  # (n, 4) int64: label id, pixels, those predicted right, those of its category


class CityscapesSemanticEvaluator(SemanticEvaluator):
    """`IoU` and `iIoU` of classes, `IoU_sup` and `iIoU_sup` of categories, beside all that `SemanticEvaluator` gives.

    iIoU weights the pixels of each instance by mean size of its class / its size, so that small and far ones count as
    much as large ones. `IoU` is `mIoU_union`; it is `mIoU` where every class has ground truth, as in Cityscapes.

    Args:
        class_names, seen: as for `ClassEvaluator`.
        dataset_ids: contiguous index of each class -> its label id in Cityscapes.

    Raises:
        ValueError: a label that Cityscapes does not evaluate.
    """

    def __init__(
        self, *, class_names: Sequence[str], dataset_ids: Mapping[int, int], seen: Sequence[bool] | None = None
    ) -> None:
        super().__init__(class_names=class_names, ignore_label=-1, seen=seen)
        strange = sorted(set(dataset_ids.values()) - _EVALUATED)
        if strange or sorted(dataset_ids) != list(range(len(self.class_names))):
            raise InputError(
                f"the {len(self.class_names)} classes have the labels {sorted(dataset_ids.values())}; Cityscapes "
                f"evaluates {sorted(_EVALUATED)}"
            )
        self.label_of_class = np.array([dataset_ids[index] for index in range(len(dataset_ids))])
        self.class_of_label = np.full(_NUM_LABELS, -1)
        self.class_of_label[self.label_of_class] = np.arange(len(dataset_ids))
        self.instances: dict[Hashable, np.ndarray] = {}

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> SemanticCounts:
        ids, predicted = read_instance_ids(ground_truth), as_array(output["sem_seg"])
        name = instance_ids_file(ground_truth.record)
        self.check(ids, predicted, name=name)
        histogram = joint_histogram(ids, predicted)
        labels = _labels_of(histogram.first)
        counted = self.class_of_label[labels] >= 0
        pairs = (self.class_of_label[labels], histogram.second, histogram.pixels)
        return SemanticCounts(summed(*(column[counted] for column in pairs)), self._instances(histogram, labels))

    def _instances(self, histogram: JointHistogram, labels: np.ndarray) -> np.ndarray:
        category_of_label = np.full(_NUM_LABELS, -1)
        for number, name in enumerate(_CATEGORIES):
            category_of_label[list(_CATEGORIES[name])] = number
        chosen = (histogram.first > _FIRST_INSTANCE) & np.isin(labels, list(_MEAN_PIXELS))
        ids, row = np.unique(histogram.first[chosen], return_inverse=True)
        label_of_class = np.append(self.label_of_class, 0)  # a gap has the label of void
        true, predicted = labels[chosen], label_of_class[histogram.second[chosen]]
        pixels = histogram.pixels[chosen]
        right, related = true == predicted, category_of_label[true] == category_of_label[predicted]
        counts = [
            np.bincount(row, weights, len(ids)).astype(np.int64)
            for weights in (pixels, pixels * right, pixels * related)
        ]
        return np.stack([_labels_of(ids), *counts], axis=1)

    def keep(self, image_id: int | str, measured: SemanticCounts) -> None:
        super().keep(image_id, measured.pairs)
        self.instances[image_id] = measured.instances

    def state(self) -> tuple:
        return (*super().state(), self.instances)

    def merge(self, state: tuple) -> None:
        *common, instances = state
        super().merge(tuple(common))
        self.instances.update(instances)

    def results(self) -> dict[str, dict[str, float]]:
        metrics = super().results()["sem_seg"]
        return {"sem_seg": self._protocol() | metrics}

    def _protocol(self) -> dict[str, float]:
        classes = {label: [index] for index, label in enumerate(self.label_of_class.tolist())}
        categories = {
            name: [index for label in labels for index in classes.get(label, ())]
            for name, labels in _CATEGORIES.items()
        }
        instances = np.concatenate([np.zeros((0, 4), np.int64), *self.instances.values()])
        weights = np.array([_MEAN_PIXELS[label] for label in instances[:, 0].tolist()]) / instances[:, 1]

        def weighted(members: Sequence[int], column: int) -> tuple[float, float]:
            """Weighted pixels of the instances of these labels: right, wrong; whatever the order of the images."""
            chosen = np.isin(instances[:, 0], members)
            right, size = instances[chosen, column], instances[chosen, 1]
            return math.fsum(right * weights[chosen]), math.fsum((size - right) * weights[chosen])

        def iou(rows: Sequence[int], hits_and_misses: tuple[float, float] | None = None) -> float:
            block = self.confusion[:, rows]
            hits = block[rows].sum()
            wrong = block.sum() - hits
            right, missed = hits_and_misses or (hits, self.confusion[rows].sum() + self.gap_pixels[rows].sum() - hits)
            whole = right + wrong + missed
            return 100 * float(right) / float(whole) if whole else math.nan

        return {
            "IoU": mean_of_defined(iou(rows) for rows in classes.values()),
            "iIoU": mean_of_defined(
                iou(rows, weighted([label], 2)) for label, rows in classes.items() if label in _MEAN_PIXELS
            ),
            "IoU_sup": mean_of_defined(iou(rows) for rows in categories.values() if rows),
            "iIoU_sup": mean_of_defined(
                iou(categories[name], weighted(_CATEGORIES[name], 3)) for name in _INSTANCE_CATEGORIES
            ),
        }


def pixels_by_region(masks: Tensor, region: np.ndarray, num_regions: int) -> np.ndarray:
    """How many pixels of each mask lie in each region.

    Args:
        masks: (n, h, w) bool, on any device; equal ones are counted once.
        region: (h, w) int, number of each pixel's region.
        num_regions: how many there are.

    Returns:
        (n, num_regions) int64.
    """
    counts = np.zeros((len(masks), num_regions), np.int64)
    if masks.is_cuda:
        flat = torch.from_numpy(np.ascontiguousarray(region).ravel()).to(masks.device)
        for row, mask in enumerate(masks.flatten(1)):
            counts[row] = torch.bincount(flat[mask], minlength=num_regions).cpu().numpy()
        return counts
    flat, known = region.ravel(), {}
    for row, mask in enumerate(np.ascontiguousarray(as_array(masks)).reshape(len(masks), flat.size)):
        key = np.packbits(mask).tobytes()
        if key not in known:
            known[key] = np.bincount(flat[np.flatnonzero(mask)], minlength=num_regions)
        counts[row] = known[key]
    return counts


def _labels_of(ids: np.ndarray) -> np.ndarray:
    return np.where(ids < _FIRST_INSTANCE, ids, ids // _FIRST_INSTANCE)


def _joined(images: Iterable[InstanceCounts]) -> InstanceCounts:
    """One record of many images."""
    truth, predicted, pairs = ([np.zeros((0, 3), np.int64)] for _ in range(3))
    scores, num_truth, num_predicted = [np.zeros(0)], 0, 0
    for image in images:
        pairs.append(image.pairs + np.array([num_truth, num_predicted, 0]))
        truth.append(image.truth)
        predicted.append(image.predicted)
        scores.append(image.scores)
        num_truth, num_predicted = num_truth + len(image.truth), num_predicted + len(image.predicted)
    return InstanceCounts(*(np.concatenate(parts) for parts in (truth, predicted, scores, pairs)))


def _average_precisions(counts: InstanceCounts, index: int) -> Iterator[float]:
    """AP of a class at each threshold, 0..1: NaN without an instance to find, 0 without a prediction."""
    true_class, truth_pixels, to_find = counts.truth.T
    predicted_class, pixels, excused = counts.predicted.T
    g, p, common = counts.pairs[true_class[counts.pairs[:, 0]] == index].T  # which are of one class each
    to_find = (true_class == index) & (to_find == 1)
    overlap = common / (truth_pixels[g] + pixels[p] - common)
    for threshold in THRESHOLDS:
        if not to_find.any():
            yield math.nan
            continue
        matched = overlap > threshold
        hits = matched & to_find[g]
        # Of several predictions for one instance the best is right, the others are not.
        order = np.lexsort((-counts.scores[p[hits]], g[hits]))
        instance, score = g[hits][order], counts.scores[p[hits]][order]
        right = np.append(True, instance[1:] != instance[:-1])[: len(instance)]
        wrong = (predicted_class == index) & (excused / pixels <= threshold)
        wrong[p[matched]] = False
        scores = np.concatenate([score, counts.scores[wrong]])
        right = np.concatenate([right, np.zeros(wrong.sum(), bool)])
        yield _area_under_curve(scores, right, int(to_find.sum()))


def _area_under_curve(scores: np.ndarray, right: np.ndarray, num_instances: int) -> float:
    """Area under precision over recall, without interpolation; equal scores make one point.

    Args:
        scores: (n,) of the predictions that count.
        right: (n,) bool.
        num_instances: those that had to be found.
    """
    if not len(scores):
        return 0.0
    order = np.argsort(scores)
    first = np.unique(scores[order], return_index=True)[1]
    hits = np.cumsum(right[order][::-1])[::-1][first]  # with this score or a higher one
    precision = hits / (len(scores) - first)
    recall = hits / num_instances
    # A last point at recall 0 and precision 1; each stands for half of the way to both of its neighbours.
    precision, recall = np.append(precision, 1.0), np.append(recall, 0.0)
    before, after = np.append(recall[0], recall[:-1]), np.append(recall[1:], 0.0)
    return float(np.dot(precision, (before - after) / 2))
