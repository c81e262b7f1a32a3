"""A run is resumed with the config that it was begun with."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from fcclip.config import affects, flatten, get_cfg
from fcclip.errors import InputError
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


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
        lines = [f"the training in '{source}' was begun with another config (there -> here):"]
        lines += [f"  {line}" for line in refused]
        if any(line.startswith("SOLVER.REFERENCE_WORLD_SIZE:") for line in refused):
            lines.append(
                "SOLVER.REFERENCE_WORLD_SIZE scales batch, learning rate and lengths to the number of processes, so a "
                "run goes on with as many as it was begun with."
            )
        lines.append(f"Restore these keys to resume; {_new_run(source)}")
        raise InputError("\n".join(lines))
    if harmless:
        changes = "; ".join(harmless)
        logger.info("resuming with changes that the training does not depend on (there -> here): %s", changes)


def check_same_classes(stored: Mapping[str, Any] | None, here: Vocabulary, *, source: str | Path) -> None:
    """Refuses to resume a training whose class names or synonyms have changed, though the config names the same data.

    Args:
        stored: what the checkpoint says of the training classes, `{"classes": [[synonym, …], …]}`; without it nothing
            is compared.
        here: the training classes of this run.
        source: the checkpoint, for the message.

    Raises:
        ValueError: names the first class that has changed.
    """
    if not isinstance(stored, Mapping) or "classes" not in stored:
        return
    classes = [tuple(synonyms) for synonyms in stored["classes"]]
    pairs = enumerate(itertools.zip_longest(classes, here.synonyms, fillvalue=("nothing",)))
    for index, (old, new) in pairs:
        if old != new:
            raise InputError(
                f"the training in '{source}' was begun with other classes ({len(classes)}, here {len(here)}): class "
                f"{index} was '{', '.join(old)}' and is '{', '.join(new)}'. Restore the list of classes "
                f"(MODEL.FC_CLIP.VOCABULARIES for published vocabularies) to resume; {_new_run(source)}"
            )


def _new_run(source: str | Path) -> str:
    return f"or start a new run from its weights: another OUTPUT_DIR, MODEL.WEIGHTS {source}, without --resume."


def compare_configs(stored: str, here: CfgNode, *, iteration: int | None = None) -> tuple[list[str], list[str]]:
    """The keys in which two configs differ: those that change what is trained, and those that do not, each a sorted
    list of "KEY: stored -> here".

    A key that only one of the trees has (of an earlier or later version) counts where it is not at its default, or
    unknown here and switched on.

    Args:
        stored: YAML of a whole config.
        here: the other one.
        iteration: iterations trained so far; None: unknown.

    Raises:
        ValueError: `stored` is not the YAML of a config.
    """
    try:
        tree = yaml.safe_load(stored)
    except yaml.YAMLError as error:
        raise InputError(f"the stored config cannot be read as YAML: {error}") from error
    if not isinstance(tree, Mapping):
        raise InputError(f"the stored config is a {type(tree).__name__}, expected keys and values")
    before, now, defaults = (flatten(config) for config in (tree, here, get_cfg()))
    refused, harmless = [], []
    for key in sorted(before.keys() | now.keys()):
        new_at_its_default = key not in before and key in defaults and now[key] == defaults[key]
        unknown_and_off = key not in now and not before[key]
        if new_at_its_default or unknown_and_off or (key in before and key in now and before[key] == now[key]):
            continue
        old, new = (repr(config[key]) if key in config else "no such key" for config in (before, now))
        is_harmless = affects(key) in ("prediction", "nothing") or _is_ahead(key, before, now, iteration)
        (harmless if is_harmless else refused).append(f"{key}: {old} -> {new}")
    return refused, harmless


def _is_ahead(key: str, before: Mapping[str, Any], here: Mapping[str, Any], iteration: int | None) -> bool:
    """Whether the change lies ahead of what has been trained, or behind a drawn seed."""
    if key == "SEED":  # negative: drawn afresh, or taken from the checkpoint
        return before.get(key, -1) < 0 or here[key] < 0
    if key == "SOLVER.MAX_ITER":  # the other schedules stretch over the whole training
        schedules = {tree.get("SOLVER.LR_SCHEDULER_NAME") for tree in (before, here)}
        return schedules == {"WarmupMultiStepLR"} and not here["SOLVER.RESCALE_INTERVAL"]
    if key == "SOLVER.STEPS" and iteration is not None:
        past = [[step for step in tree.get(key, ()) if step < iteration] for tree in (before, here)]
        return past[0] == past[1]
    return False
