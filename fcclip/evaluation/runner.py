"""Runs a model over a data set and hands what it finds to the evaluators of that data set."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fcclip.comm import broadcast_object
from fcclip.config import lookup
from fcclip.data import EVALUATORS, Dataset, build_test_loader, dataset_vocabulary
from fcclip.engine import watch
from fcclip.errors import InputError
from fcclip.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from fcclip.evaluation.ground_truth import Evaluator, GroundTruth, in_order
from fcclip.evaluation.instances import InstanceEvaluator, InstanceTruth
from fcclip.evaluation.lvis import LvisEvaluator
from fcclip.evaluation.panoptic import PanopticEvaluator
from fcclip.evaluation.predictions import PredictionWriter, SavedPredictions, begin_predictions, prediction_header
from fcclip.evaluation.semantic import SemanticEvaluator
from fcclip.evaluation.thread_pool import Background
from fcclip.files import write_atomically
from fcclip.modeling.augmentation import AugmentedModel, build_augmented
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
_LINE_SECONDS = 10  # between two lines of progress where there is no terminal


def evaluate(
    model: nn.Module | AugmentedModel,
    cfg: Any,
    dataset: Dataset,
    *,
    modes: Mapping[str, tuple[float, float]] | None = None,
    training_vocabulary: Vocabulary | None = None,
    vocabulary: Vocabulary | None = None,
    output_dir: str | os.PathLike | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    max_images: int | None = None,
    save_predictions: bool = False,
    resume: bool = False,
    oracle: str | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluates a model on the images of one data set.

    The network sees each image once, whatever the number of modes. With several processes each takes a share of the
    images, and the numbers are exactly those of one process. With saved predictions an evaluation that was killed can
    be resumed, by any number of processes, and gives the numbers of one that was not.

    Args:
        model: what `build_model` returns, or anything that is called like it; its training flag is restored.
        cfg: the config; decides which heads are evaluated and how images are read.
        dataset: what `get_dataset` returns.
        modes: name -> (alpha, beta) of the geometric ensemble; None: the config's TEST.MODE alone.
        training_vocabulary: what the model was trained on; None: no metrics of seen and unseen classes.
        vocabulary: the words to look for; None: those of the data set.
        output_dir: files go to its folder named like the data set, with several modes to a folder for each; None: no
            files.
        rank, world_size: this process and their number; torch.distributed is set up when there are several.
        progress: show a progress bar, or lines where there is no terminal.
        max_images: only the first images of the data set; None: all.
        save_predictions: write what is predicted to the folder `predictions` (see predictions.py), and to
            `per_image.json` how good each image is.
        resume: with `save_predictions`, go on with the predictions that are there; their images need no model. Else
            they are removed.
        oracle: `masks` or `classes`: what is true instead of predicted; see oracle.py. None: nothing.

    Returns:
        mode -> task (`panoptic_seg`, `segm`, `bbox`, `sem_seg`) -> metric -> value in percent, NaN where undefined; {}
        on other ranks than 0.

    Raises:
        ValueError: a vocabulary that does not fit the data set, nothing to evaluate, and what the evaluators refuse.
        RuntimeError: another process failed.
    """
    from fcclip.reports.oracle import ORACLES, TrueMasks

    if save_predictions and output_dir is None:
        raise InputError("save_predictions needs output_dir, the folder to write to")
    if oracle is not None and oracle not in ORACLES:
        raise InputError(f"oracle must be one of {', '.join(ORACLES)} or None, got {oracle!r}")
    records = dataset.records()[:max_images]
    if not records:
        raise InputError(f"data set '{dataset.name}' has no images to evaluate (max_images: {max_images})")
    limited = dataclasses.replace(dataset, load=functools.partial(list, records))
    vocabulary = dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES) if vocabulary is None else vocabulary
    vocabulary = _fitting(vocabulary, dataset)
    seen = None if training_vocabulary is None else vocabulary.seen_by(training_vocabulary).tolist()
    mode_names = tuple(modes) if modes is not None else (cfg.TEST.MODE,)
    folder = None if output_dir is None else Path(output_dir) / dataset.name
    evaluators = build_evaluators(cfg, dataset, modes=mode_names, seen=seen, folder=folder)
    by_id = {record["image_id"]: record for record in records}
    ignore_label = dataset.metadata.get("ignore_label", 255)

    def ground_truth_of(image_id: int | str) -> GroundTruth:
        return GroundTruth(by_id[image_id], ignore_label)

    if oracle is not None:
        evaluators = with_oracle(evaluators, oracle, vocabulary, ignore_label)
    folders = mode_folders(folder, mode_names)
    done: list[int | str] = []
    writers: dict[str, list[Evaluator]] = {mode: [] for mode in mode_names}
    if save_predictions:
        headers = functools.partial(prediction_header, model, cfg, dataset=dataset.name, vocabulary=vocabulary)
        done, writers = _begin_saving(
            lambda mode: headers(
                mode=mode, ensemble=(modes or {}).get(mode), oracle=oracle if oracle == "masks" else None
            ),
            cfg,
            dataset,
            records,
            folders,
            resume=resume,
            rank=rank,
        )
    limited = _without(limited, done)
    loader = build_test_loader(cfg, limited, rank=rank, world_size=world_size) if len(done) < len(records) else ()
    network = model
    if oracle == "masks":
        network = TrueMasks(model, ground_truth_of=ground_truth_of, ignore_label=ignore_label)
    call = functools.partial(network, vocabulary=vocabulary, semantic="labels")
    if modes is not None:
        call = functools.partial(call, modes=dict(modes))

    def predict(samples: list[dict]) -> dict[str, list[dict]]:
        outputs = call(samples)
        return outputs if modes is not None else {mode_names[0]: outputs}

    def evaluate_share() -> None:
        meter = _Meter(dataset.name, len(records), world_size, show=progress and rank == 0)
        with _evaluation_mode(model), meter:
            saved = {mode: SavedPredictions(folders[mode] / "predictions") for mode in mode_names} if done else {}
            evaluate_saved(saved, done[rank::world_size], ground_truth_of, evaluators, meter.advance)
            with_writers = {mode: [*group, *writers[mode]] for mode, group in evaluators.items()}
            _run(predict, loader, ground_truth_of, with_writers, meter)

    states = _gather(
        evaluate_share,
        lambda: {mode: [evaluator.state() for evaluator in group] for mode, group in evaluators.items()},
        rank,
        world_size,
    )
    if rank != 0:
        return {}
    for state in states[1:]:
        for mode, group in evaluators.items():
            for evaluator, other in zip(group, state[mode], strict=True):
                evaluator.merge(other)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for mode, group in evaluators.items():
        results[mode] = {}
        for evaluator in group:
            results[mode] |= evaluator.results()
            evaluator.save()
        for writer in writers[mode]:
            writer.save()
            write_per_image(folders[mode], group)
    return results


def with_oracle(
    evaluators: Mapping[str, Sequence[Evaluator]], oracle: str, vocabulary: Vocabulary, ignore_label: int
) -> dict[str, list[Evaluator]]:
    """The evaluators for outputs of which something is true: they allow pixels without a class, or see true classes."""
    from fcclip.reports.oracle import TrueClassEvaluator

    if oracle == "classes":
        options = {"thing_classes": vocabulary.thing_classes, "ignore_label": ignore_label}
        return {mode: [TrueClassEvaluator(one, **options) for one in group] for mode, group in evaluators.items()}
    for evaluator in itertools.chain(*evaluators.values()):
        if isinstance(evaluator, SemanticEvaluator):
            evaluator.gaps = True
    return {mode: list(group) for mode, group in evaluators.items()}


def evaluate_saved(
    saved: Mapping[str, Any],
    image_ids: Iterable[int | str],
    ground_truth_of: Callable[[int | str], GroundTruth],
    evaluators: Mapping[str, Sequence[Evaluator]],
    advance: Callable[[int], None] = lambda images: None,
) -> None:
    """Hands predictions that were saved to evaluators.

    Args:
        saved: mode -> something with `read(image_id)`, such as `SavedPredictions`.
        image_ids: the images.
        ground_truth_of: image id -> image.
        evaluators: mode -> the evaluators.
        advance: is told the number of images that are done.
    """
    with Background(evaluators) as background:
        for image_id in image_ids:
            background.process(ground_truth_of(image_id), _ReadLater(saved, image_id))
            advance(1)


class _ReadLater(Mapping):
    """Mode -> the saved output for an image, read by the thread that looks at it."""

    def __init__(self, saved: Mapping[str, Any], image_id: int | str) -> None:
        self.saved, self.image_id = saved, image_id
        self.kept: dict[str, Any] = {}

    def __getitem__(self, mode: str) -> Any:
        if mode not in self.kept:
            self.kept[mode] = self.saved[mode].read(self.image_id)
        return self.kept[mode]

    def __iter__(self) -> Iterator[str]:
        return iter(self.saved)

    def __len__(self) -> int:
        return len(self.saved)


def write_per_image(folder: Path, evaluators: Sequence[Evaluator]) -> None:
    """Writes `per_image.json`: task -> [image id, value in percent] of each image, null where undefined."""
    found = {
        next(iter(evaluator.results())): [
            [image_id, None if math.isnan(values[image_id]) else values[image_id]] for image_id in in_order(values)
        ]
        for evaluator in evaluators
        if (values := evaluator.per_image)
    }
    write_atomically(folder / "per_image.json", lambda file: file.write(json.dumps(found).encode()))


def evaluate_augmented(
    model: nn.Module, cfg: Any, dataset: Dataset, **options: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluates the mean semantic maps of the variants of each image that TEST.AUG asks for.

    The published second pass beside `evaluate`, whatever TEST.AUG.ENABLED says. Only semantic maps have a mean, so the
    panoptic and instance heads are neither run nor evaluated.

    Args:
        model: what `build_model` returns; its training flag is restored.
        cfg: the config.
        dataset: what `get_dataset` returns.
        options: as for `evaluate`.

    Returns:
        mode -> `sem_seg_TTA` -> metric -> value in percent, NaN where undefined; {} on other ranks than 0.

    Raises:
        ValueError: semantic maps turned off, no sizes in TEST.AUG, and what `evaluate` refuses.
        RuntimeError: another process failed.
    """
    augmented = build_augmented(cfg, model)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    cfg.freeze()
    logger.info(
        "test-time augmentation: each image of %s in %d variants, shorter side %s%s",
        dataset.name,
        len(augmented.variants),
        ", ".join(map(str, augmented.variants.min_sizes)),
        ", each mirrored too" if augmented.variants.flip else "",
    )
    found = evaluate(augmented, cfg, dataset, **options)
    return {mode: {f"{task}_TTA": metrics for task, metrics in tasks.items()} for mode, tasks in found.items()}


def build_evaluators(
    cfg: Any,
    dataset: Dataset,
    *,
    modes: Sequence[str],
    seen: Sequence[bool] | None = None,
    folder: Path | None = None,
) -> dict[str, list[Evaluator]]:
    """The evaluators that a data set's kind and the config ask for, one set for each mode.

    Args:
        cfg: says which heads are on.
        dataset: brings kind, class names, ids and ground-truth files.
        modes: a name for each set.
        seen: (K,) whether training knew the class; None when unknown.
        folder: for files, with several modes a folder for each below it; None: no files.

    Raises:
        ValueError: an unknown kind, no head on that the kind is evaluated for, missing ground truth.
    """
    metadata = dataset.metadata
    kind = metadata["evaluator_type"]
    test = cfg.MODEL.MASK_FORMER.TEST
    switched_on = {"panoptic": test.PANOPTIC_ON, "instance": test.INSTANCE_ON, "semantic": test.SEMANTIC_ON}
    wanted = [head for head in lookup("evaluator type", kind, EVALUATORS) if switched_on[head]]
    if not wanted:
        keys = ", ".join(f"MODEL.MASK_FORMER.TEST.{head.upper()}_ON" for head in dataset.evaluators)
        raise InputError(f"nothing to evaluate on data set '{dataset.name}' ({kind}): switch on at least one of {keys}")
    names = distinct_names(metadata["stuff_classes"])
    thing_index = metadata.get("thing_dataset_id_to_contiguous_id", {})
    things = {index: identifier for identifier, index in thing_index.items()}
    truth = _instance_truth(dataset) if "instance" in wanted and kind != "cityscapes_panoptic_seg" else None
    common = {"class_names": names, "seen": seen}

    def build(mode_folder: Path | None) -> Iterator[Evaluator]:
        if mode_folder is not None:
            mode_folder.mkdir(parents=True, exist_ok=True)
        if "panoptic" in wanted:
            yield PanopticEvaluator(**common, thing_classes=things)
        if kind == "cityscapes_panoptic_seg":
            ids = {index: identifier for identifier, index in metadata["stuff_dataset_id_to_contiguous_id"].items()}
            if "instance" in wanted:
                yield CityscapesInstanceEvaluator(**common, dataset_ids=things)
            if "semantic" in wanted:
                yield CityscapesSemanticEvaluator(**common, dataset_ids=ids)
            return
        if "instance" in wanted:
            instance_evaluator = LvisEvaluator if kind == "lvis" else InstanceEvaluator
            yield instance_evaluator(**common, truth=truth, dataset_ids=things, folder=mode_folder)
        if "semantic" in wanted:
            yield SemanticEvaluator(**common, ignore_label=metadata["ignore_label"])

    return {mode: list(build(mode_folder)) for mode, mode_folder in mode_folders(folder, modes).items()}


def mode_folders(folder: Path | None, modes: Sequence[str]) -> dict[str, Path | None]:
    """Mode -> the folder of its files: that of the data set, of several modes a folder for each below it."""
    return {mode: folder / mode if folder is not None and len(modes) > 1 else folder for mode in modes}


def distinct_names(names: Sequence[str]) -> list[str]:
    """Class names by which metrics can be told apart: those that occur twice get their index.

    ADE20K-847 has nine such names; without this the IoU of one "bag" would take the place of the other's.

    Example:
        >>> distinct_names(["bag", "cat", "bag"])
        ['bag [0]', 'cat', 'bag [2]']
    """
    counts = Counter(names)
    return [f"{name} [{index}]" if counts[name] > 1 else name for index, name in enumerate(names)]


def _run(
    predict: Callable[[list[dict]], dict[str, list[dict]]],
    loader: Iterable[list[dict]],
    ground_truth_of: Callable[[int | str], GroundTruth],
    evaluators: Mapping[str, Sequence[Evaluator]],
    meter: _Meter,
) -> None:
    with Background(evaluators) as background:
        for samples in meter.timed("data", loader):
            with meter.time("network"), torch.no_grad():
                outputs = predict(samples)
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
            with meter.time("evaluation"):
                for index, sample in enumerate(samples):
                    ground_truth = ground_truth_of(sample["image_id"])
                    background.process(ground_truth, {mode: found[index] for mode, found in outputs.items()})
            meter.advance(len(samples))
        with meter.time("evaluation"):
            background.finish()


def _gather(work: Callable[[], None], state: Callable[[], Any], rank: int, world_size: int) -> list[Any]:
    """Does the work of this process, then collects the states of all on rank 0, in the order of the ranks.

    A process that fails does not leave the others waiting: all of them raise.
    """
    if world_size == 1:
        work()
        return [state()]
    failure = None
    try:
        work()
    except Exception as error:
        failure = error
    # States are Python objects in main memory, and the others may take long: hence a group of its own.
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=12))
    try:
        messages: list[str | None] = [None] * world_size
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        torch.distributed.all_gather_object(messages, message, group=group)
        if failure is not None:
            raise failure
        for other, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"evaluation stopped because process {other} failed: {message}")
        states: list[Any] | None = [None] * world_size if rank == 0 else None
        torch.distributed.gather_object(state(), states, dst=0, group=group)
        return states or []
    finally:
        torch.distributed.destroy_process_group(group)


class _Meter:
    """Progress, and where the time goes: waiting for data, the network, the evaluators."""

    def __init__(self, name: str, num_images: int, world_size: int, *, show: bool) -> None:
        self.name, self.num_images, self.world_size, self.show = name, num_images, world_size, show
        self.seconds = {"data": 0.0, "network": 0.0, "evaluation": 0.0}
        self.done = 0
        self.start = self.last_line = time.perf_counter()
        self.bar: Progress | None = None

    def __enter__(self) -> _Meter:
        if self.show and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[speed]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(f"evaluate {self.name}", total=self.num_images, speed="")
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.show and error_type is None:
            seconds = time.perf_counter() - self.start
            logger.info("evaluated %s: %d images in %.1f s, %s", self.name, self._all_done(), seconds, self._split())

    @contextlib.contextmanager
    def time(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    def timed(self, what: str, items: Iterable) -> Iterator:
        iterator = iter(items)
        while True:
            with self.time(what):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def advance(self, images: int) -> None:
        watch()
        self.done += images
        now = time.perf_counter()
        if self.bar is not None:
            wide = self.bar.console.width >= 120  # the split of time is not worth more than the rest of the bar
            self.bar.update(self.task, completed=self._all_done(), speed=self._split() if wide else self._speed())
        elif self.show and now - self.last_line >= _LINE_SECONDS:
            self.last_line = now
            logger.info("evaluate %s: %d/%d images, %s", self.name, self._all_done(), self.num_images, self._split())

    def _all_done(self) -> int:
        return min(self.done * self.world_size, self.num_images)  # the others are about as far

    def _speed(self) -> str:
        return f"{self._all_done() / max(time.perf_counter() - self.start, 1e-9):.1f} images/s"

    def _split(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        shares = ", ".join(f"{what} {100 * spent / total:.0f} %" for what, spent in self.seconds.items())
        return f"{self._speed()} ({shares})"


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module | AugmentedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _fitting(vocabulary: Vocabulary, dataset: Dataset) -> Vocabulary:
    """The same words; what is a thing is the data set's to say."""
    num_classes = len(dataset.metadata["stuff_classes"])
    if len(vocabulary) != num_classes:
        raise InputError(
            f"vocabulary '{vocabulary.name}' has {len(vocabulary)} classes, '{dataset.name}' has {num_classes}; "
            "evaluation needs one entry for each class, in the order of the data set"
        )
    things = set(dataset.metadata.get("thing_dataset_id_to_contiguous_id", {}).values())
    return vocabulary.with_things(things) if things and things != set(vocabulary.thing_classes) else vocabulary


def _instance_truth(dataset: Dataset) -> InstanceTruth | None:
    """What AP is measured against; None: the segments of the panoptic annotation.

    Of the kinds with panoptic annotations, the users' own may do without an instances file; a benchmark may not.
    """
    path = dataset.metadata.get("json_file")
    if path:
        truth = InstanceTruth.read(path)
        own = "yaml_file" in dataset.metadata
        return truth.completed(dataset.metadata["thing_dataset_id_to_contiguous_id"]) if own else truth
    if dataset.metadata["evaluator_type"] == "coco_panoptic_seg" and dataset.metadata.get("panoptic_json"):
        return None
    raise InputError(
        f"data set '{dataset.name}' has no instances file, so AP cannot be evaluated; set "
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON False"
    )


def _begin_saving(
    header_of: Callable[[str], Mapping[str, Any]],
    cfg: Any,
    dataset: Dataset,
    records: Sequence[Mapping],
    folders: Mapping[str, Path],
    *,
    resume: bool,
    rank: int,
) -> tuple[list[int | str], dict[str, list[Evaluator]]]:
    """The images whose predictions are there already, and mode -> what writes the others.

    Args:
        header_of: mode -> what its predictions depend on; asked on rank 0.
        cfg, dataset, records: what is evaluated.
        folders: mode -> folder of its files.
        resume, rank: as for `evaluate`.

    Raises:
        ValueError: the predictions that are there depend on something else.
        RuntimeError: rank 0 failed.
    """
    done = _on_first(
        lambda: begin_predictions(
            {mode: folder / "predictions" for mode, folder in folders.items()},
            {mode: header_of(mode) for mode in folders},
            [record["image_id"] for record in records],
            resume=resume,
        ),
        rank,
    )
    if done:
        logger.info("%s: %d of %d images are evaluated from saved predictions", dataset.name, len(done), len(records))
    return done, {mode: [_writer(cfg, dataset, records, folder, rank)] for mode, folder in folders.items()}


def _writer(cfg: Any, dataset: Dataset, records: Sequence[Mapping], folder: Path, rank: int) -> PredictionWriter:
    metadata = dataset.metadata
    header = None
    if cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON and metadata.get("panoptic_json") and rank == 0:
        content = json.loads(Path(metadata["panoptic_json"]).read_text(encoding="utf-8"))
        header = {key: value for key, value in content.items() if key != "annotations"}
    ids = metadata.get("stuff_dataset_id_to_contiguous_id", {}) | metadata.get("thing_dataset_id_to_contiguous_id", {})
    return PredictionWriter(
        folder=folder / "predictions",
        records=records,
        num_classes=len(metadata["stuff_classes"]),
        dataset_ids={index: identifier for identifier, index in ids.items()},
        panoptic_header=header,
        rank=rank,
    )


def _without(dataset: Dataset, image_ids: Sequence[int | str]) -> Dataset:
    """The data set without these images."""
    if not image_ids:
        return dataset
    done = set(image_ids)
    left = [record for record in dataset.load() if record["image_id"] not in done]
    return dataclasses.replace(dataset, load=lambda: list(left))


def _on_first(work: Callable[[], Any], rank: int) -> Any:
    """What rank 0 makes of `work`, on every rank; where it fails, all do."""
    failure, made = None, None
    if rank == 0:
        try:
            made = work()
        except Exception as error:
            failure = error
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    message, made = broadcast_object((message, made))
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(f"evaluation stopped because process 0 failed: {message}")
    return made
