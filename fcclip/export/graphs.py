"""The graphs of a model, and their way to torch's exported programs and to ONNX.

Class names enter FC-CLIP in its last step, so the graph of images has none (FC-CLIP, section 3.2).

Legend: B images, Q queries, D embedding, K classes, W names, H x W padded input.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fcclip.errors import InputError, NotInstalledError
from fcclip.modeling import FCCLIP, FrozenSeg
from fcclip.modeling.classifier import ensemble_probabilities, resize_masks, text_logits, with_void
from fcclip.modeling.pixel_decoder import MSDeformAttn
from fcclip.structures import Features, TextEmbeddings

STEP, CELLS = 32, (2, 80)  # of a side: pixels that it is a multiple of, and how many of them there may be
BATCH = 16  # images at once, at most


class Images(nn.Module):
    """What a network says of images before it meets a name: `image.onnx`."""

    outputs = ("mask_logits", "class_embeddings", "region_embeddings", "query_embeddings", "mask_not_empty")

    def __init__(self, model: FCCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """RGB (B, 3, H, W) float32, 0..255, padded with the mean colour -> mask logits (B, Q, H/4, W/4), class and
        region embeddings (B, Q, D), mask embeddings (B, Q, d), and (B, Q) bool, masks with a cell inside."""
        none = torch.zeros(0, dtype=torch.int64, device=image.device)
        text = TextEmbeddings(image.new_zeros(0, self.model.backbone.embed_dim), none, 0)
        features = self.see(image)
        proposals = self.model.propose(features, text)
        mask_logits = proposals.mask_logits()
        small = resize_masks(mask_logits, features.dense.shape[-2:])
        regions, not_empty = self.model.classifier(features.dense, small), (small > 0).flatten(2).any(-1)
        return mask_logits, proposals.class_embeddings[-1], regions, proposals.mask_embeddings[-1], not_empty

    def see(self, image: Tensor) -> Features:
        """What the frozen parts see; SAM has another mean colour, and padding is told by a colour that no pixel of
        8 bits has."""
        model = self.model
        features = model.backbone((image - model.pixel_mean) / model.pixel_std)
        if not isinstance(model, FrozenSeg) or model.sam is None:
            return features
        padding = (image == model.pixel_mean).all(1, keepdim=True)
        pixels = torch.where(padding, 0.0, (image - model.sam.pixel_mean) / model.sam.pixel_std)
        return model.with_sam(features, model.sam.encode(pixels))


class Names(nn.Module):
    """What `Images` says meets names: `all.onnx` is that graph with this one behind it."""

    outputs = ("class_probabilities",)

    def __init__(self, model: FCCLIP) -> None:
        super().__init__()
        self.void, self.on_valid_mask = model.void_embedding, model.ensemble_on_valid_mask
        self.in_scale, self.out_scale = model.sem_seg_head.predictor.logit_scale, model.backbone.logit_scale

    def forward(
        self,
        class_embeddings: Tensor,
        region_embeddings: Tensor,
        mask_not_empty: Tensor,
        vectors: Tensor,
        class_of_vector: Tensor,
        clip_weight: Tensor,
    ) -> Tensor:
        """Outputs of `Images`, vectors (W, D) of names, the class of each (W,) int64, ascending, and the weight of the
        frozen CLIP for each class (K,) -> probabilities (B, Q, K + 1), void last."""
        text = TextEmbeddings(vectors, class_of_vector, clip_weight.shape[0])
        in_logits = text_logits(class_embeddings, with_void(text, self.void.weight), self.in_scale)
        out_logits = text_logits(region_embeddings, text, self.out_scale)
        valid = mask_not_empty if self.on_valid_mask else None
        return ensemble_probabilities(in_logits, out_logits, clip_weight, valid)


class Text(nn.Module):
    """CLIP's text tower: `text.onnx`."""

    outputs = ("text_embeddings",)

    def __init__(self, model: FCCLIP) -> None:
        super().__init__()
        self.clip = model.backbone.clip_model

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, context length) int64 -> (n, D), of any length; a name's vector is the normalised mean over the
        templates of the normalised embeddings."""
        return self.clip.encode_text(tokens)


@dataclass(frozen=True)
class Graph:
    """A module with what it is traced with.

    Args:
        module: traced as it is.
        inputs: by name, in its order; sizes that may change are above 1, and no two alike.
        dynamic: for each input the sizes that may change, by axis.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, Any]]


def image_graph(model: FCCLIP, *, size: tuple[int, int] | None = None) -> Graph:
    """`Images`; of any size, or of one size (height, width) and one image."""
    return Graph(Images(model).eval(), {"image": _image(model, size)}, {"image": _image_dims(size)})


def names_graph(model: FCCLIP) -> Graph:
    """`Names`, for any of them."""
    embeddings = torch.ones(2, model.sem_seg_head.predictor.query_feat.num_embeddings, model.backbone.embed_dim)
    inputs = {  # no tensor twice, for torch.export would take both inputs for one
        "class_embeddings": embeddings,
        "region_embeddings": embeddings.clone(),
        "mask_not_empty": embeddings[..., 0] > 0,
        "vectors": embeddings[0, :5].clone(),
        "class_of_vector": torch.tensor([0, 0, 1, 2, 2]),
        "clip_weight": torch.zeros(3),
    }
    batch, count = Dim("batch", min=1, max=BATCH), Dim("names", min=1, max=65536)
    sizes = {"vectors": count, "class_of_vector": count, "clip_weight": Dim("classes", min=1, max=65536)}
    return Graph(Names(model).eval(), inputs, {name: {0: sizes.get(name, batch)} for name in inputs})


def text_graph(model: FCCLIP) -> Graph:
    """`Text`, for any number of prompts."""
    length = int(model.backbone.clip_model.positional_embedding.shape[0])
    tokens = torch.ones(2, length, dtype=torch.int64)
    return Graph(Text(model).eval(), {"tokens": tokens}, {"tokens": {0: Dim("prompts", min=1, max=65536)}})


def _image(model: FCCLIP, size: tuple[int, int] | None) -> Tensor:
    return model.pixel_mean.expand(1 if size else 2, -1, *(size or (2 * STEP, 3 * STEP))).clone()


def _image_dims(size: tuple[int, int] | None) -> Mapping[int, Any]:
    if size is not None:
        return {}
    low, high = CELLS
    rows, columns = (STEP * Dim(name, min=low, max=high) for name in ("rows", "columns"))
    return {0: Dim("batch", min=1, max=BATCH), 2: rows, 3: columns}


@torch.no_grad()
def traced(graph: Graph, *, engine: str) -> ExportedProgram:
    """torch's program of a graph, with an engine of deformable attention that is plain operations."""
    with _plain(graph.module, engine):
        dynamic = {name: dict(graph.dynamic.get(name, {})) or None for name in graph.inputs}
        return torch.export.export(graph.module, tuple(graph.inputs.values()), dynamic_shapes=dynamic, strict=False)


@contextlib.contextmanager
def _plain(module: nn.Module, engine: str) -> Iterator[None]:
    """Deformable attention with an engine, and timm's attention (of SAM) as products and a softmax: the exporter knows
    its fused form for four axes alone, SAM's has three."""
    settings = [(part, "engine", engine) for part in module.modules() if isinstance(part, MSDeformAttn)]
    settings += [(part, "fused_attn", False) for part in module.modules() if hasattr(part, "fused_attn")]
    before = [(part, name, getattr(part, name)) for part, name, _ in settings]
    try:
        for part, name, value in settings:
            setattr(part, name, value)
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def write_onnx(program: ExportedProgram, graph: Graph, path: Path, *, opset: int, notes: Mapping[str, str]) -> None:
    """Writes `path` and beside it `path`.data, the weights, for a protobuf holds 2 GB at most; then checks them.

    Args:
        program: of `traced`.
        graph: what it was traced from.
        path: ends in .onnx.
        opset: of ONNX, 18 or above.
        notes: metadata of the file.

    Raises:
        ImportError: the extra `export` is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx imports it late)
    except ImportError as error:
        raise NotInstalledError(f"ONNX files need more packages ({error}): pip install 'fcclip[export]'") from error
    if opset < 18:
        raise InputError(f"the opset must be at least 18, whose ScatterElements knows the maximum; got {opset}")
    for name in ("onnxscript", "onnx_ir"):  # they tell of every node that they leave as it is
        logging.getLogger(name).setLevel(logging.ERROR)
    names = {"input_names": list(graph.inputs), "output_names": list(graph.module.outputs)}
    written = torch.onnx.export(program, opset_version=opset, dynamo=True, verbose=False, **names)
    written.model.metadata_props.update(notes)
    written.save(str(path), external_data=True)
    onnx.checker.check_model(str(path))


def join(image: Path, names: Path, path: Path) -> None:
    """Writes `path`: the graph of `image` with that of `names` behind it; the weights stay in the file of the first."""
    import onnx
    from onnx.compose import add_prefix_graph, merge_graphs

    first, second = onnx.load(str(image), load_external_data=False), onnx.load(str(names))
    graph = add_prefix_graph(second.graph, "names_", rename_inputs=False, rename_outputs=False)
    between = sorted({output.name for output in first.graph.output} & {value.name for value in graph.input})
    merged = merge_graphs(
        first.graph, graph, [(name, name) for name in between], outputs=[*Names.outputs, Images.outputs[0]]
    )
    model = onnx.helper.make_model(merged, ir_version=first.ir_version, opset_imports=first.opset_import)
    model.metadata_props.extend(first.metadata_props)
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path))


def halve(path: Path) -> None:
    """Turns a written ONNX file into half precision, in place: inputs and outputs stay as they are, and so do norms,
    sampling coordinates, and all that is no product of matrices or convolution."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(str(path))
    full = sorted({node.op_type for node in model.graph.node} - {"Conv", "MatMul", "Gemm"})
    half = convert_float_to_float16(model, keep_io_types=True, op_block_list=full)
    OnnxModel.graph_topological_sort(half.graph)  # the converter puts casts of inputs last
    path.with_name(f"{path.name}.data").unlink()  # onnx would append
    onnx.save(half, str(path), save_as_external_data=True, location=f"{path.name}.data")
    onnx.checker.check_model(str(path))
