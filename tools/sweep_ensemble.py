"""Chooses alpha, beta and void trust of the ensemble on one data set, from a single pass of the network over it.

    python tools/sweep_ensemble.py --config-file configs/shapes/fcclip_shapes.yaml --dataset shapes_tune \\
        --weights shapes_fcclip.safetensors [--alphas 0 0.2 0.4] [--betas 0.6 0.8 1] [--trusts 0 0.5] \\
        [--scopes unseen all] [--metric PQ mIoU] [--first N] [--opts KEY VALUE ...]

Choose on a set that is not reported, such as shapes_tune: the best over all classes is printed last, but never of a
benchmark or of the config's test sets, of which only the table is shown. Any data set will do, registered or a YAML
file, with the settings it was published with. alpha = beta = 0 is the in-vocabulary mode, alpha = beta = 1 the
out-of-vocabulary one. Void trust (docs/beyond.md) is for the outputs whose metrics are swept.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from fcclip.config import load_config
from fcclip.data import get_dataset
from fcclip.errors import InputError, run_program
from fcclip.evaluation import evaluate, format_value
from fcclip.modeling import Ensemble, build_model
from fcclip.reports.zero_shot import benchmark, default_sets, set_config
from fcclip.weights import load_weights

STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# metric -> evaluator, task, head
METRICS = {
    "PQ": ("panoptic", "panoptic_seg", "panoptic"),
    "AP": ("instance", "segm", "instances"),
    "mIoU": ("semantic", "sem_seg", "semantic"),
}
Key = tuple[float, float, float, str]  # alpha, beta, void trust and its scope


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints metrics of all, seen and unseen classes for every combination, then the best one by the first metric."""
    args = parse_arguments(arguments)
    dataset = get_dataset(args.dataset)
    own = dataset.evaluators
    metrics = args.metric or [next(name for name in ("PQ", "mIoU", "AP") if METRICS[name][0] in own)]
    for metric in metrics:
        if METRICS[metric][0] not in own:
            raise InputError(f"data set '{dataset.name}' is evaluated for {', '.join(own)}, which gives no {metric}")
    switches = {
        f"MODEL.MASK_FORMER.TEST.{evaluator.upper()}_ON": str(name in metrics)
        for name, (evaluator, _, _) in METRICS.items()
    }
    cfg = load_config(args.config_file, [*itertools.chain(*switches.items()), *args.opts])
    model = build_model(cfg)
    load_weights(model, args.weights or cfg.MODEL.WEIGHTS)
    cfg = set_config(cfg, dataset, given=[*switches, *args.opts[::2]])

    trusts = dict.fromkeys((trust, scope if trust else "") for trust in args.trusts for scope in args.scopes)
    heads = tuple(METRICS[metric][2] for metric in metrics)
    modes: dict[Key, Ensemble] = {
        (alpha, beta, trust, scope): Ensemble(alpha, beta, trust, scope != "all", heads)
        for trust, scope in trusts
        for alpha in args.alphas
        for beta in args.betas
    }
    named = {str(ensemble): ensemble for ensemble in modes.values()}
    results = evaluate(
        model, cfg, dataset, modes=named, training_vocabulary=model.seen_vocabulary, max_images=args.first
    )
    for metric in metrics:
        quality = {key: results[str(ensemble)][METRICS[metric][1]] for key, ensemble in modes.items()}
        print(f"{metric} on {dataset.name}, percent: all / seen / unseen")
        print_tables(quality, metric, args, trusts)
        if metric == metrics[0]:
            best = max(quality, key=lambda key: -math.inf if math.isnan(value := quality[key][metric]) else value)
            told = f"best {metric} {quality[best][metric]:.2f}: {keys_of(best, heads)}"
    if benchmark(dataset.name) is not None or dataset.name in default_sets(cfg):
        told = f"'{dataset.name}' is reported: nothing is recommended by it. Choose on another set, such as shapes_tune"
    print(told)
    return 0


def print_tables(
    quality: dict[Key, dict[str, float]], metric: str, args: argparse.Namespace, trusts: Iterable[tuple[float, str]]
) -> None:
    """A table of alphas and betas for each void trust."""
    for trust, scope in trusts:
        table = Table(title=f"void trust {trust:g}, {scope}" if trust else None)
        table.add_column("alpha \\ beta")
        for beta in args.betas:
            table.add_column(f"{beta:g}", justify="right")
        for alpha in args.alphas:
            cells = [quality[alpha, beta, trust, scope] for beta in args.betas]
            table.add_row(f"{alpha:g}", *(figures(cell, metric) for cell in cells))
        Console(width=20 + 24 * len(args.betas)).print(table)


def keys_of(best: Key, heads: tuple[str, ...]) -> str:
    """A combination as config keys and values."""
    alpha, beta, trust, scope = best
    values = {"GEOMETRIC_ENSEMBLE_ALPHA": f"{alpha:g}", "GEOMETRIC_ENSEMBLE_BETA": f"{beta:g}"}
    if trust:
        values |= {"CLIP_TRUST_WEIGHT": f"{trust:g}", "CLIP_TRUST_SCOPE": scope, "CLIP_TRUST_HEADS": f'"{heads}"'}
    return " ".join(f"MODEL.FC_CLIP.{name} {value}" for name, value in values.items())


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    add("--dataset", required=True, metavar="NAME", help="a data set that is not reported, or a YAML")
    add("--weights", metavar="FILE", help="default: the config's MODEL.WEIGHTS")
    add("--alphas", nargs="+", type=float, default=STEPS, help="for seen classes (default: %(default)s)")
    add("--betas", nargs="+", type=float, default=STEPS, help="for unseen ones (default: %(default)s)")
    add("--trusts", nargs="+", type=float, default=(0.0,), help="void trust (default: 0, none)")
    add("--scopes", nargs="+", choices=("unseen", "all"), default=("unseen",), help="of void trust (default: unseen)")
    add("--metric", nargs="+", choices=METRICS, help="default: PQ where there is one, else mIoU, else AP")
    add("--first", type=int, metavar="N", help="only the first images")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides")
    return parser.parse_args(arguments)


def figures(metrics: dict[str, float], metric: str) -> str:
    """All / seen / unseen."""
    return " / ".join(format_value(metrics.get(metric + group, math.nan)) for group in ("", "_seen", "_unseen"))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
