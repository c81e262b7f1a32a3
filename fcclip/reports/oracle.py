"""What would be if half of the model were perfect: true masks with predicted classes, or the other way round.

`masks`: every ground-truth segment is classified as the model classifies its own masks. The frozen CLIP pools its
features inside the true mask; the decoder's opinion is that of the query whose mask overlaps it most. What remains
wrong is classification.

`classes`: every predicted segment gets the class of the ground-truth segment that it overlaps most, if their
intersection over union is more than 0.5; else it keeps its own. Segments are those of the panoptic map, instances, or
in a semantic map the pixels of one class. What remains wrong is segmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask
import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.data import Dataset
from fcclip.data.segmentations import compressed, has_area
from fcclip.errors import InputError
from fcclip.evaluation.ground_truth import Evaluator, GroundTruth
from fcclip.evaluation.histograms import as_array, compact, joint_histogram
from fcclip.evaluation.semantic import SemanticEvaluator
from fcclip.modeling import FCCLIP, Ensemble, ScoredMasks
from fcclip.modeling.outputs import OutputSettings
from fcclip.structures import Instances, boxes_of_masks
from fcclip.vocabulary import Vocabulary

MIN_IOU = 0.5


# ---- true classes ----


class TrueClassEvaluator(Evaluator):
    """An evaluator that sees predictions with true classes.

    Args:
        evaluator: what looks at them; everything but `measure` is its own.
        thing_classes: contiguous indices of the countable classes.
        ignore_label: value of pixels without a class in label maps.
    """

    def __init__(self, evaluator: Evaluator, *, thing_classes: Collection[int], ignore_label: int) -> None:
        self.evaluator, self.thing_classes, self.ignore_label = evaluator, frozenset(thing_classes), ignore_label

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> Any:
        return self.evaluator.measure(
            ground_truth, _TrueClasses(ground_truth, output, self.thing_classes, self.ignore_label)
        )

    def keep(self, image_id: int | str, measured: Any) -> None:
        self.evaluator.keep(image_id, measured)

    @property
    def per_image(self) -> dict:
        return self.evaluator.per_image

    def state(self) -> Any:
        return self.evaluator.state()

    def merge(self, state: Any) -> None:
        self.evaluator.merge(state)

    def results(self) -> dict[str, dict[str, float]]:
        return self.evaluator.results()

    def save(self) -> None:
        self.evaluator.save()


class _TrueClasses(Mapping):
    """The outputs of an image; each gets its true classes when it is asked for."""

    def __init__(
        self, ground_truth: GroundTruth, output: Mapping, thing_classes: frozenset[int], ignore_label: int
    ) -> None:
        self.ground_truth, self.output = ground_truth, output
        self.thing_classes, self.ignore_label = thing_classes, ignore_label

    def __getitem__(self, key: str) -> Any:
        value = self.output[key]
        if key == "panoptic_seg":
            ground_truth = self.ground_truth
            return true_panoptic(*value, ground_truth.id_map, ground_truth.segments, thing_classes=self.thing_classes)
        if key == "sem_seg":
            return true_labels(value, self.ground_truth.labels, ignore_label=self.ignore_label)
        if key == "instances":
            classes, masks = self.ground_truth.once(
                "true instances", lambda: true_masks(self.ground_truth, self.thing_classes)
            )
            return true_instances(value, classes, masks)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.output)

    def __len__(self) -> int:
        return len(self.output)


def true_panoptic(
    id_map: np.ndarray | Tensor,
    segments: Sequence[Mapping],
    truth_map: np.ndarray,
    truth: Sequence[Mapping],
    *,
    thing_classes: Collection[int],
) -> tuple[np.ndarray, list[dict]]:
    """A predicted panoptic map with true classes.

    Args:
        id_map: (h, w) int, predicted segment ids.
        segments: `id, category_id, isthing` of each.
        truth_map: (h, w) int, true segment ids.
        truth: `id, category_id` of each segment that counts.
        thing_classes: contiguous indices.
    """
    ids = as_array(id_map)
    class_of = {one["id"]: one["category_id"] for one in truth}
    best = _best_matches(truth_map, ids, first=class_of.keys())
    found = []
    for segment in segments:
        match = best.get(segment["id"])
        index = segment["category_id"] if match is None else class_of[match]
        found.append({**segment, "category_id": index, "isthing": index in thing_classes})
    return ids, found


def true_labels(labels: np.ndarray | Tensor, truth: np.ndarray, *, ignore_label: int) -> np.ndarray:
    """(h, w) int predicted classes -> the same with true classes; ignored pixels of the truth do not count.

    Example:
        >>> true_labels(np.array([[5, 5, 5, 1]]), np.array([[2, 2, 1, 1]]), ignore_label=255).tolist()
        [[2, 2, 2, 1]]
    """
    labels = as_array(labels)
    counted = truth != ignore_label
    present = np.unique(truth[counted]).tolist()
    best = _best_matches(truth[counted][None], labels[counted][None], first=present)
    values, position = compact(labels)
    return np.array([best.get(value, value) for value in values.tolist()], labels.dtype)[position]


def true_instances(instances: Instances, truth_classes: np.ndarray, truth_masks: Tensor) -> Instances:
    """Predicted instances with true classes; of several with one mask and one class the best scored stays.

    Args:
        instances: n predictions.
        truth_classes: (m,) int.
        truth_masks: (m, h, w) bool; may overlap.
    """
    masks = instances.pred_masks.detach().cpu()
    classes = instances.pred_classes.detach().cpu().clone()
    if len(masks) and len(truth_classes):
        flat = truth_masks.flatten(1).float()
        common = _unique_product(masks, flat)  # (n, m)
        size, truth_size = masks.flatten(1).sum(1, dtype=torch.float32), flat.sum(1)
        iou = common / (size[:, None] + truth_size[None] - common).clamp(min=1)
        value, row = iou.max(1)
        matched = value > MIN_IOU
        classes[matched] = torch.as_tensor(truth_classes, dtype=classes.dtype)[row[matched]]
    order = instances.scores.detach().cpu().sort(descending=True, stable=True).indices.tolist()
    content = [np.packbits(mask).tobytes() for mask in masks.numpy()]
    first = {}
    for index in order:
        first.setdefault((content[index], int(classes[index])), index)
    kept = torch.tensor(sorted(first.values()), dtype=torch.int64)
    return Instances(
        scores=instances.scores.detach().cpu()[kept],
        pred_classes=classes[kept],
        pred_masks=masks[kept],
        pred_boxes=instances.pred_boxes.detach().cpu()[kept],
    )


def true_masks(ground_truth: GroundTruth, thing_classes: Collection[int]) -> tuple[np.ndarray, Tensor]:
    """((m,) int classes, (m, h, w) bool masks) of the true instances of an image. Crowds are among
    them: what lies on one is then excused, as it should be."""
    record = ground_truth.record
    if "segments_info" in record:
        chosen = [one for one in ground_truth.segments if one["category_id"] in thing_classes]
        masks = [ground_truth.id_map == one["id"] for one in chosen]
    else:
        chosen = record.get("annotations", ())
        masks = [_mask_of(one["segmentation"], record["height"], record["width"]) for one in chosen]
    classes = np.array([one["category_id"] for one in chosen], np.int64)
    size = (record["height"], record["width"])
    return classes, torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size), bool))


def _mask_of(segmentation: Mapping | Sequence, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, Mapping):
        return pycocotools.mask.decode(compressed(segmentation)).astype(bool)
    polygons = [one for one in segmentation if has_area(one)]
    code = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, height, width))
    return pycocotools.mask.decode(code).astype(bool)


def _best_matches(truth: np.ndarray, predicted: np.ndarray, *, first: Collection[int]) -> dict[int, int]:
    """Predicted value -> the true one of `first` that it overlaps by an IoU above one half; there is at most one."""
    if not truth.size:
        return {}
    histogram = joint_histogram(truth, predicted)
    true_pixels, pixels = {}, {}
    for g, p, n in zip(*(column.tolist() for column in histogram)):
        true_pixels[g] = true_pixels.get(g, 0) + n
        pixels[p] = pixels.get(p, 0) + n
    return {
        p: g
        for g, p, n in zip(*(column.tolist() for column in histogram))
        if g in first and n > MIN_IOU * (true_pixels[g] + pixels[p] - n)
    }


def _unique_product(masks: Tensor, flat: Tensor) -> Tensor:
    """Common pixels of (n, h, w) masks and (m, hw) others, (n, m) float; equal masks are multiplied once."""
    content = [np.packbits(mask).tobytes() for mask in masks.numpy()]
    row_of = {key: row for row, key in enumerate(dict.fromkeys(content))}
    rows = torch.tensor([row_of[key] for key in content])
    one_of = torch.tensor([content.index(key) for key in row_of])
    return (masks[one_of].flatten(1).float() @ flat.T)[rows]


class TrueClasses:
    """The oracle `classes`: predictions of the model, with true classes."""

    name, predicts = "classes", False

    def model(self, model: Any, ground_truth_of: Callable[[int | str], GroundTruth], dataset: Dataset) -> Any:
        """The model itself."""
        return model

    def evaluators(self, evaluators: Sequence[Evaluator], dataset: Dataset, vocabulary: Vocabulary) -> list[Evaluator]:
        """Evaluators that see true classes."""
        ignore_label = dataset.metadata.get("ignore_label", 255)
        options = {"thing_classes": vocabulary.thing_classes, "ignore_label": ignore_label}
        return [TrueClassEvaluator(evaluator, **options) for evaluator in evaluators]


# ---- true masks ----


class TrueMasks:
    """The oracle `masks`: the model's classes of true masks."""

    name, predicts = "masks", True

    def model(
        self, model: FCCLIP, ground_truth_of: Callable[[int | str], GroundTruth], dataset: Dataset
    ) -> TrueMaskModel:
        """What classifies true masks."""
        ignore_label = dataset.metadata.get("ignore_label", 255)
        return TrueMaskModel(model, ground_truth_of=ground_truth_of, ignore_label=ignore_label)

    def evaluators(self, evaluators: Sequence[Evaluator], dataset: Dataset, vocabulary: Vocabulary) -> list[Evaluator]:
        """The same, which now allow pixels without a class."""
        for evaluator in evaluators:
            if isinstance(evaluator, SemanticEvaluator):
                evaluator.gaps = True
        return list(evaluators)


ORACLES = {oracle.name: oracle for oracle in (TrueMasks(), TrueClasses())}


@dataclass(frozen=True)
class ScoredSegments:
    """The true segments of an image, scored.

    Args:
        ground_truth: of the image.
        id_map: (h, w) int.
        ids: of the n segments to classify.
        scored: their masks with both opinions; None where there is no segment.
        vocabulary: the classes.
    """

    ground_truth: GroundTruth
    id_map: np.ndarray
    ids: Sequence[int]
    scored: ScoredMasks | None
    vocabulary: Vocabulary


class TrueMaskModel:
    """A model that classifies true masks instead of its own; has `score` and `outputs` like the model.

    Args:
        model: is used, not copied.
        ground_truth_of: image id -> ground truth.
        ignore_label: value of pixels without a class in label maps.
    """

    def __init__(
        self, model: FCCLIP, *, ground_truth_of: Callable[[int | str], GroundTruth], ignore_label: int
    ) -> None:
        self.source, self.ground_truth_of, self.ignore_label = model, ground_truth_of, ignore_label

    @torch.no_grad()
    def score(self, inputs: Sequence[Mapping], vocabulary: Vocabulary | None = None) -> list[ScoredSegments]:
        """As the model's, with true masks."""
        return [
            self._score(self.ground_truth_of(sample["image_id"]), own)
            for sample, own in zip(inputs, self.source.score(inputs, vocabulary))
        ]

    def _score(self, ground_truth: GroundTruth, own: ScoredMasks) -> ScoredSegments:
        id_map, ids = self._segments(ground_truth)
        scored = None
        if ids:
            masks, device = own.masks, own.dense.device
            sizes = masks.image_size, masks.padded_size
            at_masks = coverage(id_map, ids, *sizes, tuple(masks.mask_logits.shape[-2:])).to(device)
            at_dense = coverage(id_map, ids, *sizes, tuple(own.dense.shape[-2:])).to(device)
            queries = best_queries(masks.mask_logits > 0, inside(at_masks))
            scored = self.source.score_masks(own, queries, torch.where(inside(at_dense), 20.0, -20.0))
        return ScoredSegments(ground_truth, id_map, ids, scored, own.vocabulary)

    def _segments(self, ground_truth: GroundTruth) -> tuple[np.ndarray, list[int]]:
        """(h, w) int ids and those of the segments to classify: of the panoptic annotation, crowds too, or of each
        class."""
        if "segments_info" in ground_truth.record:
            present = set(compact(ground_truth.id_map)[0].tolist())
            return ground_truth.id_map, [segment["id"] for segment in ground_truth.segments if segment["id"] in present]
        if not ground_truth.record.get("sem_seg_file_name"):
            raise InputError(
                f"image {ground_truth.image_id!r} has neither segments nor a label map; true masks need one of them"
            )
        labels = ground_truth.labels
        return labels, [value for value in compact(labels)[0].tolist() if value != self.ignore_label]

    @torch.no_grad()
    def outputs(
        self,
        scored: ScoredSegments,
        *,
        heads: Sequence[str],
        ensemble: Ensemble | tuple[float, float] | None = None,
        semantic: str = "labels",
        settings: OutputSettings | None = None,
    ) -> dict[str, Any]:
        """As the model's; pixels without a true segment have class K in semantic maps."""
        ids, num_classes, things = scored.ids, len(scored.vocabulary), set(scored.vocabulary.thing_classes)
        scores, classes = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        if ids:
            class_logits = scored.scored.class_logits(self.source.ensemble if ensemble is None else ensemble)
            scores, classes = class_logits.softmax(-1)[:, :-1].cpu().max(1)
        values, position = compact(scored.id_map)
        number = {segment_id: index for index, segment_id in enumerate(ids, start=1)}
        numbers = np.array([number.get(value, 0) for value in values.tolist()], np.int32)[position]
        outputs: dict[str, Any] = {}
        if "semantic" in heads:
            outputs["sem_seg"] = np.append(num_classes, classes.numpy()).astype(np.int64)[numbers]
        if "panoptic" in heads:
            areas = np.bincount(numbers.ravel(), minlength=len(ids) + 1)[1:].tolist()
            rows = enumerate(zip(classes.tolist(), scores.tolist(), areas), start=1)
            outputs["panoptic_seg"] = (
                numbers,
                [
                    {"id": index, "isthing": category in things, "category_id": category, "score": score, "area": area}
                    for index, (category, score, area) in rows
                ],
            )
        if "instances" in heads:
            segments = scored.ground_truth.record.get("segments_info", ())
            crowds = {segment["id"] for segment in segments if segment.get("iscrowd", 0)}
            chosen = [
                index
                for index, (segment_id, category) in enumerate(zip(ids, classes.tolist()))
                if category in things and segment_id not in crowds
            ]
            masks = [numbers == index + 1 for index in chosen]
            masks = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *numbers.shape), bool))
            outputs["instances"] = Instances(scores[chosen], classes[chosen], masks, boxes_of_masks(masks))
        return outputs


def coverage(
    id_map: np.ndarray,
    ids: Sequence[int],
    image_size: tuple[int, int],
    padded_size: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """How much of each cell of the network's grid a true segment covers.

    Args:
        id_map: (h, w) int at the size of the image.
        ids: the segments, each with a pixel.
        image_size, padded_size: (height, width) of the network input without and with padding.
        grid: (rows, columns) of the features, which cover the padded input.

    Returns:
        (n, *grid) float, 0..1.
    """
    masks = []
    resized = _nearest(id_map, image_size)
    for segment_id in ids:
        mask = torch.from_numpy(resized == segment_id).float()
        mask = F.pad(mask, (0, padded_size[1] - image_size[1], 0, padded_size[0] - image_size[0]))
        masks.append(F.adaptive_avg_pool2d(mask[None], grid)[0])
    return torch.stack(masks)


def inside(covered: Tensor) -> Tensor:
    """(n, h, w) coverage -> bool: cells covered by half, or of a segment without one those that it covers most."""
    most = covered.flatten(1).max(1).values[:, None, None]
    return (covered >= most.clamp(max=0.5)) & (covered > 0)


def best_queries(own_masks: Tensor, truth: Tensor) -> Tensor:
    """(Q, h, w) and (n, h, w) bool -> (n,) int64: the query whose mask overlaps each true one most, by IoU."""
    own, truth = own_masks.flatten(1).float(), truth.flatten(1).float()
    common = truth @ own.T
    return (common / (truth.sum(1)[:, None] + own.sum(1)[None] - common).clamp(min=1)).argmax(1)


def _nearest(id_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> size, the value at the centre of each pixel."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, id_map.shape))
    return id_map[rows[:, None], columns[None]]
