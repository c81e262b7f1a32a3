"""Predictions on the disk: written image by image while a model runs, read back in its place.

A folder `predictions` holds what one mode found in one data set:

    header.json           what the predictions depend on: data set, mode, vocabulary, weights, config
    images.<rank>.jsonl   a line an image, appended when its files are complete
    <image>.png         segment ids, as in COCO panoptic files
    semantic/<image>.png  classes, 8 bit, or 16 where there are 256 or more

and `predictions.json` beside it lists the segments in COCO's format once everything is evaluated. Scores and boxes are
written with every digit, so evaluating the files gives the bits that evaluating the model gave.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask
import torch

from fcclip.comm import get_rank
from fcclip.config import affects, flatten, keys_that
from fcclip.data import Dataset
from fcclip.errors import InputError, MissingFileError
from fcclip.evaluation.ground_truth import Evaluator, GroundTruth, in_order
from fcclip.evaluation.histograms import as_array
from fcclip.evaluation.instances import encode_masks
from fcclip.files import listed, read_json, write_atomically, write_json
from fcclip.modeling.architecture import Ensemble
from fcclip.modeling.augmentation import AugmentedModel
from fcclip.structures import Instances
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_notes, weights_hash

FORMAT = 1
_HEADER = "header.json"
_LINES = "images.{}.jsonl"
_SEMANTIC = "semantic"


class _Line(NamedTuple):
    """Where the record of an image stands."""

    path: Path
    start: int
    length: int


class PredictionWriter(Evaluator):
    """Writes what a model predicts, image by image, so that a kill loses at most the last image.

    The files of an image are complete before its line is appended, in one piece. Each process has a file of lines of
    its own.

    Args:
        folder: the folder `predictions`; made when missing.
        dataset: what is evaluated.
        records: its images, which give the files their names.
    """

    def __init__(self, folder: Path, dataset: Dataset, records: Sequence[Mapping]) -> None:
        self.folder, self.dataset, self.names = folder, dataset, image_names(records)
        num_classes = len(dataset.metadata["stuff_classes"])
        self.label_type = np.uint8 if num_classes < 256 else np.uint16  # K stands for no class
        self.path = folder / _LINES.format(get_rank())
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self, ground_truth: GroundTruth, output: Mapping) -> bytes:
        name = self.names[ground_truth.image_id]
        record: dict[str, Any] = {"image_id": ground_truth.image_id, "name": name}
        if "panoptic_seg" in output:
            id_map, segments = output["panoptic_seg"]
            ids = np.ascontiguousarray(as_array(id_map), dtype="<i4")
            if ids.size and not 0 <= ids.min() <= ids.max() < 1 << 24:
                raise InputError(f"image {ground_truth.image_id!r}: predicted ids must be 0..{(1 << 24) - 1}")
            planes = ids.view(np.uint8).reshape(*ids.shape, 4)
            record["panoptic"] = self._write(f"{name}.png", np.ascontiguousarray(planes[..., 2::-1]))  # BGR
            record["segments_info"] = [dict(segment) for segment in segments]
        if "sem_seg" in output:
            labels = as_array(output["sem_seg"]).astype(self.label_type)
            record["semantic"] = self._write(f"{_SEMANTIC}/{name}.png", labels)
        if "instances" in output:
            record |= _instances_record(output["instances"], ground_truth)
        return json.dumps(record, separators=(",", ":")).encode() + b"\n"

    def keep(self, image_id: int | str, measured: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(descriptor, measured)
            if written != len(measured):
                raise OSError(f"cannot write '{self.path}': {written} of {len(measured)} bytes; is the disk full?")
        finally:
            os.close(descriptor)

    def _write(self, name: str, pixels: np.ndarray) -> list[int]:
        """Writes a PNG; its size and check sum, which go into the line."""
        made, content = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_STRATEGY, 0])
        assert made
        content = content.tobytes()
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return [len(content), zlib.crc32(content)]

    def state(self) -> None:
        """Nothing: what was taken in stands on the disk."""

    def merge(self, state: None) -> None:
        pass

    def results(self) -> dict:
        return {}

    def save(self) -> None:
        """Writes `predictions.json`, which other programs read, where the ground truth is in COCO's panoptic format."""
        metadata, saved, annotations = self.dataset.metadata, SavedPredictions(self.folder), []
        index_of = metadata.get("stuff_dataset_id_to_contiguous_id", {})  # of every class
        dataset_ids = {index: identifier for identifier, index in index_of.items()}
        for image_id in in_order(saved.image_ids & self.names.keys()):
            record = saved.record(image_id)
            if "panoptic" not in record:
                continue
            segments = [
                {key: value for key, value in segment.items() if key != "isthing"}
                | {"category_id": dataset_ids[segment["category_id"]]}
                for segment in record["segments_info"]
            ]
            annotations.append({"image_id": image_id, "file_name": f"{record['name']}.png", "segments_info": segments})
        if annotations and metadata.get("panoptic_json"):
            ground_truth = read_json(metadata["panoptic_json"])
            del ground_truth["annotations"]
            write_json(self.folder.with_suffix(".json"), ground_truth | {"annotations": annotations})


class SavedPredictions:
    """The predictions in a folder, read image by image; a line that a kill cut off does not count.

    Args:
        folder: the folder `predictions`, or the one that it lies in.

    Raises:
        FileNotFoundError: there are no saved predictions.
        ValueError: they are broken in another place than the end.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        folder = Path(folder)
        if not (folder / _HEADER).is_file() and (folder / "predictions" / _HEADER).is_file():
            folder = folder / "predictions"
        self.folder = folder
        self.header = read_header(folder)
        self._lines = self._find_lines()

    def _find_lines(self) -> dict[Hashable, _Line]:
        return {
            _parsed(line, path, start)["image_id"]: _Line(path, start, len(line))
            for path in self._line_files()
            for start, line in _whole_lines(path)
        }

    def _line_files(self) -> list[Path]:
        return sorted(self.folder.glob(_LINES.format("*")))

    @property
    def image_ids(self) -> KeysView[Hashable]:
        """The images that are there."""
        return self._lines.keys()

    def record(self, image_id: Hashable) -> dict[str, Any]:
        """The line of an image."""
        path, start, length = self._lines[image_id]
        with path.open("rb") as file:
            file.seek(start)
            return _parsed(file.read(length), path, start)

    def is_complete(self, image_id: Hashable) -> bool:
        """Whether the image's PNGs have the size that its line says; their content is checked when they are read."""
        record = self.record(image_id)
        paths = {self._png(record, kind): record[kind][0] for kind in ("panoptic", "semantic") if kind in record}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def read(self, image_id: Hashable) -> dict[str, Any]:
        """What the model gave for an image, as evaluators take it.

        Raises:
            ValueError: a PNG is damaged.
        """
        record = self.record(image_id)
        output: dict[str, Any] = {}
        if "panoptic" in record:
            planes = cv2.cvtColor(_decoded(self._png(record, "panoptic"), *record["panoptic"]), cv2.COLOR_BGR2RGBA)
            output["panoptic_seg"] = planes.view("<i4")[..., 0] & 0xFFFFFF, record["segments_info"]
        if "semantic" in record:
            labels = _decoded(self._png(record, "semantic"), *record["semantic"])
            output["sem_seg"] = labels.astype(np.int32)
        if "masks" in record:
            output["instances"] = _instances(record)
        return output

    def keep_only(self, image_ids: Collection[Hashable]) -> None:
        """Takes every other line out of the files, those that were cut off too."""
        kept = {(line.path, line.start) for image_id, line in self._lines.items() if image_id in image_ids}
        for path in self._line_files():
            lines = [line for start, line in _whole_lines(path) if (path, start) in kept]
            if sum(map(len, lines)) != path.stat().st_size:
                write_atomically(path, lambda file, lines=lines: file.writelines(lines))
        self._lines = self._find_lines()

    def _png(self, record: Mapping, kind: str) -> Path:
        return self.folder / ("" if kind == "panoptic" else _SEMANTIC) / f"{record['name']}.png"


def begin_predictions(
    folders: Mapping[str, Path], headers: Mapping[str, Mapping], image_ids: Iterable[Hashable], *, resume: bool
) -> list[Hashable]:
    """Makes the folders ready to be written to, before any process does.

    Args:
        folders: mode -> its folder `predictions`.
        headers: mode -> what its predictions depend on.
        image_ids: of the images to be evaluated.
        resume: go on with the predictions that are there, if any; else they are removed.

    Returns:
        The images that are there in every mode, which need no model any more, in ascending order.

    Raises:
        ValueError: the predictions that are there depend on something else.
    """
    saved: dict[str, SavedPredictions] = {}
    for mode, folder in folders.items():
        if (folder / _HEADER).is_file() and resume:
            saved[mode] = SavedPredictions(folder)
            check_header(saved[mode].header, headers[mode], folder)
        elif (folder / _HEADER).is_file():
            shutil.rmtree(folder)
    present = [set(predictions.image_ids) for predictions in saved.values()] if len(saved) == len(folders) else [set()]
    complete = {
        image_id
        for image_id in set.intersection(*present)
        if all(predictions.is_complete(image_id) for predictions in saved.values())
    }
    for predictions in saved.values():
        predictions.keep_only(complete)
    for mode in folders.keys() - saved.keys():
        folders[mode].mkdir(parents=True, exist_ok=True)
        for stray in folders[mode].glob(_LINES.format("*")):  # lines without a header belong to nothing
            stray.unlink()
        write_json(folders[mode] / _HEADER, dict(headers[mode]), indent=1)
    return in_order(complete.intersection(image_ids))


def prediction_header(
    model: Any,
    cfg: Any,
    *,
    dataset: str,
    vocabulary: Vocabulary,
    mode: str,
    ensemble: Ensemble | tuple[float, float] | None,
    oracle: str | None = None,
) -> dict[str, Any]:
    """What predictions depend on, as JSON values.

    Args:
        model: its weights are hashed, those of the CLIP included.
        cfg: keys that decide what is predicted are kept.
        dataset: its name.
        vocabulary: the classes to look for.
        mode: its name.
        ensemble: of the classifiers; None: as the config says.
        oracle: its name; None: nothing is true instead of predicted.
    """
    module = model.model if isinstance(model, AugmentedModel) else model
    own = None if ensemble is None else Ensemble.of(ensemble)
    seen = getattr(module, "seen_vocabulary", None)  # decides where alpha counts, and where beta
    return {
        "format": FORMAT,
        "data_set": dataset,
        "mode": mode,
        "alpha_and_beta": None if own is None else [own.alpha, own.beta],
        "void_trust": str(own) if own is not None and own.trust else None,
        "oracle": oracle,
        "vocabulary": vocabulary.name,
        "vocabulary_sha256": vocabulary.hash,
        "seen_vocabulary_sha256": None if seen is None else seen.hash,
        "weights_sha256": weights_hash(module),
        "clip_weights": frozen_notes(module).get("clip", {}).get("weights"),
        "augmentation": _augmentation(model),
        "config": deciding_settings(cfg),
    }


def _augmentation(model: Any) -> dict[str, Any] | None:
    """Sizes and mirroring of test-time augmentation; None without it."""
    if not isinstance(model, AugmentedModel):
        return None
    variants = model.variants
    return {"min_sizes": list(variants.min_sizes), "max_size": variants.max_size, "flip": variants.flip}


def deciding_settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that decide what is predicted, sorted.

    Batch sizes, devices and engines are not among them: they change no more than rounding.
    """
    settings = flatten(cfg)
    return {key: settings[key] for key in sorted(keys_that("decides_predictions"))}


def read_header(folder: str | os.PathLike) -> dict[str, Any]:
    """What stands in `header.json`.

    Raises:
        FileNotFoundError, ValueError: it is missing or broken.
    """
    path = Path(folder) / _HEADER
    if not path.is_file():
        raise MissingFileError(
            f"'{folder}' holds no saved predictions: there is no {_HEADER}. Expected a folder that an evaluation "
            "wrote, <output>/<data set> or its folder predictions."
        )
    header = read_json(path)
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT:
        raise InputError(
            f"'{path}' has format {version!r}, this version of fcclip reads {FORMAT}; remove the folder and evaluate "
            "again"
        )
    return header


def check_header(stored: Mapping[str, Any], new: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Refuses to mix predictions. Config keys that decide nothing, which earlier versions stored too, may differ.

    Raises:
        ValueError: names what differs, and what to do.
    """
    stored, new = ({**header, **header.get("config", {})} for header in (stored, new))
    changes = [
        f"{key} was {_short(stored.get(key))}, now {_short(new.get(key))}"
        for key in dict.fromkeys([*new, *stored])
        if key != "config" and stored.get(key) != new.get(key) and affects(key) != "nothing"
    ]
    if changes:
        raise InputError(
            f"the predictions in '{folder}' were made with something else: {listed(changes, 6, separator='; ')}. "
            "Give the same as then to go on with them; else choose another output folder, or remove this one to begin "
            "anew."
        )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else repr(value)


def image_names(records: Sequence[Mapping]) -> dict[Hashable, str]:
    """Image id -> name of its files: that of the image without the extension, made distinct where several have it.

    Example:
        >>> image_names([{"image_id": 1, "file_name": "a/x.jpg"}, {"image_id": 2, "file_name": "b/x.png"}])
        {1: 'x.6b86b273ff34', 2: 'x.d4735e3a265e'}
    """
    counts = Counter(Path(record["file_name"]).stem.casefold() for record in records)
    names = {}
    for record in records:
        stem = Path(record["file_name"]).stem
        if counts[stem.casefold()] > 1:
            stem = f"{stem}.{hashlib.sha256(repr(record['image_id']).encode()).hexdigest()[:12]}"
        names[record["image_id"]] = stem
    return names


def _instances_record(instances: Instances, ground_truth: GroundTruth) -> dict[str, Any]:
    """Each mask once, and of each instance which of them it has."""
    codes = encode_masks(instances.pred_masks, ground_truth.once("encoded masks", dict))
    row_of: dict[str, int] = {}
    for code in codes:
        row_of.setdefault(code["counts"], len(row_of))
    boxes = instances.pred_boxes.detach().cpu().tolist()
    rows = [
        [row_of[code["counts"]], index, score, *box]
        for code, index, score, box in zip(
            codes, instances.pred_classes.tolist(), instances.scores.detach().cpu().tolist(), boxes, strict=True
        )
    ]
    return {"size": list(instances.pred_masks.shape[1:]), "masks": list(row_of), "instances": rows}


def _instances(record: Mapping) -> Instances:
    rows, (height, width) = record["instances"], record["size"]
    codes = [{"size": [height, width], "counts": counts.encode("ascii")} for counts in record["masks"]]
    masks = np.zeros((0, height, width), bool)
    if codes:
        masks = np.ascontiguousarray(pycocotools.mask.decode(codes).transpose(2, 0, 1)).view(bool)
    return Instances(
        scores=torch.tensor([row[2] for row in rows], dtype=torch.float64),
        pred_classes=torch.tensor([row[1] for row in rows], dtype=torch.int64),
        pred_masks=torch.from_numpy(masks)[torch.tensor([row[0] for row in rows], dtype=torch.int64)],
        pred_boxes=torch.tensor([row[3:] for row in rows], dtype=torch.float64).reshape(-1, 4),
    )


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(position, line) of the lines that end."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield start, line
            start += len(line)


def _parsed(line: bytes, path: Path, start: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        record["image_id"], record["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' is damaged at byte {start} ({error}). Remove that line: its image is then evaluated again."
        ) from error
    return record


def _decoded(path: Path, size: int, check_sum: int) -> np.ndarray:
    """Pixels of a PNG as they were written.

    Raises:
        ValueError: the file is missing or is not the one that was written.
    """
    content = path.read_bytes() if path.is_file() else b""
    if len(content) != size or zlib.crc32(content) != check_sum:
        what = "is missing" if not content else "is not the one that was written: its check sum differs"
        raise InputError(f"{path} {what}. Remove the file and go on with --resume, which makes it again.")
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)


def saved_modes(folder: str | os.PathLike) -> dict[str, Path]:
    """Mode -> the folder of its predictions, in the folder of a data set or of one mode.

    Raises:
        FileNotFoundError: there are none.
    """
    folder = Path(folder)
    places = [place for place in (folder, folder / "predictions") if (place / _HEADER).is_file()]
    places = places[:1] or sorted(path.parent for path in folder.glob(f"*/predictions/{_HEADER}"))
    if not places:
        read_header(folder)  # says what was expected
    return {read_header(place)["mode"]: place for place in places}
