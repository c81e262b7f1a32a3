"""Fusioner on four folds of the shapes world, with the tokens of a CLIP and with those of a vision transformer that
never met a word, as in the paper's table of encoder pairs.

    python tools/compare_fusioner.py [--output FOLDER] [--encoders CLIP timm] [--folds 0 1 2 3] [-- KEY VALUE ...]

The 60 classes of the world are divided as those of COCO-20^i: every fourth is novel in a fold. Trained is on pairs of
an image and one of its base classes, tested on all pairs of shapes_val with a novel class, by the published protocol:
images of the training show novel classes, unnamed. Text is the shipped CLIP's in both cases. The transformer is trained
here first, without text: of two views of an image, turned and mirrored, each piece must be told from those of all
images of a batch. Called again, the program goes on where it was interrupted. Writes results.json, table.md, and
drawings of predictions.

Beside each result stand two that need no sight of what is asked for: everything is foreground, and the model asked for
another novel class of the fold, of another colour and shape.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from safetensors.torch import save
from stages import call
from torch import Tensor, nn

from fcclip.config import load_config
from fcclip.data import get_dataset, read_image
from fcclip.data.dataset import Dataset
from fcclip.data.datasets.metadata import class_metadata
from fcclip.data.loaders import build_train_loader
from fcclip.data.mappers import build_test_mapper
from fcclip.engine import build_trainer, seed_everything
from fcclip.errors import run_program
from fcclip.evaluation import evaluate
from fcclip.evaluation.results import current_commit
from fcclip.files import read_json, write_atomically, write_json
from fcclip.modeling import build_model
from fcclip.modeling.architecture import Architecture
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights

CONFIG = "shapes/fusioner_shapes.yaml"
TRAIN_SPLITS = ("tune", "val_unseen")  # those of all 60 classes but val
NUM_FOLDS, PREPARED_IMAGES = 4, 1  # the set train has two thirds of the classes and is not used
NAMES = {"CLIP": "CLIP (convolutional)", "timm": "ViT without text"}
SIDES = {"CLIP": 256, "timm": 128}  # of images, pixels: both encoders give 8 x 8 tokens
ROWS = ("novel", "another name", "everything")
VIT_ITERATIONS, VIT_BATCH, VIT_RATE, TEMPERATURE = 200, 12, 1e-3, 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    output = args.output.expanduser().resolve()
    world = os.environ["DETECTRON2_DATASETS"] = str(args.world or output / "world")
    if args.world is None:
        call("datasets/prepare_shapes.py", "--images", PREPARED_IMAGES, "--out", world)
    path, vit = output / "results.json", output / "vit.safetensors"
    results = read_json(path, what="results") if path.is_file() else {"commit": current_commit(), "mIoU": {}}
    if "timm" in args.encoders and not vit.is_file():
        train_vit(load_config(CONFIG), vit)
    for fold, encoder in itertools.product(args.folds, args.encoders):
        key = f"{encoder} {fold}"
        if key not in results["mIoU"]:
            results["mIoU"][key] = run_fold(encoder, fold, vit, output, args)
            write_json(path, results, indent=1)
    table = format_table(results["mIoU"])
    write_atomically(output / "table.md", lambda file: file.write(table.encode()))
    print(f"mIoU of novel classes, percent\n\n{table}\nresults: {path}")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/fusioner_shapes"), help="folder (default: %(default)s)")
    add("--world", type=Path, help="folder of the shapes world (default: it is rendered into the output folder)")
    add("--encoders", nargs="+", choices=tuple(NAMES), default=list(NAMES))
    add("--folds", type=int, nargs="+", choices=range(NUM_FOLDS), default=list(range(NUM_FOLDS)))
    add("--first", type=int, metavar="N", help="test on the first pairs only")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys for every training, after --")
    return parser.parse_args(arguments)


# ---- pairs ----


def pairs(splits: Sequence[str], fold: int, *, novel: bool, step: int = 0) -> Dataset:
    """Pairs of an image and a class that it shows, of the novel or the base classes of a fold.

    Args:
        step: the class that is prompted is that many places after the one whose mask counts.
    """
    whole = Vocabulary.builtin("shapes")
    classes = [index for index in range(len(whole)) if (index % NUM_FOLDS == fold) == novel]
    names = [whole.class_names[index] for index in classes]
    vocabulary = Vocabulary.from_names(names, name=f"shapes_fold{fold}_{'novel' if novel else 'base'}")

    def load() -> list[dict]:
        images = [image for split in splits for image in get_dataset(f"shapes_{split}").annotations()]
        return [
            {
                **{key: image[key] for key in ("file_name", "sem_seg_file_name", "height", "width")},
                "image_id": f"{Path(image['file_name']).parent.name}_{image['image_id']}_{index}",
                "category_id": position,
                "mask_value": index,
                "class_name": names[(position + step) % len(names)],
            }
            for image in images
            for position, index in enumerate(classes)
            if index in {segment["category_id"] for segment in image["segments_info"]}
        ]

    metadata = class_metadata(vocabulary, things=False) | {"ignore_label": 255, "evaluator_type": "one_class_pairs"}
    return Dataset(
        name=vocabulary.name,
        metadata=metadata,
        load=load,
        vocabulary=vocabulary.name,
        read_vocabulary=lambda: vocabulary,
    )


# ---- a fold ----


def run_fold(encoder: str, fold: int, vit: Path, output: Path, args: argparse.Namespace) -> dict[str, float]:
    """Trains, unless that was done, tests and draws; mIoU of novel classes by `ROWS`."""
    keys = {"MODEL.BACKBONE.NAME": encoder, "MODEL.FUSIONER.TIMM_WEIGHTS": str(vit)}
    keys |= {f"INPUT.{key}": str(SIDES[encoder]) for key in ("IMAGE_SIZE", "MIN_SIZE_TEST", "MAX_SIZE_TEST")}
    cfg = load_config(CONFIG, [*(word for pair in keys.items() for word in pair), *args.opts])
    folder = output / f"{encoder}_{fold}"
    train, test = pairs(TRAIN_SPLITS, fold, novel=False), pairs(("val",), fold, novel=True)
    seed_everything(cfg.SEED)
    model = build_model(cfg, train_vocabulary=train.own_vocabulary(), test_vocabulary=test.own_vocabulary())
    if not (folder / "model_final.pth").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        build_trainer(
            cfg,
            model,
            batches=lambda start: build_train_loader(cfg, dataset=train, start=start),
            device=model.device,
            vocabulary=train.own_vocabulary(),
            output_dir=folder,
        ).train()
    load_weights(model, folder / "model_final.pth")
    draw(model.eval(), cfg, test.records(), folder)
    results = {
        row: evaluate(model, cfg, dataset, progress=False, max_images=args.first)[cfg.TEST.MODE]["pairs"]["mIoU"]
        for row, dataset in zip(ROWS, (test, pairs(("val",), fold, novel=True, step=2)))
    }
    return {**results, "everything": everything(test)}


def everything(dataset: Dataset) -> float:
    """The mIoU of a foreground that is the whole image: the share of a class in the images that show it."""
    shares: dict[int, list[float]] = {}
    for record in dataset.records():
        mask = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED) == record["mask_value"]
        shares.setdefault(record["category_id"], []).append(mask.mean())
    return 100 * float(np.mean([np.mean(values) for values in shares.values()]))


@torch.no_grad()
def draw(model: Architecture, cfg: CfgNode, records: Sequence[dict], folder: Path, number: int = 12) -> None:
    """predictions.png: of some pairs the image, the true and the predicted mask, and the name."""
    rows, mapper = [], build_test_mapper(cfg)
    for record in records[:: max(len(records) // number, 1)][:number]:
        image = read_image(record["file_name"])
        [scored] = model.score([mapper(record)])
        mask = model.outputs(scored, heads=("panoptic",))["panoptic_seg"][0].cpu().numpy() > 0
        truth = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED) == record["mask_value"]
        views = [image, *(np.where(chosen[..., None], image, image // 5) for chosen in (truth, mask))]
        row = np.ascontiguousarray(np.concatenate(views, axis=1))
        rows.append(cv2.putText(row, record["class_name"], (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 2))
    half = len(rows) // 2
    sheet = np.concatenate([np.concatenate(part) for part in (rows[:half], rows[half : 2 * half])], axis=1)
    cv2.imwrite(str(folder / "predictions.png"), sheet[..., ::-1])


# ---- the vision transformer ----


def train_vit(cfg: CfgNode, path: Path) -> None:
    """Trains the encoder on the images of the training and writes it; no class is read, in words or numbers."""
    seed_everything(cfg.SEED)
    vit = timm.create_model(cfg.MODEL.FUSIONER.TIMM_MODEL, num_classes=0, dynamic_img_size=True)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=VIT_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / VIT_ITERATIONS))
    )
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    records = [record for split in TRAIN_SPLITS for record in get_dataset(f"shapes_{split}").annotations()]
    side, patch = SIDES["timm"], vit.patch_embed.patch_size[0]
    images = [
        cv2.resize(read_image(record["file_name"]), (side, side), interpolation=cv2.INTER_AREA) for record in records
    ]
    images = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images]
    pieces = [piece_shares(record["sem_seg_file_name"], side // patch) for record in records]
    rng, losses = np.random.default_rng(cfg.SEED), []
    for iteration in range(VIT_ITERATIONS):
        chosen = rng.choice(len(images), VIT_BATCH, replace=False)
        first, second = (
            embeddings(vit, [view(images[index], pieces[index], rng) for index in chosen], mean, deviation)
            for _ in range(2)
        )
        similarity = first @ second.T / TEMPERATURE
        target = torch.arange(len(similarity))
        loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (iteration + 1) % 50 == 0:
            print(f"ViT, iteration {iteration + 1}/{VIT_ITERATIONS}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({name: weight.contiguous() for name, weight in vit.state_dict().items()})
    write_atomically(path, lambda file: file.write(content))


def piece_shares(path: str, side: int) -> Tensor:
    """(pieces, side, side): of the pixels below a token, the share of each area of a label map, whatever it is."""
    labels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    masks = torch.from_numpy(np.stack([labels == value for value in np.unique(labels)])).float()
    return F.adaptive_avg_pool2d(masks, side)


def view(image: Tensor, pieces: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The same, turned and mirrored at random, and a little lighter or darker."""
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    turned = (torch.rot90(maps, turns, (-2, -1)) for maps in (image.float() * rng.uniform(0.9, 1.1), pieces))
    image, pieces = (maps.flip(-1) if mirrored else maps for maps in turned)
    return image, pieces


def embeddings(vit: nn.Module, views: Sequence[tuple[Tensor, Tensor]], mean: Tensor, deviation: Tensor) -> Tensor:
    """(pieces of all views, D), unit length: the mean of the tokens below a piece."""
    images = torch.stack([image for image, _ in views])
    tokens = vit.forward_features((images - mean) / deviation)[:, vit.num_prefix_tokens :]
    pooled = [(shares / shares.sum((1, 2), keepdim=True)).flatten(1) @ own for (_, shares), own in zip(views, tokens)]
    return F.normalize(torch.cat(pooled), dim=-1)


# ---- the table ----


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table: a column a fold, and the mean of all four."""
    lines = ["| vision | prompt | fold 0 | fold 1 | fold 2 | fold 3 | mean |", "|---|---|---|---|---|---|---|"]
    for encoder, row in ((encoder, row) for encoder in NAMES for row in ROWS):
        values = [results.get(f"{encoder} {fold}", {}).get(row, math.nan) for fold in range(NUM_FOLDS)]
        cells = " | ".join("–" if math.isnan(value) else f"{value:.1f}" for value in [*values, float(np.mean(values))])
        lines.append(f"| {NAMES[encoder]} | {row} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(run_program(main))
