"""What the weights in a file mean to a model: matched key by key, explained when they do not fit.

A file holds the trained weights and buffers of a model, not its frozen parts, which are named by their fingerprints.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fcclip.config import resolve_file
from fcclip.errors import InputError
from fcclip.files import listed, write_atomically
from fcclip.vocabulary import ClassEntry, Vocabulary, builtin_names
from fcclip.weights.files import WeightFile, read_weight_file
from fcclip.weights.frozen import FrozenPart, frozen_parts, frozen_prefixes, unwrap

logger = logging.getLogger(__name__)

PIXEL_DECODER, PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
# Keys that files may hold and that never come from a file: constants, and the class weights that the config decides.
_IGNORED = {"pixel_mean", "pixel_std", "criterion.empty_weight"}
FORMER = "former_vocabulary"  # note of a fine-tuned file
# Prefixes of the two towers in files of the published Fusioner, and here.
_FUSIONER_TOWERS = {"img_model.": "backbone.clip_model.visual.", "text_model.": "backbone.clip_model."}
# Beginnings of names of others' files for what is not the model's: CLIPs that taught OVRCOAT's and MAFT+'s.
_TEACHERS = ("frozen_backbone.", "backbone_t.")
_COUNTER = ".num_batches_tracked"  # of batch normalisation; nothing reads it in evaluation mode


def load_weights(model: nn.Module, path: str | Path, *, initialise: bool = False) -> dict[str, Any]:
    """Loads a file of weights into a model, all of it or nothing.

    Every key of the model must be in the file with the same shape, and the other way round, apart from constants and
    the frozen parts, of which a file may hold any subset. Class weights of the loss stay as the config built them. The
    frozen parts that the file was trained with must be those of the model. Of a fine-tuned file, the model learns all
    classes that count as seen.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        path: a file of any kind that `read_weight_file` reads, or the name of a shipped asset.
        initialise: a file of Mask2Former is taken too, as a start for a training (see `initialise_from`), or of the
            architecture that the model adds parts to (`is_base`).

    Returns:
        What else the file says: a checkpoint's other entries, or the metadata of a safetensors file.

    Raises:
        MissingFileError: no such file.
        InputError: unreadable or unsafe file, weights of another model or on another frozen part; names the keys and
            the likely cause.
    """
    file = own_names(read_weight_file(resolve_file(path, what="weights file")))
    if initialise and is_mask2former(file.tensors):
        start = initialise_from(model, file.tensors, source=str(path))
        logger.info("%s", start.report())
    elif initialise and is_base(model, file.tensors):
        added = unwrap(model).added_parts
        load_state(model, file.tensors, source=str(path), notes=file.rest, may_lack=added)
        fresh = [key for key in model_weights(model) if key.startswith(added)]
        logger.info("%s", Start(str(path), tuple(file.tensors), {}, tuple(fresh), of="FC-CLIP").report())
    else:
        load_state(model, file.tensors, source=str(path), notes=file.rest)
    bare = unwrap(model)
    if hasattr(bare, "seen_vocabulary"):
        bare.seen_vocabulary = seen_vocabulary(file.rest, bare.train_vocabulary)
    return file.rest


def own_names(file: WeightFile) -> WeightFile:
    """A published file under the names of this package; any other as it is.

    Files of OVRCOAT and MAFT+ lose the frozen CLIP that taught theirs; Mask-Adapters are classifiers. In Fusioner's are
    both towers of its CLIP, which are OpenAI's, with QuickGELU.
    """
    file = replace(file, tensors={_renamed(key): value for key, value in file.tensors.items()})
    if taught := [key for key in file.tensors if key.startswith(_TEACHERS)]:
        logger.info("%d tensors of a CLIP that only taught are left out (%s)", len(taught), listed(taught, 2))
        file = replace(file, tensors={key: value for key, value in file.tensors.items() if key not in set(taught)})
    if not any(key.startswith("img_model.") for key in file.tensors):
        return file
    tensors = {}
    for key, value in file.tensors.items():
        prefix = next((prefix for prefix in _FUSIONER_TOWERS if key.startswith(prefix)), "")
        tensors[_FUSIONER_TOWERS.get(prefix, "") + key.removeprefix(prefix)] = value
    return replace(file, tensors=tensors, rest={"clip": {"quick_gelu": True}, **file.rest})


def _renamed(key: str) -> str:
    return "classifier." + key.removeprefix("mask_adapter.") if key.startswith("mask_adapter.") else key


def vocabulary_note(vocabulary: Vocabulary) -> dict[str, Any]:
    """What a checkpoint says of the classes it was trained on, under `vocabulary`, and of those before a fine-tuning,
    under `former_vocabulary`."""
    classes = [list(synonyms) for synonyms in vocabulary.synonyms]
    things = list(vocabulary.thing_classes)
    return {"name": vocabulary.name, "sha256": vocabulary.hash, "classes": classes, "things": things}


def trained_vocabulary(notes: Mapping[str, Any]) -> Vocabulary | None:
    """All classes that a file was trained on, in this training and in those before it.

    Args:
        notes: what stands beside the weights.

    Returns:
        None where the file does not tell: the published ones, and those that name a vocabulary which this package does
        not have.

    Raises:
        InputError: the note is broken.
    """
    vocabularies = [_noted_vocabulary(notes[key]) for key in (FORMER, "vocabulary") if notes.get(key)]
    if not vocabularies or None in vocabularies:
        return None
    return functools.reduce(Vocabulary.joined, vocabularies)


def seen_vocabulary(notes: Mapping[str, Any], training: Vocabulary | None) -> Vocabulary | None:
    """The classes that count as seen: those of the training labels, and for a fine-tuned file those before."""
    former = trained_vocabulary(notes) if FORMER in notes else None
    return training if former is None else former if training is None else former.joined(training)


def _noted_vocabulary(note: Any) -> Vocabulary | None:
    if isinstance(note, str):  # the shipped files name a vocabulary of the package
        return Vocabulary.builtin(note) if note in builtin_names() else None
    try:
        entries = [tuple(map(str, synonyms)) for synonyms in note["classes"]]
        things = {int(index) for index in note.get("things", range(len(entries)))}  # earlier files do not say
        classes = tuple(
            ClassEntry(index, synonyms[0], synonyms, index in things) for index, synonyms in enumerate(entries)
        )
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
    notes: Mapping[str, Any] | None = None,
    may_lack: tuple[str, ...] = (),
) -> None:
    """Copies weights into a model under the rules of `load_weights`.

    Args:
        model, weights: the model, or its DistributedDataParallel wrapper, and a state dict.
        source: names the weights in messages.
        notes: what stands beside the weights, with the fingerprints of the frozen parts they were trained with.
        may_lack: beginnings of names that may be missing and then stay as they are.

    Raises:
        InputError: weights of another model, or on another frozen part; the model is as it was.
    """
    model = unwrap(model)
    if hasattr(model, "check_file"):
        model.check_file(weights, source=source)
    parts = frozen_parts(model)
    ignored = _IGNORED | {prefix + name for prefix, part in parts.items() for name in part.constants}
    groups = tuple(name for name in ignored if name.endswith("."))
    expected = {key: value for key, value in model.state_dict().items() if key not in ignored}
    weights = {key: value for key, value in weights.items() if key not in ignored and not key.startswith(groups)}
    for name, module in model.named_modules():
        if hasattr(module, "state_like"):  # comes in several layouts, and takes that of the file when it is loaded
            own = module.state_like(_below(f"{name}.", weights))
            expected |= {f"{name}.{key}": value for key, value in own.items()}
    _check_fit(weights, expected, (*parts, *may_lack), source)
    complete = {
        prefix: _check_frozen(part, _below(prefix, weights), _below(prefix, expected), notes or {}, source=source)
        for prefix, part in parts.items()
    }
    _copy(weights, model)
    for prefix, part in parts.items():
        part.loaded((notes or {}).get(part.notes_key) or {}, source=source, complete=complete[prefix])


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _copy(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Loads some of the keys by torch's own method, since a model's may refuse a part (integrations/detectron2)."""
    nn.Module.load_state_dict(model, weights, strict=False)


def _check_fit(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], optional: tuple[str, ...], source: str
) -> None:
    both = [key for key in weights if key in expected]
    misfits = {
        "wrong shape": [
            f"{key} (file {_shape(weights[key])}, model {_shape(expected[key])})"
            for key in both
            if weights[key].shape != expected[key].shape
        ],
        "missing from the file": [key for key in expected if key not in weights and not key.startswith(optional)],
        "unknown to the model": [key for key in weights if key not in expected],
        "not floating-point": [
            f"{key} ({str(weights[key].dtype).removeprefix('torch.')})"
            for key in both
            if expected[key].is_floating_point() and not weights[key].is_floating_point()
        ],
    }
    if any(misfits.values()):
        raise InputError(
            f"the weights in '{source}' do not fit the model:\n{_lines(misfits)}\n"
            f"  likely cause: {_likely_cause(weights, expected, optional)}"
        )
    broken = [key for key in both if weights[key].is_floating_point() and not weights[key].isfinite().all()]
    if broken:
        raise InputError(
            f"the weights in '{source}' are broken:\n{_lines({'with NaN or infinity': broken})}\n"
            "  likely cause: the training diverged, or the conversion to half overflowed"
        )


def _check_frozen(
    part: FrozenPart, held: Mapping[str, Tensor], own: Mapping[str, Tensor], notes: Mapping[str, Any], *, source: str
) -> bool:
    """Refuses weights that belong to another frozen part, or that would leave some of it random.

    Returns:
        Whether the file holds all of its weights.
    """
    name, key = part.notes_key.upper(), part.config_keys[-1]
    absent = [name for name in own if name not in held and not name.endswith(_COUNTER)]
    if absent and held and part.has_random_weights:
        raise InputError(
            f"'{source}' holds a part of the {name} only, {len(held)} tensors, and the model's {name} has random "
            f"weights: {len(absent)} would stay random (e.g. {absent[0]}). Set {key} to the {name} it was trained with."
        )
    note = notes.get(part.notes_key) or {}
    if not note and not held and part.has_random_weights:
        logger.warning(
            "%s holds no %s, and that of the model has random weights: set %s to the %s it was trained with, or expect "
            "nothing of the results",
            *(source, name, key, name),
        )
    part.check(note, held, source=source, complete=not absent)
    changed = [name for name, value in held.items() if absent and not _about_equal(value, own[name])]
    if changed:
        logger.warning(
            "%s holds %d of the %d tensors of the %s, and %d of them differ from those of %s (e.g. %s): the %s is now "
            "a mixture of both, right only if the file was trained so",
            *(source, len(held), len(held) + len(absent), name, len(changed), key, changed[0], name),
        )
    return not absent


def _about_equal(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to half precision."""
    return torch.allclose(tensor.float(), other.float().cpu(), rtol=2**-10, atol=1e-6)


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
    """The state dict that a checkpoint holds: everything except the frozen parts, or with `full` everything."""
    frozen = () if full else frozen_prefixes(model)
    return {key: value for key, value in unwrap(model).state_dict().items() if not key.startswith(frozen)}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of everything that a training changes in a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model_weights(model).items()):
        if not name.startswith("criterion."):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- other models as a start ----


@dataclass(frozen=True)
class Start:
    """What a training took from the weights of another model.

    Args:
        source: the file.
        taken: names, as the model has them.
        left: reason -> names in the file that were not taken.
        fresh: names of the model's own parts that stay freshly initialised.
        of: what the weights are of.
    """

    source: str
    taken: tuple[str, ...]
    left: dict[str, tuple[str, ...]]
    fresh: tuple[str, ...]
    of: str = "Mask2Former"

    def report(self) -> str:
        """Counts and names, a line per kind."""
        left = {f"left, {reason}": names for reason, names in self.left.items()}
        kinds = {"taken": self.taken, **left, "freshly initialised": self.fresh}
        return f"starting from the {self.of} weights in '{self.source}':\n{_lines(kinds)}"


def is_mask2former(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of Mask2Former: its decoder, and a class layer for a fixed list of classes."""
    decoder = any(key.startswith(PREDICTOR + "transformer_") for key in weights)
    return decoder and PREDICTOR + "class_embed.weight" in weights


def is_base(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of the architecture that a model adds parts to, as FrozenSeg does to FC-CLIP, which
    names their beginnings as `added_parts`."""
    added, own = getattr(unwrap(model), "added_parts", ()), unwrap(model).state_dict()
    return any(key.startswith(added) for key in own) and not any(key.startswith(added) for key in weights)


def has_layouts(model: nn.Module) -> bool:
    """Whether loaded weights may give parts of a model another shape (`state_like`)."""
    return any(hasattr(module, "state_like") for module in model.modules())


def initialise_from(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> Start:
    """Starts a model from Mask2Former's weights: takes every tensor of its pixel decoder and decoder that fits.

    Backbone, class head, void embedding and losses stay as they are, and so does what another backbone or another
    number of queries has given another shape.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        weights: the state dict, with the names of any version of Mask2Former.
        source: names the weights in messages.

    Raises:
        InputError: nothing fits; the model is as it was.
    """
    model = unwrap(model)
    parts = (PIXEL_DECODER, PREDICTOR)
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(parts)}
    taken: dict[str, Tensor] = {}
    left: dict[str, list[str]] = {}
    for key, value in published_names(weights).items():
        if not key.startswith(parts):
            reason = "outside pixel decoder and mask decoder"
        elif key.startswith(PREDICTOR + "class_embed."):
            reason = "head of a fixed list of classes"
        elif key not in expected:
            reason = "unknown to the model"
        elif value.shape != expected[key].shape:
            reason, key = "of another shape", f"{key} (file {_shape(value)}, model {_shape(expected[key])})"
        else:
            taken[key] = value
            continue
        left.setdefault(reason, []).append(key)
    if not taken:
        raise InputError(f"no weights of '{source}' fit the model, so it cannot start a training:\n{_lines(left)}")
    _copy(taken, model)
    fresh = [key for key in model_weights(model) if key not in taken and key not in _IGNORED]
    return Start(source, tuple(taken), {reason: tuple(names) for reason, names in left.items()}, tuple(fresh))


def published_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mask2Former's weights under its present names, which are also FC-CLIP's.

    Its head once had the pixel decoder's parts directly inside, and its decoder called the queries' features
    `static_query`.
    """

    def present(key: str) -> str:
        if key.startswith("sem_seg_head.") and not key.startswith((PIXEL_DECODER, PREDICTOR)):
            return PIXEL_DECODER + key.removeprefix("sem_seg_head.")
        return key.replace(PREDICTOR + "static_query.", PREDICTOR + "query_feat.")

    return {present(key): value for key, value in weights.items()}


# ---- explaining ----


def _likely_cause(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], frozen: tuple[str, ...]) -> str:
    """What a user most probably did, from the keys and shapes alone."""

    def sizes(key: str, dim: int) -> tuple[int, int] | None:
        both = [shapes[key].shape for shapes in (weights, expected) if key in shapes and shapes[key].dim() > dim]
        return (both[0][dim], both[1][dim]) if len(both) == 2 and both[0][dim] != both[1][dim] else None

    def layers(keys: Iterable[str], prefix: str) -> int:
        return len({key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)})

    if "fusion.cls_emb" in expected:
        return _fusioner_cause(sizes, layers(weights, "fusion.blocks."), layers(expected, "fusion.blocks."))
    if not any(key.startswith("sem_seg_head.") for key in weights):
        if any(".resblocks." in key or "visual." in key for key in weights):
            return "a CLIP, not a segmenter: it belongs in MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS, not in MODEL.WEIGHTS."
        return "this is not a file of FC-CLIP weights: no key starts with 'sem_seg_head.'."
    if is_mask2former(weights):
        return (
            "weights of a closed-vocabulary Mask2Former, which has another class head than FC-CLIP. They can be the "
            "start of a training (MODEL.WEIGHTS without --eval-only), not more."
        )
    if PREDICTOR + "class_embed.weight" in weights:
        return "weights of a closed-vocabulary MaskFormer, which has another decoder and class head than FC-CLIP."
    injectors = [any("_layers_sam." in key for key in keys) for keys in (weights, expected)]
    if injectors == [False, True]:
        return (
            "weights of FC-CLIP, which lacks what FrozenSeg adds. They can be the start of a training (MODEL.WEIGHTS "
            "without --eval-only), not more."
        )
    if injectors == [True, False]:
        return "weights of FrozenSeg: use its YAML (MODEL.META_ARCHITECTURE)."
    adapters = [any(key.startswith("classifier.") for key in keys) for keys in (weights, expected)]
    if adapters == [True, False]:
        return "weights with a Mask-Adapter: set MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER mask_adapter."
    if adapters == [False, True]:
        return (
            "weights without a Mask-Adapter, which the config asks for (MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER). "
            "They can be the start of its training (MODEL.MASK_ADAPTER.TRAIN warmup), not more."
        )
    transfers = [any(key.startswith("cdt.") for key in keys) for keys in (weights, expected)]
    if transfers == [True, False]:
        return "weights of MAFT+: use its YAML (MODEL.META_ARCHITECTURE MAFT_Plus)."
    if transfers == [False, True]:
        return "weights of FC-CLIP, which lacks the text transfer of MAFT+: use the YAML it was trained with."
    queries = PREDICTOR + "query_feat.weight"
    if pair := sizes(queries, 1):
        return f"the file was trained with MODEL.MASK_FORMER.HIDDEN_DIM (CONVS_DIM, MASK_DIM) {pair[0]}, not {pair[1]}."
    backbone = "use the YAML it was trained with (MODEL.FC_CLIP.CLIP_MODEL_NAME)."
    if pair := sizes(PIXEL_DECODER + "input_proj.0.0.weight", 1):
        return f"weights of another backbone, whose res5 has {pair[0]} channels instead of {pair[1]}: {backbone}"
    if pair := sizes("void_embedding.weight", 1):
        return f"weights of another CLIP, with embeddings of size {pair[0]} instead of {pair[1]}: {backbone}"
    held = [key for key in weights if key.startswith(frozen)]
    if any(key not in expected or weights[key].shape != expected[key].shape for key in held):
        return f"the CLIP in the file is another one than the model's: {backbone}"
    if pair := sizes(queries, 0):
        advice = f"set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES {pair[0]}."
        return f"the file was trained with {pair[0]} queries, the model has {pair[1]}: {advice}"
    for part, key, extra in (
        (PREDICTOR + "transformer_ffn_layers.", "MODEL.MASK_FORMER.DEC_LAYERS", 1),
        (PIXEL_DECODER + "transformer.encoder.layers.", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 0),
    ):
        own, theirs = layers(expected, part), layers(weights, part)
        if own != theirs:
            return f"the file was trained with {theirs} layers where the model has {own}: set {key} {theirs + extra}."
    if pair := sizes(PREDICTOR + "transformer_ffn_layers.0.linear1.weight", 0):
        return f"the file was trained with MODEL.MASK_FORMER.DIM_FEEDFORWARD {pair[0]}, the model has {pair[1]}."
    return "the file belongs to another config; use the YAML it was trained with."


def _fusioner_cause(sizes: Callable[[str, int], tuple[int, int] | None], theirs: int, own: int) -> str:
    if not theirs:
        return "this is not a file of Fusioner weights: no key starts with 'fusion.blocks.'."
    if theirs != own:
        return f"the file was trained with {theirs} fusion layers, not {own}: set MODEL.FUSIONER.LAYERS {theirs}."
    if pair := sizes("fusion.cls_emb", 1):
        return f"the file was trained with MODEL.FUSIONER.WIDTH {pair[0]}, not {pair[1]}."
    for part, key in (("vision", "fusion.visual_proj.0.weight"), ("text", "fusion.text_proj.0.weight")):
        if pair := sizes(key, 0):
            return f"weights of another {part} encoder, whose tokens have {pair[0]} channels instead of {pair[1]}."
    return "the file belongs to another config; use the YAML it was trained with."


def _lines(kinds: Mapping[str, Sequence[str]]) -> str:
    """A line for each kind of keys that there are."""
    return "\n".join(f"  {kind} ({len(keys)}): {listed(keys, 4)}" for kind, keys in kinds.items() if keys)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
