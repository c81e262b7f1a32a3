"""Runs a model over a data set and hands what it finds to the evaluators of that data set."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
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

from fcclip.config import lookup
from fcclip.data import Dataset, build_test_loader, dataset_vocabulary
from fcclip.engine import watch
from fcclip.evaluation.instances import InstanceEvaluator, InstanceTruth
from fcclip.evaluation.panoptic import PanopticEvaluator, PanopticWriter
from fcclip.evaluation.pictures import Evaluator, Picture
from fcclip.evaluation.semantic import SemanticEvaluator
from fcclip.modeling.augmentation import AugmentedModel, build_augmented
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
_LINE_SECONDS = 10  # between two lines of progress where there is no terminal

# What each kind of data set is evaluated for, as far as the config's {PANOPTIC,INSTANCE,SEMANTIC}_ON ask for it.
EVALUATORS: dict[str, tuple[str, ...]] = {
    "coco_panoptic_seg": ("panoptic", "instance", "semantic"),
    "ade20k_panoptic_seg": ("panoptic", "instance", "semantic"),
    "mapillary_vistas_panoptic_seg": ("panoptic", "instance", "semantic"),
    "sem_seg": ("semantic",),
    "coco": ("instance",),
}


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
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluates a model on the pictures of one data set.

    The network sees each picture once, whatever the number of modes. With several processes each takes a share of the
    pictures, and the numbers are exactly those of one process.

    Args:
        model: what `build_model` returns, or anything that is called like it; its training flag is restored.
        cfg: the config; decides which heads are evaluated and how pictures are read.
        dataset: what `get_dataset` returns.
        modes: name -> (alpha, beta) of the geometric ensemble; None: the config's TEST.MODE alone.
        training_vocabulary: what the model was trained on; None: no metrics of seen and unseen classes.
        vocabulary: the words to look for; None: those of the data set.
        output_dir: files go to its folder named like the data set, with several modes to a folder for each; None: no
            files.
        rank, world_size: this process and their number; torch.distributed is set up when there are several.
        progress: show a progress bar, or lines where there is no terminal.
        max_images: only the first pictures of the data set; None: all.
        save_predictions: write panoptic predictions as JSON and PNGs.

    Returns:
        mode -> task (`panoptic_seg`, `segm`, `bbox`, `sem_seg`) -> metric -> value in percent, NaN where undefined; {}
        on other ranks than 0.

    Raises:
        ValueError: a vocabulary that does not fit the data set, nothing to evaluate, and what the evaluators refuse.
        RuntimeError: another process failed.
    """
    if save_predictions and output_dir is None:
        raise ValueError("save_predictions needs output_dir, the folder to write to")
    records = dataset.records()[:max_images]
    if not records:
        raise ValueError(f"data set '{dataset.name}' has no pictures to evaluate (max_images: {max_images})")
    limited = dataclasses.replace(dataset, load=functools.partial(list, records))
    vocabulary = dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES) if vocabulary is None else vocabulary
    vocabulary = _fitting(vocabulary, dataset)
    seen = None if training_vocabulary is None else vocabulary.seen_by(training_vocabulary).tolist()
    mode_names = tuple(modes) if modes is not None else (cfg.TEST.MODE,)
    folder = None if output_dir is None else Path(output_dir) / dataset.name
    evaluators = build_evaluators(
        cfg, dataset, modes=mode_names, seen=seen, folder=folder, save_predictions=save_predictions
    )
    loader = build_test_loader(cfg, limited, rank=rank, world_size=world_size)
    call = functools.partial(model, vocabulary=vocabulary, semantic="labels")
    if modes is not None:
        call = functools.partial(call, modes=dict(modes))

    def predict(samples: list[dict]) -> dict[str, list[dict]]:
        outputs = call(samples)
        return outputs if modes is not None else {mode_names[0]: outputs}

    def evaluate_share() -> None:
        meter = _Meter(dataset.name, len(records), world_size, show=progress and rank == 0)
        with _evaluation_mode(model), meter:
            _run(predict, loader, {record["image_id"]: record for record in records}, evaluators, meter)

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
    return results


def evaluate_augmented(
    model: nn.Module, cfg: Any, dataset: Dataset, **options: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluates the mean semantic maps of the variants of each picture that TEST.AUG asks for.

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
        "test-time augmentation: each picture of %s in %d variants, shorter side %s%s",
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
    save_predictions: bool = False,
) -> dict[str, list[Evaluator]]:
    """The evaluators that a data set's kind and the config ask for, one set for each mode.

    Args:
        cfg: says which heads are on.
        dataset: brings kind, class names, ids and ground-truth files.
        modes: a name for each set.
        seen: (K,) whether training knew the class; None when unknown.
        folder: for files, with several modes a folder for each below it; None: no files.
        save_predictions: add a writer of panoptic predictions.

    Raises:
        ValueError: an unknown kind, no head on that the kind is evaluated for, missing ground truth.
    """
    metadata = dataset.metadata
    kind = metadata["evaluator_type"]
    test = cfg.MODEL.MASK_FORMER.TEST
    switched_on = {"panoptic": test.PANOPTIC_ON, "instance": test.INSTANCE_ON, "semantic": test.SEMANTIC_ON}
    wanted = [head for head in lookup("evaluator type", kind, EVALUATORS) if switched_on[head]]
    if not wanted:
        keys = ", ".join(f"MODEL.MASK_FORMER.TEST.{head.upper()}_ON" for head in EVALUATORS[kind])
        raise ValueError(f"nothing to evaluate on data set '{dataset.name}' ({kind}): switch on at least one of {keys}")
    names = distinct_names(metadata["stuff_classes"])
    thing_index = metadata.get("thing_dataset_id_to_contiguous_id", {})
    things = {index: identifier for identifier, index in thing_index.items()}
    truth = InstanceTruth.read(_instances_file(dataset)) if "instance" in wanted else None
    header = _predictions_header(metadata) if save_predictions and "panoptic" in wanted else None

    def build(mode_folder: Path | None) -> Iterator[Evaluator]:
        if mode_folder is not None:
            mode_folder.mkdir(parents=True, exist_ok=True)
        if "panoptic" in wanted:
            yield PanopticEvaluator(class_names=names, thing_classes=things, seen=seen)
        if header is not None:
            ids = metadata["stuff_dataset_id_to_contiguous_id"] | thing_index
            dataset_ids = {index: identifier for identifier, index in ids.items()}
            yield PanopticWriter(folder=mode_folder, dataset_ids=dataset_ids, header=header)
        if truth is not None:
            yield InstanceEvaluator(truth=truth, class_names=names, dataset_ids=things, seen=seen, folder=mode_folder)
        if "semantic" in wanted:
            yield SemanticEvaluator(class_names=names, ignore_label=metadata["ignore_label"], seen=seen)

    folders = {mode: folder / mode if folder is not None and len(modes) > 1 else folder for mode in modes}
    return {mode: list(build(mode_folder)) for mode, mode_folder in folders.items()}


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
    records: Mapping[int | str, dict],
    evaluators: Mapping[str, Sequence[Evaluator]],
    meter: _Meter,
) -> None:
    for samples in meter.timed("data", loader):
        with meter.time("network"), torch.no_grad():
            outputs = predict(samples)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        with meter.time("evaluation"):
            for index, sample in enumerate(samples):
                picture = Picture(records[sample["image_id"]])
                for mode, group in evaluators.items():
                    for evaluator in group:
                        evaluator.process(picture, outputs[mode][index])
        meter.advance(len(samples))


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

    def __init__(self, name: str, num_pictures: int, world_size: int, *, show: bool) -> None:
        self.name, self.num_pictures, self.world_size, self.show = name, num_pictures, world_size, show
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
            self.task = self.bar.add_task(f"evaluate {self.name}", total=self.num_pictures, speed="")
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.show and error_type is None:
            seconds = time.perf_counter() - self.start
            logger.info("evaluated %s: %d pictures in %.1f s, %s", self.name, self._all_done(), seconds, self._split())

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

    def advance(self, pictures: int) -> None:
        watch()
        self.done += pictures
        now = time.perf_counter()
        if self.bar is not None:
            wide = self.bar.console.width >= 120  # the split of time is not worth more than the rest of the bar
            self.bar.update(self.task, completed=self._all_done(), speed=self._split() if wide else self._speed())
        elif self.show and now - self.last_line >= _LINE_SECONDS:
            self.last_line = now
            logger.info(
                "evaluate %s: %d/%d pictures, %s", self.name, self._all_done(), self.num_pictures, self._split()
            )

    def _all_done(self) -> int:
        return min(self.done * self.world_size, self.num_pictures)  # the others are about as far

    def _speed(self) -> str:
        return f"{self._all_done() / max(time.perf_counter() - self.start, 1e-9):.1f} pictures/s"

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
        raise ValueError(
            f"vocabulary '{vocabulary.name}' has {len(vocabulary)} classes, '{dataset.name}' has {num_classes}; "
            "evaluation needs one entry for each class, in the order of the data set"
        )
    things = set(dataset.metadata.get("thing_dataset_id_to_contiguous_id", {}).values())
    return vocabulary.with_things(things) if things and things != set(vocabulary.thing_classes) else vocabulary


def _instances_file(dataset: Dataset) -> str:
    path = dataset.metadata.get("json_file")
    if not path:
        raise ValueError(
            f"data set '{dataset.name}' has no instances file, so AP cannot be evaluated; set "
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON False"
        )
    return path


def _predictions_header(metadata: Mapping[str, Any]) -> dict[str, Any]:
    content = json.loads(Path(metadata["panoptic_json"]).read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key != "annotations"}
