"""Trains and evaluates FC-CLIP; the published command line.

    python train_net.py --config-file configs/shapes/fcclip_shapes.yaml --num-gpus 1 [KEY VALUE ...]
    python train_net.py --config-file ... --resume
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS weights.pth
    python train_net.py --config-file ... --dry-run

Writes config.yaml, log.txt, metrics.json, TensorBoard events, checkpoints and inference/<data set>/ into OUTPUT_DIR.
Leaves with 0; with 1 after an error; with 2 when the command line cannot be read; with 75 when SIGTERM or SIGUSR1 asked
a training to stop: it has saved, and goes on with --resume.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import math
import multiprocessing
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from torch import nn

from fcclip.comm import barrier, broadcast_object, get_rank, get_world_size, is_main_process
from fcclip.config import keys_without_effect, load_config, resolve_device, resolve_file
from fcclip.data import (
    DATASETS,
    Dataset,
    build_test_mapper,
    build_train_loader,
    dataset_vocabulary,
    distinct_datasets,
    get_dataset,
    is_own_data,
    joined,
    read_image,
)
from fcclip.engine import (
    REQUEUE_EXIT_CODE,
    Checkpointer,
    ProcessFailedError,
    RunLock,
    StopRequest,
    StopRequested,
    Trainer,
    apply_numeric_settings,
    build_trainer,
    check_resume,
    check_same_classes,
    check_training,
    close_logging,
    draw_seed,
    duration,
    environment_report,
    launch,
    log_exception,
    scale_to_world_size,
    seed_everything,
    setup_logging,
    shield_worker,
)
from fcclip.errors import InputError
from fcclip.evaluation import copypaste_lines, evaluate, evaluate_augmented, format_table, unmet_expectations
from fcclip.files import write_atomically
from fcclip.finetuning import (
    Comparison,
    FineTuning,
    begin_finetuning,
    build_replay_loader,
    check_finetuning,
    replay_sets,
)
from fcclip.modeling import FCCLIP, build_model, build_variants, test_modes
from fcclip.structures import Segment
from fcclip.visualization import draw_panoptic
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights

logger = logging.getLogger("fcclip.train_net")

Results = dict[str, dict[str, dict[str, dict[str, float]]]]  # data set -> mode -> task -> metric -> percent

_HERE = Path(__file__).resolve().parent
_KILL_S = 5  # for a process that was killed to be gone
_TASKS = ("panoptic_seg", "segm", "bbox", "sem_seg")
_TEXT_TOWER = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code; an error that the user can fix is one message, not a traceback."""
    args = parse_arguments(argv)
    try:
        cfg = load_config(args.config_file, args.opts)
        prepare_output_folder(cfg.OUTPUT_DIR)
        check(cfg, args)
        launch(
            run,
            cfg,
            args,
            num_processes=args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            device_type=resolve_device(cfg.MODEL.DEVICE).type,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ProcessFailedError as error:
        if error.__cause__ is not None:
            print(error.__cause__, file=sys.stderr)
        print(f"error: {short_message(str(error))}", file=sys.stderr)
        return 1
    except SystemExit as left:  # asked to stop
        return left.code
    except Exception as error:
        if not is_users(type(error).__name__, traceback.format_exc()):
            raise
        print(f"error: {short_message(str(error))}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The published command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML file, or the name of a shipped one")
    parser.add_argument("--resume", action="store_true", help="continue from OUTPUT_DIR/last_checkpoint if present")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (with --resume the last checkpoint)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take one batch there and back, say sizes, memory and time to finish; change nothing",
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="K", help="number of this machine (default: 0)")
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0 (default: auto)"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys that override the file"
    )
    return parser.parse_args(argv)


def prepare_output_folder(folder: str) -> None:
    """Makes OUTPUT_DIR and proves that it can be written, before anything is computed.

    Raises:
        PermissionError: it cannot be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"OUTPUT_DIR '{folder}' cannot be written ({error.strerror or error}). Choose a folder that you may write: "
            "OUTPUT_DIR /some/folder"
        ) from error


def check(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Refuses what cannot work, before a process is started or a GPU is taken.

    Raises:
        ValueError, FileNotFoundError: unknown data sets or device, missing weights, classes that do not fit.
    """
    resolve_device(cfg.MODEL.DEVICE)
    distinct_datasets(cfg.DATASETS.TEST)
    checkpoint = Checkpointer(cfg.OUTPUT_DIR).last() if args.resume else None
    if cfg.MODEL.WEIGHTS and checkpoint is None:
        resolve_file(cfg.MODEL.WEIGHTS, what="MODEL.WEIGHTS")
    if args.dry_run and args.eval_only:
        raise InputError("--dry-run tries out a training; leave --eval-only out")
    if not args.eval_only:
        world_size = max(args.num_gpus, 1) * args.num_machines
        scaled = scale_to_world_size(cfg, world_size)
        check_training(scaled, training_vocabulary(cfg), world_size=world_size)
        check_finetuning(scaled, world_size=world_size, resumes=checkpoint is not None)
        check_best(cfg)
        return
    if cfg.TEST.AUG.ENABLED:
        build_variants(cfg)
    if not cfg.DATASETS.TEST:
        raise InputError("--eval-only needs DATASETS.TEST, the data sets to evaluate on")
    if not cfg.MODEL.WEIGHTS and checkpoint is None:
        raise InputError(
            "--eval-only needs MODEL.WEIGHTS (or --resume with a checkpoint in OUTPUT_DIR); there is nothing to "
            "evaluate"
        )


def check_best(cfg: CfgNode) -> None:
    """Refuses SOLVER.BEST.* that cannot choose; whether the metric exists is known after the first evaluation.

    Raises:
        ValueError: an unknown data set or task, or another data set of the name of one in DATASETS.TEST.
    """
    if not cfg.TEST.EVAL_PERIOD:
        return
    if cfg.SOLVER.BEST.DATASET:
        is_reported(cfg, cfg.SOLVER.BEST.DATASET)
    task, _, metric = cfg.SOLVER.BEST.METRIC.partition("/")
    if task not in _TASKS or not metric:
        raise InputError(
            f"SOLVER.BEST.METRIC must be task/metric with a task of {', '.join(_TASKS)}, such as panoptic_seg/PQ; got "
            f"'{cfg.SOLVER.BEST.METRIC}'"
        )


def run(cfg: CfgNode, args: argparse.Namespace) -> Results:
    """What every process does. Returns the results on rank 0, {} elsewhere.

    Raises:
        SystemExit: REQUEUE_EXIT_CODE, when a training was asked to stop and has saved.
    """
    alone = is_main_process() and not (args.eval_only or args.dry_run)
    with RunLock(cfg.OUTPUT_DIR) if alone else contextlib.nullcontext():
        setup_logging(Path(cfg.OUTPUT_DIR), rank=get_rank())
        try:
            if args.eval_only:
                return evaluate_only(cfg, args)
            with StopRequest() as stop:
                return train(cfg, args, stop)
        except Exception:
            log_exception()
            end_loading_processes()
            raise
        finally:
            close_logging()


def train(cfg: CfgNode, args: argparse.Namespace, stop: StopRequest) -> Results:
    """Trains, evaluates on every data set of DATASETS.TEST at the end and at each EVAL_PERIOD."""
    last = Checkpointer(cfg.OUTPUT_DIR).last() if args.resume else None
    cfg = scale_to_world_size(cfg, get_world_size())
    cfg = with_seed(cfg) if last is None else as_begun(cfg, last)
    begin(cfg, args)
    vocabulary = training_vocabulary(cfg)
    model = build_model(cfg, train_vocabulary=vocabulary, test_vocabulary=None)
    log_parameters(model)
    tuning = load_start(cfg, model, last)
    if cfg.TEST.AUG.ENABLED:
        logger.info("TEST.AUG.ENABLED: test-time augmentation belongs to --eval-only, not to evaluations in training")
    dataset, results = training_set(cfg), {}

    replayed = replay_sets(cfg) if cfg.FINETUNE.METHOD == "replay" and cfg.FINETUNE.REPLAY_SHARE else []
    build_loader = functools.partial(build_replay_loader, former=replayed) if replayed else build_train_loader

    def batches(start: int):
        return build_loader(
            cfg,
            dataset=dataset,
            rank=get_rank(),
            world_size=get_world_size(),
            start=start,
            worker_init=shield_worker,
        )

    best = best_dataset(cfg)
    best_metric = f"{get_dataset(best).name}/{cfg.SOLVER.BEST.METRIC}" if best else ""

    def evaluate_and_keep(bare: nn.Module) -> dict[str, float]:
        results.update(evaluate_all(bare, cfg, bare.seen_vocabulary))
        return scalars(results, cfg.TEST.MODE) | best_scalars(bare, cfg, bare.seen_vocabulary, best, results)

    trainer = build_trainer(
        cfg,
        model,
        batches=batches,
        device=model.device,
        vocabulary=vocabulary,
        evaluate=evaluate_and_keep if cfg.DATASETS.TEST or best else None,
        best_metric=best_metric,
        draw=functools.partial(draw_predictions, cfg) if cfg.DATASETS.TEST and cfg.TEST.EVAL_PERIOD else None,
        stop=stop,
        notes=tuning.notes if tuning else None,
        output_dir=cfg.OUTPUT_DIR,
    )
    if last is not None:
        trainer.resume(last)
    elif args.resume:
        logger.info("--resume: no last_checkpoint in %s, starting from the beginning", cfg.OUTPUT_DIR)
    if args.dry_run:
        report_dry_run(trainer, cfg)
        return {}
    if not args.resume and Path(cfg.OUTPUT_DIR, "last_checkpoint").is_file():
        logger.warning(
            "%s holds an earlier training, whose checkpoints this one replaces; --resume would go on with it",
            cfg.OUTPUT_DIR,
        )
    comparison = begin_comparison(cfg, model, vocabulary, tuning, stop, resumes=last is not None)
    if not trainer.train():
        raise SystemExit(REQUEUE_EXIT_CODE)
    if comparison is not None:
        comparison.finish(results)
    check_expectations(cfg, results)
    return results


def load_start(cfg: CfgNode, model: FCCLIP, last: Path | None) -> FineTuning | None:
    """Loads MODEL.WEIGHTS, unless the checkpoint `last` will be resumed from; for a fine-tuning what that needs."""
    if cfg.FINETUNE.METHOD:
        return begin_finetuning(cfg, model, resumed=None if last is None else Checkpointer(cfg.OUTPUT_DIR).load(last))
    if cfg.MODEL.WEIGHTS and last is None:
        load_weights(model, cfg.MODEL.WEIGHTS, initialise=True)
        model.former_vocabulary = None  # an ordinary training knows the words of DATASETS.TRAIN alone
        logger.info("starting from the weights in %s", cfg.MODEL.WEIGHTS)
    return None


def begin_comparison(
    cfg: CfgNode,
    model: FCCLIP,
    vocabulary: Vocabulary,
    tuning: FineTuning | None,
    stop: StopRequest,
    *,
    resumes: bool,
) -> Comparison | None:
    """Evaluates what a fine-tuning starts from, or finds the figures in OUTPUT_DIR when it is resumed.

    Raises:
        SystemExit: REQUEUE_EXIT_CODE, when it was asked to stop meanwhile; nothing is lost.
    """
    if tuning is None:
        return None
    if not cfg.DATASETS.TEST:
        logger.info("DATASETS.TEST is empty: nothing is compared before and after the fine-tuning")
        return None
    comparison = Comparison(cfg, former=tuning.former, own=vocabulary, rank=get_rank(), world_size=get_world_size())
    if resumes:
        comparison.resume()
        return comparison
    try:
        with stop.interrupting():
            comparison.measure(model)
            barrier()  # nobody trains while the first process is still at its figures and can be stopped there
    except StopRequested:
        pointer = Path(cfg.OUTPUT_DIR, "last_checkpoint")
        if is_main_process() and pointer.is_file():
            earlier = pointer.rename(pointer.with_name("last_checkpoint_earlier"))
            logger.warning("%s pointed at an earlier training; --resume would have gone on with that", earlier)
        raise SystemExit(REQUEUE_EXIT_CODE) from None
    return comparison


def report_dry_run(trainer: Trainer, cfg: CfgNode) -> None:
    """Says what one step takes, and what the whole training would."""
    found = trainer.dry_run()
    left, size = trainer.max_iter - trainer.iteration, cfg.SOLVER.IMS_PER_BATCH
    lines = [
        f"first batch, {len(found['batch'])} of {size} images in this process:",
        *(f"  {line}" for line in found["batch"]),
        f"loss {found['total_loss']:.4g}, gradient norm {found['grad_norm']:.4g}",
        f"memory: {found['memory_mb']:.0f} MiB at most, {'GPU' if trainer.device.type == 'cuda' else 'whole process'}",
        f"a step takes {found['time']:.3g} s; starting to load and the first batch took {found['data_time']:.3g} s",
        f"{left} iterations to go: about {duration(left * found['time'])} without evaluations, if loading keeps up",
    ]
    logger.info("dry run, nothing is changed:%s", "".join(f"\n  {line}" for line in lines))


def best_dataset(cfg: CfgNode) -> str:
    """The data set that chooses `best.pth`, "" for none; the log says which, or why none.

    By default the val split of a registered training set, never one of DATASETS.TEST: a number that is reported must
    not have chosen the weights that it is reported for.
    """
    name = cfg.SOLVER.BEST.DATASET
    if not cfg.TEST.EVAL_PERIOD:
        why = "TEST.EVAL_PERIOD is 0, so only the final weights are evaluated"
    elif name:
        if is_reported(cfg, name):
            logger.warning(
                "best.pth is chosen by '%s', which is in DATASETS.TEST: its results there look better than they are",
                name,
            )
        why = ""
    elif is_own_data(cfg.DATASETS.TRAIN[0]):
        why = "the training set is a YAML file, which has no val split; SOLVER.BEST.DATASET can name a data set"
    else:
        name = cfg.DATASETS.TRAIN[0].replace("train", "val")
        why = "" if name in DATASETS and name != cfg.DATASETS.TRAIN[0] else "the training set has no val split"
        if name in [one.name for one in distinct_datasets(cfg.DATASETS.TEST)]:
            why = f"'{name}' is reported (DATASETS.TEST), so it chooses nothing unless SOLVER.BEST.DATASET names it"
        if not why:
            try:
                get_dataset(name).records()
            except FileNotFoundError:
                why = f"'{name}', the val split of the training set, is not there"
    if why:
        logger.info("no best.pth is kept: %s", why)
        return ""
    logger.info("best.pth: the weights with the highest %s on '%s'", cfg.SOLVER.BEST.METRIC, name)
    return name


def is_reported(cfg: CfgNode, name: str) -> bool:
    """Whether a data set is one of DATASETS.TEST.

    Raises:
        ValueError: it is not, but has the name of one; metrics are stored by name.
    """
    dataset = get_dataset(name)
    for other, reported in zip(cfg.DATASETS.TEST, distinct_datasets(cfg.DATASETS.TEST)):
        if dataset.name != reported.name:
            continue
        if Path(name).expanduser().resolve() == Path(other).expanduser().resolve():  # names are no paths, and compare
            return True
        raise InputError(
            f"SOLVER.BEST.DATASET '{name}' and '{other}' of DATASETS.TEST are both named '{dataset.name}', the name "
            "that metrics are stored by. Rename the YAML of one of them."
        )
    return False


def best_scalars(model: nn.Module, cfg: CfgNode, training: Vocabulary, name: str, results: Results) -> dict[str, float]:
    """The metrics that choose `best.pth`, `data set/task/metric`; evaluated unless they are among the results already.

    Raises:
        ValueError: SOLVER.BEST.METRIC is not among them.
    """
    if not name:
        return {}
    mode, dataset = cfg.TEST.MODE, get_dataset(name)
    if not is_reported(cfg, name):
        found = evaluate(
            model,
            cfg,
            dataset,
            modes={mode: test_modes(cfg)[mode]},
            training_vocabulary=training,
            vocabulary=dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES),
            rank=get_rank(),
            world_size=get_world_size(),
        )
    else:
        found = results.get(dataset.name, {})
    name = dataset.name
    if not is_main_process():
        return {}
    flat = {f"{name}/{task}/{key}": value for task, metrics in found[mode].items() for key, value in metrics.items()}
    if f"{name}/{cfg.SOLVER.BEST.METRIC}" not in flat:
        known = ", ".join(sorted(key.removeprefix(f"{name}/") for key in flat if "-" not in key))
        raise InputError(f"SOLVER.BEST.METRIC is '{cfg.SOLVER.BEST.METRIC}'; '{name}' is evaluated for {known}")
    return {key: value for key, value in flat.items() if "-" not in key}


def draw_predictions(cfg: CfgNode, model: nn.Module, *, images: int = 4) -> dict[str, np.ndarray]:
    """What the model sees in the first images of DATASETS.TEST[0]: drawings (H, W, 3) uint8 by file name."""
    dataset, mapper = get_dataset(cfg.DATASETS.TEST[0]), build_test_mapper(cfg)
    vocabulary = dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES)
    if not cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON:
        return {}
    drawings = {}
    for record in dataset.records()[:images]:
        (output,) = model([mapper(record)], vocabulary=vocabulary, semantic=None)
        id_map, segments = output["panoptic_seg"]
        segments = [Segment(**segment) for segment in segments]
        drawing = draw_panoptic(read_image(record["file_name"]), id_map.cpu().numpy(), segments, vocabulary.class_names)
        drawings[Path(record["file_name"]).name] = drawing
    return drawings


def evaluate_only(cfg: CfgNode, args: argparse.Namespace) -> Results:
    """Loads weights and evaluates on every data set of DATASETS.TEST."""
    begin(cfg, args)
    vocabulary = training_vocabulary(cfg)
    model = build_model(cfg, train_vocabulary=vocabulary, test_vocabulary=None)
    log_parameters(model)
    last = Checkpointer(cfg.OUTPUT_DIR).last() if args.resume else None
    weights = cfg.MODEL.WEIGHTS if last is None else last
    load_weights(model, weights)
    logger.info("evaluating the weights in %s", weights)
    results = evaluate_all(model, cfg, model.seen_vocabulary)
    if cfg.TEST.AUG.ENABLED:
        for name, modes in evaluate_all(model, cfg, model.seen_vocabulary, augmented=True).items():
            for mode, tasks in modes.items():
                results[name][mode] |= tasks
    check_expectations(cfg, results)
    return results


def begin(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Seeds, settings, and the record of what is run: environment, config and the keys of it that do nothing."""
    apply_numeric_settings(cfg, training=not args.eval_only)
    if cfg.SEED >= 0:
        seed_everything(cfg.SEED + get_rank())
    if not is_main_process():
        return
    report = environment_report(resolve_device(cfg.MODEL.DEVICE))
    logger.info("environment:%s", "".join(f"\n  {name:<16} {value}" for name, value in report.items()))
    reasons: dict[str, list[str]] = {}
    for key, why in keys_without_effect(args.config_file).items():
        reasons.setdefault(why, []).append(key)
    for why, keys in reasons.items():
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        logger.info("keys of %s without effect, because %s: %s%s", args.config_file, why, ", ".join(keys[:3]), more)
    if args.dry_run:
        logger.info("read %s, writing nothing but this log", args.config_file)
        return
    write_atomically(Path(cfg.OUTPUT_DIR) / "config.yaml", lambda file: file.write(cfg.dump().encode()))
    logger.info(
        "read %s, writing to %s (the full config is in config.yaml there)",
        args.config_file,
        Path(cfg.OUTPUT_DIR).resolve(),
    )


def as_begun(cfg: CfgNode, last: Path) -> CfgNode:
    """The config with the seed of the training that is resumed from the checkpoint `last`.

    Raises:
        ValueError: the checkpoint is damaged, or holds another training than this config's.
    """
    state = Checkpointer(cfg.OUTPUT_DIR).load(last)
    cfg = with_seed(cfg, state.get("seed"))
    if "config" in state and "iteration" in state:
        check_resume(state["config"], cfg, source=str(last), iteration=state["iteration"] + 1)
    check_same_classes(state.get("vocabulary"), training_vocabulary(cfg), source=last)
    return cfg


def with_seed(cfg: CfgNode, seed: int | None = None) -> CfgNode:
    """The config with a SEED that all processes share: its own, else `seed`, that of the run that is resumed, else a
    fresh one."""
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = broadcast_object(draw_seed() if seed is None else seed)
    cfg.freeze()
    logger.info("SEED was negative: drew %d", cfg.SEED)
    return cfg


def training_set(cfg: CfgNode) -> Dataset:
    """The data set of DATASETS.TRAIN, or all of them one after the other.

    Raises:
        ValueError: none, an unknown one, or several with different classes.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError(
            "DATASETS.TRAIN is empty; its data set brings the training images and decides which classes are seen"
        )
    return joined([get_dataset(name) for name in cfg.DATASETS.TRAIN])


def training_vocabulary(cfg: CfgNode) -> Vocabulary:
    """The classes of DATASETS.TRAIN[0], which also decide which test classes count as seen."""
    return dataset_vocabulary(training_set(cfg), cfg.MODEL.FC_CLIP.VOCABULARIES)


def evaluate_all(model: nn.Module, cfg: CfgNode, training: Vocabulary, *, augmented: bool = False) -> Results:
    """Evaluates each data set of DATASETS.TEST with its own vocabulary, in the three modes; rank 0 writes and prints.

    With `augmented`, the mean semantic maps of TEST.AUG's variants, in a folder and under task names of their own.
    """
    results: Results = {}
    folder = Path(cfg.OUTPUT_DIR) / ("inference_TTA" if augmented else "inference")
    for dataset in distinct_datasets(cfg.DATASETS.TEST):
        name, vocabulary = dataset.name, dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES)
        found = (evaluate_augmented if augmented else evaluate)(
            model,
            cfg,
            dataset,
            modes=test_modes(cfg),
            training_vocabulary=training,
            vocabulary=vocabulary,
            output_dir=folder,
            rank=get_rank(),
            world_size=get_world_size(),
        )
        if not is_main_process():
            continue
        results[name] = found
        content = json.dumps(
            {
                "vocabulary": vocabulary.name,
                "sha256": vocabulary.hash,
                "published_vocabulary": vocabulary.is_published,
                "results": _without_nan(found),
            },
            indent=2,
        )
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name / "results.json", lambda file, content=content: file.write(content.encode()))
        for line in copypaste_lines(found[cfg.TEST.MODE]):
            logger.info("%s %s", name, line)
    if results:
        title = "test-time augmentation" if augmented else "results"
        logger.info("%s in percent, files in %s\n%s", title, folder, format_table(_without_suffix(results)))
    return results


def scalars(results: Results, mode: str) -> dict[str, float]:
    """What goes into metrics.json: `task/metric` of the config's mode, with the data set in front when there are
    several.

    Metrics of single classes stay in results.json; other modes have their name in front.
    """
    flat = {}
    for name, modes in results.items():
        for one, tasks in modes.items():
            place = [part for part in (name if len(results) > 1 else "", one if one != mode else "") if part]
            for task, metrics in tasks.items():
                flat |= {"/".join([*place, task, key]): value for key, value in metrics.items() if "-" not in key}
    return flat


def check_expectations(cfg: CfgNode, results: Results) -> None:
    """Compares the first data set with TEST.EXPECTED_RESULTS.

    Raises:
        ValueError: a result is missing or out of tolerance.
    """
    if not (cfg.TEST.EXPECTED_RESULTS and results):
        return
    name, modes = next(iter(results.items()))
    unmet = unmet_expectations(modes[cfg.TEST.MODE], cfg.TEST.EXPECTED_RESULTS)
    if unmet:
        raise InputError(f"{name}: results are not those of TEST.EXPECTED_RESULTS: {'; '.join(unmet)}")
    logger.info("%s: results are those of TEST.EXPECTED_RESULTS", name)


def log_parameters(model: nn.Module) -> None:
    """Says how many parameters there are, and how many of them learn."""
    counts = {"total": 0, "trainable": 0, "text": 0}
    for name, parameter in model.named_parameters():
        counts["total"] += parameter.numel()
        counts["trainable"] += parameter.numel() * parameter.requires_grad
        clip_part = name.partition("clip_model.")[2]
        counts["text"] += parameter.numel() * clip_part.startswith(_TEXT_TOWER)
    frozen = counts["total"] - counts["trainable"]
    logger.info(
        "parameters: %.2f M, trainable %.2f M, frozen %.2f M (%.2f M without the text tower)",
        *(number / 1e6 for number in (counts["total"], counts["trainable"], frozen, frozen - counts["text"])),
    )


def end_loading_processes() -> None:
    """Kills them after an error: one that hangs would keep this process from ending."""
    watched = hasattr(signal, "SIGCHLD")
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if watched else None  # torch's would raise another error
    for process in multiprocessing.active_children():
        process.kill()
        process.join(_KILL_S)
    if watched:
        signal.signal(signal.SIGCHLD, handler)


def is_users(kind: str, trace: str) -> bool:
    """Whether an error is one that the user can fix: raised with a clear text by this project, by the file system, or
    by torch wherever the main thread is when a loading process dies."""
    own_errors = ("NonFiniteError", "BrokenWeightsError", "OutOfMemoryError", "LoaderError", "UnsafeFileError")
    if kind in ("FileNotFoundError", "PermissionError", "ConnectionError", "OSError", "ImportError", *own_errors):
        return True
    if kind == "RuntimeError" and re.search(r"^RuntimeError: DataLoader worker \(pid", trace, re.MULTILINE):
        return True
    files = re.findall(r'File "([^"]+)", line', trace)
    own = bool(files) and Path(files[-1]).resolve().is_relative_to(_HERE)
    return kind == "ValueError" and own and "site-packages" not in files[-1].replace(str(_HERE), "")


def short_message(text: str) -> str:
    """The text of an error without the traceback that a loader process put around it."""
    if "Original Traceback (most recent call last)" not in text:
        return text
    first = text.split("Caught ", 1)[0]
    last = re.split(r"\n\w+(?:Error|Exception): ", text)[-1]
    return f"{first}{last}".strip()


def _without_suffix(results: Results) -> Results:
    """Tasks under the names that a table knows."""
    return {
        name: {
            mode: {task.removesuffix("_TTA"): found for task, found in tasks.items()} for mode, tasks in modes.items()
        }
        for name, modes in results.items()
    }


def _without_nan(results: Mapping[str, Any]) -> dict[str, Any]:
    """The same nested mapping with None for what is undefined, as JSON wants it."""
    return {
        key: _without_nan(value) if isinstance(value, Mapping) else value if math.isfinite(value) else None
        for key, value in results.items()
    }


if __name__ == "__main__":
    sys.exit(main())
