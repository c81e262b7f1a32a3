"""Measures speed and memory; results are written with hardware, versions and commit.

    python tools/benchmark.py training-step --config-file FILE [--batch 2] [--size 1024] [--largest] [KEY VALUE ...]
    python tools/benchmark.py mapper [--images 24] [--rounds 8] [--size 1024]
    python tools/benchmark.py evaluation [--images 8] [--rounds 5] [--size 640 960] [--classes 150]
    python tools/benchmark.py ops [--device auto] [--sizes 640x960 ...] [--batch 1 ...] [--dtypes float32 ...]

training-step: one step of training on made-up images (random pixels, `--segments` segments each, CLIP with random
weights, which changes no time), as `train_net.py` takes it: forward, losses with matching, backward, clipping, AdamW.

mapper: the training mapper `coco_panoptic_lsj` on made-up 640 x 480 images, beside the published steps in their order
(benchmarks/peers/published_panoptic_lsj.py), which must give the same samples; one process and one thread, in turns.

evaluation: panoptic quality, mean IoU and the encoding of instances on made-up 640 x 960 images, beside the published
steps (benchmarks/peers/published_evaluation.py), which must give the same numbers; one thread, in turns. Then how much
all three add to a network that keeps one core busy for 100 ms an image.

ops: multi-scale deformable attention at the sizes of FC-CLIP, forward and backward, both forms, every engine that can
run here, in turns (benchmark_ops.py). The default ends in about a minute on a CPU and covers all sizes on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import logging
import operator
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_ops
import cv2
import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from rich.console import Console
from rich.table import Table

from fcclip.config import get_cfg, load_config, resolve_device
from fcclip.data import build_train_mapper
from fcclip.engine import amp_dtype, apply_numeric_settings, build_trainer, environment_report, peak_memory_mb
from fcclip.engine.metrics import History
from fcclip.errors import InputError
from fcclip.evaluation import (
    EvaluationThreads,
    Evaluator,
    GroundTruth,
    InstanceEvaluator,
    PanopticEvaluator,
    SemanticEvaluator,
    encode_masks,
    write_id_map,
)
from fcclip.files import write_atomically
from fcclip.modeling import build_model
from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.outputs import semantic_inference, semantic_labels
from fcclip.structures import Instances, Targets, boxes_of_masks
from fcclip.vocabulary import Vocabulary

WARM_UP = 3  # steps that are not counted: caches fill, cuDNN chooses, the frozen copy is made
PARTS = ("data_time", "forward_time", "backward_time", "step_time")
PEERS = Path(__file__).resolve().parents[1] / "benchmarks" / "peers"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        report = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
        print(f"written to {path}")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    step = kinds.add_parser("training-step", help="one step of training: time split and peak memory")
    step.add_argument("--config-file", required=True, metavar="FILE")
    step.add_argument("--batch", type=int, nargs="+", default=[2], metavar="N", help="images a step (default 2)")
    step.add_argument("--largest", action="store_true", help="also the largest batch that fits the GPU")
    step.add_argument("--size", type=int, default=1024, metavar="PIXELS", help="side of the images (default 1024)")
    step.add_argument("--segments", type=int, default=12, metavar="N", help="segments an image (default 12)")
    step.add_argument("--steps", type=int, default=20, metavar="N", help=f"counted steps, after {WARM_UP} (default 20)")
    step.add_argument("--output", metavar="FILE", help="JSON file for the results")
    step.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys")
    step.set_defaults(run=benchmark_training_step)
    mapper = kinds.add_parser("mapper", help="the panoptic training mapper beside the published steps")
    mapper.add_argument("--images", type=int, default=24, metavar="N", help="made-up images (default 24)")
    mapper.add_argument("--rounds", type=int, default=8, metavar="N", help="times each is mapped (default 8)")
    mapper.add_argument("--size", type=int, default=1024, metavar="PIXELS", help="side of the canvas (default 1024)")
    mapper.add_argument("--segments", type=int, default=12, metavar="N", help="segments an image (default 12)")
    mapper.add_argument("--output", metavar="FILE", help="JSON file for the results")
    mapper.set_defaults(run=benchmark_mapper)
    evaluation = kinds.add_parser("evaluation", help="evaluators beside the published steps, and beside a network")
    evaluation.add_argument("--images", type=int, default=8, metavar="N", help="made-up images (default 8)")
    evaluation.add_argument("--rounds", type=int, default=5, metavar="N", help="times each is evaluated (default 5)")
    evaluation.add_argument("--size", type=int, nargs=2, default=[640, 960], metavar="PIXELS", help="height and width")
    evaluation.add_argument("--classes", type=int, default=150, metavar="N", help="classes (default 150)")
    evaluation.add_argument("--segments", type=int, default=20, metavar="N", help="segments an image (default 20)")
    evaluation.add_argument("--queries", type=int, default=100, metavar="N", help="masks of the network (default 100)")
    evaluation.add_argument("--instances", type=int, default=100, metavar="N", help="instances an image (default 100)")
    evaluation.add_argument("--output", metavar="FILE", help="JSON file for the results")
    evaluation.set_defaults(run=benchmark_evaluation)
    benchmark_ops.add_arguments(kinds.add_parser("ops", help="multi-scale deformable attention, all engines in turns"))
    return parser.parse_args(arguments)


def benchmark_training_step(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each batch size, prints the table, and returns everything as JSON values."""
    if min(options.batch) < 1 or options.steps < 1 or options.segments < 0:
        raise InputError("--batch and --steps must be at least 1, --segments 0 or more")
    fixed = ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "INPUT.IMAGE_SIZE", str(options.size), "SEED", "0"]
    cfg = load_config(options.config_file, [*fixed, *options.opts])
    device = resolve_device(cfg.MODEL.DEVICE)
    if options.largest and device.type != "cuda":
        raise InputError(f"--largest fills a GPU, but the device is {device}")
    apply_numeric_settings(cfg, training=True)
    rows = [measure_step(cfg, batch, options) for batch in options.batch]
    if options.largest:
        rows.append(largest_step(cfg, options))
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
    words = Vocabulary.from_names([f"class {index}" for index in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)])
    model = build_model(cfg, train_vocabulary=words, test_vocabulary=words)
    samples = [made_up_sample(index, options.size, options.segments, len(words)) for index in range(batch)]
    trainer = build_trainer(
        cfg, model, batches=lambda start: itertools.repeat(samples), device=device, vocabulary=words
    )
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


def largest_step(cfg: CfgNode, options: argparse.Namespace) -> dict[str, Any]:
    """The largest batch whose steps fit: doubled until one does not, then halved in between."""
    fits, too_large, row, batch = 0, None, {}, max(options.batch)
    while batch > fits:
        try:
            row, fits = measure_step(cfg, batch, options), batch
        except torch.OutOfMemoryError:
            too_large = batch
        batch = 2 * fits if too_large is None else (fits + too_large) // 2
    if not row:
        raise InputError("not even one image fits this GPU")
    return row | {"largest_that_fits": True}


def made_up_sample(index: int, size: int, segments: int, num_classes: int) -> dict[str, Any]:
    """A training sample of random pixels, its segments blocks of an 8 x 8 grid."""
    generator = torch.Generator().manual_seed(index)
    blocks = torch.randint(1, max(segments, 1) + 1, (8, 8), generator=generator)
    id_map = blocks.repeat_interleave(-(-size // 8), 0).repeat_interleave(-(-size // 8), 1)[:size, :size]
    ids = torch.arange(1, segments + 1)
    labels = torch.randint(0, num_classes, (segments,), generator=generator)
    return {
        "image": torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8),
        "targets": Targets(labels=labels, id_map=id_map.to(torch.int32).contiguous(), ids=ids),
        "point_seed": index,
        "file_name": f"made up {index}",
    }


def _print(report: dict[str, Any]) -> None:
    environment = report["environment"]
    table = Table(title=f"one training step, {report['ground_truth'][1]} x {report['ground_truth'][2]} pixels")
    for name in ("batch", "seconds", "images/s", "forward", "backward", "step", "peak, MiB"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        parts = [f"{100 * row['median_seconds'][name] / row['seconds']:.0f} %" for name in PARTS[1:]]
        batch = f"{row['batch']}{' (largest)' if row.get('largest_that_fits') else ''}"
        speed = f"{row['images_per_second']:.3g}"
        table.add_row(batch, f"{row['seconds']:.3g}", speed, *parts, f"{row['peak_memory_mib']:,.0f}")
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

    def theirs(record: dict, rng: np.random.Generator) -> dict[str, Any]:
        return published(record, rng, size=options.size)

    with tempfile.TemporaryDirectory() as folder, one_thread():
        records = made_up_records(Path(folder), options.images, options.segments)
        for index, record in enumerate(records):
            check_equal(ours(record, np.random.default_rng(index)), theirs(record, np.random.default_rng(index)))
        rounds = [mapping_times({"ours": ours, "published": theirs}, records, turn) for turn in range(options.rounds)]
    seconds = {name: [one[name] for one in rounds] for name in rounds[0]}
    ratios = [slow / fast for fast, slow in zip(seconds["ours"], seconds["published"])]
    report = {
        "benchmark": "mapper",
        "mapper": "coco_panoptic_lsj",
        "images": [480, 640],
        "canvas": options.size,
        "segments": options.segments,
        "samples": options.images * options.rounds,
        "seconds": seconds,
        "images_per_second": {name: 1 / statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "environment": environment_report(torch.device("cpu")),
    }
    for name, values in seconds.items():
        per_second = report["images_per_second"][name]
        print(f"{name:>9}: {1000 * statistics.median(values):6.2f} ms an image, {per_second:.1f} images/s")
    print(
        f"ratio {report['ratio']:.2f} (median of {options.rounds} rounds, {min(ratios):.2f} to {max(ratios):.2f}); "
        f"{options.images} samples compared, all equal"
    )
    return report


def mapping_times(mappers: dict[str, Callable[..., Any]], records: Sequence[dict], turn: int) -> dict[str, float]:
    """Mean seconds an image of each mapper. They take turns image after image, with the same augmentations, so
    that whatever else the machine does slows all of them."""
    spent = dict.fromkeys(mappers, 0.0)
    for index, record in enumerate(records):
        names = list(mappers) if (turn + index) % 2 == 0 else list(reversed(mappers))
        for name in names:
            began = time.perf_counter()
            mappers[name](record, np.random.default_rng((turn, index)))
            spent[name] += time.perf_counter() - began
    return {name: seconds / len(records) for name, seconds in spent.items()}


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
        smooth = np.asarray(
            Image.fromarray(rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)).resize(
                (width, height)
            )
        )
        noisy = (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index}.jpg", quality=90)
        rows, columns = np.mgrid[:height, :width] + 20 * np.sin(np.mgrid[:height, :width][::-1] / 15)
        centres = rng.random((segments + 1, 2)) * (height, width)
        nearest = np.argmin([(rows - y) ** 2 + (columns - x) ** 2 for y, x in centres], axis=0)
        ids = np.array([0, *rng.choice(np.arange(1, 1 << 24), segments, replace=False)])
        pixels = ids[nearest]
        colours = np.stack([pixels & 255, pixels >> 8 & 255, pixels >> 16], axis=-1)
        Image.fromarray(colours.astype(np.uint8)).save(folder / f"{index}.png")
        segments_info = [
            {"id": int(one), "category_id": int(rng.integers(133)), "isthing": True, "iscrowd": 0} for one in ids[1:]
        ]
        names = {"file_name": str(folder / f"{index}.jpg"), "pan_seg_file_name": str(folder / f"{index}.png")}
        records.append({**names, "image_id": index, "height": height, "width": width, "segments_info": segments_info})
    return records


# ---- evaluation ----

BUSY_SECONDS = 0.1  # an image, of the stand-in for a network
BUSY_IMAGES = 40  # beside which they are evaluated, so that what is done once for a set weighs little


class MadeUpImage(NamedTuple):
    """A record with its files, and what a network found there."""

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
            for ground_truth in images:
                if not same(ours(ground_truth), published(ground_truth)):
                    raise InputError(f"image {ground_truth.record['image_id']}: ours and the published steps differ")
        rows = {}
        for name, (ours, published, _) in tasks.items():
            both = {"ours": ours, "published": published}
            rounds = [evaluation_times(both, images, turn) for turn in range(options.rounds)]
            rows[name] = _ratios(rounds)
        added = added_to_network(images, options)
    report = {
        "benchmark": "evaluation",
        "image": list(options.size),
        **{name: getattr(options, name) for name in ("classes", "segments", "queries", "instances", "images")},
        "tasks": rows,
        "beside_a_network": added,
        "allocator": allocator(),
        "environment": environment_report(torch.device("cpu")),
    }
    for name, row in rows.items():
        ours, published = (1000 * row["seconds"][key] for key in ("ours", "published"))
        print(
            f"{name:>22}: ours {ours:7.2f} ms an image, published {published:7.2f} ms, ratio {row['ratio']:.2f} "
            f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        )
    for name, row in added.items():
        print(f"{name:>22}: {1000 * row['seconds']:.1f} ms an image, {100 * row['added']:+.1f} % of the network alone")
    print(f"{len(images)} images compared in each task, all equal; allocator: {report['allocator']}")
    return report


def evaluation_tasks(peer: Any, head: MadeUpHead, num_classes: int) -> dict[str, tuple[Callable, Callable, Callable]]:
    """Task -> ours, the published one, and whether what they return is the same."""
    names = [f"class {index}" for index in range(num_classes)]

    def panoptic(ground_truth: MadeUpImage) -> dict[int, tuple]:
        evaluator = PanopticEvaluator(class_names=names, thing_classes=range(num_classes // 2))
        evaluator.process(GroundTruth(ground_truth.record), ground_truth.output)
        return evaluator.images[ground_truth.record["image_id"]]

    def published_panoptic(ground_truth: MadeUpImage) -> Any:
        counts = peer.PanopticCounts()
        id_map, segments = ground_truth.output["panoptic_seg"]
        truth = ground_truth.record["pan_seg_file_name"], ground_truth.record["segments_info"]
        peer.compare_panoptic(*truth, peer.encode_panoptic(id_map), segments, counts)
        return counts

    def same_panoptic(ours: dict[int, tuple], published: Any) -> bool:
        theirs = (published.tp, published.fp, published.fn)
        whole = all(tuple(count[k] for count in theirs) == tuple(one[:3]) for k, one in ours.items())
        known = {k for count in theirs for k in count} <= ours.keys()
        return whole and known and all(abs(published.iou[k] - one.iou) < 1e-9 for k, one in ours.items())

    def semantic(ground_truth: MadeUpImage) -> np.ndarray:
        evaluator = SemanticEvaluator(class_names=names)
        evaluator.process(GroundTruth(ground_truth.record), ground_truth.output)
        return evaluator.confusion

    def semantic_with_head(ground_truth: MadeUpImage) -> np.ndarray:
        labels = semantic_labels(head.class_logits, OutputMasks.whole(head.mask_logits))
        return semantic(MadeUpImage(ground_truth.record, {"sem_seg": labels}))

    def published_semantic(ground_truth: MadeUpImage, scores: torch.Tensor = head.scores) -> np.ndarray:
        counts = peer.SemanticCounts(num_classes)
        peer.compare_semantic(scores, ground_truth.record["sem_seg_file_name"], 255, counts)
        return counts.confusion[:-1, :-1].T

    def published_with_head(ground_truth: MadeUpImage) -> np.ndarray:
        return published_semantic(
            ground_truth, semantic_inference(head.class_logits, OutputMasks.whole(head.mask_logits))
        )

    def instances(ground_truth: MadeUpImage) -> list[dict]:
        return encode_masks(ground_truth.output["instances"].pred_masks)

    def published_instances(ground_truth: MadeUpImage) -> list[dict]:
        return peer.encode_instances(ground_truth.output["instances"].pred_masks)

    return {
        "panoptic quality": (panoptic, published_panoptic, same_panoptic),
        "mean IoU": (semantic, published_semantic, np.array_equal),
        "mean IoU with head": (semantic_with_head, published_with_head, np.array_equal),
        "instance encoding": (instances, published_instances, operator.eq),
    }


def evaluation_times(both: dict[str, Callable], images: Sequence[MadeUpImage], turn: int) -> dict[str, float]:
    """Mean seconds an image of each, which take turns image after image."""
    spent = dict.fromkeys(both, 0.0)
    for index, ground_truth in enumerate(images):
        names = list(both) if (turn + index) % 2 == 0 else list(reversed(both))
        for name in names:
            began = time.perf_counter()
            both[name](ground_truth)
            spent[name] += time.perf_counter() - began
    return {name: seconds / len(images) for name, seconds in spent.items()}


def _ratios(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    ratios = [one["published"] / one["ours"] for one in rounds]
    seconds = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {"seconds": seconds, "ratio": statistics.median(ratios), "ratios": ratios, "rounds": list(rounds)}


def added_to_network(images: Sequence[MadeUpImage], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds an image with all three tasks and their results, with the network alone, and the share that is added:
    in threads beside the network, and in its place."""
    work = busy_work()
    images = [
        MadeUpImage(one.record | {"image_id": number}, one.output)
        for number, one in zip(range(BUSY_IMAGES), itertools.cycle(images))
    ]

    def alone() -> None:
        for _ in images:
            work()

    def beside() -> None:
        group = three_evaluators(images, options.classes)
        with EvaluationThreads({"": group}) as threads:
            for ground_truth in images:
                work()
                threads.process(GroundTruth(ground_truth.record), {"": ground_truth.output})
        for evaluator in group:
            evaluator.results()

    def in_turns() -> None:
        group = three_evaluators(images, options.classes)
        for ground_truth in images:
            work()
            shared = GroundTruth(ground_truth.record)
            for evaluator in group:
                evaluator.process(shared, ground_truth.output)
        for evaluator in group:
            evaluator.results()

    seconds: dict[str, list[float]] = {"network alone": [], "with three tasks": [], "without threads": []}
    for _ in range(options.rounds):
        for name, run in zip(seconds, (alone, beside, in_turns)):
            began = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - began) / len(images))
    added = {
        name: [one / base - 1 for one, base in zip(values, seconds["network alone"])]
        for name, values in seconds.items()
    }
    return {
        name: {"seconds": statistics.median(values), "added": statistics.median(added[name]), "rounds": values}
        for name, values in seconds.items()
    }


def busy_work() -> Callable[[], None]:
    """Something that keeps one core busy for `BUSY_SECONDS`, always the same work."""
    left, right = torch.randn(256, 256), torch.randn(256, 256)

    def multiply(times: int) -> None:
        for _ in range(times):
            left @ right

    multiply(20)
    began = time.thread_time()
    multiply(200)
    times = round(200 * BUSY_SECONDS / (time.thread_time() - began))
    return lambda: multiply(times)


def three_evaluators(images: Sequence[MadeUpImage], num_classes: int) -> tuple[Evaluator, ...]:
    names = [f"class {index}" for index in range(num_classes)]
    things = range(num_classes // 2)
    return (
        PanopticEvaluator(class_names=names, thing_classes=things),
        InstanceEvaluator(truth=None, class_names=names, dataset_ids={index: index + 1 for index in things}),
        SemanticEvaluator(class_names=names),
    )


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
        rows, columns = np.mgrid[:height, :width] + 20 * np.sin(np.mgrid[:height, :width][::-1] / 15)
        centres = rng.random((options.segments + 1, 2)) * (height, width)
        nearest = np.argmin([(rows - y) ** 2 + (columns - x) ** 2 for y, x in centres], axis=0)
        ids = np.array([0, *rng.choice(np.arange(1, 1 << 24), options.segments, replace=False)])
        classes = np.array([255, *rng.integers(0, options.classes, options.segments)])
        write_id_map(folder / f"{index}.png", ids[nearest])
        Image.fromarray(classes[nearest].astype(np.uint8)).save(folder / f"{index}_labels.png")
        sizes = np.bincount(nearest.ravel(), minlength=len(ids)).tolist()
        segments = [
            {"id": int(one), "category_id": int(label), "area": size, "iscrowd": int(rng.random() < 0.1)}
            for one, label, size in zip(ids[1:], classes[1:], sizes[1:])
        ]
        shifted = np.roll(nearest, rng.integers(-6, 7, 2), (0, 1))
        guesses = np.where(rng.random(len(ids)) < 0.7, classes % options.classes, 0)
        found = [{"id": one, "category_id": int(guesses[one])} for one in np.unique(shifted).tolist() if one]
        things = [one for one in found if one["category_id"] < options.classes // 2] or found[:1]
        masks = torch.from_numpy(np.stack([shifted == one["id"] for one in things]))
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
            "panoptic_seg": (torch.from_numpy(shifted).to(torch.int32), found),
            "sem_seg": head.scores.argmax(0),
            "instances": instances,
        }
        images.append(MadeUpImage(record | files, output))
    return images, head


def allocator() -> str:
    """Which memory allocator the process runs with; large arrays cost page faults in the default one."""
    names = ("LD_PRELOAD", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    changed = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    return ", ".join(changed) or "the system's default"


def load_peer(name: str) -> Any:
    """A module of benchmarks/peers: what ours is measured against."""
    spec = importlib.util.spec_from_file_location(name, PEERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    sys.exit(main())
