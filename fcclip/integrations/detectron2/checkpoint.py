"""detectron2's checkpointer with fcclip's rules: strict, safe, atomic, without the frozen encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from fcclip.config import assets_dir
from fcclip.engine import save_checkpoint
from fcclip.weights import frozen_notes, load_weights, model_weights


class Checkpointer(DetectionCheckpointer):
    """Reads and writes checkpoints of fcclip's models; used like detectron2's.

    Reading takes everything `fcclip.weights.load_weights` takes (`.pth`, `.safetensors`, with any frozen weights), runs
    no code of a file, and raises where a key does not fit. Of a fine-tuned file the model learns all classes that
    count as seen; detectron2's own checkpointer gives a model weights alone. Files appear whole or not at all.

    Args:
        model, save_dir, save_to_disk, checkpointables: as of detectron2's.
        full: write the frozen encoders too (SOLVER.CHECKPOINT_FULL).
        notes: entries that every file holds besides the training state.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        full: bool = False,
        notes: Mapping[str, Any] | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.full = full
        self.notes = dict(notes or {})

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads the model, and what else the file holds of the checkpointables; `path` may name a shipped asset.

        Returns:
            The other entries of the file.

        Raises:
            ValueError: unreadable or unsafe file, weights of another model; see `fcclip.weights.load_weights`.
        """
        if path and not Path(path).is_file() and (assets_dir() / path).is_file():
            path = str(assets_dir() / path)
        return super().load(path, *args, **kwargs)

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes `<name>.pth` into the folder and lets `last_checkpoint` name it.

        Raises:
            OSError: the disk is full, the folder cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        weights = model_weights(self.model, full=self.full)
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        save_checkpoint(path, {"model": weights, **frozen_notes(self.model), **self.notes, **states, **kwargs})
        self.tag_last_checkpoint(path.name)

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Loads the model already here, where the file and what it says about its encoders are at hand."""
        return load_weights(self.model, filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        return _IncompatibleKeys(missing_keys=[], unexpected_keys=[], incorrect_shapes=[])
