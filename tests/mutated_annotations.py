"""Own data with something wrong in their annotations, checked, trained on and evaluated:

    mutated_annotations.py FOLDER FIRST_SEED END_SEED

Prints a line of JSON for each seed where check, training and evaluation do not agree, a number is impossible, or
an annotation is lost without a word; a last line says how many seeds were tried.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from fcclip.checks.dataset import check_dataset
from fcclip.checks.issue import ERROR
from fcclip.data import build_train_mapper, get_dataset
from fcclip.data.annotations import KINDS
from fcclip.errors import UserError
from fcclip.evaluation import evaluate
from fcclip.modeling import build_model
from fcclip.structures import TrainingBatch
from tests.conftest import tiny_config
from tests.evaluation import tiny_world

NUM_IMAGES = 2
MAPPERS = {"panoptic": "coco_panoptic_lsj", "instances": "coco_instance_lsj", "semantic": "mask_former_semantic"}
LEFT_OUT = ("flat-instance", "crowd-without-mask")
JUNK = (
    None, True, False, -1, 0, 1, 2, 5, 7.0, 3.7, 1e30, math.nan, math.inf, 10**30, "", "0", "7", "日本", "\0", [], [1],
    [[]], {}, {"a": 1}, [[1, 2]], "cup\u200b", "images\\0.jpg",
)  # fmt: skip
POLYGONS = (
    [[1, 2, 30, 5, 20, 33]], [1, 2, 30, 5, 20, 33], [[1, 2], [30, 5], [20, 33]], [[[1, 2], [30, 5], [20, 33]]],
    [[1, 2, 30, 5]], [[1, 2, 30, 5, 20]], [[1, 2, 30, 5, 20, 3.5e8]], [[1, 2, 30, math.nan, 20, 33]], [[]],
    [[1, 2], []], [["1", "2", "3", "4", "5", "6"]], [[1, 2, 30, 5, 20, 33], [3, 4]],
    [[-50, -50, 200, -50, 200, 200]],
    {"size": [40, 60], "counts": [100, 50, 2250]}, {"size": [60, 40], "counts": [100, 50, 2250]},
    {"size": [40, 60], "counts": [100, -50, 2350]}, {"size": [40, 60], "counts": "abc"}, {"size": [40, 60]},
    {"size": ["40", 60], "counts": [2400]}, {"size": [40, 60], "counts": [2400.0]}, {"counts": [2400]},
)  # fmt: skip


def write_world(folder: Path) -> dict[str, dict]:
    """Two images with three kinds of labels; returns the contents of the two JSON files."""
    tiny_world.write(folder)
    contents = {}
    for kind in ("panoptic", "instances"):
        content = json.loads((folder / f"{kind}.json").read_text())
        content["images"] = [
            {**image, "file_name": f"{number}.jpg"} for number, image in enumerate(content["images"][:NUM_IMAGES])
        ]
        known = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in known]
        contents[kind] = content
    for path in folder.glob("*/*"):
        if int(path.stem) >= NUM_IMAGES:
            path.unlink()
    classes = [f"{entry.name}:{'thing' if entry.thing else 'stuff'}" for entry in tiny_world.VOCABULARY.classes]
    files = {"panoptic": "panoptic.json", "instances": "instances.json", "semantic": "changed"}
    for kind, file in files.items():
        description = {"type": kind, "images": "images", "annotations": file, "classes": classes}
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(description))
    return contents


# ---- what is changed ----


def change_json(rng: random.Random, kind: str, content: dict) -> None:
    """Changes one to three things."""
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(("images", "annotations", "annotations", "annotations", "categories", "parts", "parts"))
        entries = content.get("annotations" if place == "parts" else place)
        if not isinstance(entries, list) or not entries:
            continue
        entry = rng.choice(entries)
        if place == "parts" and kind == "panoptic" and isinstance(entry, dict):
            entries = entry.get("segments_info")
            if not isinstance(entries, list) or not entries:
                continue
            entry = rng.choice(entries)
        deed = rng.random()
        if not isinstance(entry, dict) or deed < 0.06:
            entries[entries.index(entry)] = rng.choice(JUNK)
        elif deed < 0.12:
            entries.remove(entry)
        elif deed < 0.18:
            entries.append(copy.deepcopy(entry))
        elif deed < 0.26:
            entry.pop(rng.choice(list(entry)), None)
        elif deed < 0.5 and "segmentation" in entry:
            entry["segmentation"] = copy.deepcopy(rng.choice(POLYGONS))
        else:
            entry[rng.choice([*entry, "iscrowd", "area", "bbox"])] = copy.deepcopy(rng.choice(JUNK))


def change_labels(rng: random.Random, source: Path, target: Path) -> None:
    """Writes the label maps with something changed in one of them."""
    for path in sorted(source.iterdir()):
        labels = np.array(Image.open(path))
        target_file = target / path.name
        if path.stem == "1":
            Image.fromarray(labels).save(target_file)
            continue
        deed = rng.choice(
            ("label", "label", "size", "deep", "colours", "cut", "text", "none", "void", "palette", "float")
        )
        if deed == "label":
            labels[: rng.randint(1, 20)] = rng.choice((0, 1, 2, 3, 4, 5, 200, 254, 255))
        elif deed == "size":
            labels = labels[: rng.randint(5, 39)]
        elif deed == "void":
            labels[:] = 255
        if deed == "none":
            continue
        if deed == "colours":
            Image.fromarray(np.stack([labels] * 3, -1)).save(target_file)
        elif deed == "deep":
            Image.fromarray(labels.astype(np.uint16) * rng.choice((1, 257))).save(target_file)
        elif deed == "palette":
            image = Image.fromarray(labels)
            image.putpalette([rng.randint(0, 255) for _ in range(768)])
            image.save(target_file)
        elif deed == "float":
            Image.fromarray(labels.astype(np.float32)).save(target_file, format="TIFF")
        else:
            Image.fromarray(labels).save(target_file)
        if deed == "cut":
            target_file.write_bytes(target_file.read_bytes()[: rng.randint(0, 60)])
        elif deed == "text":
            target_file.write_text("labels")


# ---- what becomes of it ----


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = write_world(folder)
        self.cfg = tiny_config()
        self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(tiny_world.VOCABULARY)
        self.cfg.INPUT.IMAGE_SIZE = 32
        self.cfg.INPUT.MIN_SIZE_TRAIN, self.cfg.INPUT.CROP.ENABLED = (32,), False
        torch.manual_seed(0)
        vocabularies = {"train_vocabulary": tiny_world.VOCABULARY, "test_vocabulary": tiny_world.VOCABULARY}
        self.model = build_model(self.cfg, **vocabularies).train()

    def change(self, seed: int) -> tuple[str, int]:
        """Writes the files of a seed; returns their kind and how many annotations they have."""
        rng = random.Random(seed)
        kind = rng.choice(("panoptic", "instances", "semantic"))
        if kind == "semantic":
            target = self.folder / "changed"
            target.mkdir(exist_ok=True)
            for path in target.iterdir():
                path.unlink()
            change_labels(rng, self.folder / "semantic", target)
            return kind, 0
        content = copy.deepcopy(self.contents[kind])
        change_json(rng, kind, content)
        (self.folder / f"{kind}.json").write_text(json.dumps(content))
        return kind, len(content["annotations"])

    def train(self, kind: str, records: list[dict]) -> None:
        """Two steps on the images."""
        self.cfg.DATASETS.TRAIN = (str(self.folder / f"{kind}.yaml"),)
        self.cfg.INPUT.DATASET_MAPPER_NAME = MAPPERS[kind]
        mapper = build_train_mapper(self.cfg)
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)
        for step in range(2):
            samples = [mapper(record, np.random.default_rng(step)) for record in (records * 2)[:NUM_IMAGES]]
            losses = self.model.losses(TrainingBatch(samples))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            assert all(math.isfinite(loss) for loss in map(float, losses.values())), losses

    def results(self, dataset) -> dict[str, float]:
        """Every number of an evaluation."""
        settings = {"modes": {"ensemble": (0.4, 0.8)}, "progress": False, "vocabulary": tiny_world.VOCABULARY}
        results = evaluate(tiny_world.GreyModel(), tiny_world.config(), dataset, **settings)["ensemble"]
        return {f"{task}/{name}": value for task, values in results.items() for name, value in values.items()}


class Told(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def trial(world: World, seed: int) -> dict[str, Any] | None:
    """What is wrong about a seed; None: nothing."""
    kind, num_annotations = world.change(seed)
    path = str(world.folder / f"{kind}.yaml")
    report = check_dataset(get_dataset(path))
    errors = [f"{issue.kind}: {issue.text}" for issue in report.issues if issue.level == ERROR]
    told = Told()
    logging.getLogger("fcclip").addHandler(told)
    refusals, kept, numbers = {}, 0, {}
    try:
        dataset = get_dataset(path)
        records = dataset.records()
        kept = sum(len(record["annotations"]) for record in records) if kind == "instances" else len(records)
    except UserError as error:
        refusals["reader"] = str(error)
    else:
        try:
            world.train(kind, records)
        except UserError as error:
            refusals["training"] = str(error)
        try:
            numbers = world.results(dataset)
        except UserError as error:
            refusals["evaluation"] = str(error)
    finally:
        logging.getLogger("fcclip").removeHandler(told)
    wrong = {}
    if bool(errors) != bool(refusals):
        wrong["disagreement"] = {"check": errors, "refusals": refusals}
    impossible = {key: value for key, value in numbers.items() if not (math.isnan(value) or 0 <= value <= 100)}
    if impossible:
        wrong["impossible"] = impossible
    if kind == "instances" and "reader" not in refusals:
        titles = [KINDS[name].title for name in LEFT_OUT]
        counts = [re.search(rf": (\d+) {re.escape(title)}", text) for text in told.messages[:9] for title in titles]
        left_out = sum(int(count[1]) for count in {match[0]: match for match in filter(None, counts)}.values())
        if kept + left_out != num_annotations:
            wrong["lost"] = {"kept": kept, "told": told.messages, "of": num_annotations}
    return {"seed": seed, "kind": kind, **wrong} if wrong else None


def main() -> None:
    folder, first, end = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    torch.set_num_threads(1)
    logging.getLogger("fcclip").propagate = False
    world = World(folder)
    for seed in range(first, end):
        print(f"seed {seed}", file=sys.stderr, flush=True)
        try:
            wrong = trial(world, seed)
        except Exception:
            wrong = {"seed": seed, "traceback": traceback.format_exc()}
        if wrong:
            print(json.dumps(wrong, ensure_ascii=True), flush=True)
    print(json.dumps({"tried": end - first}))


if __name__ == "__main__":
    main()
