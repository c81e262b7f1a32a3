"""Makes SAM's automatic masks of a data set for the OpenSeg ensemble of FrozenSeg (TEST.USE_SAM_MASKS).

    python tools/precompute_sam_masks.py --dataset openvocab_ade20k_panoptic_val --weights sam_vit_h_4b8939.pth
        [--sam vit_h] [--output output/SAM_masks_pred] [--limit 50] [--device auto] [--share 1/4]

Any data set will do, registered or a YAML file. Writes OUTPUT/SAM/<stem of the image's file>.npz for each image, whole
or not at all; files that are there stay, so that a run goes on where it was stopped. --share K/N does the K-th of N
parts, for N processes at a time. An image that fails is named at the end and does not stop the others.

Leaves with 0; with 1 when some images have failed, or nothing could begin.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from fcclip.config import resolve_device
from fcclip.data import get_dataset, read_image
from fcclip.errors import InputError, is_users, run_program
from fcclip.files import listed
from fcclip.modeling.automatic_masks import build_mask_generator
from fcclip.modeling.openseg import save_sam_masks


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the masks that are missing."""
    args = parse_arguments(arguments)
    files = [Path(record["file_name"]) for record in get_dataset(args.dataset).records()]
    twice = [stem for stem, count in Counter(file.stem for file in files).items() if count > 1]
    if twice:
        raise InputError(
            f"'{args.dataset}': masks are found by the stem of an image's file, and some are there twice: "
            f"{listed(twice, 4)}"
        )
    folder = args.output / args.sam
    folder.mkdir(parents=True, exist_ok=True)
    part, parts = args.share
    own = files[part - 1 :: parts]
    missing = [file for file in own if not (folder / f"{file.stem}.npz").is_file()]
    print(f"{args.dataset}: {len(own)} images, {len(own) - len(missing)} have masks in {folder}")
    failures = []
    if missing:
        masks_of = build_mask_generator(args.sam, args.weights, device=resolve_device(args.device))
    for file in track(missing, description=args.sam, disable=not sys.stdout.isatty()):
        try:
            image = read_image(file)
            logits, rle = masks_of(image, limit=args.limit)
            save_sam_masks(folder / f"{file.stem}.npz", logits, image_size=image.shape[:2], rle=rle)
        except Exception as error:
            if not is_users(error):
                raise
            failures.append(f"{file}: {error}")
    print(f"{len(missing) - len(failures)} files written to {folder}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME_OR_YAML", help="a registered data set, or a YAML file")
    add("--weights", required=True, metavar="FILE", help="Meta's file")
    add("--sam", default="vit_h", metavar="NAME", help="vit_b, vit_l or vit_h (default: %(default)s)")
    add("--output", type=Path, default=Path("output/SAM_masks_pred"), metavar="FOLDER", help="default: %(default)s")
    add("--limit", type=int, default=50, metavar="N", help="masks of an image, the largest (default: %(default)s)")
    add("--device", default="auto", metavar="DEVICE", help="default: %(default)s")
    add("--share", type=_share, default=(1, 1), metavar="K/N", help="do the K-th of N parts (default: all)")
    return parser.parse_args(arguments)


def _share(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"expected K/N with 1 <= K <= N, got '{text}'")
    return int(part), int(parts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
