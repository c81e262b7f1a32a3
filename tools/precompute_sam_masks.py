"""Makes SAM's automatic masks of a data set for the OpenSeg ensemble of FrozenSeg (TEST.USE_SAM_MASKS).

    python tools/precompute_sam_masks.py --dataset openvocab_ade20k_panoptic_val --weights sam_vit_h_4b8939.pth
        [--sam vit_h] [--output output/SAM_masks_pred] [--limit 50] [--device auto] [--share 1/4]

Any data set will do, registered or a YAML file. Writes OUTPUT/SAM/<stem of the image's file>.npz for each image, whole
or not at all; files that are there stay, so that a run goes on where it was stopped. --share K/N does the K-th of N
parts, for N processes at a time. An image that fails is named at the end and does not stop the others.

Leaves with 0; with 1 when some images have failed, or nothing could begin.

The package segment-anything gives binary masks alone. For those that stay, it is asked a second time, with the prompt
that each came from, so that the logits of all candidates need not be held until then.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from fcclip.config import lookup, resolve_device, resolve_file
from fcclip.data import get_dataset, read_image
from fcclip.errors import InputError, NotInstalledError, is_users, run_program
from fcclip.files import listed
from fcclip.modeling.openseg import save_sam_masks
from fcclip.modeling.output_masks import resize
from fcclip.weights.files import read_weight_file
from fcclip.weights.frozen import load_frozen

# What FrozenSeg changes of the package's settings.
SETTINGS = {"pred_iou_thresh": 0.8, "stability_score_thresh": 0.7, "min_mask_region_area": 100}
PROMPTS = 16  # masks whose logits are asked for at once


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
        generator = build_generator(args.sam, args.weights, device=resolve_device(args.device))
    for file in track(missing, description=args.sam, disable=not sys.stdout.isatty()):
        try:
            image = read_image(file)
            logits, rle = automatic_masks(generator, image, limit=args.limit)
            save_sam_masks(folder / f"{file.stem}.npz", logits, image_size=image.shape[:2], rle=rle)
        except Exception as error:
            if not is_users(error):
                raise
            failures.append(f"{file}: {error}")
    print(f"{len(missing) - len(failures)} files written to {folder}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def build_generator(name: str, weights: str, *, device: torch.device) -> Any:
    """The package's generator with Meta's weights; `name` is vit_b, vit_l or vit_h.

    Raises:
        NotInstalledError: the package is missing.
        ValueError, FileNotFoundError: an unknown name, weights that are missing or of another SAM.
    """
    try:
        from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
    except ImportError as error:
        raise NotInstalledError(
            "automatic masks need the package segment-anything: pip install 'fcclip[sam]'"
        ) from error
    sam = lookup("SAM", name, {key: sam_model_registry[key] for key in ("vit_b", "vit_l", "vit_h")})()
    path = resolve_file(weights, what="weights of SAM")
    load_frozen(sam, read_weight_file(path, what="weights of SAM").tensors, source=str(path), what=f"SAM '{name}'")
    return SamAutomaticMaskGenerator(sam.to(device).eval(), output_mode="coco_rle", **SETTINGS)


@torch.no_grad()
def automatic_masks(generator: Any, image: np.ndarray, *, limit: int) -> tuple[Tensor, list[str]]:
    """The largest masks of an image, the largest first.

    Args:
        generator: a `SamAutomaticMaskGenerator` with COCO's run lengths as output.
        image: (H, W, 3) uint8, RGB.
        limit: at most so many.

    Returns:
        logits (J, h, w) over the image, its longer side 256 cells, and the masks at the size of the image as COCO's
        compressed run lengths.
    """
    predictor = generator.predictor
    forget, predictor.reset_image = predictor.reset_image, lambda: None  # the embedding is needed once more
    try:
        records = sorted(generator.generate(image), key=lambda record: -record["area"])[:limit]
        chunks = [records[start : start + PROMPTS] for start in range(0, len(records), PROMPTS)]
        logits = [prompted_logits(predictor, chunk) for chunk in chunks]
    finally:
        predictor.reset_image = forget
    size = tuple(max(1, round(256 * side / max(image.shape[:2]))) for side in image.shape[:2])
    maps = [resize(chunk, size) for chunk in logits] or [torch.zeros(0, *size)]
    return torch.cat(maps), [record["segmentation"]["counts"] for record in records]


def prompted_logits(predictor: Any, records: Sequence[dict]) -> Tensor:
    """Of each record's mask over the part of SAM's square that shows the image."""
    points = np.array([record["point_coords"][0] for record in records])
    coords = torch.as_tensor(predictor.transform.apply_coords(points, predictor.original_size))
    coords = coords.to(predictor.device, torch.float32)[:, None]
    labels = torch.ones(coords.shape[:2], dtype=torch.int, device=predictor.device)
    _, qualities, logits = predictor.predict_torch(coords, labels, multimask_output=True, return_logits=True)
    wanted = torch.tensor([record["predicted_iou"] for record in records], device=qualities.device)
    best = (qualities - wanted[:, None]).abs().argmin(1)  # of the three masks of a prompt
    chosen = logits[torch.arange(len(records), device=best.device), best]
    side = predictor.model.image_encoder.img_size
    height, width = predictor.input_size
    return resize(chosen, (side, side))[:, :height, :width]


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
