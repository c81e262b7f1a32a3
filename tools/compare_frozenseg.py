"""FC-CLIP and FrozenSeg on the shapes world, trained equally long, with the ablations of FrozenSeg's table 4.

    python tools/compare_frozenseg.py [--output FOLDER] [--seeds 1 2 3] [--dataset shapes_val] [-- KEY VALUE ...]

Every stage is what a user would call: datasets/prepare_shapes.py, train_net.py, fcclip.evaluation. Masks for the
OpenSeg ensemble come from the shipped encoder of the shapes world (tools/train_shapes_sam.py), not from Meta's. Each
model is trained once with each seed; keys behind -- change all trainings alike. Called again, it goes on where it was
interrupted. Writes results.json and table.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages import REPOSITORY, call

from fcclip.config import load_config
from fcclip.data import get_dataset
from fcclip.errors import run_program
from fcclip.evaluation import evaluate
from fcclip.evaluation.results import current_commit
from fcclip.files import read_json, write_atomically, write_json
from fcclip.modeling import build_model
from fcclip.weights import load_weights

CONFIGS = "configs/shapes"
NO_QUERY, NO_FEATURE = (f"MODEL.MASK_FORMER.SAM_{name}_FUSE_LAYER 3".split() for name in ("QUERY", "FEATURE"))
TRAININGS = {  # name -> config, and keys over it
    "fcclip": ("fcclip_shapes.yaml", []),
    "query": ("frozenseg_shapes.yaml", NO_FEATURE),
    "both": ("frozenseg_shapes.yaml", []),
}
# Row of the table -> training, config and keys that it is evaluated with, ensemble.
ROWS = {
    "FC-CLIP": ("fcclip", "fcclip_shapes.yaml", [], False),
    "FC-CLIP, ensemble": ("fcclip", "frozenseg_shapes.yaml", [*NO_QUERY, *NO_FEATURE], True),
    "query injector": ("query", "frozenseg_shapes.yaml", NO_FEATURE, False),
    "query and feature injector": ("both", "frozenseg_shapes.yaml", [], False),
    "query and feature injector, ensemble": ("both", "frozenseg_shapes.yaml", [], True),
}
METRICS = {  # column -> task, and metrics of seen and unseen classes
    "PQ": ("panoptic_seg", "PQ_seen", "PQ_unseen"),
    "AP": ("segm", "AP_seen", "AP_unseen"),
    "mIoU": ("sem_seg", "mIoU_seen", "mIoU_unseen"),
    **{f"recall {t}": ("recall", f"S_Recall@IoU={t}", f"U_Recall@IoU={t}") for t in ("0.50", "0.75", "0.90")},
}


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    output = args.output.expanduser().resolve()
    os.environ["DETECTRON2_DATASETS"] = str(output / "world")
    call("datasets/prepare_shapes.py", "--seed", 0, "--images", args.images, "--out", output / "world")
    masks = output / "masks" / args.dataset
    if not masks.is_dir():
        call("tools/train_shapes_sam.py", "--dataset", args.dataset, "--masks", masks)
    path = output / "results.json"
    results = read_json(path, what="results") if path.is_file() else {"commit": current_commit(), "rows": {}}
    results |= {"dataset": args.dataset, "overrides": args.opts}
    for seed in args.seeds:
        for name, (config, keys) in TRAININGS.items():
            folder = output / f"{name}_{seed}"
            keys = [*keys, "SEED", str(seed), *args.opts, "DATASETS.TEST", "()", "OUTPUT_DIR", str(folder)]
            if not (folder / "model_final.pth").is_file():
                call("train_net.py", "--resume", "--config-file", f"{CONFIGS}/{config}", *keys)
            for label, (training, *evaluation) in ROWS.items():
                figures = results["rows"].setdefault(label, {})
                if training == name and str(seed) not in figures:
                    figures[str(seed)] = measure(folder / "model_final.pth", *evaluation, masks, args)
                    write_json(path, results, indent=1)
    table = format_rows(results["rows"])
    write_atomically(output / "table.md", lambda file: file.write(table.encode()))
    print(f"{args.dataset}, percent, seen / unseen classes\n\n{table}\nresults: {path}")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/frozenseg_shapes"), help="folder (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the trainings (default: %(default)s)")
    add("--images", type=int, default=2000, help="training images (default: %(default)s)")
    add("--dataset", default="shapes_val", help="to evaluate on; shapes_tune for choices (default: %(default)s)")
    add("--first", type=int, metavar="N", help="evaluate on the first images only")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys for every training, after --")
    return parser.parse_args(arguments)


def measure(
    weights: Path, config: str, keys: Sequence[str], ensemble: bool, masks: Path, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Column -> [seen, unseen], percent; those that the ensemble does not change are left out with it."""
    test = "MODEL.MASK_FORMER.TEST"
    opts = ["MODEL.WEIGHTS", str(weights), f"{test}.RECALL_ON", "True", *keys, *args.opts]
    if ensemble:
        opts += ["TEST.USE_SAM_MASKS", "True", "TEST.SAM_MASKS_DIR", str(masks.parent)]
        opts += ["TEST.PKL_SAM_MODEL_NAME", masks.name, f"{test}.PANOPTIC_ON", "False", f"{test}.INSTANCE_ON", "False"]
    cfg = load_config(REPOSITORY / CONFIGS / config, opts)
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS)
    options = {"training_vocabulary": model.seen_vocabulary, "max_images": args.first}
    [tasks] = evaluate(model, cfg, get_dataset(args.dataset), **options).values()
    available = {name: column for name, column in METRICS.items() if column[0] in tasks}
    return {name: [tasks[task][metric] for metric in metrics] for name, (task, *metrics) in available.items()}


def format_rows(rows: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    """A Markdown table: mean over seeds, and behind ± their standard deviation."""
    lines = ["| | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for label, seeds in rows.items():
        cells = []
        for name in METRICS:
            groups = list(zip(*(figures[name] for figures in seeds.values() if name in figures)))
            cells.append(" / ".join(mean_and_spread(values) for values in groups) or "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(run_program(main))
