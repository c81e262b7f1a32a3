"""The beginning and the end of a run: its folder, its log, its seed, and what is written down about it."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fvcore.common.config import CfgNode

from fcclip.comm import broadcast_object, get_rank, is_main_process
from fcclip.config import resolve_device, told_without_effect
from fcclip.data.loaders import LoaderError
from fcclip.engine.checkpoint import load_checkpoint
from fcclip.engine.environment import apply_numeric_settings, draw_seed, environment_report, seed_everything
from fcclip.engine.logs import close_logging, log_exception, setup_logging
from fcclip.engine.run_folder import check_resume, check_same_classes
from fcclip.engine.run_lock import RunLock
from fcclip.files import write_atomically
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_KILL_S = 5  # for a process that was killed to be gone


def prepare_output_folder(folder: str | Path) -> None:
    """Makes OUTPUT_DIR and proves that it can be written, before anything is computed.

    Raises:
        PermissionError: it cannot be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"OUTPUT_DIR '{folder}' cannot be written ({error.strerror or error}). Choose a folder that you may write: "
            "OUTPUT_DIR /some/folder"
        ) from error


@contextlib.contextmanager
def run_in_folder(folder: str | Path, *, locks: str = "") -> Iterator[None]:
    """For the time of a run in this process: log.txt, which also gets the traceback of an error.

    Args:
        folder: must exist.
        locks: what is done there, if nobody else may do that in the folder; "": the folder is shared.
    """
    with RunLock(folder, locks) if locks and is_main_process() else contextlib.nullcontext():
        setup_logging(Path(folder), rank=get_rank())
        try:
            yield
        except Exception as error:
            log_exception()
            _end_loading_processes()
            # torch says so wherever the main thread is, and has no class for it
            if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):
                raise LoaderError(f"a loading process died ({str(error).splitlines()[0]})") from error
            raise
        finally:
            close_logging()


def begin_run(cfg: CfgNode, *, config_file: str, training: bool, writes: bool = True) -> None:
    """Numeric settings and seeds; then what is run goes into the log, and the config into config.yaml.

    Args:
        cfg: complete (seed drawn, scaled to the number of processes).
        config_file: that it was read from.
        training: whether it trains.
        writes: whether config.yaml is written.
    """
    apply_numeric_settings(cfg, training=training)
    if cfg.SEED >= 0:
        seed_everything(cfg.SEED + get_rank())
    if not is_main_process():
        return
    report = environment_report(resolve_device(cfg.MODEL.DEVICE))
    logger.info("environment:%s", "".join(f"\n  {name:<16} {value}" for name, value in report.items()))
    if unused := told_without_effect(config_file):
        logger.info("keys of %s without effect: %s", config_file, unused)
    if not writes:
        logger.info("read %s, writing nothing but this log", config_file)
        return
    folder = Path(cfg.OUTPUT_DIR)
    write_atomically(folder / "config.yaml", lambda file: file.write(cfg.dump().encode()))
    logger.info("read %s, writing to %s (the full config is in config.yaml there)", config_file, folder.resolve())


def as_begun(cfg: CfgNode, last: Path | None, vocabulary: Vocabulary) -> CfgNode:
    """The config with a SEED that all processes share: its own, else that of the training that is resumed, else a
    fresh one.

    Args:
        cfg: scaled to the number of processes.
        last: the checkpoint that is resumed from, if any.
        vocabulary: the training classes.

    Raises:
        ValueError: the checkpoint is damaged, or holds another training than this config's.
    """
    state = {} if last is None else load_checkpoint(last)
    if cfg.SEED < 0:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SEED = broadcast_object(state["seed"] if "seed" in state else draw_seed())
        cfg.freeze()
        logger.info("SEED was negative: drew %d", cfg.SEED)
    if "config" in state and "iteration" in state:
        check_resume(state["config"], cfg, source=str(last), iteration=state["iteration"] + 1)
    check_same_classes(state.get("vocabulary"), vocabulary, source=str(last))
    return cfg


def _end_loading_processes() -> None:
    """Kills them after an error: one that hangs would keep this process from ending."""
    watched = hasattr(signal, "SIGCHLD")
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if watched else None  # torch's would raise another error
    for process in multiprocessing.active_children():
        process.kill()
        process.join(_KILL_S)
    if watched:
        signal.signal(signal.SIGCHLD, handler)
