"""Fusioner by its published flags: trains or tests a fold of PASCAL-5^i or COCO-20^i; train_net.py does the work.

    python tools/fusioner.py train --dataset_name pascal --dataset_root DIR --fold 0 [--output_dir DIR] [--resume]
    python tools/fusioner.py test --dataset_name pascal --dataset_root DIR --fold all --load_ckpt_path RUN_{fold}.pth

A training writes checkpoints, log and metrics into the output folder, a test results.json; `--fold all` does all four,
one after the other ({fold} in a path stands for the number), and prints the mean. Numbers are in percent. Unseen means:
the novel classes were never prompted in training; images that show them may have been in it (not with `--strict`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fcclip.data import get_dataset
from fcclip.errors import run_program

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"
BENCHMARKS = {"pascal": "pascal_5i", "coco": "coco_20i"}
PUBLISHED_STATISTICS = {  # mean and standard deviation, 0..1
    "pascal": ((0.4554, 0.4298, 0.3955), (0.1181, 0.1189, 0.1338)),
    "coco": ((0.4650, 0.4357, 0.3973), (0.1152, 0.1153, 0.1352)),
}
# flag -> (key, type, default); None: the key's own
PUBLISHED = {
    "batch_size": ("SOLVER.IMS_PER_BATCH", int, 32),
    "aug_prob": ("INPUT.PAIRS.AUG_PROB", float, 0.5),
    "fusion_lr": ("SOLVER.BASE_LR", float, 0.001),
    "fusion_min_lr": ("SOLVER.BASE_LR_END", float, 2e-6),
    "decoder_lr": ("SOLVER.DECODER_LR", float, 0.001),
    "wd": ("SOLVER.WEIGHT_DECAY", float, 0.01),
    "wd_end": ("SOLVER.WEIGHT_DECAY_END", float, 0.4),
    "drop_path_rate": ("MODEL.FUSIONER.DROP_PATH_RATE", float, 0.0),
    "transformer_dropout": ("MODEL.FUSIONER.DROPOUT", float, 0.0),
    "transformer_heads": ("MODEL.FUSIONER.HEADS", int, 8),
    "transformer_layers": ("MODEL.FUSIONER.LAYERS", int, 12),
    "transformer_width": ("MODEL.FUSIONER.WIDTH", int, 512),
    "temperature": ("MODEL.FUSIONER.TEMPERATURE", float, 0.07),
    "device": ("MODEL.DEVICE", str, "auto"),
    "seed": ("SEED", int, 0),
    "num_workers": ("DATALOADER.NUM_WORKERS", int, 4),
}


PAIRS_HELP = (
    "pairs of an image and a class that it shows, which alone is prompted (default: all of PASCAL, first1000 of COCO); "
    "or multiclass: each image once, all novel classes of the fold prompted"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    args, rest = parse_arguments(arguments)
    folds = range(4) if args.fold == "all" else [int(args.fold)]
    results: dict[int, dict[str, float]] = {}
    for fold in folds:
        folder = Path(
            args.output_dir.format(fold=fold) if "{fold}" in args.output_dir else f"{args.output_dir}/fold{fold}"
        )
        command = [sys.executable, str(TRAIN_NET), *flags(args), *overrides(args, fold, folder), *rest]
        environment = {**os.environ, "DETECTRON2_DATASETS": str(args.dataset_root)}
        if code := subprocess.run(command, env=environment, check=False).returncode:
            return code
        results[fold] = metrics_of(folder)
    print_results(results, strict=args.strict, names=args.names, pairs=args.test_pairs)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The published flags and ours; KEY VALUE pairs may follow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("action", choices=("train", "test"))
    add("--dataset_name", choices=tuple(BENCHMARKS), default="coco")
    add("--dataset_root", type=Path, default=Path("./data"), help="folder of VOCdevkit, or of the COCO folders")
    add("--fold", choices=("0", "1", "2", "3", "all"), default="0")
    add("--target_size", type=int, nargs=2, default=(224, 224), help="a square; of images in training, and windows")
    add("--scale_range", type=float, nargs=2, default=(0.5, 1.0))
    add("--warmup_epochs", type=int, default=10)
    add("--training_epochs", type=int, default=500)
    add("--beta1", type=float, default=0.9, help="0.9, which alone is built")
    add("--load_ckpt_path", help="weights to test, or to start a training from")
    add("--test_with_org_resolution", action="store_true", help="sliding windows; else images are squashed")
    for flag, (_, kind, default) in PUBLISHED.items():
        add(f"--{flag}", type=kind, default=default)
    add("--output_dir", default="output/fusioner", help="a folder fold0, … is made in it, unless {fold} is in the name")
    add("--config", default="fusioner/Base-Fusioner.yaml", help="other encoders by another YAML")
    add("--resume", action="store_true")
    add("--dry-run", action="store_true")
    add("--num-gpus", type=int, default=1)
    add("--amp", action="store_true", help="mixed precision")
    add("--eval_every", type=int, default=10, metavar="EPOCHS")
    add("--test_pairs", choices=("first1000", "uniform1000", "all", "multiclass"), help=PAIRS_HELP)
    add("--windows", choices=("shift", "pad"), default="shift", help="at the border; published: pad")
    add("--norm", choices=("clip", "reference"), default="clip", help="statistics of pixels; published: reference")
    add("--border", choices=("ignore", "background"), default="ignore", help="of augmentation; published: background")
    add("--names", choices=("reference", "readable"), default="reference", help="published: reference")
    add("--strict", action="store_true", help="no training image shows a novel class; published: they may")
    args, rest = parser.parse_known_args(arguments)
    if args.target_size[0] != args.target_size[1]:
        parser.error(f"--target_size must be a square, got {args.target_size[0]} x {args.target_size[1]}")
    if args.beta1 != 0.9:
        parser.error(f"--beta1 is 0.9 in every optimiser that is built, got {args.beta1}")
    if args.action == "test" and not args.load_ckpt_path:
        parser.error("a test needs --load_ckpt_path")
    args.test_pairs = args.test_pairs or {"pascal": "all", "coco": "first1000"}[args.dataset_name]
    return args, rest


def flags(args: argparse.Namespace) -> list[str]:
    """Of train_net.py."""
    switches = {"--eval-only": args.action == "test", "--resume": args.resume, "--dry-run": args.dry_run}
    chosen = [flag for flag, is_on in switches.items() if is_on]
    return ["--config-file", args.config, "--num-gpus", str(args.num_gpus), *chosen]


def overrides(args: argparse.Namespace, fold: int, folder: Path) -> list[str]:
    """KEY VALUE of a fold."""
    benchmark = BENCHMARKS[args.dataset_name] + ("_readable" if args.names == "readable" else "")
    train = f"{benchmark}_fold{fold}_train" + ("_strict" if args.strict else "")
    test = f"{benchmark}_fold{fold}_val" + ("" if args.test_pairs == "all" else f"_{args.test_pairs}")
    side = args.target_size[0]
    keys = {
        "OUTPUT_DIR": str(folder),
        "DATASETS.TRAIN": (train,),
        "DATASETS.TEST": (test,),
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(get_dataset(train).own_vocabulary()),
        "MODEL.WEIGHTS": (args.load_ckpt_path or "").format(fold=fold),
        "MODEL.FUSIONER.WINDOW": side if args.test_with_org_resolution else 0,
        "MODEL.FUSIONER.WINDOW_BORDER": args.windows,
        "INPUT.SQUARE_TEST": 0 if args.test_with_org_resolution else side,
        "INPUT.IMAGE_SIZE": side,
        "INPUT.PAIRS.SCALE_RANGE": list(args.scale_range),
        "INPUT.PAIRS.JITTER": {"pascal": 0.5, "coco": 0.2}[args.dataset_name],
        "INPUT.PAIRS.ROTATE": {"pascal": 20.0, "coco": 10.0}[args.dataset_name],
        "INPUT.PAIRS.BORDER": args.border,
        "SOLVER.AMP.ENABLED": args.amp,
        **{key: getattr(args, flag) for flag, (key, _, _) in PUBLISHED.items()},
    }
    if args.norm == "reference":
        mean, deviation = PUBLISHED_STATISTICS[args.dataset_name]
        keys |= {"MODEL.PIXEL_MEAN": [255 * value for value in mean]}
        keys |= {"MODEL.PIXEL_STD": [255 * value for value in deviation]}
    if args.action == "train":
        pairs = len(get_dataset(train, args.dataset_root).annotations())
        epoch = math.ceil(pairs / args.batch_size)
        keys |= {
            "SOLVER.MAX_ITER": epoch * (args.warmup_epochs + args.training_epochs),
            "SOLVER.WARMUP_ITERS": epoch * args.warmup_epochs,
            "SOLVER.CHECKPOINT_PERIOD": epoch,
            "TEST.EVAL_PERIOD": epoch * args.eval_every,
        }
    return [word for key, value in keys.items() for word in (key, str(value))]


def metrics_of(folder: Path) -> dict[str, float]:
    """Metrics of the only data set of a run; {}: a dry run."""
    newest = max((folder / "inference").glob("*_fold?_val*/results.json"), key=os.path.getmtime, default=None)
    if newest is None:
        return {}
    modes = json.loads(newest.read_text(encoding="utf-8"))["results"]
    [metrics] = next(iter(modes.values())).values()  # all modes are the same: there is no ensemble
    return metrics


def print_results(results: Mapping[int, Mapping[str, float]], *, strict: bool, names: str, pairs: str) -> None:
    """A line a fold, and the mean of all four."""
    told = {fold: metrics for fold, metrics in results.items() if metrics}
    for fold, metrics in told.items():
        print(f"fold {fold}: {scores(metrics)}")
    if len(told) == 4:
        means = {name: sum(metrics[name] for metrics in told.values()) / 4 for name in metrics if "IoU-" not in name}
        print(f"mean of the folds: {scores(means)}")
    if told:
        seen = "no training image shows a novel class" if strict else "training images may show novel classes"
        prompts = "all novel classes prompted" if pairs == "multiclass" else "one class prompted that is in the image"
        print(f"{prompts}; test: {pairs}; names: {names}; {seen}")


def scores(metrics: Mapping[str, float]) -> str:
    """All but those of single classes, which results.json has."""
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if "IoU-" not in name)


if __name__ == "__main__":
    sys.exit(run_program(main))
