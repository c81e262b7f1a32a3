"""A model as a folder that `fcclip.deploy.Runner` runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fcclip.deploy import Metadata, VocabularyFile
from fcclip.deploy.runner import GRAPH, VOCABULARY
from fcclip.errors import InputError
from fcclip.export.graphs import Graph, halve, image_graph, join, names_graph, text_graph, traced, write_onnx
from fcclip.modeling import FCCLIP, FrozenSeg
from fcclip.modeling.maft import MAFTPlus
from fcclip.ops.engines import PLAIN
from fcclip.segmenter import Segmenter
from fcclip.version import __version__
from fcclip.vocabulary import Vocabulary
from fcclip.weights.frozen import frozen_parts, sampled_hash

EXTRAS = ("all", "text", "pt2")  # what may be written beside the graph of images
WHOLE = "all.onnx"  # has the weights of the graph of images
_LIBRARIES = ("torch", "onnx", "onnxscript")


def vocabulary_file(model: FCCLIP, vocabulary: Vocabulary) -> VocabularyFile:
    """Class names as the vectors of a model's text tower."""
    text = model.text_encoder.encode(vocabulary)
    return VocabularyFile(
        vectors=text.vectors.cpu().numpy().astype(np.float32),
        class_of_vector=text.class_of_vector.cpu().numpy(),
        synonyms=np.array([name for synonyms in vocabulary.synonyms for name in synonyms]),
        class_names=np.array(vocabulary.class_names),
        things=np.array([entry.thing for entry in vocabulary.classes]),
        seen=vocabulary.seen_by(model.seen_vocabulary).numpy(),
        void=F.normalize(model.void_embedding.weight.detach().float(), dim=-1)[0].cpu().numpy(),
        templates=np.array(model.text_encoder.templates),
        fingerprint=np.array(_fingerprint(model)),
    )


def _fingerprint(model: FCCLIP) -> str:
    """Of all that a vocabulary file takes from a model."""
    seen = "" if model.seen_vocabulary is None else model.seen_vocabulary.hash
    void = model.void_embedding.weight.detach().float().cpu().numpy().tobytes()
    return hashlib.sha256(f"{model.text_encoder.weights_hash()} {seen}".encode() + void).hexdigest()


def metadata_of(segmenter: Segmenter, *, opset: int, precision: str, license: str) -> Metadata:
    """What the graph of a model says of itself."""
    model, inputs = segmenter.model, segmenter.cfg.INPUT
    scales = model.sem_seg_head.predictor.logit_scale, model.backbone.logit_scale
    seen = model.seen_vocabulary
    return Metadata(
        fingerprint=_fingerprint(model),
        clip=model.backbone.fingerprint(),
        num_queries=model.sem_seg_head.predictor.query_feat.num_embeddings,
        embed_dim=model.backbone.embed_dim,
        size_divisibility=model.size_divisibility,
        pixel_mean=tuple(model.pixel_mean.flatten().tolist()),
        pixel_std=tuple(model.pixel_std.flatten().tolist()),
        min_size=inputs.MIN_SIZE_TEST,
        max_size=inputs.MAX_SIZE_TEST,
        square=inputs.SQUARE_TEST,
        channel_order=inputs.FORMAT,
        decoder_scale=min(math.exp(scales[0].item()), 100.0),
        clip_scale=min(math.exp(scales[1].item()), 100.0),
        alpha=model.ensemble.alpha,
        beta=model.ensemble.beta,
        ensemble_on_valid_mask=model.ensemble_on_valid_mask,
        object_mask_threshold=model.output_settings.object_mask_threshold,
        overlap_threshold=model.output_settings.overlap_threshold,
        topk=model.output_settings.topk,
        masks_first=model.output_settings.masks_first,
        training_vocabulary=() if seen is None else seen.synonyms,
        config_sha256=hashlib.sha256(segmenter.cfg.dump().encode()).hexdigest(),
        weights_sha256=sampled_hash(model.state_dict()),
        precision=precision,
        opset=opset,
        versions={"fcclip": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        license=license,
    )


def export_folder(
    segmenter: Segmenter,
    folder: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    extras: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    opset: int = 18,
    engine: str = "torch",
    half: bool = False,
    license: str = "not stated",
    check: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Writes `image.onnx` with its weights in `image.onnx.data`, and what else is asked for.

    All is made in a folder beside and moved when it is complete, the graph of images last: who finds that one finds
    everything, after a kill too.

    Args:
        segmenter: of FC-CLIP or FrozenSeg, on the CPU.
        folder: made if needed, for one export at a time; files of an earlier one are replaced, others stay.
        vocabulary: written as `vocabulary.npz`; None: none.
        extras: of `EXTRAS`: `all.onnx`, `text.onnx`, `image.pt2`.
        size: (height, width) in pixels, multiples of 32: the graph takes one image of this size; None: any.
        opset: of ONNX.
        engine: of deformable attention, of `PLAIN`.
        half: products and convolutions in half precision.
        license: of the weights, in a line.
        check: called with the complete folder before its files are moved; what it raises stops the export.

    Returns:
        the folder.

    Raises:
        ImportError: the extra `export` is not installed.
        ValueError: a model that cannot be exported, such as one with a random CLIP; sizes and names that do not exist.
    """
    model = segmenter.model
    check_exportable(model, size=size, extras=extras, engine=engine)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    precision = "float16" if half else "float32"
    notes = metadata_of(segmenter, opset=opset, precision=precision, license=license).strings()
    for left in folder.glob(".exporting-*"):  # by an export that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=folder) as name:
        made = Path(name)
        if vocabulary is not None:
            vocabulary_file(model, vocabulary).save(made / VOCABULARY)
        graphs: dict[str, Graph] = {GRAPH: image_graph(model, size=size)}
        graphs |= {"text.onnx": text_graph(model)} if "text" in extras else {}
        for file, graph in graphs.items():
            program = traced(graph, engine=engine)
            if file == GRAPH and "pt2" in extras:
                torch.export.save(program, made / "image.pt2")
            write_onnx(program, graph, made / file, opset=opset, notes=notes)
            if half:
                halve(made / file)
        if "all" in extras:
            with tempfile.TemporaryDirectory(dir=made) as beside:
                path, graph = Path(beside) / "names.onnx", names_graph(model)
                write_onnx(traced(graph, engine=engine), graph, path, opset=opset, notes={})
                join(made / GRAPH, path, made / WHOLE)
        check(made)
        _move(made, folder)
    return folder


def _move(made: Path, folder: Path) -> None:
    """The graph of images goes first and comes last; with its weights goes the other graph that has them."""
    for name in (GRAPH, WHOLE):
        (folder / name).unlink(missing_ok=True)
    for file in sorted(made.iterdir(), key=lambda file: file.name == GRAPH):
        with file.open("rb") as content:
            os.fsync(content.fileno())
        os.replace(file, folder / file.name)


def check_exportable(
    model: FCCLIP, *, size: tuple[int, int] | None = None, extras: Sequence[str] = (), engine: str = "torch"
) -> None:
    """Refuses what cannot be exported; see `export_folder`."""
    if not isinstance(model, FCCLIP) or isinstance(model, MAFTPlus):
        raise InputError(
            f"{type(model).__name__} cannot be exported: its class names go through the network with the image. Models "
            "that can are FCCLIP and FrozenSeg"
        )
    beyond = {
        "void trust (MODEL.FC_CLIP.CLIP_TRUST_WEIGHT)": model.ensemble.trust,
        "a Mask-Adapter (MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER)": isinstance(model.classifier, nn.Module),
    }
    if used := [name for name, is_used in beyond.items() if is_used]:
        raise InputError(f"the runner does not know {' and '.join(used)}: turn it off to export the model without it")
    random = [part.notes_key.upper() for part in frozen_parts(model).values() if part.has_random_weights]
    if random:
        raise InputError(
            f"{' and '.join(random)} of this model has random weights, on which no segmenter finds anything: give "
            "weights that hold it, or name it in the config (MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS)"
        )
    if unknown := set(extras) - set(EXTRAS):
        raise InputError(f"beside the graph of images there are {', '.join(EXTRAS)}, not {', '.join(sorted(unknown))}")
    if engine not in PLAIN:
        raise InputError(f"exports show deformable attention as plain operations: {' or '.join(PLAIN)}, not '{engine}'")
    step = max(32, model.size_divisibility)
    if size is not None and any(side % step or side < 64 for side in size):
        raise InputError(f"a side of the input is a multiple of {step} and at least 64 pixels, got {size[0]}x{size[1]}")
    if size is None and isinstance(model, FrozenSeg) and model.sam is not None and model.sam.resize == "pad":
        raise InputError(
            "MODEL.SAM_RESIZE 'pad' fills as many cells as an image has, which a graph of any size cannot: give a size"
        )
    if model.device.type != "cpu":
        raise InputError(f"exports are made on the CPU, and the model is on {model.device}: pass device='cpu'")
