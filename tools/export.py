"""Writes a model as a folder that runs without PyTorch: a graph of images, and class names as vectors.

    python tools/export.py --weights shapes --vocabulary "red circle; sand:stuff" --output exported/
    python tools/export.py --weights shapes --vocabulary coco_panoptic --only-vocabulary --output coco.npz

The graph knows no class names, so they may change afterwards: the second command makes other ones for the same graph
(fcclip.deploy.Runner runs it on NumPy, Pillow and onnxruntime). What the graph gives is compared with what PyTorch
gives; if a limit is missed, nothing but parity.json is written, and the exit code is 1. See docs/export.md.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fcclip import Segmenter
from fcclip.data import read_image
from fcclip.deploy import Runner
from fcclip.deploy.runner import runtime
from fcclip.errors import InputError, run_program
from fcclip.export import (
    EXTRAS,
    Limits,
    as_record,
    as_table,
    export_folder,
    made_up_images,
    measure,
    placement,
    vocabulary_file,
)
from fcclip.files import write_json
from fcclip.ops.engines import PLAIN
from fcclip.segmenter import read_vocabulary
from fcclip.vocabulary import Vocabulary


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True, metavar="NAME", help="as for Segmenter.from_pretrained: a file, a folder, shapes")
    add("--config-file", metavar="FILE", help="YAML of weights that bring none")
    add("--output", required=True, type=Path, metavar="PATH", help="folder; with --only-vocabulary a file (.npz)")
    add("--vocabulary", "--vocab", metavar="NAMES", help="as for demo/demo.py (default: that of the first test set)")
    add("--only-vocabulary", action="store_true", help="write the class names of --vocabulary, and no graph")
    add("--with", dest="extras", nargs="+", choices=EXTRAS, default=[], help="also all.onnx, text.onnx, image.pt2")
    add("--size", type=image_size, metavar="HxW", help="the graph takes this size alone, e.g. 800x1088 (default: any)")
    add("--half", action="store_true", help="products and convolutions in half precision")
    add("--msda", choices=PLAIN, default="torch", help="deformable attention as GridSample (torch) or by gathers")
    add("--opset", type=int, default=18, help="of ONNX (default: %(default)s)")
    add("--verify", nargs="+", default=[], metavar="IMAGE", help="compare on these (default: two made-up ones)")
    add("--providers", nargs="+", default=["CPUExecutionProvider"], metavar="P", help="of onnxruntime, to compare on")
    add("--license", default="not stated", metavar="TEXT", help="of the weights, a line for the metadata")
    return parser.parse_args(arguments)


def image_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size is HEIGHTxWIDTH in pixels, e.g. 800x1088, not '{text}'")
    return int(match[1]), int(match[2])


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    runtime(args.providers)  # before minutes are spent
    images = {path: read_image(path) for path in args.verify} or made_up_images()
    segmenter = Segmenter.from_pretrained(args.weights, args.config_file, device="cpu")
    segmenter.model.amp_dtype = None  # graphs are fp32, and compared with a model that is
    vocabulary = read_vocabulary(args.vocabulary) if args.vocabulary else segmenter.model.test_vocabulary
    if vocabulary is None:
        raise InputError("no class names: the config has no test set, so give some with --vocabulary")
    if args.only_vocabulary:
        vocabulary_file(segmenter.model, vocabulary).save(args.output)
        print(f"{len(vocabulary)} classes -> {args.output}")
        return 0

    def check(folder: Path) -> None:
        vocabularies = [vocabulary, Vocabulary.from_names("cat, kitty; dog; car; grass:stuff; sky:stuff")]
        cases = measure(segmenter, folder, images, vocabularies, providers=args.providers)
        nodes = {provider: placement(folder, provider) for provider in args.providers}
        metadata = Runner(folder).metadata
        record = as_record(cases, Limits.of(metadata.precision), metadata, nodes)
        Console(width=140).print(as_table(cases, nodes))
        write_json((args.output if record["missed"] else folder) / "parity.json", record, indent=1)
        if record["missed"]:
            raise InputError("the graph differs too much from the model: " + "; ".join(record["missed"]))

    options = {"extras": args.extras, "size": args.size, "opset": args.opset, "engine": args.msda, "half": args.half}
    export_folder(segmenter, args.output, vocabulary=vocabulary, license=args.license, check=check, **options)
    for file in sorted(args.output.iterdir()):
        print(f"{file.stat().st_size / 1e6:10.2f} MB  {file}")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
