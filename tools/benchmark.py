"""Measures speed and memory; results are written with hardware, versions and commit.

    python tools/benchmark.py training-step --config-file FILE [--batch 2] [--size 1024] [--largest] [KEY VALUE ...]
    python tools/benchmark.py mapper [--pictures 24] [--rounds 8] [--size 1024]

training-step: one step of training on made-up pictures (random pixels, `--segments` segments each, CLIP with random
weights, which changes no time), as `train_net.py` takes it: forward, losses with matching, backward, clipping, AdamW.

mapper: the training mapper `coco_panoptic_lsj` on made-up 640 x 480 pictures, beside the published steps in their order
(benchmarks/peers/published_panoptic_lsj.py), which must give the same samples; one process and one thread, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from rich.console import Console
from rich.table import Table

from fcclip.config import get_cfg, load_config, resolve_device
from fcclip.data import build_train_mapper
from fcclip.engine import apply_numeric_settings, build_trainer, environment_report, write_atomically
from fcclip.engine.metrics import History
from fcclip.engine.trainer import amp_dtype, peak_memory_mb
from fcclip.modeling import build_model
from fcclip.structures import Targets
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
    step.add_argument("--batch", type=int, nargs="+", default=[2], metavar="N", help="pictures a step (default 2)")
    step.add_argument("--largest", action="store_true", help="also the largest batch that fits the GPU")
    step.add_argument("--size", type=int, default=1024, metavar="PIXELS", help="side of the pictures (default 1024)")
    step.add_argument("--segments", type=int, default=12, metavar="N", help="segments a picture (default 12)")
    step.add_argument("--steps", type=int, default=20, metavar="N", help=f"counted steps, after {WARM_UP} (default 20)")
    step.add_argument("--output", metavar="FILE", help="JSON file for the results")
    step.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys")
    step.set_defaults(run=benchmark_training_step)
    mapper = kinds.add_parser("mapper", help="the panoptic training mapper beside the published steps")
    mapper.add_argument("--pictures", type=int, default=24, metavar="N", help="made-up pictures (default 24)")
    mapper.add_argument("--rounds", type=int, default=8, metavar="N", help="times each is mapped (default 8)")
    mapper.add_argument("--size", type=int, default=1024, metavar="PIXELS", help="side of the canvas (default 1024)")
    mapper.add_argument("--segments", type=int, default=12, metavar="N", help="segments a picture (default 12)")
    mapper.add_argument("--output", metavar="FILE", help="JSON file for the results")
    mapper.set_defaults(run=benchmark_mapper)
    return parser.parse_args(arguments)


def benchmark_training_step(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each batch size, prints the table, and returns everything as JSON values."""
    if min(options.batch) < 1 or options.steps < 1 or options.segments < 0:
        raise ValueError("--batch and --steps must be at least 1, --segments 0 or more")
    fixed = ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "INPUT.IMAGE_SIZE", str(options.size), "SEED", "0"]
    cfg = load_config(options.config_file, [*fixed, *options.opts])
    device = resolve_device(cfg.MODEL.DEVICE)
    if options.largest and device.type != "cuda":
        raise ValueError(f"--largest fills a GPU, but the device is {device}")
    apply_numeric_settings(cfg, training=True)
    rows = [measure_step(cfg, batch, options) for batch in options.batch]
    if options.largest:
        rows.append(largest_step(cfg, options))
    report = {
        "benchmark": "training-step",
        "config": options.config_file,
        "overrides": list(options.opts),
        "picture": [3, options.size, options.size],
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
        "pictures_per_second": batch / spent,
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
        raise ValueError("not even one picture fits this GPU")
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
    table = Table(title=f"one training step, {report['picture'][1]} x {report['picture'][2]} pixels")
    for name in ("batch", "seconds", "pictures/s", "forward", "backward", "step", "peak, MiB"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        parts = [f"{100 * row['median_seconds'][name] / row['seconds']:.0f} %" for name in PARTS[1:]]
        batch = f"{row['batch']}{' (largest)' if row.get('largest_that_fits') else ''}"
        speed = f"{row['pictures_per_second']:.3g}"
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
    if min(options.pictures, options.rounds, options.size) < 1 or options.segments < 0:
        raise ValueError("--pictures, --rounds and --size must be at least 1, --segments 0 or more")
    cfg = get_cfg()
    cfg.INPUT.FORMAT, cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.IMAGE_SIZE = "RGB", "coco_panoptic_lsj", options.size
    ours, published = build_train_mapper(cfg), load_peer("published_panoptic_lsj").map_record

    def theirs(record: dict, rng: np.random.Generator) -> dict[str, Any]:
        return published(record, rng, size=options.size)

    with tempfile.TemporaryDirectory() as folder, one_thread():
        records = made_up_records(Path(folder), options.pictures, options.segments)
        for index, record in enumerate(records):
            check_equal(ours(record, np.random.default_rng(index)), theirs(record, np.random.default_rng(index)))
        rounds = [mapping_times({"ours": ours, "published": theirs}, records, turn) for turn in range(options.rounds)]
    seconds = {name: [one[name] for one in rounds] for name in rounds[0]}
    ratios = [slow / fast for fast, slow in zip(seconds["ours"], seconds["published"])]
    report = {
        "benchmark": "mapper",
        "mapper": "coco_panoptic_lsj",
        "pictures": [480, 640],
        "canvas": options.size,
        "segments": options.segments,
        "samples": options.pictures * options.rounds,
        "seconds": seconds,
        "pictures_per_second": {name: 1 / statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "environment": environment_report(torch.device("cpu")),
    }
    for name, values in seconds.items():
        per_second = report["pictures_per_second"][name]
        print(f"{name:>9}: {1000 * statistics.median(values):6.2f} ms a picture, {per_second:.1f} pictures/s")
    print(
        f"ratio {report['ratio']:.2f} (median of {options.rounds} rounds, {min(ratios):.2f} to {max(ratios):.2f}); "
        f"{options.pictures} samples compared, all equal"
    )
    return report


def mapping_times(mappers: dict[str, Callable[..., Any]], records: Sequence[dict], turn: int) -> dict[str, float]:
    """Mean seconds a picture of each mapper. They take turns picture after picture, with the same augmentations, so
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
        raise ValueError(f"{ours['file_name']}: the two mappers give different samples")


def made_up_records(folder: Path, count: int, segments: int) -> list[dict]:
    """Panoptic records of made-up pictures, 640 x 480 in JPEG (about 130 kB) with the id PNG of wavy segments; every
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
