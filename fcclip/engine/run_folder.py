"""The folder of a run: one training at a time, and resumed with the config that it was begun with."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from fcclip.config import affects, flatten, get_cfg
from fcclip.errors import InputError
from fcclip.vocabulary import Vocabulary

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

HEARTBEAT_S = 30.0  # between two signs of life in the lock file
STALE_S = 300.0  # a lock of another machine without one for so long is dead
_NOTE_BYTES = 512


# ---- one training at a time ----


class RunLock:
    """Keeps a second training out of a folder, as long as this one lives.

    The file `.lock` in the folder is locked by the system, which frees it when the process dies, however it dies. Where
    such locks do not reach other machines, the time of the file tells: its owner touches it now and then. A dead owner
    on another machine costs a wait of three heartbeats, unless it has been silent for STALE_S.

    Args:
        folder: of the run; must exist.
        what: is done there, for the message.
        heartbeat_s: seconds between two touches.

    Raises:
        ValueError: on entering, when another process holds the folder; names it.
    """

    def __init__(self, folder: str | Path, what: str = "training", *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.path = Path(folder) / ".lock"
        self.what = what
        self.heartbeat_s = heartbeat_s
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self._descriptor = self._take()
        _held.add(self)
        note = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "what": self.what,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.pwrite(self._descriptor, json.dumps(note).encode().ljust(_NOTE_BYTES), 0)  # whole, whoever reads it when
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is None:  # a forked child
            return
        self._left.set()
        self._heart.join()
        with contextlib.suppress(OSError):  # the folder may be gone
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        _held.discard(self)

    def _take(self) -> int:
        """The descriptor of the file, which is ours and locked where the system can."""
        while True:
            descriptor, is_new = self._open()
            try:
                locked = _lock(descriptor)
                if locked is False:
                    raise self._refusal(descriptor)
                if not self._is_still_there(descriptor):  # its owner has just left
                    os.close(descriptor)
                    continue
                if not is_new and self._owner_lives(descriptor, reached=locked is not None):
                    raise self._refusal(descriptor)
                if self._is_still_there(descriptor):
                    return descriptor
                os.close(descriptor)
            except BaseException:
                os.close(descriptor)
                raise

    def _open(self) -> tuple[int, bool]:
        while True:
            with contextlib.suppress(FileExistsError):  # exclusive creation is atomic on network file systems too
                return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.path, os.O_RDWR), False

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _owner_lives(self, descriptor: int, *, reached: bool) -> bool:
        """Whether the owner in the file lives; with `reached` the system's lock has told of every process here."""
        owner = self._owner(descriptor)
        here = owner.get("host") == socket.gethostname()
        if not owner or (here and (reached or not _is_running(owner.get("pid")))):
            return False
        seen = os.fstat(descriptor).st_mtime
        if time.time() - seen > STALE_S:
            return False
        patience = 3 * self.heartbeat_s
        logger.warning(
            "%s was left by process %s on %s; waiting up to %.0f s to see whether it lives",
            self.path,
            owner.get("pid"),
            owner.get("host"),
            patience,
        )
        until = time.monotonic() + patience
        while time.monotonic() < until:
            time.sleep(self.heartbeat_s / 10)
            try:
                if os.stat(self.path).st_mtime != seen:
                    return True
            except FileNotFoundError:
                return False
        return False

    def _owner(self, descriptor: int) -> dict[str, Any]:
        """What the owner wrote about itself; {} when it died before it could."""
        owner = _read(descriptor)
        if not owner:
            time.sleep(min(self.heartbeat_s, 1.0))  # it may be about to
            owner = _read(descriptor)
        return owner

    def _refusal(self, descriptor: int) -> ValueError:
        owner = self._owner(descriptor)
        who = (
            f"process {owner.get('pid')} on {owner.get('host')}, {owner.get('what')} there since {owner.get('started')}"
            if owner
            else "another process that has just started"
        )
        return ValueError(
            f"OUTPUT_DIR '{self.path.parent}' is in use by {who}. Two trainings in one folder would overwrite each "
            "other's checkpoints: give this one another OUTPUT_DIR, or stop the other first"
            + (f" (kill {owner.get('pid')} on {owner.get('host')})." if owner else ".")
        )

    def _beat(self) -> None:
        while not self._left.wait(self.heartbeat_s):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _forget(self) -> None:
        """In a forked child, which shares the lock and would keep it after its parent's death."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in list(_held):
        lock._forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _lock(descriptor: int) -> bool | None:
    """Whether the system locked the file for us; None where it cannot lock files of that kind."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(descriptor: int) -> dict[str, Any]:
    """The note in a lock file; {} when there is none."""
    try:
        note = json.loads(os.pread(descriptor, _NOTE_BYTES, 0))
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def _is_running(pid: Any) -> bool:
    """Whether this machine may have such a process."""
    if os.name != "posix" or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---- the same config ----


def check_resume(stored: str, here: CfgNode, *, source: str | Path, iteration: int | None = None) -> None:
    """Refuses to resume a training whose config has changed in what it trains; logs changes that do no harm.

    Args:
        stored: the config that the checkpoint holds, as YAML (`cfg.dump()`); "" is not compared.
        here: the config of this run, complete (seed drawn, scaled to the number of processes).
        source: the checkpoint, for the message.
        iteration: iterations trained so far; with it, SOLVER.STEPS may change behind it.

    Raises:
        ValueError: names every key that has changed, with both values.
    """
    if not stored:
        logger.warning("%s holds no config: whether it was trained with this one is not checked", source)
        return
    refused, harmless = compare_configs(stored, here, iteration=iteration)
    if refused:
        scaled = any(line.startswith("SOLVER.REFERENCE_WORLD_SIZE:") for line in refused)
        raise InputError(
            f"the training in '{source}' was begun with another config (there -> here):\n"
            + "".join(f"  {line}\n" for line in refused)
            + (
                "SOLVER.REFERENCE_WORLD_SIZE scales batch, learning rate and lengths to the number of processes, so a "
                "run goes on with as many as it was begun with.\n"
                if scaled
                else ""
            )
            + "Restore these keys to resume; or start a new run from its weights: another OUTPUT_DIR, MODEL.WEIGHTS "
            f"{source}, without --resume."
        )
    if harmless:
        logger.info(
            "resuming with changes that the training does not depend on (there -> here): %s", "; ".join(harmless)
        )


def check_same_classes(stored: Mapping[str, Any] | None, here: Vocabulary, *, source: str | Path) -> None:
    """Refuses to resume a training whose classes or words have changed, though the config still names the same data.

    Args:
        stored: what the checkpoint says of the training classes, `{"classes": [[word, …], …]}`; without it nothing is
            compared.
        here: the training classes of this run.
        source: the checkpoint, for the message.

    Raises:
        ValueError: names the first class that has changed.
    """
    if not isinstance(stored, Mapping) or "classes" not in stored:
        return
    there = [tuple(words) for words in stored["classes"]]
    if there == list(here.synonyms):
        return
    pairs = enumerate(itertools.zip_longest(there, here.synonyms, fillvalue=("nothing",)))
    index, (old, new) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
    raise InputError(
        f"the training in '{source}' was begun with other classes ({len(there)}, here {len(here)}): class {index} was "
        f"'{', '.join(old)}' and is '{', '.join(new)}'. Restore the list of classes (MODEL.FC_CLIP.VOCABULARIES for "
        "published words) to resume; or start a new run from its weights: another OUTPUT_DIR, MODEL.WEIGHTS "
        f"{source}, without --resume."
    )


def compare_configs(stored: str, here: CfgNode, *, iteration: int | None = None) -> tuple[list[str], list[str]]:
    """The keys in which two configs differ: those that change what is trained, and those that do not.

    A key that only one of the trees has (of an earlier or later version) counts where it is not at its default, or
    unknown here and switched on.

    Args:
        stored: YAML of a whole config.
        here: the other one.
        iteration: iterations trained so far; None: unknown.

    Returns:
        (refused, harmless), each a sorted list of "KEY: stored -> here".

    Raises:
        ValueError: `stored` is no YAML of a config.
    """
    try:
        tree = yaml.safe_load(stored)
    except yaml.YAMLError as error:
        raise InputError(f"the stored config cannot be read as YAML: {error}") from error
    if not isinstance(tree, Mapping):
        raise InputError(f"the stored config is a {type(tree).__name__}, expected keys and values")
    there, now, defaults = (flatten(config) for config in (tree, here, get_cfg()))
    refused, harmless = [], []
    for key in sorted(there.keys() | now.keys()):
        old, new = there.get(key, _ABSENT), now.get(key, _ABSENT)
        if old == new or (old is _ABSENT and key in defaults and new == defaults[key]) or (new is _ABSENT and not old):
            continue
        is_harmless = affects(key) in ("prediction", "nothing") or _is_ahead(key, there, now, iteration)
        (harmless if is_harmless else refused).append(f"{key}: {old!r} -> {new!r}")
    return refused, harmless


class _Absent:
    def __repr__(self) -> str:
        return "no such key"


_ABSENT = _Absent()


def _is_ahead(key: str, there: Mapping[str, Any], here: Mapping[str, Any], iteration: int | None) -> bool:
    """Whether the change lies ahead of what has been trained, or behind a drawn seed."""
    if key == "SEED":  # negative: drawn afresh, or taken from the checkpoint
        return there.get(key, -1) < 0 or here[key] < 0
    if key == "SOLVER.MAX_ITER":  # the other schedules stretch over the whole training
        schedules = {tree.get("SOLVER.LR_SCHEDULER_NAME") for tree in (there, here)}
        return schedules == {"WarmupMultiStepLR"} and not here["SOLVER.RESCALE_INTERVAL"]
    if key == "SOLVER.STEPS" and iteration is not None:
        past = [[step for step in tree.get(key, ()) if step < iteration] for tree in (there, here)]
        return past[0] == past[1]
    return False
