"""Trains the small CLIP of the shapes world on captioned crops, and checks that it is good enough to be built upon.

    python tools/train_shapes_clip.py --output fcclip/assets/shapes_clip.safetensors --iterations 6000
    python tools/train_shapes_clip.py --gate-only

A crop's caption names shapes and grounds that are in the crop, in many wordings, for all classes of the world; nothing
but pairs of crop and caption teaches the network. Captions that say the same are positives of each other's crops, and a
caption that is true of another crop is no negative of it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fcclip.errors import MissingFileError, run_program
from fcclip.files import read_json
from fcclip.modeling.classifier import text_logits
from fcclip.modeling.out_of_vocabulary import MaskPool
from fcclip.modeling.text import TextEncoder, encode_tokens
from fcclip.preparation.shapes_training import GATE_SEED, Pool, check_training, render_pool, save_half
from fcclip.preparation.shapes_world import COLOURS, GROUNDS, IMAGE_SIZE, SHAPES, world_classes
from fcclip.vocabulary import TEMPLATES, Vocabulary

ASSETS = Path(__file__).resolve().parents[1] / "fcclip" / "assets"
PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)  # CLIP's, RGB in 0..255
PIXEL_STD = (68.5005327, 66.6321579, 70.32316305)
MAX_LOGIT_SCALE = math.log(100)
LEARNING_RATE, TEXT_LEARNING_RATE = 4e-3, 1e-3
PIXELS_PER_BATCH = 393_216  # crops of a batch times their area
GATE_IMAGES = 200  # of the set tune, and twice as many with a single shape
CLASSES = world_classes()
NUM_THINGS = sum(c.thing for c in CLASSES)
FACTS = (*(c.name for c in CLASSES), *COLOURS, *SHAPES)
NAMES = (
    *((c.name, *c.synonyms) for c in CLASSES),
    *((f"{colour} shape", f"{synonym} shape") for colour, (_, synonym) in COLOURS.items()),
    *((shape, synonym) if synonym else (shape,) for shape, synonym in SHAPES.items()),
)  # how to say each fact, its usual name first
FACTS_OF_CLASS = np.array(
    [[fact in (c.name, c.colour, c.shape) for fact in FACTS] for c in CLASSES]
)  # (classes, F) what a class implies

# ---- model ----


def build_clip(architecture: Path) -> nn.Module:
    """The open_clip model of a JSON file, with random weights."""
    return open_clip.model.CLIP(**read_json(architecture, what="architecture (--architecture)"))


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W), channels last."""
    mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


# ---- crops and captions ----


@dataclass(frozen=True)
class CropBatch:
    """Crops and what is said about them; a fact is a class, a colour or a shape (F of them, see FACTS)."""

    images: Tensor  # (N, S, S, 3) uint8
    captions: list[str]  # C of them, at least one for each crop
    crop_of_caption: Tensor  # (C,) int64
    mentioned: Tensor  # (C, F) bool, what the caption says
    present: Tensor  # (N, F) bool, what is true of the crop


def sample_crops(
    rng: np.random.Generator,
    pool: Pool,
    *,
    size_px: int,
    num_crops: int,
    plain: float = 0.0,
    attributes: float = 0.0,
) -> CropBatch:
    """Random crops that are `size_px` wide after scaling the images a little up or down.

    A share `plain` of them shows mainly one shape and names only that; a share `attributes` of these gets a second
    caption about form or colour alone.
    """
    images, captions, crop_of_caption, mentioned, present = [], [], [], [], []
    while len(images) < num_crops:
        index = int(rng.integers(len(pool.images)))
        window_px = min(round(size_px / math.exp(rng.uniform(-0.2, 0.2))), IMAGE_SIZE)
        is_plain = rng.random() < plain
        crop = _choose_window(rng, pool, index, window_px, around_shape=0.88 if is_plain else 0.55)
        classes = pool.piece_classes[index]
        inside = np.bincount(pool.piece_maps[index][crop].ravel(), minlength=len(classes))
        shares = np.bincount(classes, inside / window_px**2, minlength=len(CLASSES))
        whole = classes[(classes < NUM_THINGS) & (inside > 0.75 * pool.piece_areas[index])]
        statements = _tell(rng, shares, set(whole.tolist()), is_plain, attributes)
        if not statements:
            continue
        image = cv2.resize(pool.images[index][crop], (size_px, size_px), interpolation=cv2.INTER_LINEAR)
        images.append(image[:, ::-1] if rng.random() < 0.5 else image)
        present.append(FACTS_OF_CLASS[shares > 0.003].any(0))
        for named in statements:
            captions.append(write_caption(rng, named))
            mentioned.append(np.isin(np.arange(len(FACTS)), named))
            crop_of_caption.append(len(images) - 1)
    return CropBatch(
        torch.from_numpy(np.stack(images)),
        captions,
        torch.tensor(crop_of_caption),
        torch.from_numpy(np.stack(mentioned)),
        torch.from_numpy(np.stack(present)),
    )


def _choose_window(
    rng: np.random.Generator, pool: Pool, index: int, window_px: int, *, around_shape: float
) -> tuple[slice, slice]:
    """Most windows are laid around a shape, some on bare ground, the others anywhere."""
    last = IMAGE_SIZE - window_px
    top, left = rng.integers(0, last + 1, size=2)
    kind = rng.random()
    if kind < around_shape:
        piece = rng.choice(np.flatnonzero(pool.piece_classes[index] < NUM_THINGS))
        corner = pool.piece_centres[index][piece] - window_px / 2 + window_px * rng.uniform(-0.25, 0.25, 2)
        top, left = np.clip(corner, 0, last).astype(int)
    elif kind < 0.6 * around_shape + 0.4:
        num_grounds = (pool.piece_classes[index] >= NUM_THINGS).sum()
        for _ in range(20):
            if (pool.piece_maps[index][top : top + window_px, left : left + window_px] >= num_grounds).mean() < 0.03:
                break
            top, left = rng.integers(0, last + 1, size=2)
    return np.s_[top : top + window_px, left : left + window_px]


def _tell(
    rng: np.random.Generator, shares: np.ndarray, whole: set[int], is_plain: bool, attributes: float
) -> list[list[int]]:
    """The facts of each caption of a crop, in their order; no caption when nothing can be said for sure."""
    things = sorted((c for c in whole if shares[c] > 0.02), key=lambda c: -shares[c])
    grounds = [int(c) for c in rng.permutation(np.arange(NUM_THINGS, len(CLASSES))) if shares[c] > 0.15]
    covered = shares[:NUM_THINGS].sum()
    if not things:
        return [grounds] if grounds and covered < 0.3 else []
    if is_plain:
        if shares[things[0]] < 0.65 * covered:
            return []
        statements = [[things[0]]]
        if rng.random() < attributes:
            entry = CLASSES[things[0]]
            statements.append([FACTS.index(entry.shape if rng.random() < 0.8 else entry.colour)])
        return statements
    if len(things) > 1 and shares[things[0]] > 2.5 * shares[things[1]] and rng.random() < 0.6:
        things = things[:1]
    if covered > 1.6 * shares[things].sum():  # too much that would not be named
        return [grounds] if grounds and covered < 0.3 else []
    things = [int(c) for c in rng.permutation(things)][:4]
    if grounds and covered < 0.35 and rng.random() < 0.5:
        return [things, grounds]
    return [things + grounds] if rng.random() < 0.3 else [things]


def write_caption(rng: np.random.Generator, named: list[int]) -> str:
    """A sentence about facts: shapes first, then what they lie on."""
    names = [rng.choice([NAMES[fact][0], *NAMES[fact]]) for fact in named]
    things = [name for name, fact in zip(names, named, strict=True) if FACTS[fact] not in GROUNDS]
    grounds = [name for name, fact in zip(names, named, strict=True) if FACTS[fact] in GROUNDS]
    article = "a " if rng.random() < 0.5 else ""
    phrase = _list([things[0], *(article + name for name in things[1:])]) if things else _list(grounds)
    if things and grounds:
        phrase += (" on " if rng.random() < 0.7 else " and ") + _list(grounds)
    return phrase if rng.random() < 0.15 else TEMPLATES[rng.integers(len(TEMPLATES))].format(phrase)


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


# ---- training ----


def contrastive_loss(logits: Tensor, batch: CropBatch) -> Tensor:
    """Softmax in both directions over crops x captions (N, C).

    A caption that says the same as one of the crop's own is a positive; any other that is true of the crop is left out.
    """
    same = (batch.mentioned[:, None] == batch.mentioned[None]).all(-1).float()  # (C, C)
    owner = F.one_hot(batch.crop_of_caption, len(logits)).float().T  # (N, C)
    positive = owner @ same > 0
    also_true = (~batch.present).float() @ batch.mentioned.float().T == 0  # (N, C)
    logits = logits.masked_fill(also_true & ~positive, -1e4)
    rows = torch.log_softmax(logits, 1).masked_fill(~positive, 0).sum(1) / positive.sum(1)
    columns = torch.log_softmax(logits, 0).masked_fill(~positive, 0).sum(0) / positive.sum(0)
    return -(rows.mean() + columns.mean()) / 2


def start_weights(clip: nn.Module) -> None:
    """Makes a small ConvNeXt learn at once: weights that keep the variance, and layer scales of 0.5 instead of 1e-6."""
    for name, parameter in clip.visual.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
        elif parameter.ndim >= 2:
            nn.init.trunc_normal_(parameter, std=parameter[0].numel() ** -0.5)


BUCKETS = ((64, 0.3), (96, 0.25), (128, 0.2), (192, 0.1), (256, 0.15))  # crop sides in pixels, and how often


def train(
    clip: nn.Module,
    pool: Pool,
    *,
    seed: int,
    iterations: int,
    pixels_per_batch: int,
    learning_rate: float,
) -> list[float]:
    """Trains in place; returns the losses.

    The first quarter shows small plain crops only, and tells of colour and form apart as well: without that, forms are
    learnt much later than colours.
    """
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    rng = np.random.default_rng([seed, 1])
    optimizer = build_optimizer(clip, learning_rate)
    sizes, chances = zip(*BUCKETS, strict=True)
    clip.train()
    clip.visual.to(memory_format=torch.channels_last)
    losses, start = [], time.time()
    for iteration in range(iterations):
        done = iteration / iterations
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * min(1.0, (iteration + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done))
        size_px = sizes[0] if done < 0.25 else int(rng.choice(sizes, p=chances))
        batch = sample_crops(
            rng,
            pool,
            size_px=size_px,
            num_crops=max(2, pixels_per_batch // size_px**2),
            plain=float(np.interp(done, (0.1, 0.5), (1.0, 0.4))),
            attributes=float(np.interp(done, (0.2, 0.5), (1.0, 0.2))),
        )
        image_vectors = F.normalize(clip.visual(normalise(batch.images)), dim=-1)
        text_vectors = F.normalize(encode_tokens(clip, tokenizer(batch.captions)), dim=-1)
        loss = contrastive_loss(clip.logit_scale.exp() * image_vectors @ text_vectors.T, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        losses.append(loss.item())
        if (iteration + 1) % 100 == 0:
            figures = f"loss {np.mean(losses[-100:]):.3f}  scale {clip.logit_scale.exp().item():.1f}"
            print(f"iteration {iteration + 1}/{iterations}  {figures}  {time.time() - start:.0f} s", flush=True)
    return losses


def build_optimizer(clip: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; the text tower learns slower, and only matrices outside the embeddings decay."""
    groups = []
    for is_visual, rate in ((True, learning_rate), (False, TEXT_LEARNING_RATE)):
        weights = [(n, p) for n, p in clip.named_parameters() if n.startswith("visual.") == is_visual]
        for decays, weight_decay in ((True, 0.05), (False, 0.0)):
            params = [p for n, p in weights if (p.ndim >= 2 and "embedding" not in n) == decays]
            groups.append({"params": params, "full_lr": rate, "weight_decay": weight_decay})
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


# ---- gate ----


@torch.no_grad()
def gate(clip: nn.Module, *, singles: Pool, tune: Pool) -> dict[str, float]:
    """Percentages right, for the names of MEANINGS."""
    clip.eval()
    text, pool = TextEncoder(clip).encode(Vocabulary.builtin("shapes")), MaskPool(clip.visual)
    is_right: dict[str, list[bool]] = defaultdict(list)

    def classify(vectors: Tensor, labels: Sequence[int], groups: Callable[[int], Sequence[str]], only: int) -> None:
        predicted = text_logits(vectors, text, clip.logit_scale)[:, :only].argmax(1).tolist()
        for prediction, label in zip(predicted, labels, strict=True):
            for group in groups(label):
                is_right[group].append(prediction == label)

    shapes = [int(classes[-1]) for classes in singles.piece_classes]
    for begin in range(0, len(shapes), 32):
        vectors = clip.visual(normalise(torch.from_numpy(singles.images[begin : begin + 32])))
        classify(vectors, shapes[begin : begin + 32], lambda label: ["single"], NUM_THINGS)
    for begin in range(0, len(tune.images), 16):
        images = normalise(torch.from_numpy(tune.images[begin : begin + 16]))
        for index, dense in enumerate(clip.visual.trunk.forward_features(images), begin):
            classes = tune.piece_classes[index]
            masks = tune.piece_maps[index][None] == np.arange(len(classes))[:, None, None]
            vectors = pool(dense[None], torch.from_numpy(masks)[None].float() * 2 - 1)[0]
            classify(vectors, classes.tolist(), _groups_of, len(CLASSES))
    return {group: 100 * float(np.mean(values)) for group, values in is_right.items()}


def _groups_of(label: int) -> list[str]:
    """The rows of the table that a class on a ground-truth mask counts for."""
    entry = CLASSES[label]
    if entry.thing:
        return ["seen" if entry.seen else "unseen"]
    return ["grounds"] if entry.seen else ["grounds", "unseen_grounds"]


FLOORS = {"single": 95.0, "unseen": 70.0, "grounds": 85.0}
MEANINGS = {
    "single": "single-shape images, whole image, 48 classes",
    "seen": "ground-truth masks on tune, seen things, all classes",
    "unseen": "ground-truth masks on tune, unseen things, all classes",
    "grounds": "ground-truth masks on tune, grounds, all classes",
    "unseen_grounds": "ground-truth masks on tune, unseen grounds, all classes",
}


def format_gate(figures: dict[str, float]) -> str:
    """A table of what the gate measured and what it asks for."""
    lines = [f"{'measured on':<58} {'right':>7} {'floor':>7}"]
    for name, meaning in MEANINGS.items():
        floor = f"{FLOORS[name]:6.1f}%" if name in FLOORS else ""
        lines.append(f"{meaning:<58} {figures[name]:6.1f}% {floor:>7}".rstrip())
    return "\n".join(lines)


def passes(figures: dict[str, float]) -> bool:
    return all(figures[name] >= floor for name, floor in FLOORS.items())


def load_clip(architecture: Path, weights: Path) -> nn.Module:
    """The CLIP of a JSON with the weights of a file, in float32."""
    if not weights.is_file():
        raise MissingFileError(f"no weights (--output) at {weights}")
    clip = build_clip(architecture)
    clip.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return clip.eval()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the CLIP of the shapes world and checks it.")
    add = parser.add_argument
    add("--output", type=Path, default=ASSETS / "shapes_clip.safetensors", help="weights to write, or to check")
    add("--architecture", type=Path, default=ASSETS / "shapes_convnext.json", help="open_clip model description")
    add("--gate-only", action="store_true", help="check the weights, train nothing")
    add("--seed", type=int, default=90001, help=f"world to train on; not {GATE_SEED}, the gate's")
    add("--images", type=int, default=5000, help="images to cut crops from")
    add("--iterations", type=int, default=6000)
    add("--workers", type=int, default=2, help="processes that render, and threads that compute")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trains unless told not to, and returns 0 when the weights pass the gate, else 1."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.workers)
    if not options.gate_only:
        run_training(options)
    return 0 if run_gate(options) else 1


def run_training(options: argparse.Namespace) -> None:
    check_training(options.seed, options.output)
    print(f"rendering {options.images} images, seed {options.seed}", flush=True)
    pool = render_pool(seed=options.seed, rule_name="clip", num_images=options.images, workers=options.workers)
    torch.manual_seed(options.seed)
    clip = build_clip(options.architecture)
    start_weights(clip)
    recipe = {"iterations": options.iterations, "pixels_per_batch": PIXELS_PER_BATCH}
    recipe |= {"seed": options.seed, "learning_rate": LEARNING_RATE}
    train(clip, pool, **recipe)
    metadata = {"architecture": read_json(options.architecture), "training": {**recipe, "images": options.images}}
    save_half(clip, options.output, metadata)
    print(f"wrote {options.output} ({options.output.stat().st_size / 2**20:.1f} MiB)")


def run_gate(options: argparse.Namespace) -> bool:
    clip = load_clip(options.architecture, options.output)
    world = {"seed": GATE_SEED, "workers": options.workers}
    singles = render_pool(rule_name="single", num_images=2 * GATE_IMAGES, **world)
    tune = render_pool(rule_name="tune", num_images=GATE_IMAGES, **world)
    figures = gate(clip, singles=singles, tune=tune)
    print(format_gate(figures))
    print("passed" if passes(figures) else "FAILED")
    return passes(figures)


if __name__ == "__main__":
    sys.exit(run_program(main))
