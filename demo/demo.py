"""Segments images with the class names you give.

    python demo/demo.py --config-file configs/shapes/fcclip_shapes.yaml --weights shapes_fcclip.safetensors \\
        --input photo.jpg folder/ --vocabulary "red circle; blue star, azure star; sand:stuff" --output out/

For every image `out/` receives the drawing under the image's own name and a JSON file with its segments.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import logging
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from fcclip import Segmenter
from fcclip.config import load_config
from fcclip.data import read_image
from fcclip.errors import InputError, MissingFileError, run_program
from fcclip.vocabulary import Vocabulary

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEFAULT_CONFIG = "configs/coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", default=DEFAULT_CONFIG, metavar="FILE", help="YAML file (default: %(default)s)")
    add("--input", nargs="+", required=True, metavar="P", help="images, folders of images, quoted globs")
    add(
        "--vocabulary",
        "--vocab",
        help="the only classes to look for: ';' between classes, ',' between the synonyms of a class, ':stuff' or "
        "':thing' after a class (unmarked: thing); without it the classes of the config's first test set",
    )
    add("--output", required=True, metavar="PATH", help="folder, made if needed; or, for one image, a file name")
    add("--weights", metavar="FILE", help="checkpoint (default: MODEL.WEIGHTS of the config)")
    add(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="S",
        help="things with a lower score are left out; stuff always stays (default: %(default)s)",
    )
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, rest of the line")
    return parser.parse_args(arguments)


def find_images(inputs: Iterable[str]) -> list[Path]:
    """The images that files, folders and globs stand for: each once, those of a folder or glob sorted by name."""
    unique: dict[Path, None] = {}
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            images = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
            )
            if not images:
                raise MissingFileError(f"folder '{given}' holds no image ({', '.join(IMAGE_SUFFIXES)})")
        elif path.exists():
            images = [path]
        else:
            images = sorted(Path(name) for name in glob.glob(str(path)) if Path(name).is_file())
            if not images:
                raise MissingFileError(f"input '{given}' does not exist, and as a glob it matches nothing")
        unique.update(dict.fromkeys(images))
    return list(unique)


def plan_outputs(images: Sequence[Path], output: Path) -> list[Path]:
    """Where the drawing of each image goes; its JSON file stands beside it with the extension .json."""
    if output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        if len(images) > 1:
            raise InputError(f"--output '{output}' is one file, but there are {len(images)} images; give a folder")
        drawings = [output]
    else:
        if output.exists() and not output.is_dir():
            raise InputError(f"--output '{output}' is an existing file, not a folder")
        drawings = [output / path.name for path in images]
    stems: dict[Path, Path] = {}
    for path, drawing in zip(images, drawings):
        if path.resolve() == drawing.resolve():
            raise InputError(f"the drawing of '{path}' would overwrite it; choose another --output")
        other = stems.setdefault(drawing.with_suffix(".json"), path)
        if other != path:
            raise InputError(
                f"'{other}' and '{path}' would both write '{drawing.stem}.json' in '{drawing.parent}'; "
                "run them one after the other with different --output"
            )
    return drawings


def check_writable(folder: Path) -> None:
    """Makes the folder and proves that files can be written there, before minutes are spent on a model."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(f"cannot write to the output folder '{folder}': {error.strerror}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if an image could not be read (the others are done)."""
    args = parse_arguments(arguments)
    vocabulary = None if args.vocabulary is None else Vocabulary.from_names(args.vocabulary)
    images = find_images(args.input)
    drawings = plan_outputs(images, Path(args.output).expanduser())
    check_writable(drawings[0].parent)
    cfg = load_config(args.config_file, args.opts)
    segmenter = Segmenter(cfg, weights=args.weights)
    unreadable = 0
    for path, drawing in zip(images, drawings):
        start = time.perf_counter()
        try:
            image = read_image(path)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            unreadable += 1
            continue
        result = segmenter(image, vocabulary, min_score=args.confidence_threshold)
        result = dataclasses.replace(result, file_name=str(path))
        result.save(drawing.with_suffix(".json"))
        result.save(drawing)
        seconds = time.perf_counter() - start
        print(f"{path} -> {drawing}: {len(result.segments)} segments, {seconds:.2f} s")
    if unreadable:
        print(f"error: {unreadable} of {len(images)} images could not be read", file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
