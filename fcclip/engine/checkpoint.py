"""Files that hold a training: written so that a crash never leaves half of one, read so that nothing is misunderstood.

A checkpoint holds the model's own weights and buffers, not the frozen CLIP, which is named by a fingerprint. What files
may look like is the business of `modeling/weight_files.py`; here is what their weights mean to a model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from fcclip.config import resolve_file
from fcclip.modeling.clip import FROZEN_PREFIX, set_quick_gelu
from fcclip.modeling.fingerprint import adopt_activation, check_fingerprint, clip_fingerprint
from fcclip.modeling.weight_files import read_plain_data, read_weight_file
from fcclip.vocabulary import ClassEntry, Vocabulary, builtin_names

logger = logging.getLogger(__name__)

PIXEL_DECODER, PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
# Keys that files may hold and that never come from a file: constants, and the class weights that the config decides.
_CLIP_CONSTANTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
_IGNORED = {"pixel_mean", "pixel_std", "criterion.empty_weight", *(FROZEN_PREFIX + name for name in _CLIP_CONSTANTS)}
FORMER = "former_vocabulary"  # note of a fine-tuned file
_COUNTER = ".num_batches_tracked"  # of batch normalisation; nothing reads it in evaluation mode
_IMAGE_TOWER = FROZEN_PREFIX + "visual."
_PERIODIC = re.compile(r"model_(\d{7})\.pth")
_TEMPORARY = ".{}.writing"
_SHOWN = 4  # keys named in a message, per kind
_CLIP_KEY = "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"


# ---- weights ----


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
    if hasattr(bare, "former_vocabulary"):
        bare.former_vocabulary = trained_vocabulary(file.rest) if FORMER in file.rest else None
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


def _noted_vocabulary(note: Any) -> Vocabulary | None:
    if isinstance(note, str):  # the shipped files name a vocabulary of the package
        return Vocabulary.builtin(note) if note in builtin_names() else None
    try:
        entries = [tuple(map(str, words)) for words in note["classes"]]
        things = {int(index) for index in note.get("things", range(len(entries)))}  # earlier files do not say
        classes = tuple(ClassEntry(index, words[0], words, index in things) for index, words in enumerate(entries))
        return Vocabulary(str(note.get("name", "words")), classes)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
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
        raise ValueError("\n".join(lines))
    broken = [key for key in both if weights[key].is_floating_point() and not weights[key].isfinite().all()]
    if broken:
        lines = [f"the weights in '{source}' are broken:", *_list("with NaN or infinity", broken)]
        raise ValueError(
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
    frozen = [key for key in wanted if key.startswith(FROZEN_PREFIX) and not key.endswith(_COUNTER)]
    absent = [key for key in frozen if key not in clip]
    if absent and _has_random_clip(model):
        raise ValueError(
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
        raise ValueError(
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


# ---- training state ----


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint: a mapping of tensors, numbers, strings and containers of them.

    The file appears whole or not at all; one that was there before stays until then.

    Raises:
        OSError: the disk is full, the folder cannot be written.
    """
    write_atomically(Path(path), lambda file: torch.save(dict(content), file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; only plain data and tensors are accepted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, be it by one bit, or holding objects that only an unsafe reader could make.
    """
    content = read_plain_data(path, what="checkpoint")
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, expected a mapping of names to tensors")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch writes check sums, and does not look at them
        if damaged is not None:
            raise ValueError(
                f"checkpoint '{path}' is damaged: its record '{damaged}' does not have the check sum that it was "
                "written with. Is the disk all right? Copy the file again, or use an earlier checkpoint."
            )
    return content


class Checkpointer:
    """The checkpoints of one run: `model_0004999.pth`, …, `model_final.pth`, `best.pth`, and `last_checkpoint`, which
    names the newest complete one.

    Writing overlaps the training: what is handed over is copied into main memory at once, and a thread writes it, one
    file after the other. A write that fails harms no file that was there before; it is told in the log, and the next
    checkpoint is a new try. Two failures in a row are raised by `check`, and the last one by `wait`. As a context, a
    checkpointer waits at the end, and raises nothing when there is an error on its way already.

    Args:
        folder: where they are; must exist.
        keep: how many periodic checkpoints stay, the newest ones; 0 keeps all.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3) -> None:
        if keep < 0:
            raise ValueError(f"SOLVER.CHECKPOINT_KEEP must not be negative, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.newest: Path | None = None  # checkpoint that was written here, not by an earlier run in the folder
        self._thread: threading.Thread | None = None
        self._failures: dict[str, list[Exception]] = {}  # kind of file -> what went wrong since it was last written
        self._best: Mapping[str, Any] | None = None  # what is to be written into best.pth

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self.settle() if error_type is not None else self.wait()

    # ---- writing ----

    def save(self, name: str, content: Mapping[str, Any]) -> Path:
        """Writes `<name>.pth`, then lets `last_checkpoint` name it, then removes periodic checkpoints beyond `keep`.

        Returns before the file is complete; see `settle`.

        Raises:
            OSError: as `check`.
        """
        path, snapshot = self.folder / f"{name}.pth", _snapshot(content)

        def write() -> None:
            save_checkpoint(path, snapshot)
            write_atomically(self.folder / "last_checkpoint", lambda file: file.write(path.name.encode()))
            logger.info("saved %s", path)
            self.newest = path
            self._remove_old(path)

        self._overlap("checkpoint", write)
        return path

    def save_periodic(self, iteration: int, content: Mapping[str, Any]) -> Path:
        """Writes the checkpoint after the 0-based `iteration`."""
        return self.save(f"model_{iteration:07d}", content)

    def save_evaluation(self, note: Mapping[str, Any], *, best: Mapping[str, Any] | None = None) -> None:
        """Writes what became of an evaluation; `last_checkpoint` stays.

        Args:
            note: JSON values by name, for `noted_evaluation`; written last.
            best: the content of `best.pth`, if the evaluation chose it.

        Raises:
            OSError: as `check`.
        """
        snapshot = None if best is None else _snapshot(best)
        self.settle()
        if snapshot is not None:  # else one that could not be written is tried again
            self._best = snapshot
        text = json.dumps(dict(note)).encode()

        def write() -> None:
            if self._best is not None:
                save_checkpoint(self.folder / "best.pth", self._best)
                self._best = None
            write_atomically(self.folder / "last_evaluation", lambda file: file.write(text))

        self._overlap("evaluation", write)

    def forget_evaluation(self) -> None:
        """Takes back what `save_evaluation` noted, when the run goes on from before that evaluation."""
        self.settle()
        (self.folder / "last_evaluation").unlink(missing_ok=True)

    def settle(self) -> None:
        """Returns when everything that was handed over is written or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Costs nothing and waits for nothing.

        Raises:
            OSError: the same kind of file could not be written twice in a row.
        """
        for errors in list(self._failures.values()):
            if len(errors) > 1 or not isinstance(errors[-1], OSError):  # another error is our own mistake
                raise errors[-1]

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
            OSError: the last file of a kind could not be written.
        """
        self.settle()
        failures, self._failures = self._failures, {}
        for errors in failures.values():
            raise errors[-1]

    def _overlap(self, kind: str, write: Callable[[], None]) -> None:
        self.settle()
        self.check()
        self._thread = threading.Thread(target=self._try, args=(kind, write), name="checkpoint writer")
        self._thread.start()

    def _try(self, kind: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            logger.error("%s", error)
            self._failures.setdefault(kind, []).append(error)
        else:
            self._failures.pop(kind, None)

    # ---- reading ----

    def last(self) -> Path | None:
        """The newest checkpoint, or None when there is none yet.

        Raises:
            FileNotFoundError: `last_checkpoint` names a file that is not there.
        """
        pointer = self.folder / "last_checkpoint"
        if not pointer.is_file():
            return None
        path = self.folder / pointer.read_text(encoding="utf-8").strip()
        if not path.is_file():
            there = ", ".join(sorted(one.name for one in self.folder.glob("*.pth"))) or "none"
            raise FileNotFoundError(
                f"{pointer} names '{path.name}', which does not exist (checkpoints in the folder: {there}). Write the "
                "name of one of them into that file, or delete it to start again."
            )
        return path

    def load(self, path: str | Path) -> dict[str, Any]:
        """Reads a checkpoint of this run as `load_checkpoint` does.

        Raises:
            ValueError: damaged; names the newest one of the run that is not.
        """
        try:
            return load_checkpoint(path)
        except ValueError as error:
            others = set(self.folder.glob("*.pth")) - {Path(path), self.folder / "best.pth"}
            newest_first = sorted(others, key=lambda one: one.stat().st_mtime, reverse=True)
            good = next(filter(_is_readable, newest_first), None)
            if good is None:
                raise ValueError(f"{error} The folder has no other checkpoint that can be read.") from error
            raise ValueError(
                f"{error} The newest one in the folder that can be read is {good.name}: to go on from there, write "
                f"that name into {self.folder / 'last_checkpoint'}."
            ) from error

    def noted_evaluation(self) -> dict[str, Any]:
        """The `note` that `save_evaluation` was given last; {} before that."""
        path = self.folder / "last_evaluation"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def remove_unfinished(self) -> None:
        """Removes what a killed run had half written; only for a folder that no run is writing to."""
        for path in self.folder.glob(_TEMPORARY.format("*")):
            _remove(path)

    def _remove_old(self, newest: Path) -> None:
        if not self.keep:
            return
        last = _PERIODIC.fullmatch(newest.name)
        numbered = [
            (int(match[1]), path)
            for path in self.folder.glob("model_*.pth")
            if (match := _PERIODIC.fullmatch(path.name))
        ]
        # Higher numbers than the newest one belong to an earlier, longer run in the same folder and are not ours to
        # remove.
        ours = sorted((number, path) for number, path in numbered if last is None or number <= int(last[1]))
        for _, path in ours[: -self.keep]:
            _remove(path)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces the file `path` by what `write` puts into the file it is handed, once all of that is on the disk.

    Raises:
        OSError: it could not be written; a file that was there before is untouched.
    """
    temporary = path.with_name(_TEMPORARY.format(path.name))
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if (cause := _system_error(error)) is None:
            raise
        raise OSError(
            f"cannot write '{path}': {cause}. Earlier files in the folder are untouched; is the disk full? Is the "
            "folder read-only?"
        ) from error
    _flush_folder(path.parent)


def _system_error(error: BaseException) -> OSError | None:
    """The error itself, or the one that torch hides behind "unexpected pos" when it closes what it could not write."""
    if isinstance(error, RuntimeError):
        error = error.__context__
    return error if isinstance(error, OSError) else None


def _is_readable(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except ValueError:
        return False
    return True


def _snapshot(content: Any) -> Any:
    """A copy in main memory of nested containers of tensors, which later steps cannot change."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {key: _snapshot(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_snapshot(value) for value in content)
    return content


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)


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
