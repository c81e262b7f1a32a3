"""Predictions without a model: saved ones, and those of other programs in COCO's formats or as label maps.

Whatever they come from, evaluators get what a model would have given: `panoptic_seg`, `sem_seg`, `instances`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pycocotools.mask
import torch

from fcclip.config import get_cfg
from fcclip.data import Dataset, read_id_map, read_label_map
from fcclip.data.segmentations import check_code
from fcclip.errors import InputError, MissingFileError
from fcclip.evaluation.ground_truth import Evaluator, GroundTruth, in_order
from fcclip.evaluation.predictions import SavedPredictions
from fcclip.evaluation.runner import build_evaluators, write_per_image
from fcclip.evaluation.semantic import SemanticEvaluator
from fcclip.evaluation.thread_pool import Background
from fcclip.structures import Instances

HEADS = {"panoptic_seg": "panoptic", "sem_seg": "semantic", "instances": "instance"}  # output -> switch of the config
LABEL_FILES = (".png", ".tif", ".tiff", ".bmp")
_SHOWN = 5


class Source(Protocol):
    """Predictions of one kind or several.

    Attributes:
        outputs: keys of `HEADS` that `read` gives.
        tasks: results that they are good for; None: all.
        image_ids: images that there are predictions for.
    """

    outputs: tuple[str, ...]
    tasks: tuple[str, ...] | None

    @property
    def image_ids(self) -> Collection[Hashable]: ...

    def read(self, image_id: Hashable) -> dict[str, Any]: ...


class SavedSource:
    """What an evaluation saved; see `SavedPredictions`.

    Raises:
        FileNotFoundError, ValueError: there is nothing, or it belongs to another data set.
    """

    tasks = None

    def __init__(self, folder: str | os.PathLike, *, dataset: Dataset) -> None:
        self.saved = SavedPredictions(folder)
        there = self.saved.header["data_set"]
        if there != dataset.name:
            raise InputError(f"the predictions in '{folder}' are of data set '{there}', not of '{dataset.name}'")
        switches = {
            "panoptic_seg": "MODEL.MASK_FORMER.TEST.PANOPTIC_ON",
            "sem_seg": "MODEL.MASK_FORMER.TEST.SEMANTIC_ON",
            "instances": "MODEL.MASK_FORMER.TEST.INSTANCE_ON",
        }
        kind = dataset.evaluators
        self.outputs = tuple(
            output for output, key in switches.items() if self.saved.header["config"][key] and HEADS[output] in kind
        )

    @property
    def image_ids(self) -> Collection[Hashable]:
        return self.saved.image_ids

    def read(self, image_id: Hashable) -> dict[str, Any]:
        return self.saved.read(image_id)


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

    outputs, tasks = ("panoptic_seg",), None

    def __init__(self, path: str | os.PathLike, folder: str | os.PathLike | None = None, *, dataset: Dataset) -> None:
        self.path = Path(path)
        self.folder = self.path.with_suffix("") if folder is None else Path(folder)
        metadata = dataset.metadata
        class_of = {
            **metadata.get("stuff_dataset_id_to_contiguous_id", {}),
            **metadata.get("thing_dataset_id_to_contiguous_id", {}),
        }
        things = set(metadata.get("thing_dataset_id_to_contiguous_id", {}).values())
        self._annotations: dict[Hashable, dict] = {}
        content = read_json(path, "panoptic file")
        if not isinstance(content, Mapping) or not isinstance(content.get("annotations"), list):
            raise InputError(f"{path} has no 'annotations'; expected the COCO panoptic format")
        for number, annotation in enumerate(content["annotations"]):
            lacking = [key for key in ("image_id", "file_name", "segments_info") if key not in annotation]
            if lacking:
                raise InputError(
                    f"{path}: annotation {number} has no '{lacking[0]}'; expected the COCO panoptic format"
                )
            image_id = annotation["image_id"]
            if image_id in self._annotations:
                raise InputError(f"{path}: image {image_id!r} has two predictions; expected one for each image")
            segments = []
            for segment in annotation["segments_info"]:
                index = _class_of(segment, class_of, f"{path}: image {image_id!r}", dataset.name)
                if "id" not in segment:
                    raise InputError(f"{path}: image {image_id!r}: a segment has no 'id'")
                segments.append({**segment, "category_id": index, "isthing": index in things})
            self._annotations[image_id] = annotation | {"segments_info": segments}

    @property
    def image_ids(self) -> Collection[Hashable]:
        return self._annotations.keys()

    def read(self, image_id: Hashable) -> dict[str, Any]:
        annotation = self._annotations[image_id]
        path = self.folder / annotation["file_name"]
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file, though {self.path} lists it for image {image_id!r}")
        return {"panoptic_seg": (read_id_map(path), annotation["segments_info"])}


class ResultsSource:
    """COCO results format: a list with a row for each instance, masks (`segmentation`) or boxes alone (`bbox`).

    Args:
        path: the JSON; categories are the data set's own ids.
        dataset: that the predictions are for.
        records: its records, whose sizes the masks must have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not in the format, a category that is no thing class of the data set, a score that is no number.
    """

    outputs = ("instances",)

    def __init__(self, path: str | os.PathLike, *, dataset: Dataset, records: Sequence[Mapping]) -> None:
        self.path = Path(path)
        rows = read_json(path, "COCO results file")
        if not isinstance(rows, list):
            raise InputError(f"{path} is no list of instances; expected the COCO results format")
        class_of = dataset.metadata.get("thing_dataset_id_to_contiguous_id", {})
        self._sizes = {record["image_id"]: (record["height"], record["width"]) for record in records}
        self._rows: dict[Hashable, list[dict]] = {}
        with_masks = bool(rows) and isinstance(rows[0], Mapping) and "segmentation" in rows[0]
        self.tasks = None if with_masks else ("bbox",)
        wanted = ("image_id", "category_id", "score", "segmentation" if with_masks else "bbox")
        for number, row in enumerate(rows):
            lacking = [key for key in wanted if not isinstance(row, Mapping) or key not in row]
            if lacking:
                raise InputError(f"{path}: row {number} has no '{lacking[0]}'; expected the COCO results format")
            where = f"{path}: row {number} (image {row['image_id']!r})"
            if not isinstance(row["score"], (int, float)) or not math.isfinite(row["score"]):
                raise InputError(f"{where} has the score {row['score']!r}; expected a finite number")
            index = _class_of(row, class_of, where, dataset.name)
            self._rows.setdefault(row["image_id"], []).append(dict(row) | {"class": index, "number": number})

    @property
    def image_ids(self) -> Collection[Hashable]:
        return self._rows.keys()

    def read(self, image_id: Hashable) -> dict[str, Any]:
        rows, (height, width) = self._rows[image_id], self._sizes[image_id]
        masks, boxes = np.zeros((len(rows), height, width), bool), []
        for mask, row in zip(masks, rows):
            if "segmentation" in row:
                code = self._code(row, height, width)
                mask[:] = pycocotools.mask.decode(code).astype(bool)
            left, top, wide, high = row["bbox"] if "bbox" in row else pycocotools.mask.toBbox(code).tolist()
            boxes.append([left, top, left + wide, top + high])
        instances = Instances(
            scores=torch.tensor([row["score"] for row in rows], dtype=torch.float64),
            pred_classes=torch.tensor([row["class"] for row in rows], dtype=torch.int64),
            pred_masks=torch.from_numpy(masks),
            pred_boxes=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        )
        return {"instances": instances}

    def _code(self, row: Mapping, height: int, width: int) -> dict:
        segmentation, where = row["segmentation"], f"{self.path}: row {row['number']} (image {row['image_id']!r})"
        try:
            if isinstance(segmentation, list):
                return pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, height, width))
            size, counts = list(segmentation["size"]), segmentation["counts"]
            if isinstance(counts, list):
                segmentation = pycocotools.mask.frPyObjects(segmentation, *size)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"{where}: its segmentation cannot be read: {error!r}") from error
        if size != [height, width]:
            raise InputError(f"{where}: its mask is {size} (height, width), the image is {[height, width]}")
        try:
            check_code(segmentation)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}") from error
        return segmentation


class LabelSource:
    """A folder of label maps, one an image, named like the image (its image id or its label map will do too).

    Args:
        folder: is searched with everything below it.
        dataset: that the predictions are for.
        records: its records.
        offset: value of class 0.
        ignore: value of pixels without a class; None: there are none.
        own_ids: the values are the data set's own ids (Cityscapes' label ids), not 0..K-1.
        suffix: what file names have after the name of the image, such as `_pred`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: files of unknown images, or two for one image.
    """

    outputs, tasks = ("sem_seg",), None

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        dataset: Dataset,
        records: Sequence[Mapping],
        offset: int = 0,
        ignore: int | None = None,
        own_ids: bool = False,
        suffix: str = "",
    ) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise MissingFileError(f"folder '{folder}' does not exist; expected a label map for each image in it")
        self.num_classes, self.name = len(dataset.metadata["stuff_classes"]), dataset.name
        ids = dataset.metadata.get("stuff_dataset_id_to_contiguous_id") if own_ids else None
        if own_ids and not ids:
            raise InputError(f"data set '{dataset.name}' has no class ids of its own; its classes are 0..K-1")
        self.class_of = ids or {offset + index: index for index in range(self.num_classes)}
        self.ignore = ignore
        self._files: dict[Hashable, Path] = {}
        known = _ids_by_name(records)
        unknown = []
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in LABEL_FILES):
            image_id = known.get(path.stem.removesuffix(suffix))
            if image_id is None:
                unknown.append(str(path.relative_to(folder)))
            elif image_id in self._files:
                raise InputError(f"two label maps for image {image_id!r}: {self._files[image_id]} and {path}")
            else:
                self._files[image_id] = path
        if unknown:
            raise InputError(
                f"{folder}: {len(unknown)} files belong to no image of '{dataset.name}': {_some(unknown)}; expected "
                f"names like {_some(list(known)[:2])}{f' + {suffix}' if suffix else ''}"
            )

    @property
    def image_ids(self) -> Collection[Hashable]:
        return self._files.keys()

    def read(self, image_id: Hashable) -> dict[str, Any]:
        path = self._files[image_id]
        values, position = np.unique(read_label_map(path), return_inverse=True)
        classes = [
            self.num_classes if value == self.ignore else self.class_of.get(value, -1) for value in values.tolist()
        ]
        if -1 in classes:
            strange = [value for value, index in zip(values.tolist(), classes) if index == -1]
            expected = f"{min(self.class_of)}..{max(self.class_of)}"
            raise InputError(
                f"{path}: the values {_some(strange)} are no class of '{self.name}' ({self.num_classes} classes, "
                f"{expected}). --label-offset says which value class 0 has, --label-ignore which one means no class."
            )
        return {"sem_seg": np.array(classes, np.int32)[position].reshape(position.shape)}


def evaluate_predictions(
    dataset: Dataset,
    sources: Sequence[Source],
    *,
    missing: str = "error",
    seen: Sequence[bool] | None = None,
    output_dir: str | os.PathLike | None = None,
    max_images: int | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates predictions as the runner evaluates a model.

    Args:
        dataset: its ground truth.
        sources: predictions, each for other outputs.
        missing: "error", or "empty": images without a prediction count as if nothing was found in them.
        seen: (K,) whether training knew the class; None when unknown.
        output_dir: files go to its folder named like the data set; None: no files.
        max_images: only the first images of the data set; None: all.

    Returns:
        task -> metric -> value in percent, NaN where undefined.

    Raises:
        ValueError: predictions for unknown images, missing ones, two sources for one output, an output that the data
            set is not evaluated for, and what the evaluators refuse.
    """
    if missing not in ("error", "empty"):
        raise InputError(f"missing must be 'error' or 'empty', got {missing!r}")
    records = dataset.records()
    if not records[:max_images]:
        raise InputError(f"data set '{dataset.name}' has no images to evaluate (max_images: {max_images})")
    by_id = {record["image_id"]: record for record in records}
    outputs = [output for source in sources for output in source.outputs]
    twice = sorted({output for output in outputs if outputs.count(output) > 1})
    if twice or not outputs:
        what = f"two sources give '{twice[0]}'; leave one out" if twice else "there are no predictions to evaluate"
        raise InputError(f"data set '{dataset.name}': {what}")
    kind = dataset.evaluators
    useless = [output for output in outputs if HEADS[output] not in kind]
    if useless:
        raise InputError(
            f"data set '{dataset.name}' ({dataset.metadata['evaluator_type']}) is evaluated for {', '.join(kind)}; it "
            f"has no ground truth for {', '.join(HEADS[one] for one in useless)} predictions"
        )
    for source in sources:
        _check_images(source, by_id, dataset.name, missing, records[:max_images])
    cfg = get_cfg()
    for output, head in HEADS.items():
        cfg.MODEL.MASK_FORMER.TEST[f"{head.upper()}_ON"] = output in outputs
    folder = None if output_dir is None else Path(output_dir) / dataset.name
    (evaluators,) = build_evaluators(cfg, dataset, modes=["predictions"], seen=seen, folder=folder).values()
    for evaluator in evaluators:
        if isinstance(evaluator, SemanticEvaluator):
            evaluator.gaps = True
    ignore_label = dataset.metadata.get("ignore_label", 255)
    with Background({"": evaluators}) as background:
        for record in records[:max_images]:
            output: dict[str, Any] = {}
            for source in sources:
                there = record["image_id"] in source.image_ids
                output |= source.read(record["image_id"]) if there else nothing_found(record, source, dataset)
            background.process(GroundTruth(record, ignore_label), {"": output})
    return _results(evaluators, sources, folder)


def nothing_found(record: Mapping, source: Source, dataset: Dataset) -> dict[str, Any]:
    """What a model gives that finds nothing in an image."""
    size = (record["height"], record["width"])
    none = Instances(
        scores=torch.zeros(0),
        pred_classes=torch.zeros(0, dtype=torch.int64),
        pred_masks=torch.zeros(0, *size, dtype=torch.bool),
        pred_boxes=torch.zeros(0, 4),
    )
    empty = {
        "panoptic_seg": (np.zeros(size, np.int32), []),
        "sem_seg": np.full(size, len(dataset.metadata["stuff_classes"]), np.int32),
        "instances": none,
    }
    return {output: empty[output] for output in source.outputs}


def read_json(path: str | os.PathLike, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"{what} '{path}' does not exist") from None
    except ValueError as error:
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(
            f"{what} '{path}' is broken JSON{where} ({error}); was it cut off while it was written?"
        ) from None


def _results(
    evaluators: Iterable[Evaluator], sources: Sequence[Source], folder: Path | None
) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    evaluators = list(evaluators)
    for evaluator in evaluators:
        results |= evaluator.results()
        evaluator.save()
    if folder is not None:
        write_per_image(folder, evaluators)
    for source in sources:
        if source.tasks is not None and "instances" in source.outputs:
            results = {task: found for task, found in results.items() if task != "segm" or task in source.tasks}
    return results


def _check_images(
    source: Source, by_id: Mapping[Hashable, Mapping], name: str, missing: str, wanted: Sequence[Mapping]
) -> None:
    unknown = in_order({one: None for one in source.image_ids if one not in by_id})
    if unknown:
        known = next(iter(by_id))
        hint = ""
        if type(unknown[0]) is not type(known):
            hint = f" Its ids are like {known!r}: the string '7' is not the number 7."
        raise InputError(
            f"{len(unknown)} predictions are for images that '{name}' does not have: image_id {_some(unknown)}.{hint}"
        )
    lacking = [one["image_id"] for one in wanted if one["image_id"] not in source.image_ids]
    if lacking and missing == "error":
        raise InputError(
            f"{len(lacking)} of {len(wanted)} images of '{name}' have no {' or '.join(source.outputs)} prediction: "
            f"image_id {_some(lacking)}. --missing empty counts them as images in which nothing was found."
        )


def _class_of(entry: Mapping, class_of: Mapping[int, int], where: str, name: str) -> int:
    try:
        return class_of[entry["category_id"]]
    except (KeyError, TypeError):
        known = sorted(class_of)
        ids = f"{len(known)} ids, {known[0]}..{known[-1]}" if known else "it has none"
        raise InputError(f"{where}: category {entry.get('category_id')!r} is not one of '{name}' ({ids})") from None


def _ids_by_name(records: Sequence[Mapping]) -> dict[str, Hashable]:
    """Names that an image's label map may have -> image id."""
    known: dict[str, Hashable] = {}
    for key in ("file_name", "sem_seg_file_name", "pan_seg_file_name", "image_id"):
        for record in records:
            if record.get(key) is not None:
                known.setdefault(
                    Path(str(record[key])).stem if key != "image_id" else str(record[key]), record["image_id"]
                )
    return known


def _some(items: Iterable) -> str:
    items = list(items)
    return ", ".join(map(repr, items[:_SHOWN])) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
