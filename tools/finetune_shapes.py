"""Forgetting, seen on the shapes world: one fine-tuning by each method, one table, one figure.

    python tools/finetune_shapes.py [--output FOLDER] [--figure FILE] [--iterations N] [--methods plain replay distill]

The shipped segmenter, which was trained on the seen classes, learns the five orange shapes it has never seen from
images of another world in which nothing else is labelled: a data set of the user's own, described by a YAML file.
Every stage is what a user would call: datasets/prepare_shapes.py and train_net.py with FINETUNE.METHOD. Before and
after are measured on `shapes_val`, which holds all classes, and on own images. Called again, it goes on where it was
interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
import yaml
from stages import call

from fcclip.data import get_dataset, read_id_map
from fcclip.errors import run_program
from fcclip.evaluation import write_id_map
from fcclip.files import read_json, write_json
from fcclip.finetuning import figures_of, format_comparison
from fcclip.preparation.shapes_world import SETS
from fcclip.vocabulary import Vocabulary

CONFIG = "configs/shapes/fcclip_shapes.yaml"
WEIGHTS = "shapes_fcclip.safetensors"
OWN = ("orange square", "orange triangle", "orange star", "orange heart", "orange cross")
WORLD_SEED, OWN_SEED = 0, 1  # the world of the former data and of the tests; the one of the own images
OWN_SETS = tuple(name for name in SETS if name != "train")  # sets that show unseen classes, or may
METHODS = {"plain": (), "replay": ("FINETUNE.REPLAY_DATASETS", "('shapes_train',)"), "distill": ()}
COLOURS = {"before": "#b8b8b8", "plain": "#c44e52", "replay": "#4c72b0", "distill": "#55a868"}
GROUPS = {"own": "own classes (5, new)", "seen": "former classes (40)", "unseen": "unseen classes (15)"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/finetuning"), help="folder (default: %(default)s)")
    add("--figure", type=Path, help="image to write (default: finetuning.png in the folder)")
    add("--iterations", type=int, default=300, help="of each fine-tuning (default: %(default)s)")
    add("--images", type=int, default=2000, help="former training images (default: %(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys for every fine-tuning, after --")
    args = parser.parse_args(arguments)
    output = args.output.expanduser().resolve()
    results = run(output, args)
    for method, content in results.items():
        print(f"{method}:\n{format_comparison(*(figures_of(content[when]) for when in ('before', 'after')))}\n")
    figure = args.figure or output / "finetuning.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw(results, "shapes_val").savefig(figure, dpi=150)
    print(f"figure: {figure}")
    return 0


def run(output: Path, args: argparse.Namespace) -> dict[str, dict]:
    """Method -> the content of its finetune.json."""
    worlds = {"world": (WORLD_SEED, args.images), "own_world": (OWN_SEED, 1)}
    for name, (seed, images) in worlds.items():
        call("datasets/prepare_shapes.py", "--seed", seed, "--images", images, "--out", output / name)
    train = write_own_data(output / "own" / "train", output / "own_world", OWN_SETS)
    test = write_own_data(output / "own" / "test", output / "world", ("val",))
    os.environ["DETECTRON2_DATASETS"] = str(output / "world")
    results = {}
    for method in args.methods:
        folder = output / method
        call("train_net.py", "--resume", "--config-file", CONFIG, *overrides(method, train, test, folder, args))
        results[method] = read_json(folder / "finetune.json", what="results")
    return results


def overrides(method: str, train: Path, test: Path, folder: Path, args: argparse.Namespace) -> list[str]:
    """The command line of one fine-tuning."""
    keys = {
        "MODEL.WEIGHTS": WEIGHTS,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(OWN),
        "DATASETS.TRAIN": f"('{train}',)",
        "DATASETS.TEST": f"('{test}', 'shapes_val')",
        "FINETUNE.METHOD": method,
        "SOLVER.BASE_LR": 0.0005,
        "SOLVER.MAX_ITER": args.iterations,
        "SOLVER.STEPS": f"({args.iterations * 5 // 6},)",
        "SOLVER.WARMUP_ITERS": 20,
        "OUTPUT_DIR": folder,
    }
    return [str(part) for part in (*itertools.chain(*keys.items()), *METHODS[method], *args.opts)]


def write_own_data(folder: Path, world: Path, splits: Sequence[str]) -> Path:
    """Images of a world that show an orange shape, with these labelled and nothing else; returns the YAML."""
    vocabulary = Vocabulary.builtin("shapes")
    kept = [index for index, name in enumerate(vocabulary.class_names) if name in OWN]
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for split in splits:
        for record in get_dataset(f"shapes_{split}", world).records():
            segments = own_segments(record["segments_info"], kept)
            if not segments:
                continue
            number, source = len(images) + 1, Path(record["file_name"])
            stem = f"{split}_{source.stem}"
            (folder / "images" / f"{stem}.jpg").write_bytes(source.read_bytes())
            id_map = read_id_map(record["pan_seg_file_name"])
            own_ids = np.isin(id_map, [segment["id"] for segment in segments])
            write_id_map(folder / "labels" / f"{stem}.png", np.where(own_ids, id_map, 0))
            size = {"height": record["height"], "width": record["width"]}
            images.append({"id": number, "file_name": f"{stem}.jpg", **size})
            annotations.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})
    categories = [{"id": index + 1, "name": name, "isthing": 1} for index, name in enumerate(OWN)]
    write_json(folder / "labels.json", {"images": images, "annotations": annotations, "categories": categories})
    description = {
        "type": "panoptic",
        "images": "images",
        "annotations": "labels.json",
        "masks": "labels",
        "classes": [", ".join(vocabulary.synonyms[index]) for index in kept],
        "things": list(OWN),
    }
    path = folder / f"orange_{folder.name}.yaml"
    path.write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    print(f"{path}: {len(images)} images, {sum(len(image['segments_info']) for image in annotations)} orange shapes")
    return path


def own_segments(segments: Sequence[Mapping], kept: Sequence[int]) -> list[dict]:
    """Those of the kept classes, which are numbered anew from 1."""
    return [
        {"id": segment["id"], "category_id": kept.index(segment["category_id"]) + 1, "iscrowd": 0}
        | {key: segment[key] for key in ("area", "bbox")}
        for segment in segments
        if segment["category_id"] in kept
    ]


# ---- results ----


def draw(results: Mapping[str, Mapping], name: str) -> matplotlib.figure.Figure:
    """PQ, AP and mIoU of own, former and unseen classes of one data set, before and after each method."""
    start = figures_of(next(iter(results.values()))["before"])[name]
    bars = {"before": start} | {method: figures_of(content["after"])[name] for method, content in results.items()}
    figure = matplotlib.figure.Figure(figsize=(9.6, 3.1), layout="constrained")
    panels = figure.subplots(1, len(start), sharey=True)
    width = 0.8 / len(bars)
    for panel, metric in zip(panels, start):
        for index, (label, figures) in enumerate(bars.items()):
            places = np.arange(len(GROUPS)) + (index - (len(bars) - 1) / 2) * width
            heights = [figures[metric][group] for group in GROUPS]
            drawn = panel.bar(places, heights, width * 0.92, color=COLOURS[label], label=label)
            panel.bar_label(drawn, fmt="%.0f", fontsize=6.5, padding=1, color="#444444")
        panel.set_title(metric, fontsize=10)
        panel.set_xticks(range(len(GROUPS)), [text.replace(" (", "\n(") for text in GROUPS.values()], fontsize=7.5)
        panel.set_ylim(0, 100)
        panel.tick_params(axis="y", labelsize=7.5, length=0)
        panel.tick_params(axis="x", length=0)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_ylabel("percent", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(bars), fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fcclip").setLevel(logging.INFO)
    sys.exit(run_program(main))
