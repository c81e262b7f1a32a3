"""Files that hold a training: written so that a crash never leaves half of one, read so that nothing is misunderstood.

A checkpoint holds the model's own weights and buffers, not the frozen CLIP, which is named by a fingerprint. `.pth`
files are read with `torch.load(weights_only=True)` and nothing else; `.safetensors` files hold weights to share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fcclip.config import resolve_file

logger = logging.getLogger(__name__)

FROZEN_PREFIX = "backbone.clip_model."  # files may hold any subset of these keys
# Keys that files may hold and that never come from a file: constants, and the class weights that the config decides.
_IGNORED = {"pixel_mean", "pixel_std", "criterion.empty_weight", FROZEN_PREFIX + "attn_mask"}
_PERIODIC = re.compile(r"model_(\d{7})\.pth")
_TEMPORARY = ".{}.writing"
_SHOWN = 4  # keys named in an error, per kind


# ---- weights ----


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Loads a file of weights into a model, all of it or nothing.

    Every key of the model must be in the file with the same shape, and the other way round, apart from the frozen CLIP
    (`backbone.clip_model.*`), of which a file may hold any part. Class weights of the loss stay as the config built
    them.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        path: a `.pth` or `.safetensors` file, or the name of a shipped asset; a state dict, or a checkpoint with one
            under "model".

    Returns:
        What else the file says: a checkpoint's other entries, or the metadata of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable or unsafe file, or weights of another model; names the keys and the likely cause.
    """
    file = resolve_file(path, what="weights file")
    weights, rest = read_weights(file)
    load_state(model, weights, source=str(path))
    trained_on = rest.get("clip")
    if trained_on and not any(key.startswith(FROZEN_PREFIX) for key in weights):
        here = clip_fingerprint(model)
        if here != trained_on:
            logger.warning(
                "%s was trained on another CLIP than the one this model has (fingerprint %s, here %s): check "
                "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS, or expect poor results",
                path,
                trained_on[:12],
                here[:12],
            )
    return rest


def load_state(model: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copies weights into a model under the rules of `load_weights`; `source` names them in errors."""
    model = unwrap(model)
    wanted = {key: value for key, value in model.state_dict().items() if key not in _IGNORED}
    weights = {key: value for key, value in weights.items() if key not in _IGNORED}
    missing = [key for key in wanted if key not in weights and not key.startswith(FROZEN_PREFIX)]
    unexpected = [key for key in weights if key not in wanted]
    wrong_shape = [key for key in weights if key in wanted and weights[key].shape != wanted[key].shape]
    if missing or unexpected or wrong_shape:
        shapes = [f"{key} (file {_shape(weights[key])}, model {_shape(wanted[key])})" for key in wrong_shape]
        lines = [
            f"the weights in '{source}' do not fit the model:",
            *_list("wrong shape", shapes),
            *_list("missing from the file", missing),
            *_list("unknown to the model", unexpected),
            f"  likely cause: {_likely_cause(weights, wanted)}",
        ]
        raise ValueError("\n".join(lines))
    model.load_state_dict(weights, strict=False)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a file, without a common `module.` prefix, and everything else in the file.

    Raises:
        ValueError: not a file of weights, damaged, or not safe to open.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pkl":
        raise ValueError(
            f"'{path}' is a pickle file, and opening one can run any program. Open it where you trust it and save its "
            "weights as .safetensors or with torch.save(state_dict)."
        )
    content = load_checkpoint(path)
    weights = content.pop("model", None)
    if weights is None:
        weights, content = content, {}
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise ValueError(
            f"'{path}' holds neither a state dict nor one under the key 'model'; its keys are {_some(weights)}"
        )
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return dict(weights), content


def save_weights(
    model: nn.Module,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    full: bool = False,
) -> None:
    """Writes the weights of a model as a safetensors file to share.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        path: the file; replaced when the new one is complete.
        metadata: JSON values by name, stored beside the weights; `load_weights` returns them. The CLIP's fingerprint is
            added.
        dtype: of the stored floating-point weights.
        full: store the frozen CLIP too.
    """
    weights = {
        key: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous().clone()
        for key, value in model_weights(model, full=full).items()
    }
    notes = {"clip": clip_fingerprint(model), **(metadata or {})}
    content = safetensors.torch.save(weights, {name: json.dumps(value) for name, value in notes.items()})
    write_atomically(Path(path), lambda file: file.write(content))


def model_weights(model: nn.Module, *, full: bool = False) -> dict[str, Tensor]:
    """The state dict that a checkpoint holds: everything except the frozen CLIP, or with `full` everything."""
    return {
        key: value for key, value in unwrap(model).state_dict().items() if full or not key.startswith(FROZEN_PREFIX)
    }


def clip_fingerprint(model: nn.Module) -> str:
    """A hash that tells one set of CLIP weights from another ("" for a model without a CLIP).

    Reads names, shapes and at most 64 values of each tensor, so it costs milliseconds; halving the precision keeps it.
    """
    digest = hashlib.sha256()
    frozen = {key: value for key, value in unwrap(model).state_dict().items() if key.startswith(FROZEN_PREFIX)}
    for key, value in sorted(frozen.items()):
        flat = value.detach().flatten()
        sample = flat[:: max(flat.numel() // 64, 1)][:64].to("cpu", torch.float16)
        digest.update(f"{key}{tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest() if frozen else ""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


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
        ValueError: damaged, or holding objects that only an unsafe reader could make.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError, OSError) as error:
        if isinstance(error, UnpicklingError) and (zipfile.is_zipfile(path) or _is_pickle(path)):
            raise ValueError(
                f"'{path}' holds Python objects besides tensors and plain data; opening it could run any program, so "
                f"it is refused. Save only its state dict and use that file. ({_first_line(error)})"
            ) from error
        raise ValueError(
            f"'{path}' cannot be read: it is damaged, cut off or no checkpoint ({path.stat().st_size} bytes). Copy or "
            "download it again, or use an earlier checkpoint."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, expected a mapping of names to tensors")
    return content


class Checkpointer:
    """The checkpoints of one run: `model_0004999.pth`, …, `model_final.pth`, and `last_checkpoint`, which names the
    newest.

    Args:
        folder: where they are; must exist.
        keep: how many periodic checkpoints stay, the newest ones; 0 keeps all.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3) -> None:
        if keep < 0:
            raise ValueError(f"SOLVER.CHECKPOINT_KEEP must not be negative, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, name: str, content: Mapping[str, Any]) -> Path:
        """Writes `<name>.pth`, then lets `last_checkpoint` name it, then removes periodic checkpoints beyond `keep`."""
        path = self.folder / f"{name}.pth"
        save_checkpoint(path, content)
        write_atomically(self.folder / "last_checkpoint", lambda file: file.write(path.name.encode()))
        logger.info("saved %s", path)
        self._remove_old(path)
        return path

    def save_periodic(self, iteration: int, content: Mapping[str, Any]) -> Path:
        """Writes the checkpoint after the 0-based `iteration`."""
        return self.save(f"model_{iteration:07d}", content)

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
        if isinstance(error, OSError) or (isinstance(error, RuntimeError) and "write" in str(error)):
            raise OSError(
                f"cannot write '{path}': {error}. Earlier files in the folder are untouched; is the disk full?"
            ) from error
        raise
    _flush_folder(path.parent)


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


# ---- reading and explaining ----


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            notes = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' cannot be read as safetensors: it is damaged or cut off ({path.stat().st_size} bytes; {error}). "
            "Copy or download it again."
        ) from error
    return weights, {name: _from_json(value) for name, value in notes.items()}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _likely_cause(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What a user most probably did, from the keys and shapes alone."""

    def sizes(key: str, dim: int) -> tuple[int, int] | None:
        both = key in weights and key in wanted and weights[key].dim() > dim and wanted[key].dim() > dim
        pair = (weights[key].shape[dim], wanted[key].shape[dim]) if both else None
        return pair if pair and pair[0] != pair[1] else None

    predictor, decoder = "sem_seg_head.predictor.", "sem_seg_head.pixel_decoder."
    if not any(key.startswith("sem_seg_head.") for key in weights):
        if any(".resblocks." in key or "visual." in key for key in weights):
            return "a CLIP, not a segmenter: it belongs in MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS, not in MODEL.WEIGHTS."
        return "this is not a file of FC-CLIP weights: no key starts with 'sem_seg_head.'."
    if predictor + "class_embed.weight" in weights:
        return "weights of a closed-vocabulary MaskFormer or Mask2Former, which has another class head than FC-CLIP."
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


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(content: Any) -> str:
    names = list(content) if isinstance(content, Mapping) else [type(content).__name__]
    return ", ".join(map(str, names[:6])) + (", …" if len(names) > 6 else "") if names else "none"


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return lines[0][:200] if lines else type(error).__name__
