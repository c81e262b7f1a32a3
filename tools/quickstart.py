"""The whole way on the shapes world: renders it, trains, evaluates zero-shot, draws, prints one table.

    python tools/quickstart.py [--output FOLDER] [--short]

Every stage is what a user would call: datasets/prepare_shapes.py, train_net.py, fcclip.evaluation, fcclip.Segmenter.
The length is given in images and iterations, never in time. `--short` only proves that every stage runs; its numbers
mean nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from PIL import Image
from stages import REPOSITORY, call

from fcclip import Segmenter
from fcclip.config import load_config, resolve_device
from fcclip.data import dataset_vocabulary, get_dataset, read_id_map, read_image
from fcclip.errors import UserError, is_users, run_program
from fcclip.evaluation import evaluate, format_table, write_results
from fcclip.modeling import build_model, test_modes
from fcclip.ops import build_advice
from fcclip.structures import Segment
from fcclip.visualization import contact_sheet, draw_panoptic
from fcclip.weights import load_weights

CONFIG = "configs/shapes/fcclip_shapes.yaml"
SEED = 0  # of the world
SETS = ("shapes_val", "shapes_val_seen", "shapes_val_unseen")
ROWS_DRAWN = 4  # images of each set on its sheet

SHORT_RENDER = ("--images", "40")
SHORT_IMAGES = 8  # evaluated of each set
SHORT_TRAIN = ("SOLVER.MAX_ITER", "20", "SOLVER.STEPS", "(15,)", "SOLVER.IMS_PER_BATCH", "4")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder (default: output/quickstart, with --short output/short)")
    parser.add_argument("--short", action="store_true", help="few images and few iterations")
    args = parser.parse_args(arguments)
    output = (args.output or Path("output", "short" if args.short else "quickstart")).expanduser().resolve()
    os.environ["DETECTRON2_DATASETS"] = str(output / "datasets")
    weights, results_file = output / "train" / "model_final.pth", output / "results.json"
    short_render, short_train = (SHORT_RENDER, SHORT_TRAIN) if args.short else ((), ())
    seconds: dict[str, float] = {}

    with stage("render", seconds):
        cfg = load_config(REPOSITORY / CONFIG, ["MODEL.WEIGHTS", str(weights), *short_train])
        for old in (weights, results_file):  # of an earlier run, so that nothing old is taken for new
            old.unlink(missing_ok=True)
        if advice := build_advice(resolve_device(cfg.MODEL.DEVICE)):
            print(f"advice: {advice}")
        call("datasets/prepare_shapes.py", "--seed", str(SEED), "--out", str(output / "datasets"), *short_render)
    batch, devices = cfg.SOLVER.IMS_PER_BATCH, max(1, torch.cuda.device_count())
    gpus = str(max(count for count in range(1, devices + 1) if batch % count == 0))
    with stage("train", seconds):
        overrides = ("OUTPUT_DIR", str(output / "train"), "DATASETS.TEST", "()", *short_train)  # no evaluation yet
        call("train_net.py", "--config-file", CONFIG, "--num-gpus", gpus, *overrides)
    with stage("evaluate", seconds):
        sets = evaluate_sets(cfg, SHORT_IMAGES if args.short else None)
    with stage("draw", seconds):
        segmenter = Segmenter(cfg)
        sheets = [draw_set(segmenter, name, output / "images") for name in SETS]

    write_results(results_file, sets, seconds={name: round(value, 1) for name, value in seconds.items()})
    title = f"zero-shot on the shapes world after {cfg.SOLVER.MAX_ITER} iterations, percent"
    print(format_table(sets, title=title))
    print(f"results: {results_file}")
    for sheet in sheets:
        print(f"images:  {sheet}")
    return 0


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announces a stage and notes how long it took; a failure names the stage."""
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        if not is_users(error):
            raise
        raise UserError(f"the quickstart failed in stage '{name}': {error}") from error
    seconds[name] = time.perf_counter() - start
    print(f"== {name}: {seconds[name]:.0f} s", flush=True)


def evaluate_sets(cfg: CfgNode, max_images: int | None) -> dict:
    """{set: {mode: {task: {metric: percent}}}}, all modes from one pass of the network over each set."""
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS)
    options = {"modes": test_modes(cfg), "training_vocabulary": model.seen_vocabulary, "max_images": max_images}
    return {name: evaluate(model, cfg, get_dataset(name), **options) for name in SETS}


def draw_set(segmenter: Segmenter, name: str, folder: Path) -> Path:
    """Draws the first images of a data set: image, ground truth, prediction. Returns the sheet's file."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = get_dataset(name)
    vocabulary = dataset_vocabulary(dataset)
    rows = []
    for record in dataset.records()[:ROWS_DRAWN]:
        image = read_image(record["file_name"])
        ids = read_id_map(record["pan_seg_file_name"])
        truth = [Segment(s["id"], s["category_id"], s["isthing"], 1.0, s["area"]) for s in record["segments_info"]]
        drawn_truth = draw_panoptic(image, ids, truth, vocabulary.class_names, scores=False)
        rows.append([image, drawn_truth, segmenter(image, vocabulary).draw()])
    sheet = folder / f"{name}.png"
    Image.fromarray(contact_sheet(rows, titles=("image", "ground truth", "prediction"))).save(sheet)
    return sheet


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fcclip").setLevel(logging.INFO)
    sys.exit(run_program(main))
