"""The part `growth` of tools/benchmark.py: seconds and memory of ours as image, class names, queries and batch grow.

One of them grows at a time, from `--size`, 150 names, 250 queries and one image. Every point is a process of its own:
the most memory above the model in its first pass, and the seconds of its second. Images, weights of the CLIP and
vectors of names are made up; so are class scores, under which most queries have a class, as they do on photographs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.figure
import torch
from benchmark_inference import (
    machine,
    made_up_image,
    made_up_scores,
    memory_and_seconds,
    name_at_random,
    of_a_process,
    random_model,
)

from fcclip.errors import InputError
from fcclip.modeling.outputs import make_outputs
from fcclip.vocabulary import Vocabulary

KEPT = 0.64  # of the queries
SCORES_BYTES = 2**32  # what semantic scores may take; where they take more, there are only points with labels
AXES = {"size": "image, megapixels", "names": "class names", "queries": "queries", "batch": "images in a batch"}
KINDS = {"labels": "#4c72b0", "scores": "#c44e52"}  # of semantic map


def add_growth_arguments(parser: argparse.ArgumentParser) -> None:
    def size(text: str) -> list[int]:
        height, width = map(int, text.split("x"))
        return [height, width]

    add = parser.add_argument
    parser.set_defaults(run=benchmark_growth)
    add("--model", default="RN50", metavar="NAME", help="as for inference (default RN50)")
    add("--size", type=size, default=[640, 960], metavar="HxW", help="image of the other points (default 640x960)")
    sizes = ["256x256", "448x672", "1024x1024", "1376x2048"]
    add("--sizes", type=size, nargs="*", default=[*map(size, sizes)], metavar="HxW", help=f"(default {sizes})")
    for option, numbers in {"names": [1, 847, 5000], "queries": [50, 100, 500], "batch": [2, 4]}.items():
        add(f"--{option}", type=int, nargs="*", default=numbers, metavar="N", help=f"(default {numbers})")
    add("--output", metavar="FILE", help="JSON file for the results")
    add("--plot", metavar="FILE", help="PNG to draw")
    add("--memory-of", metavar="JSON", help=argparse.SUPPRESS)  # one point, in a process of its own
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys")


def benchmark_growth(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each point, prints it, draws all, and returns everything as JSON values.

    Raises:
        ValueError: the options cannot work.
    """
    if options.memory_of:
        print(json.dumps(measure(options, **json.loads(options.memory_of))))
        return {}
    counts = [*options.names, *options.queries, *options.batch]
    if min(*options.size, *(side for size in options.sizes for side in size), *counts) < 1:
        raise InputError("sizes, --names, --queries and --batch must be at least 1")
    rows = []
    for point in points(options):
        arguments = ["growth", "--model", options.model]
        memory, seconds = of_a_process(options.model, json.dumps(point), arguments, options.opts)
        row = point | {"memory_mib": memory, "seconds": seconds}
        described = "{size[0]} x {size[1]}, {names} names, {semantic}, {queries} queries, batch {batch}".format(**row)
        print(f"{described}: {row['seconds']:.2f} s, {row['memory_mib']:,.0f} MiB", flush=True)
        rows.append(row)
    report = {"benchmark": "growth", "model": options.model, "kept": KEPT, **machine(torch.device("cpu")), "rows": rows}
    if options.plot:
        draw(rows).savefig(options.plot, dpi=110)
        print(f"drawn to {options.plot}")
    return report


def points(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The first is the one that all others differ from, in one value or in names and the kind of semantic map."""
    base = {"size": options.size, "names": 150, "queries": 250, "batch": 1, "semantic": "labels"}
    grown = {"size": options.sizes, "names": options.names, "queries": options.queries, "batch": options.batch}
    rows = [base, *(base | {axis: value} for axis, values in grown.items() for value in values)]
    pixels = options.size[0] * options.size[1]
    fitting = [names for names in (base["names"], *options.names) if 4 * names * pixels <= SCORES_BYTES]
    return rows + [base | {"names": names, "semantic": "scores"} for names in fitting]


def measure(
    options: argparse.Namespace, *, size: Sequence[int], names: int, queries: int, batch: int, semantic: str
) -> tuple[float, float]:
    """See `memory_and_seconds`, from images to all outputs."""
    model = random_model(options.model, "cpu", [*options.opts, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", str(queries)])
    vocabulary = Vocabulary.from_names([f"class {index}" for index in range(names)])
    name_at_random(model)
    model.text_encoder.encode(vocabulary)
    scores = made_up_scores(queries, names, round(KEPT * queries))
    samples = [{"image": made_up_image(size)} for _ in range(batch)]

    def run() -> list[dict]:
        return [
            make_outputs(
                scores,
                scored.masks,
                vocabulary.thing_classes,
                heads=model.heads,
                settings=model.output_settings,
                semantic=semantic,
            )
            for scored in model.score(samples, vocabulary)
        ]

    return memory_and_seconds(run)


def draw(rows: Sequence[dict[str, Any]]) -> matplotlib.figure.Figure:
    """Seconds and GiB above the model by what grows; a ring is the point that all panels share."""
    figure = matplotlib.figure.Figure(figsize=(9.6, 4.4), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharex="col", sharey="row")
    for (axis, label), column in zip(AXES.items(), panels.T):
        for semantic in KINDS if axis == "names" else ("labels",):
            style = {"color": KINDS[semantic], "marker": "o"}
            places, *values = zip(*series(rows, axis, semantic))
            for panel, numbers in zip(column, values):
                panel.plot(places, numbers, markersize=3.5, linewidth=1.4, label=f"semantic {semantic}", **style)
        for panel, number in zip(column, costs(rows[0])):
            panel.plot(place(rows[0], axis), number, markersize=9, fillstyle="none", **(style | {"color": "#444444"}))
        column[-1].set_xlabel(label, fontsize=9)
    for panel in panels.flat:
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8, length=0)
        panel.grid(color="#e6e6e6", linewidth=0.7)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0, 0].set_ylabel("seconds", fontsize=9)
    panels[1, 0].set_ylabel("GiB above the model", fontsize=9)
    panels[0, list(AXES).index("names")].legend(fontsize=8, frameon=False)
    return figure


def series(rows: Sequence[dict[str, Any]], axis: str, semantic: str) -> list[tuple[float, float, float]]:
    """Place on the axis, seconds and GiB of the rows that are like the first but there and for the kind, ascending."""
    fixed = {key: rows[0][key] for key in AXES if key != axis} | {"semantic": semantic}
    return sorted((place(row, axis), *costs(row)) for row in rows if fixed.items() <= row.items())


def place(row: dict[str, Any], axis: str) -> float:
    return math.prod(row["size"]) / 1e6 if axis == "size" else row[axis]


def costs(row: dict[str, Any]) -> tuple[float, float]:
    return row["seconds"], row["memory_mib"] / 1024
