"""Trains the small SAM of the shapes world: an image encoder whose features tell one segment from another.

    python tools/train_shapes_sam.py --output fcclip/assets/shapes_sam.safetensors --iterations 1200
    python tools/train_shapes_sam.py --gate-only
    python tools/train_shapes_sam.py --masks output/SAM_masks_pred/shapes_val --dataset shapes_val

The encoder sees all colours, shapes and grounds, as SAM has seen everything, and never the name of one. Its objective
is SAM's, a point that asks for the mask around it, in its smallest form: inside are the places whose features have a
cosine above one half with those at the point. The loss is cross-entropy and dice at sampled pixels. So the head has no
weights, and what is shipped, the encoder alone, still gives masks: the gate measures them on images of the set tune,
and --masks writes those of a data set for the OpenSeg ensemble (fcclip/modeling/openseg.py).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from fcclip.config import assets_dir
from fcclip.data import get_dataset, read_image
from fcclip.errors import run_program
from fcclip.modeling.backbones.sam import SamImageEncoder, build_sam
from fcclip.modeling.openseg import save_sam_masks
from fcclip.modeling.output_masks import resize
from fcclip.preparation.shapes_training import GATE_SEED, Pool, check_training, render_pool, save_half
from fcclip.preparation.shapes_world import IMAGE_SIZE, world_classes

BATCH, LEARNING_RATE, WARMUP = 4, 1e-3, 100
POINTS, PIXELS = 32, 768  # of an image: points that ask, pixels that answer
SHARPNESS = 10.0  # of masks: their logits are SHARPNESS * (cosine - 0.5)
GATE_IMAGES = 60  # of the set tune
CLASSES = world_classes()


def mask_logits(features: Tensor, points: Tensor, pixels: Tensor) -> Tensor:
    """The masks that points ask for, at pixels.

    Args:
        features: (B, C, h, w).
        points: (B, P, 2), pixels: (B, N, 2), x and y in -1..1 over the image.

    Returns:
        (B, P, N), above 0 inside.
    """
    there = [F.grid_sample(features, p[:, None], padding_mode="border", align_corners=False) for p in (points, pixels)]
    at_points, at_pixels = (F.normalize(values[:, :, 0], dim=1) for values in there)
    return SHARPNESS * (at_points.transpose(1, 2) @ at_pixels - 0.5)


# ---- training ----


def sample_batch(rng: np.random.Generator, pool: Pool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images turned and mirrored at random, with places in pieces that are drawn with equal chance.

    Returns:
        (B, 3, 256, 256) float RGB; points (B, P, 2); pixels (B, N, 2); (B, P, N) bool, whether both lie in one piece.
    """
    images, places, same = [], [], []
    for index in rng.integers(len(pool.images), size=BATCH):
        turns, step = rng.integers(4), rng.choice((1, -1))
        image, pieces = (np.rot90(maps[index], turns)[:, ::step] for maps in (pool.images, pool.piece_maps))
        flat, areas = pieces.ravel(), np.bincount(pieces.ravel())
        chosen = rng.choice(flat.size, POINTS + PIXELS, p=1 / areas[flat] / len(areas))
        images.append(torch.from_numpy(image.copy()))
        places.append(to_places(np.stack([chosen % IMAGE_SIZE, chosen // IMAGE_SIZE], 1)))
        same.append(torch.from_numpy(flat[chosen[:POINTS], None] == flat[None, chosen[POINTS:]]))
    stacked = torch.stack(places)
    images = torch.stack(images).float().permute(0, 3, 1, 2)
    return images, stacked[:, :POINTS], stacked[:, POINTS:], torch.stack(same)


def to_places(pixels: np.ndarray) -> Tensor:
    """Pixels (..., 2), x and y -> places in -1..1."""
    return torch.from_numpy((pixels + 0.5) * 2 / IMAGE_SIZE - 1).float()


def mask_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy and dice of masks (B, P, N) at pixels."""
    target, inside = same.float(), logits.sigmoid()
    dice = 1 - (2 * (inside * target).sum(-1) + 1) / (inside.sum(-1) + target.sum(-1) + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + dice.mean()


def see(sam: SamImageEncoder, images: Tensor) -> Tensor:
    """RGB images (B, 3, 256, 256) in 0..255 -> features (B, C, h, w), with gradients where there are any."""
    return sam.image_encoder.forward_features((images - sam.pixel_mean) / sam.pixel_std)


def train(sam: SamImageEncoder, pool: Pool, *, seed: int, iterations: int) -> list[float]:
    """Trains the encoder in place; returns the losses."""
    rng = np.random.default_rng([seed, 1])
    weights = list(sam.image_encoder.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.05)
    losses, start = [], time.time()
    for iteration in range(iterations):
        rate = min(1.0, (iteration + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * iteration / iterations))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        images, points, pixels, same = sample_batch(rng, pool)
        loss = mask_loss(mask_logits(see(sam, images), points, pixels), same)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (iteration + 1) % 100 == 0:
            spent = f"{time.time() - start:.0f} s"
            print(f"iteration {iteration + 1}/{iterations}  loss {np.mean(losses[-100:]):.3f}  {spent}", flush=True)
    sam.image_encoder.requires_grad_(False)
    return losses


# ---- masks, and how good they are ----


@torch.no_grad()
def gate(sam: SamImageEncoder, tune: Pool) -> dict[str, list[float]]:
    """How well the mask of the innermost pixel of each piece fits it, for things and grounds.

    Returns:
        Percentages: mean IoU; how many have an IoU above 0.75; mean IoU of the pixels within 5 px of the edge.
    """
    figures = defaultdict(list)
    kernel = np.ones((3, 3), np.uint8)
    for image, pieces, classes in zip(tune.images, tune.piece_maps, tune.piece_classes, strict=True):
        truth = [np.pad((pieces == index).astype(np.uint8), 1) for index in range(len(classes))]
        innermost = [cv2.distanceTransform(mask, cv2.DIST_L2, 5)[1:-1, 1:-1].argmax() for mask in truth]
        points = to_places(np.stack(np.unravel_index(innermost, pieces.shape)[::-1], 1))
        for mask, logits, label in zip(truth, masks_of(sam, image, points, IMAGE_SIZE), classes, strict=True):
            pair = [mask, np.pad((logits > 0).numpy().astype(np.uint8), 1)]
            edges = [m & ~cv2.erode(m, kernel, iterations=5) for m in pair]
            iou, boundary = ((a & b).sum() / (a | b).sum() for a, b in (pair, edges))
            figures["things" if CLASSES[label].thing else "grounds"].append((iou, iou > 0.75, boundary))
    return {group: (100 * np.mean(values, axis=0)).tolist() for group, values in figures.items()}


def masks_of(sam: SamImageEncoder, image: np.ndarray, points: Tensor, side: int) -> Tensor:
    """Logits (P, side, side) over the image (256, 256, 3) of the masks that points (P, 2) ask for."""
    features = see(sam, torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float())
    return mask_logits(features, points[None], grid_places(side)[None])[0].unflatten(-1, (side, side))


def grid_places(side: int) -> Tensor:
    """The centres (side * side, 2) of a grid over the image, row by row."""
    centres = (torch.arange(side) + 0.5) * 2 / side - 1
    return torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).flatten(0, 1)


@torch.no_grad()
def automatic_masks(sam: SamImageEncoder, image: np.ndarray) -> Tensor:
    """The masks (J, 64, 64) of a grid of points, the largest first: stable ones, of those that overlap the stablest."""
    logits = masks_of(sam, image, grid_places(sam.image_size // sam.cell), 64)
    inside = (logits > 0).flatten(1).float()
    stability = (logits > 1).flatten(1).sum(1) / (logits > -1).flatten(1).sum(1)
    overlap = inside @ inside.T
    overlap = overlap / (inside.sum(1) + inside.sum(1)[:, None] - overlap)
    kept: list[int] = []
    for index in stability.argsort(descending=True).tolist():
        if stability[index] > 0.7 and (overlap[index, kept] < 0.7).all():
            kept.append(index)
    kept.sort(key=lambda index: -inside[index].sum())
    return logits[kept]


def write_masks(sam: SamImageEncoder, dataset: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in get_dataset(dataset).records():
        image = read_image(record["file_name"])
        logits, size = automatic_masks(sam, image), image.shape[:2]
        masks = (resize(logits, size) > 0).permute(1, 2, 0).numpy().astype(np.uint8)
        rle = [code["counts"].decode() for code in coco_mask.encode(np.asfortranarray(masks))]
        save_sam_masks(folder / f"{Path(record['file_name']).stem}.npz", logits, image_size=size, rle=rle)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=assets_dir() / "shapes_sam.safetensors", help="weights to write, or to use")
    add("--architecture", default="shapes_samvit.json", help="of the encoder, see build_sam")
    add("--gate-only", action="store_true", help="measure the weights, train nothing")
    add("--masks", type=Path, metavar="FOLDER", help="write the masks of --dataset there, train nothing")
    add("--dataset", default="shapes_val", metavar="NAME_OR_YAML")
    add("--seed", type=int, default=90003, help=f"world to train on; not {GATE_SEED}, the gate's")
    add("--images", type=int, default=2500, help="images to train on")
    add("--iterations", type=int, default=1200)
    add("--workers", type=int, default=2, help="processes that render, and threads that compute")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.workers)
    if options.masks:
        write_masks(build_sam(options.architecture, str(options.output)), options.dataset, options.masks)
        return 0
    if not options.gate_only:
        run_training(options)
    sam = build_sam(options.architecture, str(options.output))
    tune = render_pool(seed=GATE_SEED, rule_name="tune", num_images=GATE_IMAGES, workers=options.workers)
    print("masks of points on tune, percent: mean IoU, IoU above 0.75, IoU near the edge")
    for group, figures in gate(sam, tune).items():
        print(f"{group:<8}" + "".join(f"{figure:8.1f}" for figure in figures))
    return 0


def run_training(options: argparse.Namespace) -> None:
    check_training(options.seed, options.output)
    print(f"rendering {options.images} images, seed {options.seed}", flush=True)
    pool = render_pool(seed=options.seed, rule_name="clip", num_images=options.images, workers=options.workers)
    torch.manual_seed(options.seed)
    sam = build_sam(options.architecture)
    recipe = {"seed": options.seed, "iterations": options.iterations}
    train(sam, pool, **recipe)
    save_half(sam, options.output, {"training": {**recipe, "images": options.images}})
    print(f"wrote {options.output} ({options.output.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    sys.exit(run_program(main))
