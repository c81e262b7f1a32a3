"""Measures speed and memory; results are written with hardware, versions and commit.

    python tools/benchmark.py training-step --config-file FILE [--batch 2] [--size 1024] [KEY VALUE ...]
    python tools/benchmark.py mapper [--images 24] [--rounds 8] [--size 1024]
    python tools/benchmark.py evaluation [--images 8] [--rounds 5] [--size 640 960] [--classes 150]
    python tools/benchmark.py inference [--models RN50 ConvNeXt-L] [--size 640 960] [--kept 0] [--memory] [--device cpu]
    python tools/benchmark.py text [--model RN50] [--names 0]
    python tools/benchmark.py train [--models RN50] [--size 512] [--batch 2] [--segments 10] [--memory] [--device cpu]
    python tools/benchmark.py growth [--model RN50] [--size 640x960] [--plot FILE]
    python tools/benchmark.py ops [--device auto] [--sizes 640x960 ...] [--batch 1 ...] [--dtypes float32 ...]

training-step: one step of training on made-up images (random pixels, `--segments` segments each, CLIP with random
weights, which changes no time), as `train_net.py` takes it: forward, losses with matching, backward, clipping, AdamW.

mapper: the training mapper `coco_panoptic_lsj` on made-up 640 x 480 images, beside the published steps in their order
(benchmarks/peers/published_panoptic_lsj.py), which must give the same samples; one process and one thread, in turns.

evaluation: panoptic quality, mean IoU and the encoding of instances on made-up 640 x 960 images, beside the published
steps (benchmarks/peers/published_evaluation.py), which must give the same numbers; one thread, in turns.

inference, text: an image, and the names of ADE20K-150 from cold, beside the published steps on the same weights
(benchmarks/peers/published_inference.py), which must give the same, in turns (benchmark_inference.py); --check FILE
fails where a ratio is 20 % below the recorded one.

train: losses and gradients of a batch, beside the published steps on the same weights and points
(benchmarks/peers/published_training.py), which must give the same, in turns (benchmark_train.py).

growth: seconds and memory of ours as image, class names, queries and batch grow, and a plot (benchmark_growth.py).

ops: multi-scale deformable attention at the sizes of FC-CLIP, forward and backward, both forms, every engine that can
run here, in turns (benchmark_ops.py). The default ends in about a minute on a CPU and covers all sizes on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import operator
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from benchmark_growth import add_growth_arguments
from benchmark_inference import add_inference_arguments, add_text_arguments
from benchmark_ops import add_arguments, load_peer
from benchmark_train import add_train_arguments, made_up_sample
from fvcore.common.config import CfgNode
from PIL import Image
from rich.console import Console
from rich.table import Table

from fcclip.config import get_cfg, load_config, resolve_device
from fcclip.data import build_train_mapper
from fcclip.engine import amp_dtype, apply_numeric_settings, build_trainer, environment_report, peak_memory_mb
from fcclip.engine.metrics import History
from fcclip.errors import InputError, run_program
from fcclip.evaluation import (
    GroundTruth,
    PanopticEvaluator,
    SemanticEvaluator,
    encode_masks,
    write_id_map,
)
from fcclip.files import write_json
from fcclip.modeling import build_model
from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.outputs import semantic_inference, semantic_labels
from fcclip.structures import Instances, boxes_of_masks
from fcclip.vocabulary import Vocabulary

WARM_UP = 3  # steps that are not counted: caches fill, cuDNN chooses, the frozen copy is made
PARTS = ("data_time", "forward_time", "backward_time", "step_time")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes the results where --output says."""
    options = parse_arguments(arguments)
    report = options.run(options)
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report, indent=1)
        print(f"written to {path}")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def command(name: str, run: Callable, description: str, numbers: Mapping[str, tuple[Any, str]]) -> Callable:
        """`numbers`: option -> its default and what it counts."""
        own = commands.add_parser(name, help=description)
        own.set_defaults(run=run)
        for option, (default, what) in numbers.items():
            several = {"nargs": 2} if isinstance(default, list) else {}
            own.add_argument(
                option, type=int, default=default, metavar="N", help=f"{what} (default {default})", **several
            )
        own.add_argument("--output", metavar="FILE", help="JSON file for the results")
        return own.add_argument

    numbers = {
        "--size": (1024, "side of the images in pixels"),
        "--segments": (12, "segments an image"),
        "--steps": (20, f"counted steps, after {WARM_UP} others"),
    }
    add = command("training-step", benchmark_training_step, "one step of training: time split and peak memory", numbers)
    add("--config-file", required=True, metavar="FILE")
    add("--batch", type=int, nargs="+", default=[2], metavar="N", help="images a step (default 2)")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys")
    numbers = {
        "--images": (24, "made-up images"),
        "--rounds": (8, "times each is mapped"),
        "--size": (1024, "side of the canvas in pixels"),
        "--segments": (12, "segments an image"),
    }
    command("mapper", benchmark_mapper, "the panoptic training mapper beside the published steps", numbers)
    numbers = {
        "--images": (8, "made-up images"),
        "--rounds": (5, "times each is evaluated"),
        "--size": ([640, 960], "height and width in pixels"),
        "--classes": (150, "classes"),
        "--segments": (20, "segments an image"),
        "--queries": (100, "masks of the network"),
        "--instances": (100, "instances an image"),
    }
    command("evaluation", benchmark_evaluation, "evaluators beside the published steps", numbers)
    add_inference_arguments(commands.add_parser("inference", help="an image beside the published steps"))
    add_text_arguments(commands.add_parser("text", help="class names beside the published steps"))
    add_train_arguments(commands.add_parser("train", help="losses and gradients beside the published steps"))
    add_growth_arguments(commands.add_parser("growth", help="how seconds and memory of ours grow"))
    add_arguments(commands.add_parser("ops", help="multi-scale deformable attention, all engines in turns"))
    return parser.parse_args(arguments)


def benchmark_training_step(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each batch size, prints the table, and returns everything as JSON values."""
    if min(options.batch) < 1 or options.steps < 1 or options.segments < 0:
        raise InputError("--batch and --steps must be at least 1, --segments 0 or more")
    fixed = ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.SAM_WEIGHTS", "", "SEED", "0"]
    fixed += ["INPUT.IMAGE_SIZE", str(options.size)]
    cfg = load_config(options.config_file, [*fixed, *options.opts])
    device = resolve_device(cfg.MODEL.DEVICE)
    apply_numeric_settings(cfg, training=True)
    rows = [measure_step(cfg, batch, options) for batch in options.batch]
    report = {
        "benchmark": "training-step",
        "config": options.config_file,
        "overrides": list(options.opts),
        "image": [3, options.size, options.size],
        "segments": options.segments,
        "autocast": str(amp_dtype(cfg, device)),
        "environment": environment_report(device),
        "rows": rows,
    }
    _print(report)
    return report


def measure_step(cfg: CfgNode, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Mean seconds of a step over the counted ones, median seconds of its parts, and the most memory in MiB: of the
    GPU, or of the whole process so far on a CPU.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = batch, WARM_UP + options.steps, ()
    cfg.freeze()
    device = resolve_device(cfg.MODEL.DEVICE)
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    vocabulary = Vocabulary.from_names([f"class {index}" for index in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)])
    model = build_model(cfg, train_vocabulary=vocabulary, test_vocabulary=vocabulary)
    samples = [made_up_sample(index, options.size, options.segments, len(vocabulary)) for index in range(batch)]
    every_step = itertools.repeat(samples)
    trainer = build_trainer(cfg, model, batches=lambda start: every_step, device=device, vocabulary=vocabulary)
    trainer.model.train()
    batches = trainer.batches(0)
    for _ in range(WARM_UP):
        trainer.step(batches)
    trainer.history = History(window=options.steps)
    began = time.perf_counter()
    for _ in range(options.steps):
        trainer.step(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spent = (time.perf_counter() - began) / options.steps
    medians = trainer.history.medians()
    return {
        "batch": batch,
        "seconds": spent,
        "median_seconds": {name: medians[name] for name in PARTS},
        "images_per_second": batch / spent,
        "peak_memory_mib": peak_memory_mb(device),
        "steps": options.steps,
    }


def _print(report: dict[str, Any]) -> None:
    environment = report["environment"]
    table = Table(title=f"one training step, {report['image'][1]} x {report['image'][2]} pixels")
    for name in ("batch", "seconds", "images/s", "forward", "backward", "step", "peak, MiB"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        parts = [f"{100 * row['median_seconds'][name] / row['seconds']:.0f} %" for name in PARTS[1:]]
        speed = f"{row['images_per_second']:.3g}"
        table.add_row(str(row["batch"]), f"{row['seconds']:.3g}", speed, *parts, f"{row['peak_memory_mib']:,.0f}")
    console = Console()
    console.print(table)
    where = environment.get("GPU", environment["CPU"])
    console.print(f"{where}; torch {environment['torch']}; autocast {report['autocast']}; commit {environment['git']}")


# ---- mapper ----


def benchmark_mapper(options: argparse.Namespace) -> dict[str, Any]:
    """Checks that both mappers give the same samples, measures them in turns, prints the ratio, and returns everything
    as JSON values.

    Raises:
        ValueError: the samples differ, or the options cannot work.
    """
    if min(options.images, options.rounds, options.size) < 1 or options.segments < 0:
        raise InputError("--images, --rounds and --size must be at least 1, --segments 0 or more")
    cfg = get_cfg()
    cfg.INPUT.FORMAT, cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.IMAGE_SIZE = "RGB", "coco_panoptic_lsj", options.size
    ours, published = build_train_mapper(cfg), load_peer("published_panoptic_lsj").map_record
    published = partial(published, size=options.size)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        records = made_up_records(Path(folder), options.images, options.segments)
        for index, record in enumerate(records):
            check_equal(ours(record, np.random.default_rng(index)), published(record, np.random.default_rng(index)))

        def mapping(mapper: Callable[..., Any], record: dict, turn: int) -> None:
            mapper(record, np.random.default_rng((turn, record["image_id"])))  # the same augmentations for both

        compared = compare(partial(mapping, ours), partial(mapping, published), records, options.rounds)
    report = {
        "benchmark": "mapper",
        "mapper": "coco_panoptic_lsj",
        "image": [480, 640],
        "canvas": options.size,
        "segments": options.segments,
        "samples": options.images * options.rounds,
        **compared,
        "images_per_second": {name: 1 / seconds for name, seconds in compared["seconds"].items()},
        "environment": environment_report(torch.device("cpu")),
    }
    for name, seconds in compared["seconds"].items():
        print(f"{name:>9}: {1000 * seconds:6.2f} ms an image, {1 / seconds:.1f} images/s")
    print(f"{_ratio(compared)}, {options.rounds} rounds; {options.images} samples compared, all equal")
    return report


def compare(ours: Callable, published: Callable, images: Sequence, rounds: int) -> dict[str, Any]:
    """Median seconds an image of both, and how many times longer the published one takes, over the rounds.

    They take turns image after image, so that whatever else the machine does slows both.

    Args:
        ours, published: called with an image and the number of the round.
        images: what they work on.
    """
    functions = {"ours": ours, "published": published}
    seconds = {name: [0.0] * rounds for name in functions}
    for turn, (index, image) in itertools.product(range(rounds), enumerate(images)):
        for name in functions if (turn + index) % 2 == 0 else reversed(functions):
            began = time.perf_counter()
            functions[name](image, turn)
            seconds[name][turn] += (time.perf_counter() - began) / len(images)
    ratios = [slow / fast for fast, slow in zip(seconds["ours"], seconds["published"])]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": medians, "ratio": statistics.median(ratios), "ratios": ratios, "rounds": seconds}


def _ratio(compared: Mapping[str, Any]) -> str:
    return f"ratio {compared['ratio']:.2f} ({min(compared['ratios']):.2f} to {max(compared['ratios']):.2f})"


def check_equal(ours: dict[str, Any], published: dict[str, Any]) -> None:
    """Refuses to compare the speed of two things that are not the same."""
    same = (
        torch.equal(ours["image"], published["image"])
        and torch.equal(ours["targets"].labels, published["gt_classes"])
        and torch.equal(ours["targets"].expand(), published["gt_masks"].bool())
        and (ours["height"], ours["width"]) == (published["height"], published["width"])
    )
    if not same:
        raise InputError(f"{ours['file_name']}: the two mappers give different samples")


def made_up_records(folder: Path, count: int, segments: int) -> list[dict]:
    """Panoptic records of made-up images, 640 x 480 in JPEG (about 130 kB) with the id PNG of wavy segments; every
    fourth stands upright."""
    records = []
    for index in range(count):
        rng = np.random.default_rng(index)
        height, width = (640, 480) if index % 4 == 3 else (480, 640)
        coarse = Image.fromarray(rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height)))
        noisy = (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index}.jpg", quality=90)
        numbers, ids = wavy_segments(rng, (height, width), segments)
        write_id_map(folder / f"{index}.png", ids[numbers])
        labels = [{"category_id": int(rng.integers(133)), "isthing": True, "iscrowd": 0} for _ in range(segments)]
        described = [{"id": int(segment_id), **label} for segment_id, label in zip(ids[1:], labels)]
        names = {"file_name": str(folder / f"{index}.jpg"), "pan_seg_file_name": str(folder / f"{index}.png")}
        records.append({**names, "image_id": index, "height": height, "width": width, "segments_info": described})
    return records


def wavy_segments(rng: np.random.Generator, size: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """A map of segment numbers 0 (nothing) to `count`, (h, w), and the random id of each number, 0 for 0."""
    height, width = size
    rows, columns = np.mgrid[:height, :width] + 20 * np.sin(np.mgrid[:height, :width][::-1] / 15)
    centres = rng.random((count + 1, 2)) * (height, width)
    numbers = np.argmin([(rows - y) ** 2 + (columns - x) ** 2 for y, x in centres], axis=0)
    return numbers, np.array([0, *rng.choice(np.arange(1, 1 << 24), count, replace=False)])


# ---- evaluation ----


class MadeUpImage(NamedTuple):
    """A record with its files, and what a network predicts for it."""

    record: dict
    output: dict[str, Any]  # panoptic_seg, sem_seg (labels), instances


class MadeUpHead(NamedTuple):
    """What the semantic head starts from, the same in every image, and the scores of all classes it leads to."""

    class_logits: torch.Tensor
    mask_logits: torch.Tensor
    scores: torch.Tensor


def benchmark_evaluation(options: argparse.Namespace) -> dict[str, Any]:
    """Checks that ours and the published steps give the same numbers, measures them in turns, prints the ratios, and
    returns everything as JSON values.

    Raises:
        ValueError: the numbers differ, or the options cannot work.
    """
    counts = (options.images, options.rounds, options.segments, options.queries, options.instances)
    if min(*counts, *options.size) < 1 or options.classes < 2:
        raise InputError("--images, --rounds, --size, --segments, --queries, --instances: 1 or more; --classes: 2")
    peer = load_peer("published_evaluation")
    with tempfile.TemporaryDirectory() as folder, one_thread():
        images, head = made_up_predictions(Path(folder), options)
        tasks = evaluation_tasks(peer, head, options.classes)
        for ours, published, same in tasks.values():
            for image in images:
                if not same(ours(image), published(image)):
                    raise InputError(f"image {image.record['image_id']}: ours and the published steps differ")
        rows = {}
        for name, (ours, published, _) in tasks.items():
            both = (lambda image, turn, run=run: run(image) for run in (ours, published))
            rows[name] = compare(*both, images, options.rounds)
    report = {
        "benchmark": "evaluation",
        "image": list(options.size),
        **{name: getattr(options, name) for name in ("classes", "segments", "queries", "instances", "images")},
        "tasks": rows,
        "environment": environment_report(torch.device("cpu")),
    }
    for name, row in rows.items():
        ours, published = (1000 * row["seconds"][key] for key in ("ours", "published"))
        print(f"{name:>22}: ours {ours:7.2f} ms an image, published {published:7.2f} ms, {_ratio(row)}")
    print(f"{len(images)} images compared in each task, all equal")
    return report


def evaluation_tasks(peer: Any, head: MadeUpHead, num_classes: int) -> dict[str, tuple[Callable, Callable, Callable]]:
    """Task -> ours, the published one, and whether what they return is the same."""
    names = [f"class {index}" for index in range(num_classes)]

    def panoptic(image: MadeUpImage) -> dict[int, tuple]:
        evaluator = PanopticEvaluator(class_names=names, thing_classes=range(num_classes // 2))
        evaluator.process(GroundTruth(image.record), image.output)
        return evaluator.images[image.record["image_id"]]

    def published_panoptic(image: MadeUpImage) -> Any:
        counts = peer.PanopticCounts()
        id_map, segments = image.output["panoptic_seg"]
        truth = image.record["pan_seg_file_name"], image.record["segments_info"]
        peer.compare_panoptic(*truth, peer.encode_panoptic(id_map), segments, counts)
        return counts

    def same_panoptic(ours: dict[int, tuple], published: Any) -> bool:
        theirs = (published.tp, published.fp, published.fn)
        whole = all(tuple(count[k] for count in theirs) == tuple(quality[:3]) for k, quality in ours.items())
        known = {k for count in theirs for k in count} <= ours.keys()
        return whole and known and all(abs(published.iou[k] - quality.iou) < 1e-9 for k, quality in ours.items())

    def semantic(image: MadeUpImage) -> np.ndarray:
        evaluator = SemanticEvaluator(class_names=names)
        evaluator.process(GroundTruth(image.record), image.output)
        return evaluator.confusion

    def semantic_with_head(image: MadeUpImage) -> np.ndarray:
        labels = semantic_labels(head.class_logits, OutputMasks.whole(head.mask_logits))
        return semantic(MadeUpImage(image.record, {"sem_seg": labels}))

    def published_semantic(image: MadeUpImage, scores: torch.Tensor = head.scores) -> np.ndarray:
        counts = peer.SemanticCounts(num_classes)
        peer.compare_semantic(scores, image.record["sem_seg_file_name"], 255, counts)
        return counts.confusion[:-1, :-1].T

    def published_with_head(image: MadeUpImage) -> np.ndarray:
        scores = semantic_inference(head.class_logits, OutputMasks.whole(head.mask_logits))
        return published_semantic(image, scores)

    def instances(image: MadeUpImage) -> list[dict]:
        return encode_masks(image.output["instances"].pred_masks)

    def published_instances(image: MadeUpImage) -> list[dict]:
        return peer.encode_instances(image.output["instances"].pred_masks)

    return {
        "panoptic quality": (panoptic, published_panoptic, same_panoptic),
        "mean IoU": (semantic, published_semantic, np.array_equal),
        "mean IoU with head": (semantic_with_head, published_with_head, np.array_equal),
        "instance encoding": (instances, published_instances, operator.eq),
    }


def made_up_predictions(folder: Path, options: argparse.Namespace) -> tuple[list[MadeUpImage], MadeUpHead]:
    """Images of wavy segments, the first half of the classes things, and predictions that are a little off."""
    height, width = options.size
    generator = torch.Generator().manual_seed(0)
    class_logits = 3 * torch.randn(options.queries, options.classes + 1, generator=generator)
    coarse = 4 * torch.randn(1, options.queries, height // 16 + 1, width // 16 + 1, generator=generator)
    mask_logits = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    head = MadeUpHead(class_logits, mask_logits, semantic_inference(class_logits, OutputMasks.whole(mask_logits)))
    images = []
    for index in range(options.images):
        rng = np.random.default_rng(index)
        nearest, ids = wavy_segments(rng, (height, width), options.segments)
        classes = np.array([255, *rng.integers(0, options.classes, options.segments)])
        write_id_map(folder / f"{index}.png", ids[nearest])
        Image.fromarray(classes[nearest].astype(np.uint8)).save(folder / f"{index}_labels.png")
        sizes = np.bincount(nearest.ravel(), minlength=len(ids)).tolist()
        segments = [
            {"id": int(segment_id), "category_id": int(label), "area": size, "iscrowd": int(rng.random() < 0.1)}
            for segment_id, label, size in zip(ids[1:], classes[1:], sizes[1:])
        ]
        shifted = np.roll(nearest, rng.integers(-6, 7, 2), (0, 1))
        guesses = np.where(rng.random(len(ids)) < 0.7, classes % options.classes, 0)
        predicted = [
            {"id": number, "category_id": int(guesses[number])} for number in np.unique(shifted).tolist() if number
        ]
        things = [segment for segment in predicted if segment["category_id"] < options.classes // 2] or predicted[:1]
        masks = torch.from_numpy(np.stack([shifted == segment["id"] for segment in things]))
        chosen = torch.from_numpy(rng.integers(0, len(things), options.instances))
        instances = Instances(
            scores=torch.from_numpy(rng.random(options.instances)),
            pred_classes=torch.from_numpy(rng.integers(0, options.classes // 2, options.instances)),
            pred_masks=masks[chosen],
            pred_boxes=boxes_of_masks(masks)[chosen],
        )
        record = {"image_id": index, "file_name": f"{index}.jpg", "segments_info": segments}
        files = {"pan_seg_file_name": f"{folder}/{index}.png", "sem_seg_file_name": f"{folder}/{index}_labels.png"}
        output = {
            "panoptic_seg": (torch.from_numpy(shifted).to(torch.int32), predicted),
            "sem_seg": head.scores.argmax(0),
            "instances": instances,
        }
        images.append(MadeUpImage(record | files, output))
    return images, head


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As in a loading process."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(run_program(main))
