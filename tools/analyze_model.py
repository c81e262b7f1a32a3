"""What a model costs: parameters, FLOPs, activations and memory of each part at a given size, without running it.

    python tools/analyze_model.py --config-file configs/shapes/fcclip_shapes.yaml [--size H W] [--batch B]
        [--training [--segments N]] [--json FILE] [KEY VALUE ...]

The model is built and called on torch's meta device, which keeps shapes and no values: seconds and little memory for
any size, no weights, no GPU, no data. Where the code asks for a value, it gets the answer that costs most (every query
is kept, every pixel belongs to a mask), so memory is an upper estimate.

Counted as FLOPs, two for each multiply-add: convolutions, linear layers, matrix products and attention (torch's own
counter), `grid_sample` (four multiply-adds a sampled value) and multi-scale deformable attention (five: the sample and
its weight). Norms, activation functions, softmax, resizing, sorting and matching are not counted.

Memory is that of the tensors which the operations put out, in float32 and with fused attention. What an operation
needs inside (workspaces of convolutions), the CUDA context and the allocator's reserve come on top.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
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

from fcclip.config import load_config
from fcclip.errors import InputError, run_program
from fcclip.files import write_json
from fcclip.modeling import FCCLIP, build_model
from fcclip.modeling.inputs import padded_size
from fcclip.modeling.pixel_decoder import MSDeformAttn
from fcclip.modeling.text import encode_tokens
from fcclip.structures import Targets, TextEmbeddings
from fcclip.vocabulary import Vocabulary, prompts
from fcclip.weights import frozen_prefixes

aten = torch.ops.aten

IMAGE, TEXT, SAM, PIXELS = "CLIP image tower", "CLIP text tower", "SAM image encoder", "pixel decoder"
MASKS, IN, OUT = "mask decoder", "in-vocabulary scores", "out-of-vocabulary scores"
PREPARATION, OUTPUTS, LOSSES, BACKWARD = "preparation", "outputs", "losses", "backward pass"
PARTS = (PREPARATION, IMAGE, SAM, PIXELS, MASKS, IN, OUT, OUTPUTS, LOSSES, BACKWARD)  # in the order in which they run

# The first prefix that fits says where a parameter belongs: of the frozen parts, and of all others.
_FROZEN_OWNERS = (
    ("clip_model.visual.", IMAGE),
    ("clip_model.logit_scale", OUT),
    ("clip_model.", TEXT),
    ("image_encoder.", SAM),
)
_OWNERS = (
    ("sem_seg_head.pixel_decoder.", PIXELS),
    ("sem_seg_head.predictor.class_embed.", IN),
    ("sem_seg_head.predictor._mask_pooling_proj.", IN),
    ("sem_seg_head.predictor.logit_scale", IN),
    ("sem_seg_head.predictor.", MASKS),
    ("void_embedding.", IN),
)
_SEGMENTS = 12  # of a training image, about COCO's mean
_TEXT_CHUNK = 256  # prompts that are encoded at once


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyses the model of a config and prints its cost."""
    args = parse_arguments(arguments)
    began = time.perf_counter()
    cfg = load_config(args.config_file, args.opts)
    height, width = args.size or (cfg.INPUT.IMAGE_SIZE, cfg.INPUT.IMAGE_SIZE)
    segments = args.segments if args.training else None
    report = analyse(cfg, height=height, width=width, batch=args.batch, segments=segments)
    report = {"config": str(args.config_file), **report}
    print_report(report, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    print(f"\nread {args.config_file}; analysed in {time.perf_counter() - began:.1f} s")
    if args.json:
        write_json(args.json, report, indent=2)
        print(f"wrote {args.json}")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what follows the numbers of --size belongs to KEY VALUE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="YAML file, or the name of a shipped one")
    size = "of the images in pixels; one number for a square (default: INPUT.IMAGE_SIZE)"
    add("--size", nargs="+", metavar=("H", "W"), help=size)
    add("--batch", type=int, default=1, metavar="B", help="images (default: 1)")
    add("--training", action="store_true", help="also a training step with AdamW")
    add("--segments", type=int, default=_SEGMENTS, metavar="N", help="of a training image (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the numbers there")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys that override the file")
    args = parser.parse_args(arguments)
    if args.size is not None:
        count = next((i for i, text in enumerate(args.size) if not text.isdigit()), len(args.size))
        size, args.opts = [int(text) for text in args.size[:count]], [*args.size[count:], *args.opts]
        if len(size) not in (1, 2):
            parser.error(f"--size takes one or two numbers of pixels, got {' '.join(args.size)}")
        args.size = (size[0], size[-1])
    late = [text for text in args.opts if text.startswith("--")]
    if late:
        parser.error(f"{late[0]} must come before KEY VALUE")
    if min(args.batch, args.segments, *(args.size or (1,))) < 1:
        parser.error("--size, --batch and --segments must be at least 1")
    return args


# ---- the analysis ----


def analyse(cfg: CfgNode, *, height: int, width: int, batch: int = 1, segments: int | None = None) -> dict[str, Any]:
    """What the model of a config costs.

    Args:
        cfg: its CLIP weights, MODEL.WEIGHTS and device are not used.
        height, width: of the images, in pixels; also the size of the outputs.
        batch: images at once.
        segments: of each image of a training step; None analyses inference only.

    Returns:
        JSON values. Counts are of elements, memory is in bytes.

    Raises:
        ValueError: a config that cannot be built, or one without a vocabulary.
    """
    model = build_on_meta(cfg)
    vocabulary = model.test_vocabulary or model.train_vocabulary
    if vocabulary is None:
        raise InputError("DATASETS.TRAIN and DATASETS.TEST are empty: name a data set, its classes are what is scored")
    text = text_cost(model, vocabulary)
    model.text_encoder = ShapedText(model.backbone.embed_dim)
    image = torch.empty(3, height, width, dtype=torch.uint8, device="meta")
    with recording(model) as inference:
        model([{"image": image}] * batch, vocabulary=vocabulary, semantic="labels")
    parameters, buffers = _bytes(model.parameters()), _bytes(model.buffers())
    report = {
        "schema": 1,
        "clip": cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME,
        "size": [height, width],
        "padded_size": list(padded_size([(height, width)], model.size_divisibility)),
        "batch": batch,
        "queries": cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES,
        "vocabulary": {"name": vocabulary.name, "classes": len(vocabulary), **text},
        "parameters": count_parameters(model),
        "inference": {
            "parts": inference.as_dict(),
            "memory": {
                "parameters": parameters,
                "buffers": buffers,
                "activations": inference.peak,
                "peak_part": inference.peak_part,
                "total": parameters + buffers + inference.peak,
            },
        },
    }
    if segments is not None:
        report["training"] = training_cost(model, height, width, batch, segments, parameters + buffers)
    return report


def build_on_meta(cfg: CfgNode) -> FCCLIP:
    """The model of a config as shapes only; nothing is downloaded or read besides architecture and vocabularies."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS, cfg.MODEL.SAM_WEIGHTS = "meta", "", ""
    with torch.device("meta"):
        model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.engine = "torch"  # the others need values
    return model


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """part -> number of parameters, and how many of them learn. Each belongs to one part: the CLIP's logit scale to the
    out-of-vocabulary scores, void to the in-vocabulary ones.

    Raises:
        ValueError: a parameter of a part that is not known here.
    """
    counts = {part: {"parameters": 0, "trainable": 0} for part in (IMAGE, TEXT, PIXELS, MASKS, IN, OUT)}
    frozen = [(f"{root}{prefix}", part) for root in frozen_prefixes(model) for prefix, part in _FROZEN_OWNERS]
    for name, weight in model.named_parameters():
        part = next((part for prefix, part in (*frozen, *_OWNERS) if name.startswith(prefix)), None)
        if part is None:
            raise InputError(f"parameter '{name}' belongs to no part that is known to this tool")
        counts.setdefault(part, {"parameters": 0, "trainable": 0})
        counts[part]["parameters"] += weight.numel()
        counts[part]["trainable"] += weight.numel() * weight.requires_grad
    return counts


def text_cost(model: FCCLIP, vocabulary: Vocabulary) -> dict[str, int]:
    """Class names with synonyms (`words`), prompts and FLOPs of encoding a vocabulary, which happens once; prompts are
    cut as when they are encoded."""
    clip = model.text_encoder.clip_model
    names = list(dict.fromkeys(name for synonyms in vocabulary.synonyms for name in synonyms))
    tokens = open_clip.tokenize(prompts(names), context_length=int(clip.positional_embedding.shape[0]))
    flops, of_shape = 0, {}
    for chunk in tokens.split(_TEXT_CHUNK):
        shape = (len(chunk), int(chunk.argmax(dim=-1).max()))
        if shape not in of_shape:
            with torch.no_grad(), FusedAttention(), Recorder(model.device, rest=TEXT) as recorder:
                encode_tokens(clip, chunk)
            of_shape[shape] = recorder.flops
        flops += of_shape[shape]
    return {"words": len(names), "prompts": len(tokens), "flops": flops}


def training_cost(
    model: FCCLIP, height: int, width: int, batch: int, segments: int, model_bytes: int
) -> dict[str, Any]:
    """One step with AdamW: FLOPs, activations and what is saved by part, and the memory it needs."""
    if model.train_vocabulary is None:
        raise InputError("DATASETS.TRAIN is empty: a training step needs its classes")
    image = torch.empty(3, height, width, dtype=torch.uint8, device="meta")
    targets = Targets(
        labels=torch.zeros(segments, dtype=torch.int64),
        id_map=torch.empty(height, width, dtype=torch.int32, device="meta"),
        ids=torch.arange(segments),
    )

    model.train()
    with recording(model) as recorder:
        loss = sum(model([{"image": image, "targets": targets}] * batch).values())
        with recorder.within(BACKWARD):
            loss.backward()
    model.eval()
    model.zero_grad()
    trainable = _bytes(weight for weight in model.parameters() if weight.requires_grad)
    return {
        "segments": segments,
        "parts": recorder.as_dict(),
        "memory": {
            "model": model_bytes,
            "adamw": 2 * trainable,
            "gradients": trainable,
            "saved": sum(cost.saved for cost in recorder.parts.values()),
            "activations": recorder.peak,
            "peak_part": recorder.peak_part,
            "total": model_bytes + 2 * trainable + recorder.peak,
        },
    }


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
    """Of one part: `activations` are elements that counted operations put out, `peak` the bytes that were alive at most
    while it ran, `saved` the bytes it keeps for the backward pass."""

    flops: int = 0
    activations: int = 0
    peak: int = 0
    saved: int = 0


@contextlib.contextmanager
def recording(model: FCCLIP) -> Iterator[Recorder]:
    """Counts what a model does inside, on any device; its parts are told apart by their published names."""
    head = model.sem_seg_head
    watched = (
        (model.text_encoder, "encode", TEXT),
        (model, "preprocess", PREPARATION),
        (model.backbone, "forward", IMAGE),
        (getattr(model, "sam", None), "forward", SAM),
        (head.pixel_decoder, "forward", PIXELS),
        (head.pixel_decoder, "refine", PIXELS),
        (head.predictor, "forward", MASKS),
        (head.predictor, "classify", IN),
        (model, "classify", OUT),
    )
    recorder = Recorder(model.device, rest=LOSSES if model.training else OUTPUTS)
    with contextlib.ExitStack() as stack:
        for owner, name, part in watched:
            if not hasattr(owner, name):  # of FrozenSeg alone
                continue
            stack.enter_context(_around(owner, name, lambda call, part=part: recorder.within(part)))
        for module in model.modules():
            if isinstance(module, MSDeformAttn):
                stack.enter_context(_around(module, "forward", partial(recorder.operator, module)))
        if model.device.type == "meta":
            stack.enter_context(_autocast_on_meta())
            stack.enter_context(FusedAttention())
        yield stack.enter_context(recorder)


class Recorder(TorchDispatchMode):
    """Counts FLOPs, activations and memory while it is on.

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
        self._alive: dict[int, tuple[weakref.ref, int]] = {}  # id of a storage -> it, bytes
        self._bytes = 0
        self._saved: dict[int, weakref.ref] = {}
        self._operator_depth = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved)

    def __enter__(self) -> Recorder:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    @property
    def flops(self) -> int:
        """Of all parts."""
        return sum(cost.flops for cost in self.parts.values())

    @property
    def peak(self) -> int:
        """Bytes that were alive at most, without parameters, buffers and inputs."""
        return max(cost.peak for cost in self.parts.values())

    @property
    def peak_part(self) -> str:
        """Where that was."""
        return max(self.parts, key=lambda part: self.parts[part].peak)

    def as_dict(self) -> dict[str, dict[str, int]]:
        """JSON values, in the order in which the parts run."""
        return {part: vars(self.parts[part]) for part in PARTS if part in self.parts}

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What runs inside belongs to `part`."""
        before, self._part = self._part, part
        self._cost.peak = max(self._cost.peak, self._bytes)
        try:
            yield
        finally:
            self._part = before

    @contextlib.contextmanager
    def operator(self, module: MSDeformAttn, call: tuple) -> Iterator[None]:
        """Around a call of multi-scale deformable attention: counted by its own formula, whatever its engine does."""
        query, value, shapes = call
        forward = deformable_attention_flops(
            batch=query.shape[0],
            queries=query.shape[1],
            heads=module.heads,
            levels=len(shapes),
            points=module.points,
            channels=value.shape[-1] // module.heads,
        )
        self._cost.flops += forward
        if torch.is_grad_enabled():
            self.parts.setdefault(BACKWARD, Cost()).flops += 2 * forward
        self._operator_depth += 1
        try:
            yield
        finally:
            self._operator_depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_meta = any(tensor.device.type == "meta" for tensor in inputs)
        answer = _WORST_CASES.get(func) if on_meta else None
        result = func(*args, **kwargs) if answer is None else answer(func, *args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            # inside the operator, its own formula counts the samples
            is_counted = func._overloadpacket is aten.grid_sampler_2d and self._operator_depth
            self._cost.flops += 0 if is_counted else formula(*args, **kwargs, out_val=result)
            self._cost.activations += outputs[0].numel() if self._part != BACKWARD else 0
        known = {id(tensor.untyped_storage()) for tensor in inputs}
        for tensor in outputs:
            if tensor.device == self._device and id(tensor.untyped_storage()) not in known:
                self._add(tensor.untyped_storage())
        return result

    @property
    def _cost(self) -> Cost:
        return self.parts.setdefault(self._part, Cost())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def forget(_: weakref.ref) -> None:
            self._alive.pop(key, None)
            self._bytes -= size

        self._alive[key] = (weakref.ref(storage, forget), size)
        self._bytes += size
        self._cost.peak = max(self._cost.peak, self._bytes)

    def _save(self, tensor: Tensor) -> Tensor:
        """Called by autograd with everything it keeps; parameters and inputs are not counted, nor anything twice."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive and key not in self._saved:
            self._cost.saved += storage.nbytes()
            self._saved[key] = weakref.ref(storage, lambda _: self._saved.pop(key, None))
        return tensor


def deformable_attention_flops(*, batch: int, queries: int, heads: int, levels: int, points: int, channels: int) -> int:
    """FLOPs of multi-scale deformable attention without its projections.

    Each query samples `points` places of each level for each head; a sampled channel is four multiply-adds of bilinear
    interpolation and one with the attention weight.

    Example:
        >>> deformable_attention_flops(batch=1, queries=3, heads=1, levels=1, points=2, channels=4)
        240
    """
    return 2 * 5 * batch * queries * heads * levels * points * channels


def grid_sample_flops(image: Tensor, grid: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of a bilinear `grid_sample` of (n, C, h, w) at (n, H, W, 2): four multiply-adds a value."""
    return 2 * 4 * image.shape[1] * math.prod(grid.shape[:-1])


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# torch's formulas, and what it has none for.
_FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten.grid_sampler_2d: grid_sample_flops,
}


# ---- calling a model without values ----


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device as the devices with values do it: in one operation that never holds all scores."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)  # a mask of bools becomes one of floats inside, too
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    if query.dim() == 3:  # (B * heads, N, d), as SAM's
        query, key, value = query[None], key[None], value[None]
        attn_mask = None if attn_mask is None else attn_mask[None]
        return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=options.get("scale"))[0][0]
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=options.get("scale"))[0]


@contextlib.contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Lets code ask for autocast, and turn it off, on the meta device, which torch knows no autocast for: it is off."""
    is_enabled, switch = torch.is_autocast_enabled, torch.autocast

    class Switch(switch):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.is_autocast_enabled = lambda *device: False if device == ("meta",) else is_enabled(*device)
    torch.autocast = Switch
    try:
        yield
    finally:
        torch.is_autocast_enabled, torch.autocast = is_enabled, switch


@contextlib.contextmanager
def _around(owner: Any, name: str, context: Callable[[tuple], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Calls of the method `name` of this object run inside `context(arguments)`."""
    method = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context(args):
            return method(*args, **kwargs)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        delattr(owner, name)


def _index(func: Any, tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Every place of a mask is chosen."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            numbers += [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()
        elif index is not None and getattr(index, "distinct", False):
            numbers.append(index[: tensor.shape[len(numbers)]])
        else:
            numbers.append(index)
    return func(tensor, numbers)


def _unique(func: Any, tensor: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    """No value comes twice; still there are not more of them than places where they are used as an index."""
    values = tensor.new_empty(tensor.numel())
    values.distinct = True
    return values, tensor.new_empty(tensor.shape, dtype=torch.int64), tensor.new_empty(len(values), dtype=torch.int64)


def _copy(func: Any, tensor: Tensor, **options: Any) -> Tensor:
    """What reaches the CPU is one everywhere."""
    device = options.get("device")
    if tensor.device.type != "meta" or device is None or torch.device(device).type == "meta":
        return func(tensor, **options)
    return torch.ones(tensor.shape, dtype=options.get("dtype") or tensor.dtype, device=device)


# Operations whose result has values or a shape that depends on values.
_WORST_CASES: Mapping[Any, Callable] = {
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
    costs, memory = report["inference"]["parts"], report["inference"]["memory"]
    console.print(
        f"{report['clip']}, {report['batch']} x {height} x {width} pixels, {report['queries']} queries, "
        f"{vocabulary['classes']} classes, with synonyms {vocabulary['words']} names ('{vocabulary['name']}')\n"
    )
    table = _table("part", "parameters", "trainable", "GFLOPs", "activ., M", "peak, MiB")
    for part in PARTS:
        if part in counts or part in costs:
            table.add_row(part, *_count_cells(counts.get(part, {})), *_cost_cells(costs.get(part, {}), "peak"))
    table.add_section()
    total, text = _sums(counts), counts[TEXT]
    used = {key: total[key] - text[key] for key in total}
    all_costs = {**_sums(costs), "peak": memory["activations"]}
    table.add_row("an inference", *_count_cells(used), *_cost_cells(all_costs, "peak"))
    table.add_section()
    table.add_row(f"{TEXT}, once", *_count_cells(text), _short(vocabulary["flops"] / 1e9), "-", "-")
    table.add_row("all parameters", *_count_cells(total), "", "", "")
    console.print(table)
    rows = {
        "parameters": memory["parameters"],
        "buffers": memory["buffers"],
        f"activations at their peak ({memory['peak_part']})": memory["activations"],
    }
    _print_memory(console, "memory of an inference", rows, memory["total"])
    if "training" in report:
        _print_training(report["training"], console)
    console.print(
        f"\nThe text tower encodes {vocabulary['prompts']:,} prompts once a vocabulary; then they come from the cache. "
        "FLOPs: two for each multiply-add of convolutions, linear layers, matrix products, attention, grid_sample and "
        "multi-scale deformable attention; norms, activation functions, softmax, resizing and matching do not count. "
        "activ.: elements that the counted operations put out. peak: tensors alive at most while a part runs, in "
        "float32, with every query kept; workspaces, the CUDA context and the allocator's reserve come on top."
    )


def _print_training(training: Mapping[str, Any], console: Console) -> None:
    memory = training["memory"]
    table = _table("a training step", "GFLOPs", "activ., M", "saved, MiB", "peak, MiB")
    for part, cost in training["parts"].items():
        table.add_row(part, *_cost_cells(cost, "saved", "peak"))
    table.add_section()
    table.add_row("a step", *_cost_cells({**_sums(training["parts"]), "peak": memory["activations"]}, "saved", "peak"))
    console.print()
    console.print(table)
    rows = {
        "parameters and buffers": memory["model"],
        "state of AdamW": memory["adamw"],
        f"activations and gradients at their peak ({memory['peak_part']})": memory["activations"],
    }
    title = f"memory of training, {training['segments']} segments an image"
    _print_memory(console, title, rows, memory["total"])
    console.print(
        f"\nAll gradients take {_mebi(memory['gradients'])} MiB; for them the forward pass saves "
        f"{_mebi(memory['saved'])} MiB (saved), of which mixed precision halves a part."
    )


def _print_memory(console: Console, title: str, rows: Mapping[str, int], total: int) -> None:
    table = _table(title, "MiB")
    for name, size in rows.items():
        table.add_row(name, _mebi(size))
    table.add_section()
    table.add_row("sum", _mebi(total))
    console.print()
    console.print(table)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _sums(rows: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    return {key: sum(row.get(key, 0) for row in rows.values()) for key in keys}


def _count_cells(counts: Mapping[str, int]) -> list[str]:
    return [f"{counts[key]:,}" if counts.get(key) else "-" for key in ("parameters", "trainable")]


def _cost_cells(cost: Mapping[str, int], *memory: str) -> tuple[str, ...]:
    counts = _short(cost.get("flops", 0) / 1e9), _short(cost.get("activations", 0) / 1e6)
    return *counts, *(_mebi(cost.get(key, 0)) for key in memory)


def _short(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2}f}" if value else "-"


def _mebi(size: int) -> str:
    return f"{size / 2**20:,.1f}" if size else "-"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
