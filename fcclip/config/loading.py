"""From a YAML file and KEY VALUE pairs to a checked config."""

from __future__ import annotations

import ast
import difflib
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from fcclip.config.defaults import get_cfg
from fcclip.config.facts import flatten, why_without_effect
from fcclip.config.files import find_config
from fcclip.config.lookup import nearest
from fcclip.errors import InputError, MissingFileError
from fcclip.files import listed

logger = logging.getLogger(__name__)


def load_config(path: str | Path, overrides: Sequence[Any] = ()) -> CfgNode:
    """The config of a YAML file: defaults, then its `_BASE_` chain, then the file, then `overrides`; frozen.

    Args:
        path: a YAML file, or the name of a shipped one ("shapes/fcclip_shapes.yaml"). A `_BASE_` is relative to its
            file.
        overrides: KEY, VALUE, KEY, VALUE, …; values as on the command line (strings that read as Python literals are
            parsed).

    Raises:
        FileNotFoundError: the file or a base does not exist.
        ValueError: broken or unsafe YAML, unknown key (with the nearest known one), value of a wrong type (with the
            full path), a KEY without a VALUE.
    """
    source = find_config(path)
    cfg = config_of(_read(source, chain=()), where=str(path), overrides=overrides)
    if unused := told_without_effect(source):
        logger.info("keys of %s without effect: %s", path, unused)
    return cfg


def config_of(tree: Mapping[str, Any], *, where: str, overrides: Sequence[Any] = ()) -> CfgNode:
    """The config of a tree of keys, as a YAML file holds it: defaults, then the tree, then `overrides`; frozen.

    Args:
        tree: groups of keys, or "KEY.OF.LEAF" -> value.
        where: what messages call it.
        overrides: as for `load_config`.

    Raises:
        ValueError: unknown key, value of a wrong type, a KEY without a VALUE.
    """
    cfg = get_cfg()
    known = flatten(cfg).keys()
    for key, value in own_keys(flatten(tree)).items():
        if key in known or not why_without_effect(key):
            _assign(cfg, key, value, where=where)
    if len(overrides) % 2:
        raise InputError(
            f"overrides come in pairs KEY VALUE, got {len(overrides)} words: {' '.join(map(str, overrides))}"
        )
    for key, value in zip(overrides[::2], overrides[1::2]):
        for own_key, own_value in own_keys({str(key): value}).items():
            _assign(cfg, own_key, own_value, where="command line")
    cfg.freeze()
    return cfg


def with_values(cfg: CfgNode, values: Mapping[str, Any]) -> CfgNode:
    """A frozen copy of a config with other values: "KEY.OF.LEAF" -> value of the right type."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, value in values.items():
        *groups, name = key.split(".")
        functools.reduce(getattr, groups, cfg)[name] = value
    cfg.freeze()
    return cfg


def own_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of files of FrozenSeg, OVRCOAT, which call FC-CLIP's group after themselves, and Mask-Adapter, as they are
    called here.

    Example:
        >>> own_keys({"MODEL.FROZEN_SEG.EMBED_DIM": 640})
        {'MODEL.FC_CLIP.EMBED_DIM': 640}
    """
    known, own = flatten(get_cfg()), {}
    for key, value in flat.items():
        group, name = key.rpartition(".")[::2]
        here = f"MODEL.FC_CLIP.{name}"
        if key == "MODEL.MASK_ADAPTER.NAME":  # says that there is one
            own["MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER"] = "mask_adapter" if value else ""
            continue
        own[here if group == "MODEL.FROZEN_SEG" or (group == "MODEL.OVRCOAT" and here in known) else key] = value
        if key == "MODEL.OVRCOAT.CLIP_TRUST_WEIGHT":  # has one form, for all outputs
            own["MODEL.FC_CLIP.CLIP_TRUST_SCOPE"] = "all"
            own["MODEL.FC_CLIP.CLIP_TRUST_HEADS"] = ["panoptic", "semantic", "instances"]
    return own


def keys_without_effect(path: str | Path) -> dict[str, str]:
    """The keys that a YAML file (with its bases) sets although nothing reads them, each with the reason."""
    keys = own_keys(flatten(_read(find_config(path), chain=())))
    return {key: reason for key in keys if (reason := why_without_effect(key))}


def told_without_effect(path: str | Path) -> str:
    """The same in words, a reason with the first of its keys; "": there are none."""
    reasons: dict[str, list[str]] = {}
    for key, why in keys_without_effect(path).items():
        reasons.setdefault(why, []).append(key)
    return "; ".join(f"{listed(keys)} ({why})" for why, keys in reasons.items())


def _read(path: Path, chain: tuple[Path, ...]) -> dict:
    """The mapping of a YAML file merged over its bases."""
    if path.resolve() in chain:
        raise InputError(f"{path}: _BASE_ leads back to itself: {' -> '.join(map(str, [*chain, path]))}")
    try:
        own = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a plain YAML file: {error}. Python objects in YAML are not read.") from error
    if not isinstance(own, dict):
        raise InputError(f"{path}: expected a mapping of keys at the top, got {type(own).__name__}")
    bases = own.pop("_BASE_", [])
    merged: dict = {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_path = path.parent / Path(base).expanduser()
        if not base_path.is_file():
            raise MissingFileError(f"{path}: its _BASE_ '{base}' does not exist (looked at {base_path})")
        _update(merged, _read(base_path, (*chain, path.resolve())))
    _update(merged, own)
    return merged


def _update(target: dict, source: Mapping) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _update(target[key], value)
        else:
            target[key] = value


def _parse(text: str) -> Any:
    """The Python literal that a string spells, else the string itself; the rule of detectron2's configs."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _assign(cfg: CfgNode, key: str, value: Any, *, where: str) -> None:
    *parents, name = key.split(".")
    node = cfg
    for parent in parents:
        node = node.get(parent) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or name not in node:
        known = list(flatten(get_cfg()))
        by_name = {known_key.rpartition(".")[2]: known_key for known_key in known}
        names = difflib.get_close_matches(name, by_name, n=1)
        hint = nearest(key, known) or "".join(f" Did you mean '{by_name[name]}'?" for name in names)
        raise InputError(f"{where}: unknown key '{key}'.{hint}")
    default = node[name]
    if isinstance(default, CfgNode):
        raise InputError(f"{where}: '{key}' is a group of keys ({', '.join(default)}), got the value {value!r}")
    node[name] = _convert(_parse(value) if isinstance(value, str) else value, default, key, where)


def _convert(value: Any, default: Any, key: str, where: str) -> Any:
    if default is None or value is None or type(value) is type(default):
        return value
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(default)(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    expected = {tuple: "list", list: "list"}.get(type(default), type(default).__name__)
    raise InputError(f"{where}: '{key}' takes a {expected} (default {default!r}), got {type(value).__name__} {value!r}")
