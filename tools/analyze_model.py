"""What a model costs: parameters, FLOPs and memory of each part at a given size, without running it.

    python tools/analyze_model.py --config-file configs/shapes/fcclip_shapes.yaml [--size 1024 | --size 1024x2048]
        [--batch B] [--training] [--json FILE] [KEY VALUE ...]

The model is built and called on torch's meta device, which keeps shapes and no values: seconds and little memory for
any size, no weights, no GPU, no data. Where the code asks for a value, it gets the answer that costs most (every query
is kept, every pixel belongs to a mask), so memory is an upper estimate.

Counted as FLOPs, two for each multiply-add: convolutions, linear layers, matrix products and attention (torch's own
counter), and four multiply-adds for each value that is sampled, as in deformable attention. Norms, activation
functions, softmax, resizing, sorting and matching are not counted, nor is the text tower, which runs once a vocabulary.

Memory is that of the tensors which the operations put out, in float32 and with fused attention. What an operation
needs inside (workspaces of convolutions), the CUDA context and the allocator's reserve come on top.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from fcclip.checks.weights import build_on_meta
from fcclip.config import load_config
from fcclip.errors import InputError, run_program
from fcclip.files import write_json
from fcclip.modeling import Architecture
from fcclip.modeling.inputs import padded_size
from fcclip.modeling.pixel_decoder import MSDeformAttn
from fcclip.structures import Targets, TextEmbeddings
from fcclip.vocabulary import Vocabulary
from fcclip.weights import frozen_prefixes

aten = torch.ops.aten

IMAGE, TEXT, SAM, PIXELS = "CLIP image tower", "CLIP text tower", "SAM image encoder", "pixel decoder"
MASKS, IN, OUT = "mask decoder", "in-vocabulary scores", "out-of-vocabulary scores"
FUSION, DECODER = "fusion", "visual decoder"  # of Fusioner
OTHER, OUTPUTS, LOSSES, BACKWARD = "others", "outputs", "losses", "backward pass"
# In the order they are shown in.
PARTS = (IMAGE, SAM, PIXELS, MASKS, FUSION, DECODER, IN, OUT, OTHER, OUTPUTS, LOSSES, BACKWARD, TEXT)

# The first prefix that fits says where a parameter belongs: of the frozen parts, and of all others.
_FROZEN_OWNERS = (
    ("clip_model.visual.", IMAGE),
    ("clip_model.logit_scale", OUT),
    ("clip_model.", TEXT),
    ("image_encoder.", SAM),
    ("vit.", IMAGE),
)
_OWNERS = (
    ("sem_seg_head.pixel_decoder.", PIXELS),
    ("sem_seg_head.predictor.class_embed.", IN),
    ("sem_seg_head.predictor._mask_pooling_proj.", IN),
    ("sem_seg_head.predictor.logit_scale", IN),
    ("sem_seg_head.predictor.", MASKS),
    ("void_embedding.", IN),
    ("cdt.", OUT),  # of MAFT+
    ("classifier.", OUT),  # of a classifier that trains
    ("fusion.", FUSION),
    ("decoder.", DECODER),
    ("", OTHER),
)
# Calls that are a part each, where a model has them: what owns the method, from the model on.
_WATCHED = (
    ("", "preprocess", OTHER),
    ("backbone", "forward", IMAGE),
    ("sam", "forward", SAM),
    ("sem_seg_head.pixel_decoder", "forward", PIXELS),
    ("sem_seg_head.pixel_decoder", "refine", PIXELS),
    ("sem_seg_head.predictor", "forward", MASKS),
    ("sem_seg_head.predictor", "embed_classes", IN),
    ("", "pool", OUT),
    ("cdt", "forward", OUT),
    ("fusion", "forward", FUSION),
    ("decoder", "forward", DECODER),
)
_SEGMENTS = 12  # of a training image, about COCO's mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyses the model of a config and prints its cost."""
    args = parse_arguments(arguments)
    cfg = load_config(args.config_file, args.opts)
    height, width = args.size or (cfg.INPUT.IMAGE_SIZE, cfg.INPUT.IMAGE_SIZE)
    segments = _SEGMENTS if args.training else None
    report = analyse(cfg, height=height, width=width, batch=args.batch, segments=segments)
    print_report(report, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    if args.json:
        write_json(args.json, {"config": str(args.config_file), **report}, indent=2)
        print(f"wrote {args.json}")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="YAML file, or the name of a shipped one")
    add("--size", type=_size, metavar="HxW", help="of the images in pixels; one number for a square")
    add("--batch", type=int, default=1, metavar="B", help="images (default: 1)")
    add("--training", action="store_true", help="also a training step with AdamW")
    add("--json", type=Path, metavar="FILE", help="also write the numbers there")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys that override the file")
    args = parser.parse_intermixed_args(arguments)
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    return args


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"expected pixels, such as 1024 or 1024x2048, got '{text}'")
    return int(sides[1]), int(sides[2] or sides[1])


# ---- the analysis ----


def analyse(cfg: CfgNode, *, height: int, width: int, batch: int = 1, segments: int | None = None) -> dict[str, Any]:
    """What the model of a config costs.

    Args:
        cfg: its CLIP weights, MODEL.WEIGHTS and device are not used.
        height, width: of the images, in pixels; also the size of the outputs.
        batch: images at once.
        segments: of each image of a training step; None analyses inference only.

    Returns:
        JSON values; memory is in bytes.

    Raises:
        ValueError: a config that cannot be built, or one without a vocabulary.
    """
    model = build_on_meta(cfg)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.engine = "torch"  # the others need values
    vocabulary = model.test_vocabulary or model.train_vocabulary
    if vocabulary is None:
        raise InputError("DATASETS.TRAIN and DATASETS.TEST are empty: name a data set, its classes are what is scored")
    model.text_encoder = ShapedText(model.text_encoder.dim)
    sample = {"image": torch.empty(3, height, width, dtype=torch.uint8, device="meta")}
    with recording(model) as inference:
        model([sample] * batch, vocabulary=vocabulary, semantic="labels")
    held = _bytes([*model.parameters(), *model.buffers()])
    report = {
        "schema": 2,
        "clip": cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME,
        "padded_size": list(padded_size([(height, width)], model.size_divisibility)),
        "batch": batch,
        "queries": cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES if hasattr(model, "sem_seg_head") else len(vocabulary),
        "vocabulary": {"name": vocabulary.name, "classes": len(vocabulary)},
        "parameters": count_parameters(model),
        "inference": {
            "parts": inference.as_dict(),
            "memory": {"model": held, "activations": inference.peak, "total": held + inference.peak},
        },
    }
    if segments is not None:
        report["training"] = training_cost(model, sample, batch, segments, held)
    return report


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """part -> number of parameters, and how many of them learn. Each belongs to one part: the CLIP's logit scale to the
    out-of-vocabulary scores, void to the in-vocabulary ones."""
    counts: dict[str, dict[str, int]] = {}
    frozen = [(f"{root}{prefix}", part) for root in frozen_prefixes(model) for prefix, part in _FROZEN_OWNERS]
    for name, weight in model.named_parameters():
        part = next(part for prefix, part in (*frozen, *_OWNERS) if name.startswith(prefix))
        count = counts.setdefault(part, {"parameters": 0, "trainable": 0})
        count["parameters"] += weight.numel()
        count["trainable"] += weight.numel() * weight.requires_grad
    return counts


def training_cost(
    model: Architecture, sample: Mapping[str, Tensor], batch: int, segments: int, held: int
) -> dict[str, Any]:
    """One step with AdamW: FLOPs by part, and the memory it needs besides `held`, that of the model."""
    if model.train_vocabulary is None:
        raise InputError("DATASETS.TRAIN is empty: a training step needs its classes")
    targets = Targets(
        labels=torch.zeros(segments, dtype=torch.int64),
        id_map=torch.empty(sample["image"].shape[-2:], dtype=torch.int32, device="meta"),
        ids=torch.arange(segments),
    )
    model.train()
    with recording(model) as recorder:
        loss = sum(model([{**sample, "targets": targets}] * batch).values())
        with recorder.within(BACKWARD):
            loss.backward()
    model.eval()
    model.zero_grad()
    adamw = 2 * _bytes(weight for weight in model.parameters() if weight.requires_grad)
    memory = {"model": held, "adamw": adamw, "activations": recorder.peak, "total": held + adamw + recorder.peak}
    return {"segments": segments, "parts": recorder.as_dict(), "memory": memory}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class ShapedText:
    """Stands in for the text encoder: vectors of the right shape."""

    def __init__(self, embed_dim: int) -> None:
        self.embed_dim = embed_dim

    def encode(self, vocabulary: Vocabulary) -> TextEmbeddings:
        """As `TextEncoder.encode`, without values."""
        num_names = sum(len(synonyms) for synonyms in vocabulary.synonyms)
        return TextEmbeddings(
            vectors=torch.empty(num_names, self.embed_dim, device="meta"),
            class_of_vector=torch.empty(num_names, dtype=torch.int64, device="meta"),
            num_classes=len(vocabulary),
        )


# ---- counting ----


@dataclass
class Cost:
    """Of one part; `peak` are the bytes that were alive at most while it ran."""

    flops: int = 0
    peak: int = 0


@contextlib.contextmanager
def recording(model: Architecture) -> Iterator[Recorder]:
    """Counts what a model does inside, on any device."""
    recorder = Recorder(model.device, rest=LOSSES if model.training else OUTPUTS)
    with contextlib.ExitStack() as stack:
        for path, name, part in _WATCHED:
            owner = functools.reduce(lambda of, child: getattr(of, child, None), filter(None, path.split(".")), model)
            if not hasattr(owner, name):  # of another architecture
                continue
            stack.enter_context(mock.patch.object(owner, name, recorder.counted(getattr(owner, name), part)))
        if model.device.type == "meta":  # for which torch has no autocast
            stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *_: False))
            stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))
            stack.enter_context(FusedAttention())
        yield stack.enter_context(recorder)


class Recorder(TorchDispatchMode):
    """Counts FLOPs and memory while it is on.

    Memory is counted by storage: from the operation that made it until nothing refers to it any more. On the meta
    device, operations that need values are answered by what costs most.

    Args:
        device: tensors on other devices are not counted.
        rest: the part that everything outside `within` belongs to.

    Attributes:
        parts: what each part cost.
    """

    def __init__(self, device: torch.device, *, rest: str) -> None:
        super().__init__()
        self.parts: dict[str, Cost] = {}
        self._device = device
        self._part = rest
        self._alive: dict[int, weakref.ref] = {}  # by the id of a storage
        self._bytes = 0

    @property
    def peak(self) -> int:
        """Bytes that were alive at most, without parameters, buffers and inputs."""
        return max(cost.peak for cost in self.parts.values())

    def as_dict(self) -> dict[str, dict[str, int]]:
        """JSON values."""
        return {part: asdict(self.parts[part]) for part in PARTS if part in self.parts}

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What runs inside belongs to `part`."""
        before, self._part = self._part, part
        self._cost.peak = max(self._cost.peak, self._bytes)
        try:
            yield
        finally:
            self._part = before

    def counted(self, method: Any, part: str) -> Any:
        """A method whose calls belong to `part`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return method(*args, **kwargs)

        return wrapped

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        answer = _WORST_CASES.get(func) if any(tensor.is_meta for tensor in inputs) else None
        result = func(*args, **kwargs) if answer is None else answer(func, *args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self._cost.flops += formula(*args, **kwargs, out_val=result)
        known = {id(tensor.untyped_storage()) for tensor in inputs}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == self._device:
                storage = tensor.untyped_storage()
                if id(storage) not in known and id(storage) not in self._alive:
                    self._add(storage)
        return result

    @property
    def _cost(self) -> Cost:
        return self.parts.setdefault(self._part, Cost())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def forget(_: weakref.ref) -> None:
            self._alive.pop(key, None)
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, forget)
        self._bytes += size
        self._cost.peak = max(self._cost.peak, self._bytes)


def grid_sample_flops(image: Tensor, grid: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of a bilinear `grid_sample` of (n, C, h, w) at (n, H, W, 2): four multiply-adds a value."""
    return 2 * 4 * image.shape[1] * math.prod(grid.shape[:-1])


# torch's formulas, and what it has none for.
_FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    aten.grid_sampler_2d: grid_sample_flops,
    aten.grid_sampler_2d_backward: lambda grad, image, grid, *_, **__: 2 * grid_sample_flops(image, grid),
}


# ---- calling a model without values ----


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device as the devices with values do it: in one operation that never holds all scores."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        mask = None if mask is None else mask.to(args[0].dtype)  # a mask of bools becomes one of floats inside, too
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        if args[0].dim() == 3:  # (B * heads, N, d), as SAM's
            mask = None if mask is None else mask[None]
            return fused(*(tensor[None] for tensor in args[:3]), attn_mask=mask)[0][0]
        return fused(*args[:3], attn_mask=mask)[0]


def _index(func: Any, tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Every place of a mask is chosen."""
    numbers: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        numbers += [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim() if is_mask else [index]
    return func(tensor, numbers)


def _unique(func: Any, tensor: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    """No value comes twice."""
    counts = tensor.new_empty(tensor.numel(), dtype=torch.int64)
    return tensor.new_empty(tensor.numel()), tensor.new_empty(tensor.shape, dtype=torch.int64), counts


def _copy(func: Any, tensor: Tensor, **options: Any) -> Tensor:
    """What reaches the CPU is one everywhere."""
    device = options.get("device")
    if not tensor.is_meta or device is None or torch.device(device).type == "meta":
        return func(tensor, **options)
    return torch.ones(tensor.shape, dtype=options.get("dtype") or tensor.dtype, device=device)


# Operations whose result has values or a shape that depends on values.
_WORST_CASES = {
    aten.index.Tensor: _index,
    aten.nonzero.default: lambda func, x: x.new_empty((x.numel(), x.dim()), dtype=torch.int64),
    aten.masked_select.default: lambda func, x, mask: x.new_empty(x.numel()),
    aten.bincount.default: lambda func, x, weights=None, minlength=0: x.new_empty(max(minlength, 1)),
    aten._unique2.default: _unique,
    aten._local_scalar_dense.default: lambda func, x: torch.ones((), dtype=x.dtype).item(),
    aten._to_copy.default: _copy,
}


# ---- printing ----


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The tables."""
    height, width = report["padded_size"]
    vocabulary, counts = report["vocabulary"], report["parameters"]
    console.print(
        f"{report['clip']}, {report['batch']} x {height} x {width} pixels, {report['queries']} queries, "
        f"{vocabulary['classes']} classes ('{vocabulary['name']}')\n"
    )
    _print_costs("an inference", report["inference"], counts, console)
    if "training" in report:
        segments = report["training"]["segments"]
        _print_costs(f"a training step, {segments} segments an image", report["training"], counts, console)


def _print_costs(title: str, costs: Mapping[str, Any], counts: Mapping[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column(title, no_wrap=True)
    for name in ("parameters", "trainable", "GFLOPs", "peak, MiB"):
        table.add_column(name, justify="right")
    parts, memory = costs["parts"], costs["memory"]
    rows = [(part, counts.get(part, {}), parts.get(part, {})) for part in PARTS if part in counts or part in parts]
    sums = [{key: sum(row[place].get(key, 0) for row in rows) for key in keys}
            for place, keys in ((1, ("parameters", "trainable")), (2, ("flops",)))]  # fmt: skip
    for part, count, cost in [*rows, ("sum", sums[0], {**sums[1], "peak": memory["activations"]})]:
        numbers = [f"{count[key]:,}" if count.get(key) else "-" for key in ("parameters", "trainable")]
        table.add_row(part, *numbers, f"{cost.get('flops', 0) / 1e9:,.2f}", f"{cost.get('peak', 0) / 2**20:,.1f}")
    console.print(table)
    sizes = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in memory.items())
    console.print(f"memory: {sizes}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
