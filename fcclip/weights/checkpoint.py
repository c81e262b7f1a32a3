"""What the weights in a file mean to a model: matched key by key, explained when they do not fit.

A file holds the model's own weights and buffers, not the frozen CLIP, which is named by a fingerprint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fcclip.config import resolve_file
from fcclip.errors import InputError
from fcclip.files import write_atomically
from fcclip.vocabulary import ClassEntry, Vocabulary, builtin_names
from fcclip.weights.files import read_weight_file

logger = logging.getLogger(__name__)

FROZEN_PREFIX = "backbone.clip_model."  # of the CLIP's keys in the state dict of a whole model
PIXEL_DECODER, PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
# Keys that files may hold and that never come from a file: constants, and the class weights that the config decides.
_CLIP_CONSTANTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
_IGNORED = {"pixel_mean", "pixel_std", "criterion.empty_weight", *(FROZEN_PREFIX + name for name in _CLIP_CONSTANTS)}
FORMER = "former_vocabulary"  # note of a fine-tuned file
_COUNTER = ".num_batches_tracked"  # of batch normalisation; nothing reads it in evaluation mode
_IMAGE_TOWER = FROZEN_PREFIX + "visual."
_SHOWN = 4  # keys named in a message, per kind
_CLIP_KEY = "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"


def load_weights(model: nn.Module, path: str | Path, *, initialise: bool = False) -> dict[str, Any]:
    """Loads a file of weights into a model, all of it or nothing.

    Every key of the model must be in the file with the same shape, and the other way round, apart from the frozen CLIP
    (`backbone.clip_model.*`), of which a file may hold any part, and constants. Class weights of the loss stay as the
    config built them. The CLIP that the file was trained with must be the one the model has. Of a fine-tuned file, the
    model learns all words that count as seen.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        path: a file of any kind that `read_weight_file` reads, or the name of a shipped asset.
        initialise: a file of Mask2Former is taken too, as a start for a training (see `initialise_from`).

    Returns:
        What else the file says: a checkpoint's other entries, or the metadata of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable or unsafe file, weights of another model or on another CLIP; names the keys and the
            likely cause.
    """
    file = read_weight_file(resolve_file(path, what="weights file"))
    if initialise and is_mask2former(file.tensors):
        start = initialise_from(model, file.tensors, versions=file.versions, source=str(path))
        logger.info("%s", start.report())
    else:
        load_state(model, file.tensors, source=str(path), fingerprint=file.rest.get("clip"))
    bare = unwrap(model)
    if hasattr(bare, "seen_vocabulary"):
        bare.seen_vocabulary = seen_vocabulary(file.rest, bare.train_vocabulary)
    return file.rest


def vocabulary_note(vocabulary: Vocabulary) -> dict[str, Any]:
    """What a checkpoint says of the classes it was trained on, under `vocabulary`, and of those before a fine-tuning,
    under `former_vocabulary`."""
    classes = [list(words) for words in vocabulary.synonyms]
    things = list(vocabulary.thing_classes)
    return {"name": vocabulary.name, "sha256": vocabulary.hash, "classes": classes, "things": things}


def trained_vocabulary(notes: Mapping[str, Any]) -> Vocabulary | None:
    """All classes that a file was trained on, in this training and in those before it.

    Args:
        notes: what stands beside the weights.

    Returns:
        None where the file does not tell: the published ones, and those that name words which this package does not
        have.

    Raises:
        ValueError: the note is broken.
    """
    found = [_noted_vocabulary(notes[key]) for key in (FORMER, "vocabulary") if notes.get(key)]
    if not found or None in found:
        return None
    return functools.reduce(Vocabulary.joined, found)


def seen_vocabulary(notes: Mapping[str, Any], training: Vocabulary | None) -> Vocabulary | None:
    """The classes that count as seen: those of the training labels, and for a fine-tuned file those before."""
    former = trained_vocabulary(notes) if FORMER in notes else None
    return training if former is None else former if training is None else former.joined(training)


def _noted_vocabulary(note: Any) -> Vocabulary | None:
    if isinstance(note, str):  # the shipped files name a vocabulary of the package
        return Vocabulary.builtin(note) if note in builtin_names() else None
    try:
        entries = [tuple(map(str, words)) for words in note["classes"]]
        things = {int(index) for index in note.get("things", range(len(entries)))}  # earlier files do not say
        classes = tuple(ClassEntry(index, words[0], words, index in things) for index, words in enumerate(entries))
        return Vocabulary(str(note.get("name", "words")), classes)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(
            f"the note on the vocabulary of the weights is broken ({error!r}): {str(note)[:200]}"
        ) from error


def load_state(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    fingerprint: Mapping[str, Any] | str | None = None,
) -> None:
    """Copies weights into a model under the rules of `load_weights`.

    Args:
        model, weights: the model, or its DistributedDataParallel wrapper, and a state dict.
        source: names the weights in messages.
        fingerprint: of the CLIP they were trained with; None or nothing: it is not known.

    Raises:
        ValueError: weights of another model, or on another CLIP; the model is as it was.
    """
    model = unwrap(model)
    wanted = {key: value for key, value in model.state_dict().items() if key not in _IGNORED}
    weights = {key: value for key, value in weights.items() if key not in _IGNORED}
    _check_fit(weights, wanted, source)
    clip = {key: value for key, value in weights.items() if key.startswith(FROZEN_PREFIX)}
    if clip:
        _load_clip(model, clip, wanted, source=source, fingerprint=fingerprint)
    else:
        if fingerprint:
            from fcclip.modeling.backbones.fingerprint import check_fingerprint

            check_fingerprint(fingerprint, model, source=source, holds_clip=False)
        elif _has_random_clip(model):
            logger.warning(
                "%s holds no CLIP, and that of the model has random weights: set %s to the CLIP it was trained with, "
                "or expect nothing of the results",
                source,
                _CLIP_KEY,
            )
    _copy({key: value for key, value in weights.items() if key not in clip}, model)


def _copy(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Loads some of the keys by torch's own method, since a model's may refuse a part (integrations/detectron2)."""
    nn.Module.load_state_dict(model, weights, strict=False)


def _check_fit(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    missing = [key for key in wanted if key not in weights and not key.startswith(FROZEN_PREFIX)]
    unexpected = [key for key in weights if key not in wanted]
    both = [key for key in weights if key in wanted]
    wrong_shape = [
        f"{key} (file {_shape(weights[key])}, model {_shape(wanted[key])})"
        for key in both
        if weights[key].shape != wanted[key].shape
    ]
    wrong_type = [
        f"{key} ({str(weights[key].dtype).removeprefix('torch.')})"
        for key in both
        if wanted[key].is_floating_point() and not weights[key].is_floating_point()
    ]
    if missing or unexpected or wrong_shape or wrong_type:
        lines = [
            f"the weights in '{source}' do not fit the model:",
            *_list("wrong shape", wrong_shape),
            *_list("missing from the file", missing),
            *_list("unknown to the model", unexpected),
            *_list("not floating-point", wrong_type),
            f"  likely cause: {_likely_cause(weights, wanted)}",
        ]
        raise InputError("\n".join(lines))
    broken = [key for key in both if weights[key].is_floating_point() and not weights[key].isfinite().all()]
    if broken:
        lines = [f"the weights in '{source}' are broken:", *_list("with NaN or infinity", broken)]
        raise InputError(
            "\n".join([*lines, "  likely cause: the training diverged, or the conversion to half overflowed"])
        )


def _load_clip(
    model: nn.Module,
    clip: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    source: str,
    fingerprint: Mapping[str, Any] | str | None,
) -> None:
    """Loads what a file holds of the frozen CLIP; on an error the CLIP is as it was."""
    from fcclip.modeling.backbones.clip import set_quick_gelu
    from fcclip.modeling.backbones.fingerprint import adopt_activation, check_fingerprint

    frozen = [key for key in wanted if key.startswith(FROZEN_PREFIX) and not key.endswith(_COUNTER)]
    absent = [key for key in frozen if key not in clip]
    if absent and _has_random_clip(model):
        raise InputError(
            f"'{source}' holds a part of the CLIP only, {len(clip)} tensors, and the model's CLIP has random weights: "
            f"{len(absent)} would stay random (e.g. {absent[0]}). Set {_CLIP_KEY} to the CLIP it was trained with."
        )
    changed = [key for key, value in clip.items() if not _about_equal(value, wanted[key])] if absent else []
    if changed:
        logger.warning(
            "%s holds %d of the %d tensors of the CLIP, and %d of them differ from those of %s (e.g. %s): the CLIP is "
            "now a mixture of both, right only if the file was trained so",
            source,
            len(clip),
            len(clip) + len(absent),
            len(changed),
            _CLIP_KEY,
            changed[0],
        )
    backbone = getattr(model, "backbone", None)
    before = {key: wanted[key].clone() for key in clip} if fingerprint else {}
    activation = (getattr(backbone, "quick_gelu", None), getattr(backbone, "activation_source", ""))
    if any(not key.startswith((_IMAGE_TOWER, FROZEN_PREFIX + "logit_scale")) for key in clip):
        adopt_activation(fingerprint, model, source=source)
    _copy(clip, model)
    try:
        if fingerprint:
            check_fingerprint(fingerprint, model, source=source, holds_clip=not absent)
    except ValueError:
        _copy(before, model)
        if getattr(backbone, "quick_gelu", None) != activation[0]:
            set_quick_gelu(backbone, activation[0], source=activation[1])
        raise
    if not absent and _has_random_clip(model):
        backbone.pretrained = Path(source).name


def _has_random_clip(model: nn.Module) -> bool:
    return getattr(getattr(model, "backbone", None), "pretrained", None) == ""


def _about_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to half precision."""
    return torch.allclose(one.float(), other.float().cpu(), rtol=2**-10, atol=1e-6)


def save_weights(
    model: nn.Module,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float16,
    full: bool = False,
) -> None:
    """Writes the weights of a model as a safetensors file to share.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        path: the file; replaced when the new one is complete.
        metadata: JSON values by name, stored beside the weights; `load_weights` returns them. The CLIP's fingerprint is
            added.
        dtype: of the stored floating-point weights; None keeps each as it is.
        full: store the frozen CLIP too.
    """
    weights = {
        key: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for key, value in model_weights(model, full=full).items()
    }
    from fcclip.modeling.backbones.fingerprint import clip_fingerprint

    write_safetensors(path, weights, {"clip": clip_fingerprint(model), **(metadata or {})})


def write_safetensors(path: str | Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors bit for bit, and JSON values beside them, as a safetensors file that appears whole or not at all.

    `read_weight_file` gives the same values back. `format` is written as it is, because other programs look for "pt".

    Raises:
        OSError: the disk is full, the folder cannot be written.
    """
    content = safetensors.torch.save(
        {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()},
        {name: value if name == "format" else json.dumps(value) for name, value in metadata.items()},
    )
    write_atomically(Path(path), lambda file: file.write(content))


def model_weights(model: nn.Module, *, full: bool = False) -> dict[str, Tensor]:
    """The state dict that a checkpoint holds: everything except the frozen CLIP, or with `full` everything."""
    return {
        key: value for key, value in unwrap(model).state_dict().items() if full or not key.startswith(FROZEN_PREFIX)
    }


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of everything that a training changes in a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model_weights(model).items()):
        if not name.startswith("criterion."):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


# ---- Mask2Former as a start ----


@dataclass(frozen=True)
class Start:
    """What a training took from the weights of another model.

    Args:
        source: the file.
        taken: names, as the model has them.
        left: reason -> names in the file that were not taken.
        fresh: names of the model's own parts that stay freshly initialised.
    """

    source: str
    taken: tuple[str, ...]
    left: dict[str, tuple[str, ...]]
    fresh: tuple[str, ...]

    def report(self) -> str:
        """Counts and names, a line per kind; names with a common beginning are put together."""
        kinds = {"taken": self.taken, **{f"left, {reason}": names for reason, names in self.left.items()}}
        kinds["freshly initialised"] = self.fresh
        lines = [f"  {kind} ({len(names)}): {', '.join(_grouped(names))}" for kind, names in kinds.items() if names]
        return "\n".join([f"starting from the Mask2Former weights in '{self.source}':", *lines])


def is_mask2former(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of Mask2Former: its decoder, and a class layer for a fixed list of classes."""
    decoder = any(key.startswith(PREDICTOR + "transformer_") for key in weights)
    return decoder and PREDICTOR + "class_embed.weight" in weights


def initialise_from(
    model: nn.Module, weights: Mapping[str, Tensor], *, versions: Mapping[str, Any], source: str
) -> Start:
    """Starts a model from Mask2Former's weights: takes every tensor of its pixel decoder and decoder that fits.

    Backbone, class head, void embedding and losses stay as they are, and so does what another backbone or another
    number of queries has given another shape.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        weights: the state dict, with the names of any version of Mask2Former.
        versions: what torch keeps beside a state dict; a module that is not in it counts as old.
        source: names the weights in messages.

    Raises:
        ValueError: nothing fits; the model is as it was.
    """
    model = unwrap(model)
    parts = (PIXEL_DECODER, PREDICTOR)
    wanted = {key: value for key, value in model.state_dict().items() if key.startswith(parts)}
    taken: dict[str, Tensor] = {}
    left: dict[str, list[str]] = {}
    for key, value in published_names(weights, versions).items():
        if not key.startswith(parts):
            reason = "outside pixel decoder and mask decoder"
        elif key.startswith(PREDICTOR + "class_embed."):
            reason = "head of a fixed list of classes"
        elif key not in wanted:
            reason = "unknown to the model"
        elif value.shape != wanted[key].shape:
            reason, key = "of another shape", f"{key} (file {_shape(value)}, model {_shape(wanted[key])})"
        else:
            taken[key] = value
            continue
        left.setdefault(reason, []).append(key)
    if not taken:
        raise InputError(
            "\n".join(
                [
                    f"no weights of '{source}' fit the model, so it is no start for a training:",
                    *(line for reason, names in left.items() for line in _list(reason, names)),
                ]
            )
        )
    _copy(taken, model)
    fresh = [key for key in model_weights(model) if key not in taken and key not in _IGNORED]
    return Start(source, tuple(taken), {reason: tuple(names) for reason, names in left.items()}, tuple(fresh))


def published_names(weights: Mapping[str, Tensor], versions: Mapping[str, Any]) -> dict[str, Tensor]:
    """Mask2Former's weights under its present names, which are also FC-CLIP's.

    Its head had the pixel decoder's parts directly inside before version 2, and its decoder called the queries'
    features `static_query`. Weights that already have the present names keep them, whatever version they claim.
    """

    def is_old(module: str) -> bool:
        version = (versions.get(module) or {}).get("version")
        return not isinstance(version, int) or version < 2

    def present(key: str) -> str:
        if (
            is_old("sem_seg_head")
            and key.startswith("sem_seg_head.")
            and not key.startswith((PIXEL_DECODER, PREDICTOR))
        ):
            return PIXEL_DECODER + key.removeprefix("sem_seg_head.")
        if is_old("sem_seg_head.predictor") and key.startswith(PREDICTOR):
            return key.replace("static_query", "query_feat")
        return key

    return {present(key): value for key, value in weights.items()}


# ---- explaining ----


def _likely_cause(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What a user most probably did, from the keys and shapes alone."""

    def sizes(key: str, dim: int) -> tuple[int, int] | None:
        both = key in weights and key in wanted and weights[key].dim() > dim and wanted[key].dim() > dim
        pair = (weights[key].shape[dim], wanted[key].shape[dim]) if both else None
        return pair if pair and pair[0] != pair[1] else None

    predictor, decoder = PREDICTOR, PIXEL_DECODER
    if not any(key.startswith("sem_seg_head.") for key in weights):
        if any(".resblocks." in key or "visual." in key for key in weights):
            return "a CLIP, not a segmenter: it belongs in MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS, not in MODEL.WEIGHTS."
        return "this is not a file of FC-CLIP weights: no key starts with 'sem_seg_head.'."
    if is_mask2former(weights):
        return (
            "weights of a closed-vocabulary Mask2Former, which has another class head than FC-CLIP. They can be the "
            "start of a training (MODEL.WEIGHTS without --eval-only), not more."
        )
    if predictor + "class_embed.weight" in weights:
        return "weights of a closed-vocabulary MaskFormer, which has another decoder and class head than FC-CLIP."
    if pair := sizes(predictor + "query_feat.weight", 1):
        return f"the file was trained with MODEL.MASK_FORMER.HIDDEN_DIM (CONVS_DIM, MASK_DIM) {pair[0]}, not {pair[1]}."
    backbone = "use the YAML it was trained with (MODEL.FC_CLIP.CLIP_MODEL_NAME)."
    if pair := sizes(decoder + "input_proj.0.0.weight", 1):
        return f"weights of another backbone, whose res5 has {pair[0]} channels instead of {pair[1]}: {backbone}"
    if pair := sizes("void_embedding.weight", 1):
        return f"weights of another CLIP, with embeddings of size {pair[0]} instead of {pair[1]}: {backbone}"
    if any(
        key.startswith(FROZEN_PREFIX) and (key not in wanted or weights[key].shape != wanted[key].shape)
        for key in weights
    ):
        return f"the CLIP in the file is another one than the model's: {backbone}"
    if pair := sizes(predictor + "query_feat.weight", 0):
        advice = f"set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES {pair[0]}."
        return f"the file was trained with {pair[0]} queries, the model has {pair[1]}: {advice}"
    for part, key, extra in (
        (predictor + "transformer_ffn_layers.", "MODEL.MASK_FORMER.DEC_LAYERS", 1),
        (decoder + "transformer.encoder.layers.", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 0),
    ):
        here, there = _count_layers(wanted, part), _count_layers(weights, part)
        if here != there:
            return f"the file was trained with {there} layers where the model has {here}: set {key} {there + extra}."
    if pair := sizes(predictor + "transformer_ffn_layers.0.linear1.weight", 0):
        return f"the file was trained with MODEL.MASK_FORMER.DIM_FEEDFORWARD {pair[0]}, the model has {pair[1]}."
    return "the file belongs to another config; use the YAML it was trained with."


def _count_layers(keys: Iterable[str], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)})


def _list(kind: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = f", … and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return [f"  {kind} ({len(entries)}): {', '.join(entries[:_SHOWN])}{more}"]


def _grouped(names: Iterable[str]) -> list[str]:
    """Names up to their first number or last part, with counts; outside the head up to their first part."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        end = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        end = end if name.startswith("sem_seg_head.") else 1
        groups.setdefault(name if "(" in name else ".".join(parts[:end]), []).append(name)
    return [one[0] if len(one) == 1 else f"{group}.* ({len(one)})" for group, one in groups.items()]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
