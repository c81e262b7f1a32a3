"""The frozen encoders: their weights are there, of the architecture, and those that MODEL.WEIGHTS were trained on."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from fvcore.common.config import CfgNode

from fcclip.checks.issue import ERROR, OK, WARNING, Issues
from fcclip.config import flatten, resolve_file
from fcclip.errors import InputError
from fcclip.files import listed
from fcclip.modeling import CLIPBackbone
from fcclip.modeling.backbones.clip import build_clip, tag_has_quick_gelu
from fcclip.weights import FrozenPart, WeightFile

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".pkl")
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_KEY = "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"


def check_frozen(issues: Issues, cfg: CfgNode, prefix: str, part: FrozenPart, weights: WeightFile | None) -> None:
    """The frozen part that a run would have, of the file that the config names and of what MODEL.WEIGHTS hold of it.

    Args:
        issues: takes what is found.
        cfg: of the run.
        prefix: beginning of the names of its weights in the state dict of the model.
        part: as shapes only.
        weights: MODEL.WEIGHTS; None: there are none.
    """
    values, kind = flatten(cfg), part.notes_key.upper()
    name_key, key = part.config_keys[0], part.config_keys[-1]
    name, source = values[name_key], values[key]
    fingerprint = (weights.rest.get(part.notes_key) if weights is not None else None) or {}
    tensors = weights.tensors if weights is not None else {}
    unused = tuple(constant for constant in part.constants if constant.endswith("."))
    held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    held = {key: value for key, value in held.items() if key not in part.constants and not key.startswith(unused)}
    known = {key: value.shape for key, value in part.state_dict().items() if key not in part.constants}
    foreign = [key for key, value in held.items() if known.get(key) != value.shape]
    missing = [key for key in known if key not in held and not key.endswith("num_batches_tracked")]
    if foreign:
        text = f"{len(foreign)} tensors of the {kind} in MODEL.WEIGHTS are unknown to it or of another shape"
        remedy = f"set {name_key} to the architecture of the weights"
        issues.add(ERROR, f"{name}: {text}: {listed(foreign)}", remedy)
    if source:
        check_file = check_clip_file if isinstance(part, CLIPBackbone) else _check_file
        check_file(issues, cfg, part, {} if held else fingerprint)
    elif held and not missing:
        issues.add(OK, f"{name}: its weights are those in MODEL.WEIGHTS")
    elif held:
        text = f"MODEL.WEIGHTS hold a part of the {kind}, and {key} is empty: {len(missing)} tensors would be random"
        issues.add(ERROR, text, f"set {key} to the {kind} of the training")
    elif fingerprint:
        text = f"{name}: {key} is empty, so MODEL.WEIGHTS would be put on a {kind} of random weights"
        issues.add(ERROR, text, f"set {key} to the {kind} of the training")
    else:
        issues.add(WARNING, f"{name}: random weights, which recognise nothing", f"set {key}")
    if held:  # a text tower brings its activation
        part.check(fingerprint, held, source="MODEL.WEIGHTS", complete=True)


def _check_file(issues: Issues, cfg: CfgNode, part: FrozenPart, fingerprint: Any) -> None:
    """The weights that the config names; they must be those of the fingerprint, {}: any."""
    name, source = (flatten(cfg)[key] for key in (part.config_keys[0], part.config_keys[-1]))
    part = copy.deepcopy(part)
    if fingerprint:
        part.to_empty(device="cpu")
    with warnings.catch_warnings(), torch.device("cpu" if fingerprint else "meta"):
        warnings.simplefilter("ignore")  # of torch, that tensors without values are not written to
        part.load_named(name, source)
    issues.add(OK, f"{name}: the weights '{source}' fit")
    if fingerprint:
        part.check(fingerprint, {}, source="MODEL.WEIGHTS")
        issues.add(OK, f"it is the {part.notes_key.upper()} that MODEL.WEIGHTS were trained on")


# ---- the CLIP ----


def check_clip_file(issues: Issues, cfg: CfgNode, part: CLIPBackbone, fingerprint: Any) -> None:
    """The weights that the config names, a tag or a file; they must be those of the fingerprint, {}: any."""
    name, pretrained = cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME, cfg.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS
    quick_gelu = cfg.MODEL.FC_CLIP.QUICK_GELU
    if Path(pretrained).suffix in _SUFFIXES or "/" in pretrained:
        path = resolve_file(pretrained, what=_KEY)
    else:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            known = f"its tags: {', '.join(tags) or 'none'}"
            raise InputError(f"{_KEY}: '{pretrained}' is neither a tag of '{name}' ({known}) nor a file of weights")
        path = cached_clip(open_clip.get_pretrained_cfg(name, pretrained))
        if quick_gelu == "auto" and tag_has_quick_gelu(name, pretrained):
            quick_gelu = "on"
    if path is None:
        remedy = f"without a network, download them elsewhere and set {_KEY} to the file"
        text = f"{name}: the weights '{pretrained}' are not on this machine; the run would download them"
        return issues.add(WARNING, text, remedy)
    with torch.device("cpu" if fingerprint else "meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that tensors without values are not written to
        clip = build_clip(name, str(path), quick_gelu=quick_gelu, families=(type(part),))
    issues.add(OK, f"{name}: the weights '{pretrained}' fit")
    if fingerprint:
        clip.check(fingerprint, {}, source="MODEL.WEIGHTS")
        issues.add(OK, "it is the CLIP that MODEL.WEIGHTS were trained on")
    return None


def cached_clip(tag: Mapping[str, Any]) -> Path | None:
    """The file behind an open_clip tag where an earlier download has put it, or None."""
    if tag.get("file"):
        return Path(tag["file"])
    repository, file_name = os.path.split(tag.get("hf_hub", ""))
    names = (Path(file_name).with_suffix(".safetensors").name, file_name) if file_name else _HUB_FILES
    for name in names if repository else ():
        path = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    path = Path("~/.cache/clip").expanduser() / os.path.basename(tag.get("url", ""))
    return path if path.is_file() else None
