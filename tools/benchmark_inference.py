"""The parts `inference` and `text` of tools/benchmark.py, beside the published steps on the same weights.

They take turns in every round; before that, outputs must agree. Images are made up and the CLIP has random weights,
which changes no time; with --kept the heads get made-up class scores under which so many queries have a class, as they
do on photographs, and class names random vectors. `parts` are of the seconds of ours. --memory: the most above the
model; on a CPU each in a process of its own, where it is timed once more, the published steps with glibc's own
allocator, ours as our programs set it.

--device cuda: the published side has its CUDA operator (benchmarks/peers/published_ms_deform_attn.py). TEST.AMP and
MODEL.COMPILE are for ours alone; both must agree without them and without TF32, and `differences` tells what is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_ops import engines_that_run, load_peer, machine_speed, with_peers
from fvcore.common.config import CfgNode
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fcclip.allocator import VARIABLE
from fcclip.config import load_config, resolve_device
from fcclip.engine import environment_report
from fcclip.errors import InputError
from fcclip.modeling import FCCLIP, ScoredMasks, build_model
from fcclip.modeling.classifier import with_void
from fcclip.modeling.outputs import make_outputs
from fcclip.modeling.text import encode_class_names
from fcclip.ops.engines import automatic_engine
from fcclip.vocabulary import Vocabulary

CONFIGS = {
    "RN50": "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k_r50.yaml",
    "ConvNeXt-L": "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml",
}
VOCABULARY = "ade20k_150"
SPREAD = 1e-3  # largest difference of semantic scores over their deviation; parity with recordings allows as much
PIXELS = 0.999  # that panoptic maps must share
AGREE = 1e-5  # of text vectors of unit length


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", type=int, nargs=2, default=[640, 960], metavar="N", help="height and width (default 640 960)")
    add("--kept", type=int, default=0, metavar="N", help="queries that have a class; 0: what random weights give")
    add_model_arguments(parser, benchmark_inference, models=list(CONFIGS))


def add_model_arguments(parser: argparse.ArgumentParser, run: Callable, *, models: list[str]) -> None:
    add = parser.add_argument
    add("--models", nargs="+", default=models, metavar="NAME", help=f"of {', '.join(CONFIGS)}, or YAML files")
    add("--rounds", type=int, default=3, metavar="N", help="(default 3)")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="(default cpu)")
    add_common(parser, run)
    add("--memory", action="store_true", help="the most memory above the model, too (Linux, or CUDA)")
    add("--memory-of", choices=["ours", "published"], help=argparse.SUPPRESS)  # in a process of its own
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="RN50", metavar="NAME", help="as for inference (default RN50)")
    parser.add_argument("--names", type=int, default=0, metavar="N", help="the first N alone; 0: all")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="(default 1)")
    add_common(parser, benchmark_text)


def add_common(parser: argparse.ArgumentParser, run: Callable) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--output", metavar="FILE", help="JSON file for the results")
    parser.add_argument(
        "--check", metavar="FILE", help="fail where a ratio is 20 %% below that of this earlier --output"
    )


@with_peers()
def benchmark_inference(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each model, prints a table, and returns everything as JSON values.

    Raises:
        ValueError: outputs differ, or the options cannot work.
    """
    if min(*options.size, options.rounds) < 1 or options.kept < 0:
        raise InputError("--size and --rounds must be at least 1, --kept 0 or more")
    if options.memory_of:
        model, _, vocabulary, _, runs = _both(options.models[0], options)
        model.text_encoder.encode(vocabulary)
        print(json.dumps(memory_and_seconds(runs[options.memory_of])))
        return {}
    device, rows = checked_device(options), []
    for name in options.models:
        model, sample, vocabulary, scores, runs = _both(name, options)
        with must_agree(model, options):
            differences = _check_equal(name, *(run() for run in runs.values()))
        if timed_otherwise(model, options):
            differences = _differences(*(run() for run in runs.values()))
        seconds, ratios = in_turns(runs, options.rounds)
        row = {"model": name, "seconds": seconds, "ratio": statistics.median(ratios), "ratios": ratios}
        row |= {"differences": differences, "autocast of ours": str(model.amp_dtype)}
        row["parts"] = _parts(model, sample, vocabulary, scores)
        if options.memory:
            arguments = ["inference", "--models", name, "--size", *options.size, "--kept", options.kept]
            row |= alone(name, model, runs, arguments, options)
        rows.append(row)
    sizes = {"image": list(options.size), "kept": options.kept, "overrides": list(options.opts)}
    report = {"benchmark": "inference", **sizes, **machine(device), "rows": rows}
    title = f"{options.size[0]} x {options.size[1]}, {VOCABULARY}, " + (f"{options.kept} kept" if options.kept else "")
    show(title.strip(", "), rows, "model")
    check(report, options.check, "model")
    return report


def benchmark_text(options: argparse.Namespace) -> dict[str, Any]:
    """The vectors of a vocabulary from cold; see `benchmark_inference`."""
    clip = random_model(options.model, "cpu", []).backbone.clip_model
    names = list(dict.fromkeys(name for words in Vocabulary.builtin(VOCABULARY).synonyms for name in words))
    names = names[: options.names or None]
    runs = {
        "ours": lambda: encode_class_names(clip, names),
        "published": lambda: load_peer("published_inference").encode_names(clip, names),
    }
    difference = float((runs["ours"]() - runs["published"]()).abs().max())
    if difference > AGREE:
        raise InputError(f"text vectors differ by {difference:.1e}, more than {AGREE:.0e}")
    seconds, ratios = in_turns(runs, options.rounds)
    row = {"names": len(names), "seconds": seconds, "ratio": statistics.median(ratios), "ratios": ratios}
    report = {"benchmark": "text", "model": options.model, **machine(torch.device("cpu")), "rows": [row]}
    show(f"text of {options.model}, 14 prompts a name", [row], "names")
    check(report, options.check, "names")
    return report


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], list[float]]:
    """Median seconds of each, and published over ours in every round; who begins changes."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in runs if turn % 2 == 0 else reversed(runs):
            began = time.perf_counter()
            runs[name]()
            spent[name].append(time.perf_counter() - began)
    ratios = [slow / fast for fast, slow in zip(spent["ours"], spent["published"])]
    return {name: statistics.median(values) for name, values in spent.items()}, ratios


def checked_device(options: argparse.Namespace) -> torch.device:
    """--device.

    Raises:
        ValueError: there is none, or the published operator cannot run on it.
    """
    device = resolve_device(options.device)
    if device.type == "cuda":
        engines_that_run(device, ["published"])
    return device


def finished(run: Callable[[], Any], options: argparse.Namespace, *, eager: bool = False) -> Callable[[], Any]:
    """The same, which ends when the device has done its work; `eager`: without compiled parts."""

    def whole() -> Any:
        with force_eager(options) if eager else contextlib.nullcontext():
            result = run()
        wait_for(torch.device(options.device))
        return result

    return whole


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def force_eager(options: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Compiled parts run as they are written; it loads the compiler, which takes seconds, only if there are some."""
    return torch.compiler.set_stance("force_eager") if "MODEL.COMPILE" in options.opts else contextlib.nullcontext()


def timed_otherwise(model: FCCLIP, options: argparse.Namespace) -> bool:
    """Whether what is timed is not what `must_agree` compares."""
    return options.device != "cpu" or model.amp_dtype is not None or "MODEL.COMPILE" in options.opts


@contextlib.contextmanager
def must_agree(model: FCCLIP, options: argparse.Namespace) -> Iterator[None]:
    """Plain fp32, in which both must give the same: no autocast, no TF32, no compiled parts."""
    asked = model.amp_dtype, torch.backends.cudnn.allow_tf32
    model.amp_dtype, torch.backends.cudnn.allow_tf32 = None, False
    try:
        with force_eager(options):
            yield
    finally:
        model.amp_dtype, torch.backends.cudnn.allow_tf32 = asked


def machine(device: torch.device) -> dict[str, Any]:
    """Where it was measured, with what the machine can do: GFLOP/s of a product, GB/s of a copy and, on a CPU through
    memory that is touched for the first time, page faults a second."""
    about = {"environment": environment_report(device), "engine": automatic_engine(device.type)}
    if device.type == "cuda":
        speed = machine_speed(device)
        about |= {"gflops": speed["flops_per_second"] / 1e9, "copy_gb_per_second": speed["bytes_per_second"] / 1e9}
        return about

    def best(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return min(times)

    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    large, target = torch.rand(2**25), torch.empty(2**25)
    return {
        **about,
        "gflops": 2 * 1024**3 / best(lambda: a @ b) / 1e9,
        "copy_gb_per_second": 2 * large.nbytes / best(lambda: target.copy_(large)) / 1e9,
        "fresh_gb_per_second": large.nbytes / best(lambda: torch.empty(2**25).fill_(1)) / 1e9,
    }


def show(title: str, rows: Sequence[dict], first: str) -> None:
    table = Table(title=title)
    for name in (
        first,
        "published, s",
        "ours, s",
        "ratio",
        "of the rounds",
        *(["MiB above the model"] * ("memory_mib" in rows[0])),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        memory = row.get("memory_mib")
        table.add_row(
            str(row[first]),
            *(f"{row['seconds'][name]:.3g}" for name in ("published", "ours")),
            f"{row['ratio']:.2f}",
            f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}",
            *([f"{memory['published']:,.0f}, {memory['ours']:,.0f}"] if memory else []),
        )
    Console().print(table)
    for row in rows:
        if alone := row.get("seconds_alone"):
            print(
                f"{row[first]}, each in a process of its own, the published steps with glibc's allocator as it is: "
                f"{alone['published']:.2f} and {alone['ours']:.2f} s, {alone['published'] / alone['ours']:.2f}"
            )


def check(report: dict[str, Any], earlier: str | None, key: str) -> None:
    """Refuses a ratio that is 20 % below the recorded one.

    Raises:
        ValueError: there is one, or nothing to compare with.
    """
    if not earlier:
        return
    recorded = {row[key]: row["ratio"] for row in json.loads(Path(earlier).read_text(encoding="utf-8"))["rows"]}
    for row in report["rows"]:
        if row[key] not in recorded:
            raise InputError(f"{earlier} has no row {row[key]}")
        if row["ratio"] < 0.8 * recorded[row[key]]:
            raise InputError(f"{row[key]}: ratio {row['ratio']:.2f}, recorded was {recorded[row[key]]:.2f}")


def load(name: str, device: str, opts: Sequence[str]) -> CfgNode:
    """The config of a model with random weights."""
    fixed = ["MODEL.DEVICE", device, "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "MODEL.WEIGHTS", ""]
    torch.manual_seed(0)
    return load_config(CONFIGS.get(name, name), [*fixed, *opts])


def random_model(name: str, device: str, opts: Sequence[str]) -> FCCLIP:
    return build_model(load(name, device, opts))


def _both(
    name: str, options: argparse.Namespace
) -> tuple[FCCLIP, dict, Vocabulary, Tensor | None, dict[str, Callable[[], dict]]]:
    model, peer = random_model(name, options.device, options.opts), load_peer("published_inference")
    if options.kept:
        name_at_random(model)
    vocabulary, sample = Vocabulary.builtin(VOCABULARY), {"image": made_up_image(options.size)}
    num_queries = model.sem_seg_head.predictor.query_feat.num_embeddings
    scores = made_up_scores(num_queries, len(vocabulary), options.kept).to(model.device) if options.kept else None

    def ours() -> dict:
        [scored] = model.score([sample], vocabulary)
        return _outputs(model, scored, scores, model.heads)

    published = partial(peer.predict, model, sample, vocabulary, class_logits=scores)
    runs = {"ours": finished(ours, options), "published": finished(published, options, eager=True)}
    return model, sample, vocabulary, scores, runs


def _outputs(model: FCCLIP, scored: ScoredMasks, scores: Tensor | None, heads: Sequence[str]) -> dict:
    """Of the made-up scores (Q, K + 1), if there are some."""
    if scores is None:
        return model.outputs(scored, heads=heads)
    things = scored.vocabulary.thing_classes
    return make_outputs(scores, scored.masks, things, heads=heads, settings=model.output_settings)


def name_at_random(model: FCCLIP) -> None:
    """Class names get random unit vectors, because prompts are not what is measured; none are read or kept on disk."""
    encoder = model.text_encoder
    generator = torch.Generator().manual_seed(0)
    encoder.cache_dir = None
    encoder.compute = lambda names: F.normalize(torch.randn(len(names), encoder.dim, generator=generator), dim=-1)


def made_up_image(size: Sequence[int]) -> Tensor:
    """(3, *size) float, 0..255, smooth."""
    coarse = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(coarse, size=tuple(size), mode="bicubic")[0].clamp(0, 255)


def made_up_scores(num_queries: int, num_classes: int, kept: int) -> Tensor:
    """(Q, K + 1): the first `kept` have a class of their own, the others void."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_queries, num_classes + 1, generator=generator)
    classes = torch.randint(0, num_classes, (num_queries,), generator=generator)
    classes[kept:] = num_classes
    logits[torch.arange(num_queries), classes] += 9 + torch.rand(num_queries, generator=generator)
    return logits


def _differences(ours: dict, published: dict) -> dict[str, float]:
    """Of semantic scores over their deviation; share of equal panoptic pixels; of the sorted scores of instances."""
    scores = ours["instances"].scores.sort().values, published["instances"][0].sort().values
    far = len(scores[0]) != len(scores[1])
    return {
        "semantic": float((ours["sem_seg"] - published["sem_seg"]).abs().max() / published["sem_seg"].std()),
        "panoptic": float((ours["panoptic_seg"][0] == published["panoptic_seg"][0]).float().mean()),
        "instances": 1.0 if far else max((scores[0] - scores[1]).abs().tolist(), default=0.0),
    }


def _check_equal(name: str, ours: dict, published: dict) -> dict[str, float]:
    found = _differences(ours, published)
    segments = len(ours["panoptic_seg"][1]), len(published["panoptic_seg"][1])
    if not (found["semantic"] <= SPREAD and found["panoptic"] >= PIXELS and found["instances"] <= SPREAD):
        raise InputError(
            f"{name}: ours and the published steps differ: semantic scores by {found['semantic']:.1e} of their "
            f"deviation, {100 * found['panoptic']:.2f} % of the panoptic pixels are the same ({segments[0]} and "
            f"{segments[1]} segments), instances by {found['instances']:.1e}"
        )
    return found


def _parts(model: FCCLIP, sample: dict, vocabulary: Vocabulary, scores: Tensor | None) -> dict[str, float]:
    """Seconds of each part of ours, in one pass."""
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable, *inputs: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = function(*inputs, **options)
        wait_for(model.device)
        spent[name] = time.perf_counter() - began
        return result

    [scored] = model.score([sample], vocabulary)
    wait_for(model.device)
    with torch.no_grad():
        with model.autocast():
            images, _ = model.preprocess([sample])
            features = timed("backbone", model.backbone, images)
            mask_features, pyramid = timed("pixel decoder", model.sem_seg_head.pixel_decoder, features.levels)
            text = with_void(model.text_encoder.encode(vocabulary), model.void_embedding.weight)
            timed("masked decoder", model.sem_seg_head.predictor, pyramid, mask_features, text, all_sets=False)
        timed("out-of-vocabulary classifier", model.pool, scored.dense[None], scored.masks.mask_logits[None])
        for head in model.heads:
            timed(head, _outputs, model, scored, scores, (head,))
        timed("all heads", _outputs, model, scored, scores, model.heads)
    return spent


def alone(
    name: str, model: FCCLIP, runs: dict[str, Callable[[], Any]], arguments: Sequence, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """MiB above the model: on a GPU what torch allocates at most, on a CPU of a process for each, and its seconds."""
    device = torch.device(options.device)
    if device.type != "cuda":
        figures = {kind: of_a_process(name, kind, arguments, options.opts) for kind in runs}
        return {
            what: {kind: values[index] for kind, values in figures.items()}
            for index, what in enumerate(("memory_mib", "seconds_alone"))
        }
    found = {}
    for kind, run in runs.items():
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        found[kind] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return {"memory_mib": found}


def of_a_process(name: str, kind: str, arguments: Sequence, opts: Sequence[str]) -> tuple[float, float]:
    """What `memory_and_seconds` gives of what --memory-of says, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), *map(str, arguments)]
    allocator = {VARIABLE: "default"} if kind == "published" else {}
    done = subprocess.run(
        [*command, "--memory-of", kind, *opts],
        capture_output=True, text=True, check=False, env={**os.environ, **allocator},
    )  # fmt: skip
    if done.returncode:
        raise InputError(f"{name}: the memory of {kind} could not be measured: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_and_seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """MiB that a run takes at its peak above what the process has before, and the seconds of the next one."""

    def resident(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    run()
    above, began = resident("VmHWM") - before, time.perf_counter()
    run()
    return above, time.perf_counter() - began
