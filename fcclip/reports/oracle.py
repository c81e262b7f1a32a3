"""What would be if a part of the model were perfect: its masks, its classes, or what it takes for nothing.

`masks`: every ground-truth segment is classified as the model classifies its own masks. The frozen CLIP pools its
features inside the true mask; the decoder's opinion is that of the query whose mask overlaps it most. What remains
wrong is classification.

`classes`: every predicted segment gets the class of the ground-truth segment that it overlaps most, if their
intersection over union is more than 0.5; else it keeps its own. Segments are those of the panoptic map, or in a
semantic map the pixels of one class. What remains wrong is segmentation.

`void`: the predicted mask that overlaps a ground-truth segment most, by an intersection over union of more than 0.5, is
something, and every other mask is void. What remains wrong are masks and names.

All give panoptic and semantic maps; instances have no oracle. `EveryOracle` gives those of all from one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.data import Dataset
from fcclip.data.segmentations import distinct_values
from fcclip.evaluation.ground_truth import GroundTruth
from fcclip.evaluation.histograms import as_array, compact, joint_histogram
from fcclip.modeling import FCCLIP, Ensemble, ScoredMasks
from fcclip.vocabulary import Vocabulary

MIN_IOU = 0.5


class _Oracle:
    """What predicts in the place of a model: has `score` and `outputs` like it.

    Args:
        model: is used, not copied.
        ground_truth_of: image id -> ground truth.
        dataset: says which label is ignored.
    """

    def __init__(self, model: Any, ground_truth_of: Callable[[int | str], GroundTruth], dataset: Dataset) -> None:
        self.source, self.ground_truth_of = model, ground_truth_of
        self.ignore_label = dataset.metadata.get("ignore_label", 255)

    def segments(self, ground_truth: GroundTruth) -> tuple[np.ndarray, list[int]]:
        """(h, w) int ids and those of the segments to classify: of the panoptic annotation, crowds too, or of each
        class."""
        if "segments_info" in ground_truth.record:
            present = distinct_values(ground_truth.id_map)
            return ground_truth.id_map, [segment["id"] for segment in ground_truth.segments if segment["id"] in present]
        labels = ground_truth.labels
        return labels, [value for value in distinct_values(labels) if value != self.ignore_label]


# ---- true classes ----


class TrueClassModel(_Oracle):
    """A model whose segments have their true classes."""

    name = "classes"

    def score(self, inputs: Sequence[Mapping], vocabulary: Vocabulary) -> list[tuple[GroundTruth, Vocabulary, Any]]:
        """Ground truth, classes and what the model says, of each image."""
        return [
            (self.ground_truth_of(sample["image_id"]), vocabulary, scored)
            for sample, scored in zip(inputs, self.source.score(inputs, vocabulary))
        ]

    def outputs(self, scored: tuple[GroundTruth, Vocabulary, Any], **options: Any) -> dict[str, Any]:
        """As the model's, with true classes."""
        ground_truth, vocabulary, own = scored
        outputs = self.source.outputs(own, **options)
        if "panoptic_seg" in outputs:
            outputs["panoptic_seg"] = true_panoptic(
                *outputs["panoptic_seg"],
                ground_truth.id_map,
                ground_truth.segments,
                thing_classes=vocabulary.thing_classes,
            )
        if "sem_seg" in outputs:
            outputs["sem_seg"] = true_labels(outputs["sem_seg"], ground_truth.labels, ignore_label=self.ignore_label)
        return outputs


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
    class_of = {segment["id"]: segment["category_id"] for segment in truth}
    best = _best_matches(truth_map, ids, first=class_of.keys())
    corrected = []
    for segment in segments:
        match = best.get(segment["id"])
        index = segment["category_id"] if match is None else class_of[match]
        corrected.append({**segment, "category_id": index, "isthing": index in thing_classes})
    return ids, corrected


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


# ---- true masks ----


class ScoredSegments(NamedTuple):
    """The true segments of an image, scored."""

    id_map: np.ndarray  # (h, w) int
    ids: Sequence[int]  # of the n segments to classify
    scored: ScoredMasks | None  # their masks with both opinions; None where there is no segment
    vocabulary: Vocabulary


class TrueMaskModel(_Oracle):
    """A model that classifies true masks instead of its own."""

    name = "masks"

    @torch.no_grad()
    def score(self, inputs: Sequence[Mapping], vocabulary: Vocabulary) -> list[ScoredSegments]:
        """As the model's, with true masks."""
        return [
            self._score(self.ground_truth_of(sample["image_id"]), own)
            for sample, own in zip(inputs, self.source.score(inputs, vocabulary))
        ]

    def _score(self, ground_truth: GroundTruth, own: ScoredMasks) -> ScoredSegments:
        id_map, ids = self.segments(ground_truth)
        scored = None
        if ids:
            masks, device = own.masks, own.dense.device
            sizes = masks.image_size, masks.padded_size
            at_masks = coverage(id_map, ids, *sizes, tuple(masks.mask_logits.shape[-2:])).to(device)
            at_grid = coverage(id_map, ids, *sizes, self.source.mask_grid(own)).to(device)
            queries = best_queries(masks.mask_logits > 0, inside(at_masks))
            scored = self.source.score_masks(own, queries, torch.where(inside(at_grid), 20.0, -20.0))
        return ScoredSegments(id_map, ids, scored, own.vocabulary)

    @torch.no_grad()
    def outputs(
        self,
        scored: ScoredSegments,
        *,
        heads: Sequence[str],
        ensemble: Ensemble | tuple[float, float] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Panoptic map and labels; pixels without a true segment have class K. Other options of the model's `outputs`
        do not concern it."""
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


def best_queries(own_masks: Tensor, truth: Tensor, *, min_iou: float = -1.0) -> Tensor:
    """(Q, h, w) and (n, h, w) bool -> (n,) int64: the query whose mask overlaps each true one most, by IoU; those above
    `min_iou` alone."""
    own, truth = own_masks.flatten(1).float(), truth.flatten(1).float()
    common = truth @ own.T
    iou, queries = (common / (truth.sum(1)[:, None] + own.sum(1)[None] - common).clamp(min=1)).max(1)
    return queries[iou > min_iou]


def _nearest(id_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) -> size, the value at the centre of each pixel."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, id_map.shape))
    return id_map[rows[:, None], columns[None]]


# ---- true void ----


class TrueVoidModel(_Oracle):
    """A model that knows which of its masks are void."""

    name = "void"

    @torch.no_grad()
    def score(self, inputs: Sequence[Mapping], vocabulary: Vocabulary) -> list[ScoredMasks]:
        """As the model's; void is sure or impossible."""
        records = []
        for sample, own in zip(inputs, self.source.score(inputs, vocabulary)):
            id_map, ids = self.segments(self.ground_truth_of(sample["image_id"]))
            in_logits, masks = own.in_logits.clone(), own.masks
            in_logits[:, -1] = 1e4
            if ids:
                sizes = masks.image_size, masks.padded_size, tuple(masks.mask_logits.shape[-2:])
                truth = inside(coverage(id_map, ids, *sizes)).to(masks.mask_logits.device)
                in_logits[best_queries(masks.mask_logits > 0, truth, min_iou=MIN_IOU), -1] = -1e4
            records.append(replace(own, in_logits=in_logits))
        return records

    def outputs(self, scored: ScoredMasks, **options: Any) -> dict[str, Any]:
        """As the model's."""
        return self.source.outputs(scored, **options)


ORACLES = {oracle.name: oracle for oracle in (TrueMaskModel, TrueClassModel, TrueVoidModel)}


# ---- all of them ----


class EveryOracle:
    """All oracles beside the model from one pass; the ensemble of a mode is a pair (name of the oracle, ensemble).

    Args:
        model: is used, not copied.
        ground_truth_of, dataset: as for the oracles.
    """

    name = "every"

    def __init__(self, model: FCCLIP, ground_truth_of: Callable[[int | str], GroundTruth], dataset: Dataset) -> None:
        once = _Once(model)
        oracles = {name: oracle(once, ground_truth_of, dataset) for name, oracle in ORACLES.items()}
        self.parts = {"": once, **oracles}

    def score(self, inputs: Sequence[Mapping], vocabulary: Vocabulary) -> list[dict[str, Any]]:
        """Name of the oracle -> what it scored, an image each."""
        scored = {name: part.score(inputs, vocabulary) for name, part in self.parts.items()}
        return [dict(zip(scored, records)) for records in zip(*scored.values())]

    def outputs(self, scored: Mapping[str, Any], *, ensemble: tuple[str, Ensemble], **options: Any) -> dict[str, Any]:
        """Those of one oracle."""
        name, own = ensemble
        return self.parts[name].outputs(scored[name], ensemble=own, **options)


class _Once:
    """A model that scores the same samples once; everything else is the model's."""

    def __init__(self, model: FCCLIP) -> None:
        self.model, self._last = model, (None, None)

    def score(self, inputs: Sequence[Mapping], vocabulary: Vocabulary) -> list[ScoredMasks]:
        if self._last[0] is not inputs:
            self._last = inputs, self.model.score(inputs, vocabulary)
        return self._last[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def oracle_modes(modes: Mapping[str, Ensemble]) -> dict[str, tuple[str, Ensemble]]:
    """Rows of the table of `EveryOracle`: each classifier on predicted and on true masks; true classes, true void.

    Args:
        modes: of TEST.MODE; the first is the model's.
    """
    first = next(iter(modes.values()))
    return {
        **{f"predicted, {mode}": ("", ensemble) for mode, ensemble in modes.items()},
        "true void": ("void", first),
        "true classes": ("classes", first),
        **{f"true masks, {mode}": ("masks", ensemble) for mode, ensemble in modes.items()},
    }


def oracle_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Lines of text: PQ and what it is made of for each row, and how far it is from the first.

    Args:
        results: row -> task -> metric -> percent.
    """
    metrics = ("PQ", "SQ", "RQ", "PQ_seen", "PQ_unseen")
    task = "panoptic_seg" if "panoptic_seg" in next(iter(results.values())) else "sem_seg"
    metrics = metrics if task == "panoptic_seg" else ("mIoU", "mIoU_seen", "mIoU_unseen")
    width, first = max(map(len, results)), next(iter(results.values()))[task][metrics[0]]
    lines = [f"{'':{width}}" + "".join(f"{name:>13}" for name in (*metrics, "gain"))]
    for row, tasks in results.items():
        values = [tasks[task].get(name, math.nan) for name in metrics]
        lines.append(f"{row:{width}}" + "".join(f"{value:13.1f}" for value in (*values, values[0] - first)))
    return "\n".join(lines).replace("nan", "  -")
