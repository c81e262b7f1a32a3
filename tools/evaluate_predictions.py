"""Evaluates predictions without a model: saved ones, and those of other programs.

    python tools/evaluate_predictions.py --dataset NAME --saved FOLDER
    python tools/evaluate_predictions.py --dataset NAME [--panoptic FILE] [--instances FILE] [--semantic FOLDER]

NAME is a registered data set or the path of a YAML. Formats:

--saved      what an evaluation wrote: <output>/<data set>, with one folder for each mode or none
--panoptic   COCO panoptic: a JSON with `annotations`, PNGs of segment ids in --panoptic-folder
--instances  COCO results: a JSON list of {image_id, category_id, score, segmentation}, the last a run-length code
--semantic   a folder of label maps, one an image and named like it

Category ids are the data set's own; the values of label maps are 0..K-1, or the data set's own with --label-ids
dataset, and its ignore label (mostly 255) means no class. Prints the table that an evaluation prints, and writes
results.json into --output.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fcclip.data import Dataset, dataset_vocabulary, get_dataset
from fcclip.errors import run_program
from fcclip.evaluation import copypaste_lines, format_table, saved_modes, write_results
from fcclip.reports import LabelSource, PanopticSource, ResultsSource, SavedSource, evaluate_predictions


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    start = time.perf_counter()
    dataset = get_dataset(args.dataset)
    seen = None
    if args.training_set:
        seen = dataset_vocabulary(dataset).seen_by(dataset_vocabulary(get_dataset(args.training_set))).tolist()
    results = {}
    for mode, sources in sources_of(args, dataset).items():
        output = args.output / mode if args.output and mode != "predictions" else args.output
        results[mode] = evaluate_predictions(dataset, sources, seen=seen, output_dir=output, max_images=args.first)
        print("\n".join(copypaste_lines(results[mode])))
    print(format_table({dataset.name: results}, title="results in percent"))
    if args.output:
        seconds = {"evaluate": round(time.perf_counter() - start, 1)}
        write_results(args.output / "results.json", {dataset.name: results}, seconds=seconds)
        print(f"results: {args.output / 'results.json'}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a registered data set or a YAML file")
    parser.add_argument("--saved", type=Path, metavar="FOLDER", help="predictions that an evaluation saved")
    parser.add_argument("--panoptic", type=Path, metavar="FILE", help="COCO panoptic JSON")
    parser.add_argument(
        "--panoptic-folder", type=Path, metavar="FOLDER", help="its PNGs (default: the file's path without .json)"
    )
    parser.add_argument("--instances", type=Path, metavar="FILE", help="COCO results JSON")
    parser.add_argument("--semantic", type=Path, metavar="FOLDER", help="label maps")
    parser.add_argument(
        "--label-ids", choices=("contiguous", "dataset"), default="contiguous", help="0..K-1, or the data set's own ids"
    )
    parser.add_argument("--label-suffix", default="", metavar="TEXT", help="behind the image's name, such as _pred")
    parser.add_argument("--training-set", metavar="NAME", help="data set whose classes count as seen")
    parser.add_argument("--first", type=int, metavar="N", help="only the first images of the data set")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for results.json and files of the evaluators")
    args = parser.parse_args(arguments)
    if (args.saved is None) == (args.panoptic is None and args.instances is None and args.semantic is None):
        parser.error("give either --saved, or one or more of --panoptic, --instances and --semantic")
    return args


def sources_of(args: argparse.Namespace, dataset: Dataset) -> dict[str, list]:
    """Name of the mode -> the predictions in it."""
    if args.saved:
        return {mode: [SavedSource(folder, dataset=dataset)] for mode, folder in saved_modes(args.saved).items()}
    sources, records = [], dataset.records()
    if args.panoptic:
        sources.append(PanopticSource(args.panoptic, args.panoptic_folder, dataset=dataset))
    if args.instances:
        sources.append(ResultsSource(args.instances, dataset=dataset, records=records))
    if args.semantic:
        own_ids, suffix = args.label_ids == "dataset", args.label_suffix
        sources.append(LabelSource(args.semantic, dataset=dataset, records=records, own_ids=own_ids, suffix=suffix))
    return {"predictions": sources}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
