"""Parts of a model that no training changes, such as the CLIP, as files of weights see them.

A module with `is_frozen = True` is such a part. Files leave its weights out and keep an entry about it instead, which
is compared when they are loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fcclip.config import flatten
from fcclip.errors import InputError


class FrozenPart(nn.Module):
    """A frozen encoder; one that computes the same from the same weights everywhere has nothing to add but names.

    Attributes:
        notes_key: the entry of a file that tells of it; in capitals its name in messages.
        config_keys: what a user sets to choose it; the last one names its weights.
        constants: names that files may hold and that are never loaded; one with a dot at its end stands for all that
            begin with it.
        hash_prefix: what stands before each name in its hash, so that hashes of earlier files stay true.
    """

    is_frozen: ClassVar[bool] = True
    notes_key: ClassVar[str]
    config_keys: ClassVar[tuple[str, ...]]
    constants: ClassVar[tuple[str, ...]] = ()
    hash_prefix: ClassVar[str] = ""

    @property
    def has_random_weights(self) -> bool:
        """Whether no weights were loaded into it."""
        return False

    def load_named(self, name: str, weights: str) -> None:
        """Loads the weights that the last of `config_keys` names; `name` is what the first one says.

        Raises:
            MissingFileError, InputError: they are not there, or of another part.
        """
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """What files keep of it, as JSON values; `weights` is `weights_hash`."""
        return {"weights": self.weights_hash()}

    def weights_hash(self, held: Mapping[str, Tensor] = MappingProxyType({})) -> str:
        """`sampled_hash` of its weights, as they would be with the tensors of a file."""
        state = {**self.state_dict(), **held}
        return sampled_hash({self.hash_prefix + name: value for name, value in state.items()})

    def check(
        self, notes: Mapping[str, Any] | str, held: Mapping[str, Tensor], *, source: str, complete: bool = False
    ) -> None:
        """Before weights are loaded: whether they were trained on this part, and takes over what only they say of it.

        Args:
            notes: its fingerprint at the training; a string is the hash alone, as earlier files had it; {}: not known.
            held: what the file holds of its weights.
            source: name of the file, for messages.
            complete: the file holds all of them, so that they need not be those of the fingerprint.

        Raises:
            InputError: they were trained on another one; nothing was changed.
        """
        stored = {"weights": notes} if isinstance(notes, str) else notes
        if not complete and "weights" in stored and stored["weights"] != self.weights_hash(held):
            name = self.notes_key.upper()
            raise InputError(
                f"'{source}' was trained on another {name} than the one this model has.\n"
                f"  trained on: {_described(stored)}\n  the model has: {_described(self.fingerprint())}\n"
                f"  Set {' and '.join(self.config_keys)} to the {name} of training; on any other one the segmenter "
                "would find nothing right."
            )

    def loaded(self, notes: Mapping[str, Any] | str, *, source: str, complete: bool) -> None:
        """After weights were loaded: warns if the part computes something else than where they were trained."""


def unnamed_parts(model: nn.Module, cfg: Mapping[str, Any]) -> list[str]:
    """The frozen parts that the config names no weights for, as messages call them; checkpoints hold them, because no
    other file may.
    """
    values = flatten(cfg)
    return [part.notes_key.upper() for part in frozen_parts(model).values() if not values[part.config_keys[-1]]]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def frozen_parts(model: nn.Module) -> dict[str, FrozenPart]:
    """The frozen parts of a model by the beginning of their names in its state dict, such as "backbone."."""
    parts: dict[str, FrozenPart] = {}
    for name, module in unwrap(model).named_modules(remove_duplicate=False):
        if getattr(module, "is_frozen", False) and not name.startswith(tuple(parts)):
            parts[f"{name}." if name else ""] = module
    return parts


def frozen_prefixes(model: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of all frozen weights in the state dict of a model."""
    return tuple(frozen_parts(model))


def frozen_notes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a file says of the frozen parts of a model: entry -> fingerprint."""
    return {part.notes_key: part.fingerprint() for part in frozen_parts(model).values()}


def load_frozen(part: nn.Module, tensors: Mapping[str, Tensor], *, source: str, what: str) -> None:
    """Loads all weights of a frozen part, by its own names; `source` and `what` name file and part where they do not
    fit."""
    try:
        part.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:600]
        raise InputError(f"weights '{source}' do not fit {what}. Are they of another architecture? {reason}") from error


def sampled_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash that tells one set of weights from another.

    Reads names, shapes and at most 64 values of each tensor, so it costs milliseconds; halving the precision keeps it.
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        flat = value.detach().flatten()
        sample = flat[:: max(flat.numel() // 64, 1)][:64].to("cpu", torch.float16)
        digest.update(f"{name}{tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _described(fingerprint: Mapping[str, Any]) -> str:
    weights = f"weights {fingerprint['weights'][:12]}"
    if "architecture" not in fingerprint:
        return weights
    pretrained = f"'{fingerprint['pretrained']}'" if fingerprint["pretrained"] else "random weights"
    return f"{fingerprint['architecture']}, {pretrained} ({weights})"
