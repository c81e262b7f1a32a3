"""A data set of a few images on disk and a model without weights, for tests of the runner.

Also the program of one of several processes: `tiny_world.py FOLDER BROKEN_FOLDER RANK WORLD_SIZE OUTPUT`.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pycocotools.mask
import torch
import torch.distributed
from PIL import Image
from torch import nn

from fcclip.config import get_cfg
from fcclip.data import Dataset
from fcclip.data.datasets.files import AnnotationFile
from fcclip.data.datasets.metadata import class_metadata
from fcclip.data.datasets.panoptic import NOT_PANOPTIC, panoptic_records
from fcclip.evaluation import evaluate, write_id_map
from fcclip.structures import Instances
from fcclip.vocabulary import ClassEntry, Vocabulary

NUM_IMAGES, HEIGHT, WIDTH = 7, 40, 60
VOCABULARY = Vocabulary(
    "tiny",
    tuple(
        ClassEntry(identifier, name, (name,), thing)
        for identifier, name, thing in ((4, "cup", True), (9, "sand", False), (5, "ball", True), (2, "sea", False))
    ),
)
TRAINING = Vocabulary.from_names("cup; sea:stuff; car")
MODES = {"ensemble": (0.4, 0.8), "in_vocabulary": (0.0, 0.0), "out_of_vocabulary": (1.0, 1.0)}


def config():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE = "cpu"
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = test.SEMANTIC_ON = True
    return cfg


def write(folder: Path, sizes: Sequence[tuple[int, int]] = ((HEIGHT, WIDTH),)) -> None:
    """Images whose grey value says the class, with ground truth in every format; their (height, width), multiples of
    ten, are `sizes` in turn.
    """
    rng = np.random.default_rng(0)
    images, panoptic, instances = [], [], []
    for sub in ("images", "panoptic", "semantic"):
        (folder / sub).mkdir(parents=True)
    for number in range(NUM_IMAGES):
        image_id = 3 * number + 1
        height, width = sizes[number % len(sizes)]
        classes = np.kron(rng.integers(0, 4, (height // 10, width // 10)), np.ones((10, 10), int))
        void = rng.random((height, width)) < 0.05
        ids, segments = np.zeros((height, width), int), []
        for index, entry in enumerate(VOCABULARY.classes):
            mask = (classes == index) & ~void
            if not mask.any():
                continue
            segment_id = 300 + index
            ids[mask] = segment_id
            code = pycocotools.mask.encode(np.asfortranarray(mask, np.uint8))
            box = pycocotools.mask.toBbox(code).tolist()
            area = int(mask.sum())
            common = {"category_id": entry.id, "area": area, "bbox": box, "iscrowd": int(rng.random() < 0.1)}
            segments.append({"id": segment_id, **common})
            if entry.thing:
                code["counts"] = code["counts"].decode()
                instances.append({"id": len(instances) + 1, "image_id": image_id, "segmentation": code, **common})
        grey = (classes * 64 + 32 + rng.integers(-30, 31, classes.shape)).astype(np.uint8)
        Image.fromarray(np.stack([grey] * 3, -1)).save(folder / "images" / f"{number}.jpg", quality=80)
        write_id_map(folder / "panoptic" / f"{number}.png", ids)
        Image.fromarray(np.where(void, 255, classes).astype(np.uint8)).save(folder / "semantic" / f"{number}.png")
        panoptic.append({"image_id": image_id, "file_name": f"{number}.png", "segments_info": segments})
        images.append({"id": image_id, "height": height, "width": width})
    common = {
        "images": images,
        "categories": [
            {"id": entry.id, "name": entry.name, "isthing": int(entry.thing)} for entry in VOCABULARY.classes
        ],
    }
    (folder / "panoptic.json").write_text(json.dumps({**common, "annotations": panoptic}))
    things = [category for category in common["categories"] if category["isthing"]]
    (folder / "instances.json").write_text(json.dumps({**common, "categories": things, "annotations": instances}))


def files(folder: Path, annotation: dict) -> dict:
    stem = Path(annotation["file_name"]).stem
    return {
        "file_name": str(folder / "images" / f"{stem}.jpg"),
        "pan_seg_file_name": str(folder / "panoptic" / f"{stem}.png"),
        "sem_seg_file_name": str(folder / "semantic" / f"{stem}.png"),
    }


def dataset(folder: Path, **metadata) -> Dataset:
    source = AnnotationFile("data set 'tiny_val'", folder / "panoptic.json", ("annotations",), NOT_PANOPTIC)
    parse = partial(panoptic_records, source.where, vocabulary=VOCABULARY, image_id=int, files=partial(files, folder))
    standard = {
        **class_metadata(VOCABULARY),
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": 255,
        "panoptic_json": str(folder / "panoptic.json"),
        "json_file": str(folder / "instances.json"),
    }
    return Dataset("tiny_val", standard | metadata, partial(source.records, parse), vocabulary="none")


class GreyModel(nn.Module):
    """Reads the class off the grey value, worse with a larger alpha, and counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def score(self, inputs, vocabulary=None):
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        return [(sample["image"], vocabulary) for sample in inputs]

    def outputs(self, scored, *, heads, ensemble, semantic, settings):
        assert semantic == "labels"
        alpha = 0.1 if ensemble is None else ensemble[0]
        keys = {"semantic": "sem_seg", "panoptic": "panoptic_seg", "instances": "instances"}
        found = self.find(*scored, alpha)
        return {keys[head]: found[keys[head]] for head in heads}

    def find(self, image, vocabulary, alpha):
        labels = ((image[0].long() + int(30 * alpha)) // 64).clamp(max=len(vocabulary) - 1)
        id_map, segments, found = torch.zeros_like(labels, dtype=torch.int32), [], []
        for label in labels.unique().tolist():
            mask = labels == label
            thing, area = label in vocabulary.thing_classes, int(mask.sum())
            segments.append(
                {"id": len(segments) + 1, "isthing": thing, "category_id": label, "score": 0.5, "area": area}
            )
            id_map[mask] = segments[-1]["id"]
            if thing:
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                found.append((label, mask, [float(side) for side in box], area / mask.numel()))
        masks = [mask for _, mask, *_ in found]
        instances = Instances(
            scores=torch.tensor([score for *_, score in found]),
            pred_classes=torch.tensor([label for label, *_ in found], dtype=torch.int64),
            pred_masks=torch.stack(masks) if masks else torch.zeros(0, *labels.shape, dtype=torch.bool),
            pred_boxes=torch.tensor([box for *_, box, _ in found]).reshape(-1, 4),
        )
        return {"sem_seg": labels, "panoptic_seg": (id_map, segments), "instances": instances}


def run(folder: Path, **options):
    settings = {"modes": MODES, "training_vocabulary": TRAINING, "vocabulary": VOCABULARY, "progress": False}
    return evaluate(GreyModel().train(), config(), dataset(folder), **settings | options)


def main(folder: str, broken: str, rank: str, world_size: str, output: str) -> None:
    """Evaluates both data sets; writes what came of it to `OUTPUT.RANK`: results of the first, error of the second."""
    processes = {"rank": int(rank), "world_size": int(world_size)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{output}.rendezvous", **processes)
    results = run(Path(folder), output_dir=f"{output}.files", save_predictions=True)
    try:
        error = repr(run(Path(broken)))
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    Path(f"{output}.{rank}").write_text(json.dumps([repr(results), error]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
