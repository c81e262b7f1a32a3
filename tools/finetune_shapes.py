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
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
import yaml
from PIL import Image

from fcclip.data import get_dataset, read_id_map
from fcclip.finetuning import format_comparison
from fcclip.preparation.shapes_world import SETS
from fcclip.vocabulary import Vocabulary

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = "configs/shapes/fcclip_shapes.yaml"
WEIGHTS = "shapes_fcclip.safetensors"
OWN = ("orange square", "orange triangle", "orange star", "orange heart", "orange cross")
WORLD_SEED, OWN_SEED = 0, 1  # the world of the former data and of the tests; the one of the own images
OWN_SETS = tuple(name for name in SETS if name != "train")  # sets that show unseen classes, or may
METHODS = {
    "plain": (),
    "replay": ("FINETUNE.REPLAY_DATASETS", "('shapes_train',)"),
    "distill": (),
}
COLOURS = {"before": "#b8b8b8", "plain": "#c44e52", "replay": "#4c72b0", "distill": "#55a868"}
GROUPS = {"own": "own classes (5, new)", "seen": "former classes (40)", "unseen": "unseen classes (15)"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/finetuning"), help="folder (default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="image to write (default: finetuning.png in the folder)")
    parser.add_argument("--iterations", type=int, default=300, help="of each fine-tuning (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="former training images (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys for every fine-tuning, after --")
    args = parser.parse_args(arguments)
    output = args.output.expanduser().resolve()
    try:
        found = run(output, args)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for method, content in found.items():
        print(f"{method}:\n{format_comparison(*(figures_of(content[when]) for when in ('before', 'after')))}\n")
    figure = args.figure or output / "finetuning.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw(found, "shapes_val").savefig(figure, dpi=150)
    print(f"figure: {figure}")
    return 0


def run(output: Path, args: argparse.Namespace) -> dict[str, dict]:
    """Method -> the content of its finetune.json."""
    worlds = {"world": (WORLD_SEED, args.images), "own_world": (OWN_SEED, 1)}
    for name, (seed, images) in worlds.items():
        words = ("--seed", str(seed), "--images", str(images), "--out", str(output / name))
        call("datasets/prepare_shapes.py", *words)
    train = write_own_data(output / "own" / "train", output / "own_world", OWN_SETS)
    test = write_own_data(output / "own" / "test", output / "world", ("val",))
    os.environ["DETECTRON2_DATASETS"] = str(output / "world")
    found = {}
    for method in args.methods:
        folder = output / method
        call("train_net.py", "--resume", "--config-file", CONFIG, *overrides(method, train, test, folder, args))
        found[method] = json.loads((folder / "finetune.json").read_text(encoding="utf-8"))
    return found


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
    return [str(word) for pair in keys.items() for word in pair] + [*METHODS[method], *args.opts]


def call(script: str, *arguments: str) -> None:
    """Runs a script of the repository as a user would, from its root."""
    subprocess.run([sys.executable, script, *arguments], cwd=REPOSITORY, check=True)


def write_own_data(folder: Path, world: Path, splits: Sequence[str]) -> Path:
    """Images of a world that show an orange shape, with these labelled and nothing else; returns the YAML."""
    kept = [index for index, name in enumerate(Vocabulary.builtin("shapes").class_names) if name in OWN]
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for split in splits:
        for record in get_dataset(f"shapes_{split}", world).records():
            segments = [one for one in record["segments_info"] if one["category_id"] in kept]
            if not segments:
                continue
            number, source = len(images) + 1, Path(record["file_name"])
            stem = f"{split}_{source.stem}"
            (folder / "images" / f"{stem}.jpg").write_bytes(source.read_bytes())
            ids = [one["id"] for one in segments]
            write_labels(folder / "labels" / f"{stem}.png", record["pan_seg_file_name"], ids)
            size = {"height": record["height"], "width": record["width"]}
            images.append({"id": number, "file_name": f"{stem}.jpg", **size})
            described = [
                {"id": one["id"], "category_id": kept.index(one["category_id"]) + 1, "iscrowd": 0} | area_and_box(one)
                for one in segments
            ]
            annotations.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": described})
    categories = [{"id": index + 1, "name": name, "isthing": 1} for index, name in enumerate(OWN)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "labels.json").write_text(json.dumps(content), encoding="utf-8")
    words = {entry.name: ", ".join(entry.synonyms) for entry in Vocabulary.builtin("shapes").classes}
    description = {
        "type": "panoptic",
        "images": "images",
        "annotations": "labels.json",
        "masks": "labels",
        "classes": [words[name] for name in OWN],
        "things": list(OWN),
    }
    path = folder / f"orange_{folder.name}.yaml"
    path.write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    print(f"{path}: {len(images)} images, {sum(len(one['segments_info']) for one in annotations)} orange shapes")
    return path


def area_and_box(segment: Mapping) -> dict:
    return {key: segment[key] for key in ("area", "bbox")}


def write_labels(path: Path, source: str, ids: Sequence[int]) -> None:
    """An id PNG in which only some of the segments are left."""
    id_map = read_id_map(source)
    id_map = np.where(np.isin(id_map, ids), id_map, 0)
    Image.fromarray(np.stack([id_map % 256, id_map // 256 % 256, id_map // 65536], -1).astype(np.uint8)).save(path)


# ---- what came out ----


def figures_of(sets: Mapping) -> dict:
    """Figures of a finetune.json, with NaN for null."""
    return {
        name: {
            metric: {group: math.nan if value is None else value for group, value in groups.items()}
            for metric, groups in metrics.items()
        }
        for name, metrics in sets.items()
    }


def draw(found: Mapping[str, Mapping], name: str) -> matplotlib.figure.Figure:
    """PQ, AP and mIoU of own, former and unseen classes of one data set, before and after each method."""
    start = figures_of(next(iter(found.values()))["before"])[name]
    bars = {"before": start} | {method: figures_of(content["after"])[name] for method, content in found.items()}
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
    sys.exit(main())
