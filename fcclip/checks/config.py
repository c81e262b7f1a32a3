"""The config: as far as it can be read, with every wrong key named."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from fcclip.checks.issue import ERROR, NOTE, OK, Issues
from fcclip.config import find_config, flatten, keys_without_effect, load_config
from fcclip.errors import InputError
from fcclip.files import listed


def check_config(issues: Issues, path: str, overrides: Sequence[str]) -> CfgNode | None:
    """The config; keys that cannot be read are issues and stay at their defaults. None: there is none."""
    try:
        cfg = load_config(path, overrides)
    except ValueError as error:
        cfg = _load_what_is_right(issues, path, overrides)
        if not issues.count(ERROR):
            issues.add(ERROR, str(error))
    else:
        issues.add(OK, f"{path}: {len(overrides) // 2} keys overridden" if overrides else f"{path}: read")
    if cfg is not None:
        reasons: dict[str, list[str]] = {}
        for key, why in keys_without_effect(path).items():
            reasons.setdefault(why, []).append(key)
        for why, keys in reasons.items():
            issues.add(NOTE, f"without effect, because {why}: {listed(keys)}")
    return cfg


def _load_what_is_right(issues: Issues, path: str, overrides: Sequence[str]) -> CfgNode | None:
    """Tries every key by itself, so that all wrong ones are named and not the first alone."""
    try:
        pairs = list(_pairs(find_config(path)))
    except (OSError, ValueError, yaml.YAMLError):
        return None  # not a matter of keys; the error of load_config says what is wrong
    if len(overrides) % 2:
        issues.add(ERROR, f"KEY VALUE come in pairs, got {len(overrides)} words: {' '.join(overrides)}")
    pairs += [("command line", *pair) for pair in zip(overrides[::2], overrides[1::2])]
    right: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty.yaml")
        empty.touch()
        for place, key, value in pairs:
            try:
                load_config(empty, [key, value])
            except ValueError as error:
                issues.add(ERROR, f"{place}: {str(error).removeprefix('command line: ')}")
            else:
                right += [key, value]
        return load_config(empty, right)


def _pairs(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(file, key, value) of a YAML file, those of its bases first."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a mapping of keys")
    bases = content.pop("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        yield from _pairs(path.parent / Path(base).expanduser())
    yield from ((str(path), key, value) for key, value in flatten(content).items())
