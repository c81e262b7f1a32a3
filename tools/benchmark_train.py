"""The part `train` of tools/benchmark.py: losses and gradients of a batch, beside the published steps in turns.

Both take the same weights and the same points; before they are measured their losses and gradients must agree, in fp32.
On a GPU both are measured under SOLVER.AMP, as the published recipe trains; no gradient is scaled. --memory and
--device: as for inference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmark_inference import (
    add_model_arguments,
    alone,
    check,
    checked_device,
    finished,
    in_turns,
    load,
    machine,
    memory_and_seconds,
    must_agree,
    show,
    timed_otherwise,
    wait_for,
)
from benchmark_ops import load_peer, with_peers
from torch import Tensor

from fcclip.engine import amp_dtype
from fcclip.errors import InputError
from fcclip.modeling import FCCLIP, build_model
from fcclip.modeling.pixel_decoder import MSDeformAttn
from fcclip.structures import Targets
from fcclip.vocabulary import Vocabulary

LOSSES, GRADIENTS = 1e-5, 1e-3  # largest difference, over the sum of the losses and over the norm of the gradients


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", type=int, default=512, metavar="N", help="side of the images in pixels (default 512)")
    add("--batch", type=int, default=2, metavar="N", help="images (default 2)")
    add("--segments", type=int, default=10, metavar="N", help="of each image (default 10)")
    add_model_arguments(parser, benchmark_train, models=["RN50"])


@with_peers()
def benchmark_train(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each model, prints a table, and returns everything as JSON values.

    Raises:
        ValueError: losses or gradients differ, or the options cannot work.
    """
    if min(options.size, options.batch, options.segments, options.rounds) < 1:
        raise InputError("--size, --batch, --segments and --rounds must be at least 1")
    if options.memory_of:
        _, runs = _both(options.models[0], options)
        print(json.dumps(memory_and_seconds(runs[options.memory_of])))
        return {}
    device, rows = checked_device(options), []
    for name in options.models:
        model, runs = _both(name, options)
        with must_agree(model, options):
            differences = _check_equal(name, model, runs)
        if timed_otherwise(model, options):  # it begins warm
            for run in runs.values():
                run()
        seconds, ratios = in_turns(runs, options.rounds)
        row = {"model": name, "seconds": seconds, "ratio": statistics.median(ratios), "ratios": ratios}
        row |= {
            "differences": differences,
            "autocast of both": str(model.amp_dtype),
            "parts": _parts(model, runs["ours"]),
        }
        if options.memory:
            arguments = ["train", "--models", name, "--size", options.size, "--batch", options.batch]
            arguments += ["--segments", options.segments]
            row |= alone(name, model, runs, arguments, options)
        rows.append(row)
    sizes = {name: getattr(options, name) for name in ("size", "batch", "segments")}
    sizes["overrides"] = list(options.opts)
    report = {"benchmark": "train", **sizes, **machine(device), "rows": rows}
    show(f"{options.batch} x {options.size} x {options.size}, {options.segments} segments", rows, "model")
    check(report, options.check, "model")
    return report


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


def _both(name: str, options: argparse.Namespace) -> tuple[FCCLIP, dict[str, Callable[[], None]]]:
    cfg = load(name, options.device, options.opts)
    vocabulary = Vocabulary.from_names([f"class {index}" for index in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)])
    model = build_model(cfg, train_vocabulary=vocabulary, test_vocabulary=vocabulary).train()
    model.text_encoder.encode(vocabulary)
    model.amp_dtype = amp_dtype(cfg, model.device)
    for part in model.modules():
        if isinstance(part, MSDeformAttn):  # at first offsets are whole cells, where bilinear gradients jump
            torch.nn.init.normal_(part.sampling_offsets.weight, std=0.02)
    batch = [made_up_sample(index, options.size, options.segments, len(vocabulary)) for index in range(options.batch)]
    ways = {"ours": model.losses, "published": load_peer("published_training").losses}
    steps = {"ours": lambda: ways["ours"](batch), "published": lambda: ways["published"](model, batch)}

    def run(losses: Callable[[], dict[str, Tensor]]) -> float:
        model.zero_grad()
        with model.autocast():
            total = sum(losses().values())
        total.backward()
        return float(total.detach())

    return model, {
        kind: finished(partial(run, losses), options, eager=kind == "published") for kind, losses in steps.items()
    }


def _check_equal(name: str, model: FCCLIP, runs: dict[str, Callable[[], float]]) -> dict[str, float]:
    losses, gradients = {}, {}
    for kind, run in runs.items():
        losses[kind] = run()
        gradients[kind] = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    difference = gradients["ours"] - gradients["published"]
    differences = {
        "losses": abs(losses["ours"] / losses["published"] - 1),
        "gradients": float(difference.norm() / gradients["published"].norm()),
    }
    if differences["losses"] > LOSSES or differences["gradients"] > GRADIENTS:
        raise InputError(
            f"{name}: ours and the published steps differ: losses {losses['ours']:.6f} and {losses['published']:.6f}, "
            f"gradients by {differences['gradients']:.1e} of their norm"
        )
    return differences


def _parts(model: FCCLIP, run: Callable[[], float]) -> dict[str, float]:
    """Seconds of the forward pass of each part of ours, and of everything."""
    spent: dict[str, float] = {}
    parts = {
        "backbone": model.backbone,
        "pixel decoder": model.sem_seg_head.pixel_decoder,
        "masked decoder": model.sem_seg_head.predictor,
        "criterion": model.criterion,
    }
    hooks = []
    for part, module in parts.items():

        def begin(module: Any, inputs: Any, part: str = part) -> None:
            wait_for(model.device)
            spent[part] = -time.perf_counter()

        def end(module: Any, inputs: Any, result: Any, part: str = part) -> None:
            wait_for(model.device)
            spent[part] += time.perf_counter()

        hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    began = time.perf_counter()
    run()
    spent["all"] = time.perf_counter() - began
    for hook in hooks:
        hook.remove()
    return spent
