"""Chooses alpha and beta of the geometric ensemble on one data set, from a single pass of the network over it.

    python tools/sweep_ensemble.py --config-file configs/shapes/fcclip_shapes.yaml --dataset shapes_tune \\
        --weights shapes_fcclip.safetensors [--alphas 0 0.2 0.4] [--betas 0.6 0.8 1] [--opts KEY VALUE ...]

Choose on a set that is not reported, such as shapes_tune; the pair with the best PQ over all classes is printed last.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fcclip.config import load_config
from fcclip.data import get_dataset
from fcclip.engine import load_weights
from fcclip.evaluation import evaluate
from fcclip.modeling import build_model

STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints PQ of all, seen and unseen classes for every pair, then the best pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a panoptic data set that is not reported")
    parser.add_argument("--weights", metavar="FILE", help="default: the config's MODEL.WEIGHTS")
    parser.add_argument(
        "--alphas", nargs="+", type=float, default=STEPS, help="for seen classes (default: %(default)s)"
    )
    parser.add_argument("--betas", nargs="+", type=float, default=STEPS, help="for unseen ones (default: %(default)s)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides")
    args = parser.parse_args(arguments)
    switches = ("SEMANTIC_ON", "False", "INSTANCE_ON", "False", "PANOPTIC_ON", "True")
    test = [f"MODEL.MASK_FORMER.TEST.{word}" if word.endswith("_ON") else word for word in switches]
    cfg = load_config(args.config_file, [*test, *args.opts])
    model = build_model(cfg)
    load_weights(model, args.weights or cfg.MODEL.WEIGHTS)

    pairs = {f"{alpha:g} {beta:g}": (alpha, beta) for alpha in args.alphas for beta in args.betas}
    dataset = get_dataset(args.dataset)
    results = evaluate(model, cfg, dataset, modes=pairs, training_vocabulary=model.train_vocabulary)
    quality = {pairs[name]: tasks["panoptic_seg"] for name, tasks in results.items()}

    table = Table(title=f"PQ on {args.dataset}, percent: all / seen / unseen")
    table.add_column("alpha \\ beta")
    for beta in args.betas:
        table.add_column(f"{beta:g}", justify="right")
    for alpha in args.alphas:
        cells = [quality[alpha, beta] for beta in args.betas]
        table.add_row(
            f"{alpha:g}", *(f"{cell['PQ']:.1f} / {cell['PQ_seen']:.1f} / {cell['PQ_unseen']:.1f}" for cell in cells)
        )
    Console(width=20 + 24 * len(args.betas)).print(table)
    best = max(quality, key=lambda pair: quality[pair]["PQ"])
    print(
        f"best PQ {quality[best]['PQ']:.2f}: MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_ALPHA {best[0]:g} "
        f"MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_BETA {best[1]:g}"
    )
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
