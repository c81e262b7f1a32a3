"""One command for the whole table: every benchmark that is there, then a row as in the model zoo.

    python tools/evaluate_zero_shot.py --weights FILE [--config-file FILE] [--datasets NAME ...] [--output FOLDER]
        [--num-gpus N] [--resume] [--images N] [--oracle masks|classes|void | --oracles] [KEY VALUE ...]

Each data set is evaluated with the image sizes, outputs and vocabulary it was published with; a KEY that is given wins,
and its figures are then not compared. Beside the row stand the published one of the same backbone and the difference.
Without --datasets, a model trained on COCO is evaluated on the table's benchmarks (those that are missing are named),
any other on its config's DATASETS.TEST.

Writes into FOLDER: results.json, results.md, log.txt, and for each data set its predictions. An evaluation that was
interrupted goes on with --resume, also with another number of processes, and gives the numbers of one that was not.
--images adds a page, page/index.html, with the best, the median and the worst images of each data set. --oracle
shows PQ and mIoU with true masks and predicted classes (masks), predicted masks and true classes (classes), or masks
that are void only where they are (void). --oracles shows in one table, from one pass, what each of these and each
classifier would gain, so what is worth working on; it writes oracles.json, and no row.
Leaves with 0; with 1 after an error, or when a figure is not the published one within its tolerance; with 2 when the
command line cannot be read.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from fcclip.comm import get_rank, get_world_size, is_main_process
from fcclip.config import load_config, resolve_device, resolve_file
from fcclip.data import dataset_vocabulary
from fcclip.data.training_set import training_vocabulary
from fcclip.engine import (
    RunLock,
    apply_numeric_settings,
    close_logging,
    duration,
    environment_report,
    launch,
    log_exception,
    setup_logging,
)
from fcclip.errors import InputError, MissingFileError, run_program
from fcclip.evaluation import current_commit, evaluate, format_table
from fcclip.evaluation.evaluators import mode_folders
from fcclip.files import without_nan, write_atomically, write_json
from fcclip.modeling import FCCLIP, build_model, test_modes
from fcclip.reports import (
    FAIL,
    MIOU_RULE,
    ORACLES,
    EveryOracle,
    Outcome,
    Plan,
    Report,
    backbone_of_weights,
    oracle_modes,
    oracle_table,
    plan_sets,
    report_of,
    write_page,
)
from fcclip.weights import frozen_notes, load_weights
from fcclip.weights.files import read_weight_file

logger = logging.getLogger("fcclip.evaluate_zero_shot")
MODES = ("ensemble", "in_vocabulary", "out_of_vocabulary")
_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "Pillow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code."""
    args = parse_arguments(arguments)
    cfg = read_config(args)
    plans, missing = plan_sets(cfg, args.datasets, given=args.opts[::2])
    if not plans:
        raise MissingFileError(
            f"none of the data sets is there; looked at {', '.join(missing.values())}. Set $DETECTRON2_DATASETS to "
            "the folder of all data sets, or name some with --datasets."
        )
    prepare_output(args, plans)
    report = launch(run, cfg, args, num_processes=args.num_gpus, device_type=resolve_device(cfg.MODEL.DEVICE).type)
    if report is None:  # a process that torchrun started beside the first, which has the table and the verdict
        return 0
    print(f"\n{report.text()}\n\nresults: {args.output / 'results.md'} and {args.output / 'results.json'}")
    return 1 if report.verdict == FAIL else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint or a shipped asset")
    parser.add_argument("--config-file", metavar="FILE", help="default: the one that the weights tell of or fit")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="data sets or YAML files")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: output/zero_shot/<name of the weights>")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    parser.add_argument("--resume", action="store_true", help="go on with the predictions in the output folder")
    parser.add_argument("--first", type=int, metavar="N", help="only the first images of each data set")
    parser.add_argument(
        "--images", type=int, default=0, metavar="N", help="N best, median and worst ones of each set on a page"
    )
    parser.add_argument("--oracle", choices=ORACLES, help="what is true instead of predicted: masks, classes or void")
    parser.add_argument("--oracles", action="store_true", help="a table of all oracles instead of the row")
    parser.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE",
        help="ensemble, in_vocabulary, out_of_vocabulary; all from one pass of the network (default: TEST.MODE)",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys that override everything"
    )
    args, rest = parser.parse_known_args(arguments)
    if rest:
        parser.error(f"cannot read {' '.join(rest)}")
    for name in ("datasets", "modes"):  # take every word up to the next option, so KEY VALUE pairs are among them
        words = getattr(args, name) or []
        end = next((index for index, word in enumerate(words) if is_key(word)), len(words))
        args.opts = [*words[end:], *args.opts]
        setattr(args, name, words[:end] or None)
    unknown = [mode for mode in args.modes or () if mode not in MODES]
    if unknown:
        parser.error(f"unknown mode '{unknown[0]}'; known: {', '.join(MODES)}")
    if len(args.opts) % 2:
        parser.error(f"overrides come in pairs KEY VALUE, got {len(args.opts)} words: {' '.join(args.opts)}")
    if args.first is not None and args.first < 1:
        parser.error(f"--first must be 1 or more, got {args.first}")
    if args.images < 0:
        parser.error(f"--images must be 0 or more, got {args.images}")
    name = Path(args.weights).stem + (f"_true_{args.oracle}" if args.oracle else "")
    args.output = args.output or Path("output", "zero_shot", name)
    return args


def is_key(word: str) -> bool:
    """Whether a word is a config key and no data set or file."""
    return word.partition(".")[0].isupper() and not word.endswith((".yaml", ".yml"))


def read_config(args: argparse.Namespace) -> CfgNode:
    """The config of --config-file, else of the weights: the one they tell of, or that of the backbone they fit.

    Raises:
        ValueError: the weights tell nothing and fit no published backbone.
    """
    weights = resolve_file(args.weights, what="weights")
    overrides = ["MODEL.WEIGHTS", args.weights, *args.opts]
    if args.config_file:
        return load_config(args.config_file, overrides)
    file = read_weight_file(weights)
    stored = file.rest.get("config")
    if isinstance(stored, str) and "\n" in stored:  # checkpoints hold the whole config
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            path.write_text(stored, encoding="utf-8")
            return load_config(path, overrides)
    if isinstance(stored, str):
        return load_config(stored, overrides)
    backbone = backbone_of_weights({key: tuple(value.shape) for key, value in file.tensors.items()})
    if backbone is None:
        raise InputError(
            f"'{args.weights}' does not tell its config and fits none of the published backbones; give --config-file"
        )
    print(f"'{args.weights}' is of {backbone['name']}: taking {backbone['config']}")
    return load_config(backbone["config"], overrides)


def prepare_output(args: argparse.Namespace, plans: Sequence[Plan]) -> None:
    """Makes the output folder.

    Raises:
        ValueError: it holds predictions of another evaluation, and --resume is not given.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    if args.resume:
        return
    for plan in plans:
        for path in sorted((args.output / plan.dataset.name).glob("**/predictions/header.json")):
            raise InputError(
                f"'{path.parent}' holds predictions of an earlier evaluation. --resume goes on with them; choose "
                "another --output, or remove the folder, to begin anew."
            )


def run(cfg: CfgNode, args: argparse.Namespace) -> Report | None:
    """What every process does. Returns the report on rank 0."""
    lock = RunLock(args.output, "evaluation") if is_main_process() else contextlib.nullcontext()
    with lock:
        setup_logging(args.output, rank=get_rank())
        try:
            return evaluate_sets(cfg, args)
        except Exception:
            log_exception()
            raise
        finally:
            close_logging()


def evaluate_sets(cfg: CfgNode, args: argparse.Namespace) -> Report | None:
    """Evaluates one data set after the other; what is known so far is written after each."""
    start = time.perf_counter()
    apply_numeric_settings(cfg, training=False)
    plans, missing = plan_sets(cfg, args.datasets, given=args.opts[::2])
    folder = cfg.MODEL.FC_CLIP.VOCABULARIES
    training = training_vocabulary(cfg) if cfg.DATASETS.TRAIN else None
    model = build_model(cfg, train_vocabulary=training, test_vocabulary=None)
    load_weights(model, cfg.MODEL.WEIGHTS)
    everything = test_modes(cfg)
    modes = {mode: everything[mode] for mode in args.modes or [cfg.TEST.MODE]}
    if is_main_process():
        write_atomically(args.output / "config.yaml", lambda file: file.write(cfg.dump().encode()))
        for name, path in missing.items():
            logger.info("data set '%s' is missing: there is no %s", name, path)
    if args.oracles:
        return show_oracles(model, cfg, plans, args)
    changes = [f"mode {args.modes[0]}"] if args.modes and args.modes[0] != "ensemble" else []
    changes += [f"true {args.oracle} instead of predicted ones"] if args.oracle else []
    outcomes, report = [], None
    for plan in plans:
        vocabulary = dataset_vocabulary(plan.dataset, folder)
        results = evaluate(
            model,
            plan.cfg,
            plan.dataset,
            modes=modes,
            training_vocabulary=model.seen_vocabulary,
            vocabulary=vocabulary,
            output_dir=args.output,
            max_images=args.first,
            save_predictions=True,
            resume=args.resume,
            oracle=ORACLES.get(args.oracle),
        )
        if is_main_process():
            logger.info("%s, percent\n%s", plan.dataset.name, format_table({plan.dataset.name: results}))
            num_images = min(plan.num_images, args.first or plan.num_images)
            outcomes.append(Outcome(plan, vocabulary, num_images, results))
            notes = notes_of(cfg, args, model, time.perf_counter() - start)
            report = report_of(outcomes, training=training, missing=missing, notes=notes, changes=changes)
            write_json(args.output / "results.json", report.as_dict(), indent=1)
            markdown = report.markdown().encode()
            write_atomically(args.output / "results.md", lambda file, markdown=markdown: file.write(markdown))
    if report is not None and args.images:
        logger.info("page with images: %s", make_page(report, outcomes, args))
    return report


def show_oracles(model: FCCLIP, cfg: CfgNode, plans: Sequence[Plan], args: argparse.Namespace) -> None:
    """The table of all oracles of each data set."""
    found = {}
    for plan in plans:
        results = evaluate(
            model,
            plan.cfg,
            plan.dataset,
            modes=oracle_modes(test_modes(cfg)),
            training_vocabulary=model.seen_vocabulary,
            vocabulary=dataset_vocabulary(plan.dataset, cfg.MODEL.FC_CLIP.VOCABULARIES),
            max_images=args.first,
            oracle=EveryOracle,
        )
        if is_main_process():
            found[plan.dataset.name] = results
            logger.info("%s, percent\n%s", plan.dataset.name, oracle_table(results))
            write_json(args.output / "oracles.json", without_nan(found), indent=1)


def make_page(report: Report, outcomes: Sequence[Outcome], args: argparse.Namespace) -> Path:
    """The page with images of the first mode."""
    sets = []
    for outcome in outcomes:
        dataset = outcome.plan.dataset
        folders = mode_folders(args.output / dataset.name, tuple(outcome.results))
        sets.append((dataset, next(iter(folders.values()))))
    title = "Zero-shot evaluation" + (f" with true {args.oracle}" if args.oracle else "")
    return write_page(report, sets, args.output / "page", images=args.images, title=title)


def notes_of(cfg: CfgNode, args: argparse.Namespace, model: FCCLIP, seconds: float) -> dict[str, str]:
    """With what it was evaluated."""
    environment = environment_report(resolve_device(cfg.MODEL.DEVICE))
    clip = frozen_notes(model)["clip"]
    machine = [environment[name] for name in ("device", "GPU") if name in environment]
    return {
        "weights": str(args.weights),
        "config": f"{args.config_file or 'the one of the weights'} {' '.join(args.opts)}".strip(),
        "ensemble": str(test_modes(cfg)["ensemble"]),
        **({"images": f"only the first {args.first} of each data set"} if args.first else {}),
        **({"oracle": f"true {args.oracle} instead of predicted ones"} if args.oracle else {}),
        "mIoU rule": MIOU_RULE,
        "CLIP": f"{clip.get('architecture')}, {clip.get('pretrained') or 'no tag'}, weights {clip['weights'][:12]}",
        "versions": ", ".join(f"{name} {environment[name]}" for name in ("fcclip", "python", *_LIBRARIES)),
        "commit": current_commit(),
        "machine": f"{', '.join(machine)}, {get_world_size()} process(es)",
        "time": duration(seconds),
    }


if __name__ == "__main__":
    sys.exit(run_program(main))
