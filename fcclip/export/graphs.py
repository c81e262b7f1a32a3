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
from fcclip.modeling.classifier import ensemble_probabilities, resize_masks, text_logits
from fcclip.modeling.mask_decoder import MaskProposals
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
        proposals, mask_logits, small, regions = self.look(image, text)
        not_empty = (small > 0).flatten(2).any(-1)
        return mask_logits, proposals.class_embeddings[-1], regions, proposals.mask_embeddings[-1], not_empty

    def look(self, image: Tensor, text: TextEmbeddings) -> tuple[MaskProposals, Tensor, Tensor, Tensor]:
        """Proposals, mask logits, the same at the size of the dense features, and region embeddings."""
        features = self.see(image)
        proposals = self.model.propose(features, text)
        mask_logits = proposals.mask_logits()
        small = resize_masks(mask_logits, features.dense.shape[-2:])
        return proposals, mask_logits, small, self.model.classifier(features.dense, small)

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


class Whole(Images):
    """Images and names in, class probabilities and masks out: `all.onnx`."""

    outputs = ("class_probabilities", "mask_logits")

    def forward(
        self, image: Tensor, vectors: Tensor, class_of_vector: Tensor, clip_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Images`, with vectors (W, D) of names, the class of each (W,) int64, ascending, and the weight of the
        frozen CLIP for each class (K,) -> probabilities (B, Q, K + 1), void last, and mask logits."""
        text = TextEmbeddings(vectors, class_of_vector, clip_weight.shape[0])
        proposals, mask_logits, small, regions = self.look(image, text)
        valid = (small > 0).flatten(2).any(-1) if self.model.ensemble_on_valid_mask else None
        out_logits = text_logits(regions, text, self.model.backbone.logit_scale)
        return ensemble_probabilities(proposals.class_logits[-1], out_logits, clip_weight, valid), mask_logits


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


def whole_graph(model: FCCLIP, *, size: tuple[int, int] | None = None) -> Graph:
    """`Whole`, for any names."""
    names, classes = torch.tensor([0, 0, 1, 2, 2]), torch.zeros(3)
    vectors = torch.nn.functional.normalize(torch.ones(len(names), model.backbone.embed_dim), dim=-1)
    inputs = {"image": _image(model, size), "vectors": vectors, "class_of_vector": names, "clip_weight": classes}
    count = Dim("names", min=1, max=65536)
    dims = {"image": _image_dims(size), "vectors": {0: count}, "class_of_vector": {0: count}}
    return Graph(Whole(model).eval(), inputs, dims | {"clip_weight": {0: Dim("classes", min=1, max=65536)}})


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
