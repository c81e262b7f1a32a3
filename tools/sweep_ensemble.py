"""Chooses alpha and beta of the geometric ensemble on one data set, from a single pass of the network over it.

    python tools/sweep_ensemble.py --config-file configs/shapes/fcclip_shapes.yaml --dataset shapes_tune \\
        --weights shapes_fcclip.safetensors [--alphas 0 0.2 0.4] [--betas 0.6 0.8 1] [--metric mIoU] [--first N] \\
        [--opts KEY VALUE ...]

Choose on a set that is not reported, such as shapes_tune; the best pair over all classes is printed last. Any data set
will do, registered or a YAML file, with the settings it was published with. alpha = beta = 0 is the in-vocabulary mode,
alpha = beta = 1 the out-of-vocabulary one.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fcclip.config import load_config
from fcclip.data import get_dataset
from fcclip.errors import InputError, run_program
from fcclip.evaluation import evaluate, format_value
from fcclip.modeling import build_model
from fcclip.reports.zero_shot import benchmark, set_config
from fcclip.weights import load_weights

STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
METRICS = {"PQ": ("panoptic", "panoptic_seg"), "AP": ("instance", "segm"), "mIoU": ("semantic", "sem_seg")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the metric of all, seen and unseen classes for every pair, then the best pair."""
    args = parse_arguments(arguments)
    dataset = get_dataset(args.dataset)
    heads = dataset.evaluators
    metric = args.metric or next(name for name in ("PQ", "mIoU", "AP") if METRICS[name][0] in heads)
    head, task = METRICS[metric]
    if head not in heads:
        raise InputError(f"data set '{dataset.name}' is evaluated for {', '.join(heads)}, which gives no {metric}")
    switches = {f"MODEL.MASK_FORMER.TEST.{name.upper()}_ON": str(name == head) for name, _ in METRICS.values()}
    cfg = load_config(args.config_file, [*itertools.chain(*switches.items()), *args.opts])
    model = build_model(cfg)
    load_weights(model, args.weights or cfg.MODEL.WEIGHTS)
    cfg = set_config(cfg, dataset, given=[*switches, *args.opts[::2]])

    pairs = {f"{alpha:g} {beta:g}": (alpha, beta) for alpha in args.alphas for beta in args.betas}
    results = evaluate(
        model, cfg, dataset, modes=pairs, training_vocabulary=model.seen_vocabulary, max_images=args.first
    )
    quality = {pairs[name]: tasks[task] for name, tasks in results.items()}

    print(f"{metric} on {dataset.name}, percent: all / seen / unseen")
    table = Table()
    table.add_column("alpha \\ beta")
    for beta in args.betas:
        table.add_column(f"{beta:g}", justify="right")
    for alpha in args.alphas:
        cells = [quality[alpha, beta] for beta in args.betas]
        table.add_row(f"{alpha:g}", *(figures(cell, metric) for cell in cells))
    Console(width=20 + 24 * len(args.betas)).print(table)
    best = max(quality, key=lambda pair: -math.inf if math.isnan(quality[pair][metric]) else quality[pair][metric])
    print(
        f"best {metric} {quality[best][metric]:.2f}: MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_ALPHA {best[0]:g} "
        f"MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_BETA {best[1]:g}"
    )
    if benchmark(dataset.name) is not None:
        print(f"'{dataset.name}' is reported in the model zoo: what is chosen on it looks better than it is")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    add("--dataset", required=True, metavar="NAME", help="a data set that is not reported, or a YAML")
    add("--weights", metavar="FILE", help="default: the config's MODEL.WEIGHTS")
    add("--alphas", nargs="+", type=float, default=STEPS, help="for seen classes (default: %(default)s)")
    add("--betas", nargs="+", type=float, default=STEPS, help="for unseen ones (default: %(default)s)")
    add("--metric", choices=METRICS, help="default: PQ where there is one, else mIoU, else AP")
    add("--first", type=int, metavar="N", help="only the first images")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides")
    return parser.parse_args(arguments)


def figures(metrics: dict[str, float], metric: str) -> str:
    """All / seen / unseen."""
    return " / ".join(format_value(metrics.get(metric + group, math.nan)) for group in ("", "_seen", "_unseen"))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
