"""Files that hold a training: written so that a crash leaves no half of one, read so that nothing is misunderstood."""

from __future__ import annotations

import logging
import re
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fcclip.errors import InputError, MissingFileError
from fcclip.files import TEMPORARY, read_json, write_atomically, write_json
from fcclip.weights import model_weights
from fcclip.weights.files import read_plain_data

logger = logging.getLogger(__name__)

_TRAINING_STATE = ("model", "optimizer", "scheduler", "scaler", "iteration", "random")  # without which none goes on
_PERIODIC = re.compile(r"model_\d{7}\.pth")


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint (tensors, numbers, strings and containers of them) as `write_atomically` does."""
    write_atomically(Path(path), lambda file: torch.save(dict(content), file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; only plain data and tensors are accepted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, be it by one bit, or holding objects that only an unsafe reader could make.
    """
    content = read_plain_data(path, what="checkpoint")
    if not isinstance(content, dict):
        raise InputError(f"'{path}' holds a {type(content).__name__}, expected a mapping of names to tensors")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch writes check sums, and does not look at them
        if damaged is not None:
            raise InputError(
                f"checkpoint '{path}' is damaged: its record '{damaged}' does not have the check sum that it was "
                "written with. Is the disk all right? Copy the file again, or go on from an earlier checkpoint: write "
                "its name into last_checkpoint."
            )
    return content


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that a training can go on from, as `load_checkpoint` does.

    Raises:
        ValueError: also when it holds weights only.
    """
    state = load_checkpoint(path)
    missing = [name for name in _TRAINING_STATE if name not in state]
    if missing:
        raise InputError(
            f"'{path}' holds no state of a training (missing: {', '.join(missing)}); a training can start from its "
            "weights with MODEL.WEIGHTS, without --resume"
        )
    return state


class Checkpointer:
    """The checkpoints of one run: `model_0004999.pth`, …, `model_final.pth`, `best.pth`, and the name of the newest
    complete one in `last_checkpoint`.

    Writing overlaps the training: what is handed over is copied into main memory at once, and a thread writes it. A
    checkpoint that cannot be written harms no earlier file and is logged, and the next one is a new try; two failures
    in a row are raised by `check`, the last one by `wait`. As a context, a checkpointer waits at the end, and raises
    nothing when there is an error on its way already.

    Args:
        folder: where they are; must exist.
        keep: how many periodic checkpoints stay, the newest ones; 0 keeps all.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3) -> None:
        if keep < 0:
            raise InputError(f"SOLVER.CHECKPOINT_KEEP must not be negative, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._failures: list[Exception] = []  # since a checkpoint was last written

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self.settle() if error_type is not None else self.wait()

    # ---- writing ----

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes `<name>.pth`, then lets `last_checkpoint` name it, then removes periodic checkpoints beyond `keep`.

        Returns before the file is complete; see `settle`.

        Raises:
            OSError: as `check`.
        """
        path, snapshot = self.folder / f"{name}.pth", _snapshot(content)

        def write() -> None:
            try:
                save_checkpoint(path, snapshot)
                write_atomically(self.folder / "last_checkpoint", lambda file: file.write(path.name.encode()))
                logger.info("saved %s", path)
                self._remove_old(path)
            except Exception as error:
                logger.error("%s", error)
                self._failures.append(error)
            else:
                self._failures.clear()

        self.settle()
        self.check()
        self._thread = threading.Thread(target=write, name="checkpoint writer")
        self._thread.start()

    def save_evaluation(self, note: Mapping[str, Any], *, best: Mapping[str, Any] | None = None) -> None:
        """Writes what became of an evaluation; `last_checkpoint` stays. Returns when it is written.

        Args:
            note: JSON values by name, for `noted_evaluation`; written last.
            best: the content of `best.pth`, if the evaluation chose it.

        Raises:
            OSError: it could not be written.
        """
        self.settle()
        if best is not None:
            save_checkpoint(self.folder / "best.pth", best)
        write_json(self.folder / "last_evaluation", note)

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
            OSError: no checkpoint could be written twice in a row.
        """
        if len(self._failures) > 1 or any(not isinstance(error, OSError) for error in self._failures):
            raise self._failures[-1]  # an error that is no OSError is our own mistake, and raised at once

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        self.settle()
        if self._failures:
            raise self._failures[-1]

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
            existing = ", ".join(sorted(file.name for file in self.folder.glob("*.pth"))) or "none"
            raise MissingFileError(
                f"{pointer} names '{path.name}', which does not exist (checkpoints in the folder: {existing}). Write "
                "the name of one of them into that file, or delete it to start again."
            )
        return path

    def noted_evaluation(self) -> dict[str, Any]:
        """The `note` that `save_evaluation` was given last; {} before that."""
        path = self.folder / "last_evaluation"
        return read_json(path) if path.is_file() else {}

    def remove_unfinished(self) -> None:
        """Removes what a killed run had half written; only for a folder that no run is writing to."""
        for path in self.folder.glob(TEMPORARY.format("*")):
            _remove(path)

    def _remove_old(self, newest: Path) -> None:
        if not self.keep:
            return
        periodic = sorted(path for path in self.folder.glob("model_*.pth") if _PERIODIC.fullmatch(path.name))
        if _PERIODIC.fullmatch(newest.name):  # later ones belong to an earlier, longer run and are not ours to remove
            periodic = [path for path in periodic if path.name <= newest.name]
        for path in periodic[: -self.keep]:
            _remove(path)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What a training keeps of itself, and when.

    Args:
        checkpointer: where checkpoints go; None writes none.
        period: iterations between checkpoints; 0: only at the end.
        notes: entries that every checkpoint holds besides the training state (config, vocabulary).
        full: store frozen weights too.
    """

    checkpointer: Checkpointer | None = None
    period: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    full: bool = False

    def is_due(self, iteration: int) -> bool:
        """Whether there is a checkpoint after `iteration` steps."""
        return self.period > 0 and iteration % self.period == 0

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The notes, and the weights under `model`."""
        return {**self.notes, "model": model_weights(model, full=self.full)}


def _snapshot(content: Any) -> Any:
    """A copy in main memory of nested containers of tensors, which later steps cannot change."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {key: _snapshot(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_snapshot(value) for value in content)
    return content


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)
