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
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fvcore.common.config import CfgNode
from torch import nn

from fcclip import finetuning
from fcclip.comm import get_rank, get_world_size
from fcclip.config import load_config, resolve_device, resolve_file
from fcclip.data import distinct_datasets
from fcclip.data.training_set import training_set, training_vocabulary
from fcclip.engine import (
    REQUEUE_EXIT_CODE,
    Checkpointer,
    PeriodicEvaluation,
    StopRequest,
    as_begun,
    begin_run,
    best_choice,
    build_trainer,
    check_best,
    check_training,
    dry_run,
    launch,
    log_parameters,
    prepare_output_folder,
    run_in_folder,
    scale_to_world_size,
    shield_worker,
)
from fcclip.errors import InputError, run_program
from fcclip.evaluation.all_sets import (
    Results,
    check_evaluation,
    check_expectations,
    evaluate_all,
    evaluate_plainly,
    scalars,
)
from fcclip.evaluation.drawings import draw_predictions
from fcclip.modeling import build_model
from fcclip.weights import load_weights

logger = logging.getLogger("fcclip.train_net")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code; an error that the user can fix is one message, not a traceback."""
    return run_program(functools.partial(start, parse_arguments(argv)))


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


def start(args: argparse.Namespace) -> int:
    """Starts the processes; returns the exit code."""
    cfg = load_config(args.config_file, args.opts)
    prepare_output_folder(cfg.OUTPUT_DIR)
    check(cfg, args)
    try:
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
    except SystemExit as left:  # asked to stop
        return left.code
    return 0


def check(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Refuses what cannot work, before a process is started or a GPU is taken.

    Raises:
        ValueError, FileNotFoundError: unknown data sets or device, missing weights, classes that do not fit.
    """
    resolve_device(cfg.MODEL.DEVICE)
    distinct_datasets(cfg.DATASETS.TEST)
    resumes = last_checkpoint(cfg, args) is not None
    if cfg.MODEL.WEIGHTS and not resumes:
        resolve_file(cfg.MODEL.WEIGHTS, what="MODEL.WEIGHTS")
    if args.dry_run and args.eval_only:
        raise InputError("--dry-run tries out a training; leave --eval-only out")
    if args.eval_only:
        check_evaluation(cfg, has_checkpoint=resumes)
        return
    world_size = max(args.num_gpus, 1) * args.num_machines
    scaled = scale_to_world_size(cfg, world_size)
    check_training(scaled, training_vocabulary(cfg), world_size=world_size)
    finetuning.check_finetuning(scaled, world_size=world_size, resumes=resumes)
    check_best(cfg)


def run(cfg: CfgNode, args: argparse.Namespace) -> Results:
    """What every process does. Returns the results on rank 0, {} elsewhere.

    Raises:
        SystemExit: REQUEUE_EXIT_CODE, when a training was asked to stop and has saved.
    """
    if args.eval_only:
        with run_in_folder(cfg.OUTPUT_DIR):
            return evaluate_only(cfg, args)
    with run_in_folder(cfg.OUTPUT_DIR, locks="" if args.dry_run else "training"), StopRequest() as stop:
        return train(cfg, args, stop)


def train(cfg: CfgNode, args: argparse.Namespace, stop: StopRequest) -> Results:
    """Trains, evaluates on every data set of DATASETS.TEST at the end and at each EVAL_PERIOD."""
    last, vocabulary = last_checkpoint(cfg, args), training_vocabulary(cfg)
    cfg = as_begun(scale_to_world_size(cfg, get_world_size()), last, vocabulary)
    begin_run(cfg, config_file=args.config_file, training=True, writes=not args.dry_run)
    model = build_model(cfg, train_vocabulary=vocabulary, test_vocabulary=None)
    log_parameters(model)
    extras = finetuning.begin(cfg, model, last=last)
    results: Results = {}
    trainer = build_trainer(
        cfg,
        model,
        batches=functools.partial(load_batches, cfg, extras.build_loader),
        device=model.device,
        vocabulary=vocabulary,
        evaluation=build_evaluation(cfg, results),
        stop=stop,
        notes=extras.notes,
        output_dir=cfg.OUTPUT_DIR,
    )
    if last is not None:
        trainer.resume(last)
    elif args.resume:
        logger.info("--resume: no last_checkpoint in %s, starting from the beginning", cfg.OUTPUT_DIR)
    if args.dry_run:
        logger.info("%s", dry_run(trainer).report(cfg.SOLVER.IMS_PER_BATCH))
        return {}
    if not args.resume and Path(cfg.OUTPUT_DIR, "last_checkpoint").is_file():
        logger.warning(
            "%s holds an earlier training, whose checkpoints this one replaces; --resume would go on with it",
            cfg.OUTPUT_DIR,
        )
    extras.before(model, stop)
    if not trainer.train():
        raise SystemExit(REQUEUE_EXIT_CODE)
    extras.after(results)
    check_expectations(cfg, results)
    return results


def evaluate_only(cfg: CfgNode, args: argparse.Namespace) -> Results:
    """Loads weights and evaluates on every data set of DATASETS.TEST."""
    begin_run(cfg, config_file=args.config_file, training=False)
    model = build_model(cfg, train_vocabulary=training_vocabulary(cfg), test_vocabulary=None)
    log_parameters(model)
    weights = last_checkpoint(cfg, args) or cfg.MODEL.WEIGHTS
    load_weights(model, weights)
    logger.info("evaluating the weights in %s", weights)
    results = evaluate_all(model, cfg, augmented=cfg.TEST.AUG.ENABLED)
    check_expectations(cfg, results)
    return results


def last_checkpoint(cfg: CfgNode, args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume goes on from, if there is one."""
    return Checkpointer(cfg.OUTPUT_DIR).last() if args.resume else None


def load_batches(cfg: CfgNode, build_loader: finetuning.BuildLoader, start: int) -> Iterator[list[dict]]:
    """The training batches of this process after the first `start` ones."""
    return build_loader(
        cfg,
        dataset=training_set(cfg),
        rank=get_rank(),
        world_size=get_world_size(),
        start=start,
        worker_init=shield_worker,
    )


def build_evaluation(cfg: CfgNode, results: Results) -> PeriodicEvaluation:
    """The evaluations of a training: DATASETS.TEST, whose `results` are updated, and what chooses the best weights."""
    if cfg.TEST.AUG.ENABLED:
        logger.info("TEST.AUG.ENABLED: test-time augmentation belongs to --eval-only, not to evaluations in training")
    best = best_choice(cfg)

    def evaluate(model: nn.Module) -> dict[str, float]:
        results.update(evaluate_all(model, cfg))
        told = scalars(results, cfg.TEST.MODE)
        if best is not None:
            reported = {name: modes[cfg.TEST.MODE] for name, modes in results.items()}
            told |= best.scalars(reported, functools.partial(evaluate_plainly, model, cfg))
        return told

    return PeriodicEvaluation(
        evaluate=evaluate if cfg.DATASETS.TEST or best else None,
        period=cfg.TEST.EVAL_PERIOD,
        best_metric=best.name if best else "",
        draw=functools.partial(draw_predictions, cfg=cfg) if cfg.DATASETS.TEST and cfg.TEST.EVAL_PERIOD else None,
    )


if __name__ == "__main__":
    sys.exit(main())
