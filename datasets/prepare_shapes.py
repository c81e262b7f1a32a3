"""Renders the shapes world and writes it as a COCO panoptic data set.

    python datasets/prepare_shapes.py --seed 0 --images 2000 --out datasets

`--out` is the folder of all data sets ($DETECTRON2_DATASETS); the world becomes its subfolder `shapes`: five sets, each
with images, id PNGs, panoptic and instances JSON and semantic PNGs. The folder appears when everything in it is
complete; an interrupted run leaves nothing that counts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from fcclip.errors import InputError, run_program
from fcclip.preparation.files import id_colours, read_json, write_json
from fcclip.preparation.programs import processes
from fcclip.preparation.shapes_world import IMAGE_SIZE, SETS, WORLD_VERSION, WorldClass, render_image, world_classes

IMAGES_PER_EVALUATION_SET = 200
JPEG_QUALITY = 95
IGNORE_LABEL = 255


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare(out=options.out, seed=options.seed, num_images=options.images, num_workers=options.workers)
    return 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Renders the shapes world and writes it as a COCO panoptic data set.")
    parser.add_argument("--seed", type=int, default=0, help="every seed is another world of the same kind (default 0)")
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help=f"training images (default 2000); each other set has {IMAGES_PER_EVALUATION_SET}",
    )
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    parser.add_argument(
        "--out", type=Path, default=root, help="folder of all data sets (default $DETECTRON2_DATASETS, else datasets)"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes; they change nothing but the time"
    )
    return parser.parse_args(arguments)


def prepare(
    *, out: Path, seed: int, num_images: int, num_workers: int, num_evaluation: int = IMAGES_PER_EVALUATION_SET
) -> Path:
    """Writes `out`/shapes, or finds it there already; returns it."""
    for name, value, least in (("seed", seed, 0), ("images", num_images, 1), ("workers", num_workers, 1)):
        if value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    out = out.expanduser()
    target, partial_folder = out / "shapes", out / ".shapes.partial"
    recipe = {
        "world_version": WORLD_VERSION,
        "seed": seed,
        "images": num_images,
        "evaluation_images": num_evaluation,
    }
    if is_complete(target, recipe):
        print(f"{target} is complete already (seed {seed}, {num_images} training images)")
        return target
    shutil.rmtree(partial_folder, ignore_errors=True)  # of an interrupted run
    try:
        partial_folder.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"cannot write into {out}: {error.strerror or error}. Choose another folder with --out."
        ) from error
    try:
        start = time.time()
        with processes(num_workers) as run_each:
            for set_name in SETS:
                count = num_images if set_name == "train" else num_evaluation
                write_set(partial_folder, set_name, seed=seed, num_images=count, run_each=run_each)
                print(f"{target}: {set_name:<10} {count:>5} images", flush=True)
        write_json(partial_folder / "world.json", recipe)
        partial_folder.replace(target)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    print(f"wrote {target} in {time.time() - start:.0f} s")
    return target


def is_complete(target: Path, recipe: dict) -> bool:
    """Whether `target` holds this very world; a folder that holds anything else is an error."""
    if not target.exists():
        return False
    record = target / "world.json"
    if not record.is_file():
        raise InputError(
            f"{target} exists but has no world.json: half-written, or not a shapes world. "
            "Delete it or choose another folder with --out."
        )
    try:
        content = read_json(record)
        made_with = {key: content[key] for key in recipe}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{record} cannot be read ({error!r}). Delete {target} or choose another folder with --out."
        ) from error
    if made_with != recipe:
        raise InputError(
            f"{target} holds another world: expected {recipe}, got {made_with}. "
            "Delete it or choose another folder with --out."
        )
    return True


# ----------------------------------------------------------------------------------------------------------------- sets


def set_classes(set_name: str) -> tuple[WorldClass, ...]:
    """The classes of a set's own vocabulary: the training set knows the seen ones only."""
    return tuple(c for c in world_classes() if c.seen or set_name != "train")


def write_set(folder: Path, set_name: str, *, seed: int, num_images: int, run_each) -> None:
    """Writes one set below `folder`."""
    for name in (set_name, f"panoptic_{set_name}", f"panoptic_semseg_{set_name}", "annotations"):
        (folder / name).mkdir(exist_ok=True)
    written = list(run_each(partial(write_image, folder, set_name, seed), range(num_images)))
    classes = set_classes(set_name)
    images = [
        {"id": i + 1, "file_name": f"{stem(i)}.jpg", "height": IMAGE_SIZE, "width": IMAGE_SIZE, "license": 1}
        for i in range(num_images)
    ]
    head = {
        "info": {"description": f"shapes world, set {set_name}", "version": str(WORLD_VERSION), "seed": seed},
        "licenses": [{"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "images": images,
    }
    categories = [
        {"id": c.id, "name": c.name, "supercategory": c.shape if c.thing else "ground", "isthing": int(c.thing)}
        for c in classes
    ]
    panoptic = [
        {"image_id": i + 1, "file_name": f"{stem(i)}.png", "segments_info": segments}
        for i, (segments, _) in enumerate(written)
    ]
    instances = [{"image_id": i + 1, **shape} for i, (_, shapes) in enumerate(written) for shape in shapes]
    instances = [{"id": number, **instance} for number, instance in enumerate(instances, start=1)]
    thing_categories = [{k: v for k, v in c.items() if k != "isthing"} for c in categories if c["isthing"]]
    for kind, labels, classes in (("panoptic", panoptic, categories), ("instances", instances, thing_categories)):
        content = {**head, "annotations": labels, "categories": classes}
        write_json(folder / "annotations" / f"{kind}_{set_name}.json", content)


def write_image(folder: Path, set_name: str, seed: int, index: int) -> tuple[list[dict], list[dict]]:
    """Writes the three files of one image; returns its segments and its instances."""
    image = render_image(seed, set_name, index)
    rng = np.random.default_rng([seed, zlib.crc32(set_name.encode()), index, 2**31])
    ids = rng.choice(2**24 - 1, size=len(image.pieces), replace=False) + 1
    contiguous = {c.id: i for i, c in enumerate(set_classes(set_name))}
    id_map = ids[image.piece_map]
    semantic = np.array([contiguous[p.category_id] for p in image.pieces], np.uint8)[image.piece_map]
    _write_image(
        folder / set_name / f"{stem(index)}.jpg", image.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    _write_image(folder / f"panoptic_{set_name}" / f"{stem(index)}.png", id_colours(id_map)[..., ::-1])
    _write_image(folder / f"panoptic_semseg_{set_name}" / f"{stem(index)}.png", semantic)
    segments, instances = [], []
    for number, piece in enumerate(image.pieces):
        mask = image.piece_map == number
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        common = {
            "category_id": piece.category_id,
            "area": int(mask.sum()),
            "bbox": [int(v) for v in coco_mask.toBbox(rle)],
            "iscrowd": 0,
        }
        segments.append({"id": int(ids[number]), **common})
        if piece.thing:
            instances.append({**common, "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")}})
    return segments, instances


def stem(index: int) -> str:
    return f"{index + 1:012d}"


def _write_image(path: Path, image: np.ndarray, parameters: list[int] | None = None) -> None:
    if not cv2.imwrite(str(path), np.ascontiguousarray(image), parameters or []):
        raise OSError(f"cannot write {path}: is the disk full, or the folder not writable?")


if __name__ == "__main__":
    sys.exit(run_program(main))
