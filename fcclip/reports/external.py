"""Predictions without a model: saved ones, and those of other programs in COCO's formats or as label maps.

Whatever they come from, evaluators get what a model would have given: `panoptic_seg`, `sem_seg`, `instances`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fcclip.config import get_cfg
from fcclip.data import Dataset, read_id_map, read_label_map
from fcclip.data.segmentations import read_run_lengths
from fcclip.errors import InputError, MissingFileError
from fcclip.evaluation.evaluators import build_evaluators
from fcclip.evaluation.ground_truth import GroundTruth, in_order
from fcclip.evaluation.panoptic import read_panoptic_file
from fcclip.evaluation.predictions import SavedPredictions
from fcclip.evaluation.runner import write_per_image
from fcclip.evaluation.thread_pool import EvaluationThreads
from fcclip.files import listed, read_json, visible_files
from fcclip.structures import Instances, boxes_of_masks

HEADS = {"panoptic_seg": "panoptic", "sem_seg": "semantic", "instances": "instance"}  # output -> switch of the config
LABEL_FILES = (".png", ".tif", ".tiff", ".bmp")


class Source(Protocol):
    """Predictions for the images of a data set.

    Attributes:
        outputs: keys of `HEADS` that `read` gives.
        image_ids: images that there are predictions for.
    """

    outputs: tuple[str, ...]
    image_ids: Collection[Hashable]

    def read(self, image_id: Hashable) -> dict[str, Any]: ...


class SavedSource:
    """What an evaluation saved; see `SavedPredictions`.

    Raises:
        FileNotFoundError, ValueError: there is nothing, or it belongs to another data set.
    """

    def __init__(self, folder: str | os.PathLike, *, dataset: Dataset) -> None:
        saved = SavedPredictions(folder)
        name, settings = saved.header["data_set"], saved.header["config"]
        if name != dataset.name:
            raise InputError(f"the predictions in '{folder}' are of data set '{name}', not of '{dataset.name}'")
        switches = {output: f"MODEL.MASK_FORMER.TEST.{head.upper()}_ON" for output, head in HEADS.items()}
        self.outputs = tuple(
            output for output, head in HEADS.items() if head in dataset.evaluators and settings[switches[output]]
        )
        self.image_ids, self.read = saved.image_ids, saved.read


class PanopticSource:
    """COCO panoptic format: a JSON with `annotations`, and a PNG of segment ids for each.

    Args:
        path: the JSON; categories are the data set's own ids.
        folder: of the PNGs; None: the path without `.json`.
        dataset: that the predictions are for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not in the format, two predictions for an image, or a category that the data set does not have.
    """

    outputs = ("panoptic_seg",)

    def __init__(self, path: str | os.PathLike, folder: str | os.PathLike | None = None, *, dataset: Dataset) -> None:
        content, folder = read_panoptic_file(path, folder)
        metadata = dataset.metadata
        things = metadata.get("thing_dataset_id_to_contiguous_id", {})
        class_of = metadata.get("stuff_dataset_id_to_contiguous_id", {})  # of every class
        self._segments: dict[Hashable, list[dict]] = {}
        self.image_ids = self._segments.keys()
        self._files: dict[Hashable, Path] = {}
        for annotation in content["annotations"]:
            image_id = annotation["image_id"]
            where = f"{path}: image {image_id!r}"
            if image_id in self._segments:
                raise InputError(f"{where} has two predictions; expected one for each image")
            self._segments[image_id] = segments = []
            self._files[image_id] = folder / annotation["file_name"]
            for segment in annotation["segments_info"]:
                index = _class_of(segment, class_of, where, dataset.name)
                if "id" not in segment:
                    raise InputError(f"{where}: a segment has no 'id'")
                segments.append({**segment, "category_id": index, "isthing": index in things.values()})

    def read(self, image_id: Hashable) -> dict[str, Any]:
        path = self._files[image_id]
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file, though it is listed for image {image_id!r}")
        return {"panoptic_seg": (read_id_map(path), self._segments[image_id])}


class ResultsSource:
    """COCO results format: a list with a row for each instance, whose `segmentation` is a run-length code.

    Without a `bbox` an instance has that of its mask. An image without a row is one in which nothing was found.

    Args:
        path: the JSON; categories are the data set's own ids.
        dataset: that the predictions are for.
        records: its records, whose sizes the masks must have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not in the format, a category that is not a thing class of the data set, a score that is not a
            number.
    """

    outputs = ("instances",)

    def __init__(self, path: str | os.PathLike, *, dataset: Dataset, records: Sequence[Mapping]) -> None:
        rows = read_json(path, what="COCO results file")
        if not isinstance(rows, list):
            raise InputError(f"{path} is not a list of instances; expected the COCO results format")
        class_of = dataset.metadata.get("thing_dataset_id_to_contiguous_id", {})
        self._sizes = {record["image_id"]: (record["height"], record["width"]) for record in records}
        self._rows: dict[Hashable, list[dict]] = {image_id: [] for image_id in self._sizes}
        self.image_ids = self._rows.keys()
        for number, row in enumerate(rows):
            for key in ("image_id", "category_id", "score", "segmentation"):
                if not isinstance(row, Mapping) or key not in row:
                    raise InputError(f"{path}: row {number} has no '{key}'; expected the COCO results format")
            where = f"{path}: row {number} (image {row['image_id']!r})"
            if not isinstance(row["score"], (int, float)) or not math.isfinite(row["score"]):
                raise InputError(f"{where} has the score {row['score']!r}; expected a finite number")
            index = _class_of(row, class_of, where, dataset.name)
            self._rows.setdefault(row["image_id"], []).append({**row, "class": index, "where": where})

    def read(self, image_id: Hashable) -> dict[str, Any]:
        rows, size = self._rows[image_id], self._sizes[image_id]
        masks = np.zeros((len(rows), *size), bool)
        for mask, row in zip(masks, rows):
            try:
                mask[:] = read_run_lengths([row["segmentation"]], size)[0]
            except (TypeError, ValueError) as error:
                raise InputError(f"{row['where']}: its segmentation cannot be read: {error}") from error
        pred_masks = torch.from_numpy(masks)
        boxes = boxes_of_masks(pred_masks).double()
        for box, row in zip(boxes, rows):
            if "bbox" in row:
                left, top, width, height = row["bbox"]
                box[:] = torch.tensor([left, top, left + width, top + height], dtype=torch.float64)
        instances = Instances(
            scores=torch.tensor([row["score"] for row in rows], dtype=torch.float64),
            pred_classes=torch.tensor([row["class"] for row in rows], dtype=torch.int64),
            pred_masks=pred_masks,
            pred_boxes=boxes,
        )
        return {"instances": instances}


class LabelSource:
    """A folder of label maps, one an image, named like the image or its image id.

    Pixels with the data set's ignore label have no class.

    Args:
        folder: is searched with everything below it.
        dataset: that the predictions are for.
        records: its records.
        own_ids: the values are the data set's own ids (Cityscapes' label ids), not 0..K-1.
        suffix: what file names have after the name of the image, such as `_pred`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: files of unknown images, or two for one image.
    """

    outputs = ("sem_seg",)

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        dataset: Dataset,
        records: Sequence[Mapping],
        own_ids: bool = False,
        suffix: str = "",
    ) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise MissingFileError(f"folder '{folder}' does not exist; expected a label map for each image in it")
        self.name, num_classes = dataset.name, len(dataset.metadata["stuff_classes"])
        ids = dataset.metadata.get("stuff_dataset_id_to_contiguous_id") if own_ids else None
        if own_ids and not ids:
            raise InputError(f"data set '{dataset.name}' has no class ids of its own; its classes are 0..K-1")
        classes = ids or {index: index for index in range(num_classes)}
        ignore_label = dataset.metadata.get("ignore_label", 255)
        self.class_of = {ignore_label: num_classes, **classes}
        self.expected = f"{num_classes} classes, {min(classes)}..{max(classes)}; {ignore_label} means no class"
        self._files: dict[Hashable, Path] = {}
        self.image_ids = self._files.keys()
        names = {Path(record["file_name"]).stem: record["image_id"] for record in records}
        known = {str(record["image_id"]): record["image_id"] for record in records} | names
        unknown = []
        for path in visible_files(folder, LABEL_FILES):
            image_id = known.get(path.stem.removesuffix(suffix))
            if image_id is None:
                unknown.append(str(path.relative_to(folder)))
            elif image_id in self._files:
                raise InputError(f"two label maps for image {image_id!r}: {self._files[image_id]} and {path}")
            else:
                self._files[image_id] = path
        if unknown:
            raise InputError(
                f"{folder}: {len(unknown)} files belong to no image of '{dataset.name}': {listed(unknown)}; expected "
                f"names like {', '.join(list(names)[:2])}{f' + {suffix}' if suffix else ''}"
            )

    def read(self, image_id: Hashable) -> dict[str, Any]:
        path = self._files[image_id]
        values, position = np.unique(read_label_map(path), return_inverse=True)
        strange = [value for value in values.tolist() if value not in self.class_of]
        if strange:
            raise InputError(
                f"{path}: the values {listed(strange)} are not classes of '{self.name}' ({self.expected}). "
                "--label-ids says whether the values are the data set's own ids."
            )
        classes = np.array([self.class_of[value] for value in values.tolist()], np.int32)
        return {"sem_seg": classes[position].reshape(position.shape)}


def evaluate_predictions(
    dataset: Dataset,
    sources: Sequence[Source],
    *,
    seen: Sequence[bool] | None = None,
    output_dir: str | os.PathLike | None = None,
    max_images: int | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates predictions as the runner evaluates a model.

    Args:
        dataset: its ground truth.
        sources: predictions, each for other outputs.
        seen: (K,) whether training knew the class; None when unknown.
        output_dir: files go to its folder named like the data set; None: no files.
        max_images: only the first images of the data set; None: all.

    Returns:
        task -> metric -> value in percent, NaN where undefined.

    Raises:
        ValueError: predictions for unknown images, missing ones, two sources for one output, an output that the data
            set is not evaluated for, and what the evaluators refuse.
    """
    records = dataset.records()
    if not records[:max_images]:
        raise InputError(f"data set '{dataset.name}' has no images to evaluate (max_images: {max_images})")
    outputs = [output for source in sources for output in source.outputs]
    _check_outputs(outputs, dataset)
    for source in sources:
        _check_images(source, records, dataset.name, records[:max_images])
    cfg = get_cfg()
    for output, head in HEADS.items():
        cfg.MODEL.MASK_FORMER.TEST[f"{head.upper()}_ON"] = output in outputs
    folder = None if output_dir is None else Path(output_dir) / dataset.name
    (evaluators,) = build_evaluators(cfg, dataset, modes=["predictions"], seen=seen, folder=folder).values()
    ignore_label = dataset.metadata.get("ignore_label", 255)
    with EvaluationThreads({"": evaluators}) as threads:
        for record in records[:max_images]:
            output = {}
            for source in sources:
                output |= source.read(record["image_id"])
            threads.process(GroundTruth(record, ignore_label), {"": output})
    results: dict[str, dict[str, float]] = {}
    for evaluator in evaluators:
        results |= evaluator.results()
        evaluator.save()
    if folder is not None:
        write_per_image(folder, evaluators)
    return results


def _check_outputs(outputs: Sequence[str], dataset: Dataset) -> None:
    if not outputs:
        raise InputError(f"data set '{dataset.name}': there are no predictions to evaluate")
    for output in outputs:
        if outputs.count(output) > 1:
            raise InputError(f"data set '{dataset.name}': two sources give '{output}'; leave one out")
        if HEADS[output] not in dataset.evaluators:
            raise InputError(
                f"data set '{dataset.name}' is evaluated for {', '.join(dataset.evaluators)}; it has no ground truth "
                f"for {HEADS[output]} predictions"
            )


def _check_images(source: Source, records: Sequence[Mapping], name: str, needed: Sequence[Mapping]) -> None:
    """Refuses predictions for images that are not in `records`, and the lack of one for an image in `needed`."""
    unknown = in_order(set(source.image_ids) - {record["image_id"] for record in records})
    if unknown:
        example, hint = records[0]["image_id"], ""
        if type(unknown[0]) is not type(example):
            hint = f" Its ids are like {example!r}: the string '7' is not the number 7."
        raise InputError(
            f"{len(unknown)} predictions are for images that '{name}' does not have: image_id "
            f"{listed(map(repr, unknown))}.{hint}"
        )
    missing = [record["image_id"] for record in needed if record["image_id"] not in source.image_ids]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(needed)} images of '{name}' have no {' or '.join(source.outputs)} prediction: "
            f"image_id {listed(map(repr, missing))}"
        )


def _class_of(entry: Mapping, class_of: Mapping[int, int], where: str, name: str) -> int:
    try:
        return class_of[entry["category_id"]]
    except (KeyError, TypeError):
        known = sorted(class_of)
        ids = f"{len(known)} ids, {known[0]}..{known[-1]}" if known else "it has none"
        raise InputError(f"{where}: category {entry.get('category_id')!r} is not one of '{name}' ({ids})") from None
