"""Runs a model over a data set and hands its predictions to the evaluators of that data set."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from fvcore.common.config import CfgNode

from fcclip.comm import broadcast_object, get_rank, get_world_size, is_main_process
from fcclip.config import with_values
from fcclip.data import Dataset, build_test_loader, dataset_vocabulary
from fcclip.errors import InputError
from fcclip.evaluation.evaluators import build_evaluators, mode_folders
from fcclip.evaluation.ground_truth import Evaluator, GroundTruth, in_order
from fcclip.evaluation.meter import Meter
from fcclip.evaluation.predictions import PredictionWriter, SavedPredictions, begin_predictions, prediction_header
from fcclip.evaluation.thread_pool import EvaluationThreads
from fcclip.files import write_json
from fcclip.modeling import Architecture, AugmentedModel, Ensemble, build_augmented, enabled_heads
from fcclip.modeling.architecture import BaseArchitecture
from fcclip.modeling.build import build_output_settings
from fcclip.modeling.outputs import OutputSettings
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, dict[str, float]]]  # mode -> task -> metric -> percent


class Oracle(Protocol):
    """Makes what predicts in the model's place, partly from ground truth (see `fcclip.reports.oracle`).

    Attributes:
        name: for messages and files.
    """

    name: str

    def __call__(
        self, model: Architecture, ground_truth_of: Callable[[int | str], GroundTruth], dataset: Dataset
    ) -> Any:
        """Has `score` and `outputs` like the model."""


@dataclass(frozen=True)
class _Task:
    """An evaluation.

    Args:
        records: of the images.
        vocabulary: the classes to look for.
        modes: name -> ensemble, None being the model's own.
        folders: mode -> folder of its files, None: no files.
        evaluators: mode -> the evaluators.
        writers: mode -> what saves the predictions.
        done: images whose predictions are saved already.
    """

    records: Sequence[Mapping]
    vocabulary: Vocabulary
    modes: Mapping[str, Ensemble | None]
    folders: Mapping[str, Path | None]
    evaluators: Mapping[str, Sequence[Evaluator]]
    writers: Mapping[str, Sequence[Evaluator]]
    done: Sequence[int | str]


def evaluate(
    model: Architecture | AugmentedModel,
    cfg: CfgNode,
    dataset: Dataset,
    *,
    modes: Mapping[str, Ensemble | tuple[float, float]] | None = None,
    training_vocabulary: Vocabulary | None = None,
    vocabulary: Vocabulary | None = None,
    output_dir: str | os.PathLike | None = None,
    progress: bool = True,
    max_images: int | None = None,
    save_predictions: bool = False,
    resume: bool = False,
    oracle: Oracle | None = None,
    settings: OutputSettings | None = None,
) -> Results:
    """Evaluates a model on the images of one data set.

    The network sees each image once, whatever the number of modes. With several processes each takes a share of the
    images, and the numbers are exactly those of one process. With saved predictions an evaluation that was killed can
    be resumed, by any number of processes, and gives the numbers of one that was not.

    Args:
        model: what `build_model` returns, or anything with its `score` and `outputs`; its training flag is restored.
        cfg: the config; decides which heads run and are evaluated, and how images are read.
        dataset: what `get_dataset` returns.
        modes: name -> (alpha, beta) of the geometric ensemble; None: the model's own, under the name of TEST.MODE.
        training_vocabulary: what the model was trained on; None: no metrics of seen and unseen classes.
        vocabulary: the classes to look for; None: those of the data set.
        output_dir: files go to its folder named like the data set, with several modes to a folder for each; None: no
            files.
        progress: show a progress bar, or lines where there is no terminal.
        max_images: only the first images of the data set; None: all.
        save_predictions: write what is predicted to the folder `predictions` (see predictions.py), and to
            `per_image.json` how good each image is.
        resume: with `save_predictions`, go on with the predictions that are there; their images need no model. Else
            they are removed.
        oracle: what is true instead of predicted; None: nothing. Instances have no oracle and are not evaluated.
        settings: how outputs are made; None: as the config says.

    Returns:
        mode -> task (`panoptic_seg`, `segm`, `bbox`, `sem_seg`) -> metric -> value in percent, NaN where undefined; {}
        on other ranks than 0.

    Raises:
        ValueError: a vocabulary that does not fit the data set, nothing to evaluate, and what the evaluators refuse.
        RuntimeError: another process failed.
    """
    if save_predictions and output_dir is None:
        raise InputError("save_predictions needs output_dir, the folder to write to")
    records = dataset.records()[:max_images]
    if not records:
        raise InputError(f"data set '{dataset.name}' has no images to evaluate (max_images: {max_images})")
    if oracle is not None:
        if dataset.evaluators == ("instance",):
            raise InputError(f"data set '{dataset.name}' is evaluated for instances, which have no oracle")
        cfg = _without_heads(cfg, "INSTANCE", "RECALL")
    vocabulary = dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES) if vocabulary is None else vocabulary
    vocabulary = _fitting(vocabulary, dataset)
    seen = None if training_vocabulary is None else vocabulary.seen_by(training_vocabulary).tolist()
    modes = {cfg.TEST.MODE: None} if modes is None else dict(modes)
    folder = None if output_dir is None else Path(output_dir) / dataset.name
    evaluators = build_evaluators(cfg, dataset, modes=tuple(modes), seen=seen, folder=folder)
    task = _Task(records, vocabulary, modes, mode_folders(folder, tuple(modes)), evaluators, {}, ())
    if save_predictions:
        task = _begin_saving(task, model, cfg, dataset, resume=resume, oracle=oracle)
    _run(task, model, cfg, dataset, oracle=oracle, progress=progress, settings=settings)
    return _results(task) if is_main_process() else {}


def evaluate_augmented(model: Architecture, cfg: CfgNode, dataset: Dataset, **options: Any) -> Results:
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
    augmented, settings = build_augmented(cfg, model), build_output_settings(cfg)
    cfg = _without_heads(cfg, "PANOPTIC", "INSTANCE", "RECALL")
    logger.info(
        "test-time augmentation: each image of %s in %d variants, shorter side %s%s",
        dataset.name,
        len(augmented.variants),
        ", ".join(map(str, augmented.variants.min_sizes)),
        ", each mirrored too" if augmented.variants.flip else "",
    )
    results = evaluate(augmented, cfg, dataset, settings=settings, **options)
    return {mode: {f"{task}_TTA": metrics for task, metrics in tasks.items()} for mode, tasks in results.items()}


def write_per_image(folder: Path, evaluators: Sequence[Evaluator]) -> None:
    """Writes `per_image.json`: task -> [image id, value in percent] of each image, null where undefined."""
    content = {
        next(iter(evaluator.results())): [[image_id, values[image_id]] for image_id in in_order(values)]
        for evaluator in evaluators
        if (values := evaluator.per_image)
    }
    write_json(folder / "per_image.json", content)


def _run(
    task: _Task,
    model: Architecture | AugmentedModel,
    cfg: CfgNode,
    dataset: Dataset,
    *,
    oracle: Oracle | None,
    progress: bool,
    settings: OutputSettings | None,
) -> None:
    """Evaluates this process's share; afterwards the evaluators of rank 0 know everything."""
    by_id = {record["image_id"]: record for record in task.records}
    ignore_label = dataset.metadata.get("ignore_label", 255)

    def ground_truth_of(image_id: int | str) -> GroundTruth:
        return GroundTruth(by_id[image_id], ignore_label)

    left = [record for record in task.records if record["image_id"] not in set(task.done)]
    remaining = dataclasses.replace(dataset, load=functools.partial(list, left))
    rank, world_size = get_rank(), get_world_size()
    loader = build_test_loader(cfg, remaining, rank=rank, world_size=world_size) if left else ()
    network = model if oracle is None else oracle(model, ground_truth_of, dataset)
    options = {"heads": enabled_heads(cfg), "semantic": "labels", "settings": settings or build_output_settings(cfg)}
    look = network.score
    if isinstance(network, BaseArchitecture) and options["heads"] == ("panoptic",):  # others may name masks anew
        limits = [Ensemble.of(ensemble or network.ensemble).void_limit for ensemble in task.modes.values()]
        look = functools.partial(look, void_limit=max(limits))

    def evaluate_saved(meter: Meter) -> None:
        saved = {mode: SavedPredictions(folder / "predictions") for mode, folder in task.folders.items()}
        with EvaluationThreads(task.evaluators) as threads:
            for image_id in task.done[rank::world_size]:
                outputs = {mode: predictions.read(image_id) for mode, predictions in saved.items()}
                threads.process(ground_truth_of(image_id), outputs)
                meter.advance(1)

    @torch.no_grad()
    def predict(samples: list[dict]) -> list[dict[str, dict]]:
        """Mode -> outputs, an image each."""
        outputs = [
            {mode: network.outputs(scored, ensemble=ensemble, **options) for mode, ensemble in task.modes.items()}
            for scored in look(samples, task.vocabulary)
        ]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return outputs

    def evaluate_share() -> None:
        groups = {mode: [*group, *task.writers.get(mode, ())] for mode, group in task.evaluators.items()}
        with _evaluation_mode(model), Meter(dataset.name, len(by_id), world_size, show=progress and rank == 0) as meter:
            if task.done:
                evaluate_saved(meter)
            with EvaluationThreads(groups) as threads:
                for samples in meter.timed("data", loader):
                    with meter.time("network"):
                        outputs = predict(samples)
                    with meter.time("evaluation"):
                        for sample, by_mode in zip(samples, outputs):
                            threads.process(ground_truth_of(sample["image_id"]), by_mode)
                    meter.advance(len(samples))
                with meter.time("evaluation"):
                    threads.finish()

    if world_size == 1:
        evaluate_share()
        return
    # States are Python objects in main memory, and the others may take long: hence a group of its own.
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=12))
    try:
        _together(evaluate_share, group)
        own = {mode: [evaluator.state() for evaluator in group] for mode, group in task.evaluators.items()}
        states: list[Any] | None = [None] * world_size if rank == 0 else None
        torch.distributed.gather_object(own, states, dst=0, group=group)
    finally:
        torch.distributed.destroy_process_group(group)
    for state in (states or [])[1:]:
        for mode, evaluators in task.evaluators.items():
            for evaluator, other in zip(evaluators, state[mode], strict=True):
                evaluator.merge(other)


def _together(work: Callable[[], Any], group: torch.distributed.ProcessGroup | None = None) -> Any:
    """What `work` gives in this process. One that fails does not leave the others waiting: all of them raise."""
    if get_world_size() == 1:
        return work()
    made, failure = None, None
    try:
        made = work()
    except Exception as error:
        failure = error
    messages: list[str | None] = [None] * get_world_size()
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    torch.distributed.all_gather_object(messages, message, group=group)
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"evaluation stopped because process {rank} failed: {message}")
    return made


def _results(task: _Task) -> Results:
    results: Results = {}
    for mode, group in task.evaluators.items():
        results[mode] = {}
        for evaluator in group:
            results[mode] |= evaluator.results()
            evaluator.save()
        for writer in task.writers.get(mode, ()):
            writer.save()
            write_per_image(task.folders[mode], group)
    return results


@contextlib.contextmanager
def _evaluation_mode(model: Architecture | AugmentedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _without_heads(cfg: CfgNode, *heads: str) -> CfgNode:
    return with_values(cfg, {f"MODEL.MASK_FORMER.TEST.{head}_ON": False for head in heads})


def _fitting(vocabulary: Vocabulary, dataset: Dataset) -> Vocabulary:
    """The same classes; what is a thing is the data set's to say."""
    num_classes = len(dataset.metadata["stuff_classes"])
    if len(vocabulary) != num_classes:
        raise InputError(
            f"vocabulary '{vocabulary.name}' has {len(vocabulary)} classes, '{dataset.name}' has {num_classes}; "
            "evaluation needs one entry for each class, in the order of the data set"
        )
    things = set(dataset.metadata.get("thing_dataset_id_to_contiguous_id", {}).values())
    return vocabulary.with_things(things) if things and things != set(vocabulary.thing_classes) else vocabulary


def _begin_saving(
    task: _Task,
    model: Architecture | AugmentedModel,
    cfg: CfgNode,
    dataset: Dataset,
    *,
    resume: bool,
    oracle: Oracle | None,
) -> _Task:
    """The task with what saves predictions, and with the images whose predictions are saved already.

    Raises:
        ValueError: the predictions that are there depend on something else.
        RuntimeError: rank 0 failed.
    """
    header = functools.partial(prediction_header, model, cfg, dataset=dataset.name, vocabulary=task.vocabulary)
    name = None if oracle is None else oracle.name
    folders = {mode: folder / "predictions" for mode, folder in task.folders.items()}

    def begin() -> Sequence[int | str]:
        if not is_main_process():
            return ()
        headers = {mode: header(mode=mode, ensemble=ensemble, oracle=name) for mode, ensemble in task.modes.items()}
        return begin_predictions(folders, headers, [record["image_id"] for record in task.records], resume=resume)

    done = broadcast_object(_together(begin))
    if done:
        logger.info(
            "%s: %d of %d images are evaluated from saved predictions", dataset.name, len(done), len(task.records)
        )
    writers = {mode: [PredictionWriter(folder, dataset, task.records)] for mode, folder in folders.items()}
    return dataclasses.replace(task, done=done, writers=writers)
