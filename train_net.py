"""Trains and evaluates FC-CLIP; the published command line.

    python train_net.py --config-file configs/shapes/fcclip_shapes.yaml --num-gpus 1 [KEY VALUE ...]
    python train_net.py --config-file ... --resume
    python train_net.py --config-file ... --eval-only MODEL.WEIGHTS weights.pth

Writes config.yaml, log.txt, metrics.json, TensorBoard events, checkpoints and inference/<data set>/ into OUTPUT_DIR.
Leaves with 0, with 1 after an error, with 2 when the command line cannot be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import re
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from fcclip.config import keys_without_effect, load_config, resolve_device, resolve_file
from fcclip.data import Dataset, build_train_loader, dataset_vocabulary, get_dataset
from fcclip.engine import (
    Checkpointer,
    NonFiniteError,
    ProcessFailedError,
    apply_numeric_settings,
    broadcast_object,
    build_trainer,
    check_training,
    close_logging,
    draw_seed,
    environment_report,
    get_rank,
    get_world_size,
    is_main_process,
    launch,
    load_checkpoint,
    load_weights,
    log_exception,
    scale_to_world_size,
    seed_everything,
    setup_logging,
    write_atomically,
)
from fcclip.evaluation import copypaste_lines, evaluate, evaluate_augmented, format_table, unmet_expectations
from fcclip.modeling import build_model, build_variants, test_modes
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger("fcclip.train_net")

Results = dict[str, dict[str, dict[str, dict[str, float]]]]  # data set -> mode -> task -> metric -> percent

_HERE = Path(__file__).resolve().parent
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
        if error.trace and not is_users(error.kind, error.trace):
            print(error.trace, file=sys.stderr)
        print(f"error: {short_message(str(error))}", file=sys.stderr)
        return 1
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
    for name in cfg.DATASETS.TEST:
        get_dataset(name)
    checkpoint = Checkpointer(cfg.OUTPUT_DIR).last() if args.resume else None
    if cfg.MODEL.WEIGHTS and checkpoint is None:
        resolve_file(cfg.MODEL.WEIGHTS, what="MODEL.WEIGHTS")
    if not args.eval_only:
        world_size = max(args.num_gpus, 1) * args.num_machines
        check_training(scale_to_world_size(cfg, world_size), training_vocabulary(cfg), world_size=world_size)
        return
    if cfg.TEST.AUG.ENABLED:
        build_variants(cfg)
    if not cfg.DATASETS.TEST:
        raise ValueError("--eval-only needs DATASETS.TEST, the data sets to evaluate on")
    if not cfg.MODEL.WEIGHTS and checkpoint is None:
        raise ValueError(
            "--eval-only needs MODEL.WEIGHTS (or --resume with a checkpoint in OUTPUT_DIR); there is nothing to "
            "evaluate"
        )


def run(cfg: CfgNode, args: argparse.Namespace) -> Results:
    """What every process does. Returns the results on rank 0, {} elsewhere."""
    setup_logging(Path(cfg.OUTPUT_DIR), rank=get_rank())
    try:
        return evaluate_only(cfg, args) if args.eval_only else train(cfg, args)
    except Exception:
        log_exception()
        raise
    finally:
        close_logging()


def train(cfg: CfgNode, args: argparse.Namespace) -> Results:
    """Trains, evaluates on every data set of DATASETS.TEST at the end and at each EVAL_PERIOD."""
    checkpointer = Checkpointer(cfg.OUTPUT_DIR, keep=cfg.SOLVER.CHECKPOINT_KEEP)
    last = checkpointer.last() if args.resume else None
    cfg = with_seed(scale_to_world_size(cfg, get_world_size()), last)
    begin(cfg, args)
    vocabulary = training_vocabulary(cfg)
    model = build_model(cfg, train_vocabulary=vocabulary, test_vocabulary=None)
    log_parameters(model)
    if cfg.MODEL.WEIGHTS and last is None:
        load_weights(model, cfg.MODEL.WEIGHTS, initialise=True)
        logger.info("starting from the weights in %s", cfg.MODEL.WEIGHTS)
    if cfg.TEST.AUG.ENABLED:
        logger.info("TEST.AUG.ENABLED: test-time augmentation belongs to --eval-only, not to evaluations in training")
    dataset, results = training_set(cfg), {}

    def batches(start: int):
        return build_train_loader(cfg, dataset=dataset, rank=get_rank(), world_size=get_world_size(), start=start)

    def evaluate_and_keep(bare: nn.Module) -> dict[str, float]:
        results.update(evaluate_all(bare, cfg, vocabulary))
        return scalars(results, cfg.TEST.MODE)

    trainer = build_trainer(
        cfg,
        model,
        batches=batches,
        device=model.device,
        vocabulary=vocabulary,
        evaluate=evaluate_and_keep if cfg.DATASETS.TEST else None,
        output_dir=cfg.OUTPUT_DIR,
    )
    if last is not None:
        trainer.resume(last)
    elif args.resume:
        logger.info("--resume: no last_checkpoint in %s, starting from the beginning", cfg.OUTPUT_DIR)
    trainer.train()
    check_expectations(cfg, results)
    return results


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
    results = evaluate_all(model, cfg, vocabulary)
    if cfg.TEST.AUG.ENABLED:
        for name, modes in evaluate_all(model, cfg, vocabulary, augmented=True).items():
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
    write_atomically(Path(cfg.OUTPUT_DIR) / "config.yaml", lambda file: file.write(cfg.dump().encode()))
    logger.info(
        "read %s, writing to %s (the full config is in config.yaml there)",
        args.config_file,
        Path(cfg.OUTPUT_DIR).resolve(),
    )


def with_seed(cfg: CfgNode, checkpoint: Path | None) -> CfgNode:
    """The config with a SEED that all processes share: its own, else that of the run that is resumed, else a fresh
    one."""
    if cfg.SEED >= 0:
        return cfg
    seed = load_checkpoint(checkpoint).get("seed") if checkpoint is not None else None
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
        raise ValueError(
            "DATASETS.TRAIN is empty; its data set brings the training pictures and decides which classes are seen"
        )
    datasets = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
    vocabularies = {one.name: one.vocabulary for one in datasets}
    if len(set(vocabularies.values())) > 1:
        raise ValueError(f"the data sets of DATASETS.TRAIN have different classes: {vocabularies}")
    if len(datasets) == 1:
        return datasets[0]
    return dataclasses.replace(
        datasets[0], name="+".join(vocabularies), load=lambda: [record for one in datasets for record in one.records()]
    )


def training_vocabulary(cfg: CfgNode) -> Vocabulary:
    """The classes of DATASETS.TRAIN[0], which also decide which test classes count as seen."""
    return dataset_vocabulary(training_set(cfg), cfg.MODEL.FC_CLIP.VOCABULARIES)


def evaluate_all(model: nn.Module, cfg: CfgNode, training: Vocabulary, *, augmented: bool = False) -> Results:
    """Evaluates each data set of DATASETS.TEST with its own vocabulary, in the three modes; rank 0 writes and prints.

    With `augmented`, the mean semantic maps of TEST.AUG's variants, in a folder and under task names of their own.
    """
    results: Results = {}
    folder = Path(cfg.OUTPUT_DIR) / ("inference_TTA" if augmented else "inference")
    for name in cfg.DATASETS.TEST:
        dataset = get_dataset(name)
        vocabulary = dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES)
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
        raise ValueError(f"{name}: results are not those of TEST.EXPECTED_RESULTS: {'; '.join(unmet)}")
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


def is_users(kind: str, trace: str) -> bool:
    """Whether an error is one that the user can fix: raised with a clear text by this project, or by the file
    system."""
    own_errors = (NonFiniteError.__name__, "UnsafeFileError")
    if kind in ("FileNotFoundError", "PermissionError", "ConnectionError", "OSError", *own_errors):
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
