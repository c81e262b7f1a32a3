"""The CLIP: its weights are there, of the architecture, with a known activation, and those that were trained on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from fvcore.common.config import CfgNode
from torch import nn

from fcclip.checks.issue import ERROR, NOTE, OK, WARNING, Issues
from fcclip.config import resolve_file
from fcclip.errors import InputError
from fcclip.files import listed
from fcclip.modeling.backbones.clip import CONSTANTS, CLIPBackbone, build_clip, tag_has_quick_gelu
from fcclip.weights import WeightFile, frozen_parts

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".pkl")
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_KEY = "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"


def check_clip(issues: Issues, cfg: CfgNode, model: nn.Module | None, weights: WeightFile | None) -> None:
    """The CLIP that a run would have, of the file that the config names and of what MODEL.WEIGHTS hold of it."""
    if model is None:
        return issues.add(NOTE, "not looked at, because the model cannot be built")
    clips = {prefix: part for prefix, part in frozen_parts(model).items() if isinstance(part, CLIPBackbone)}
    if not clips:
        return issues.add(NOTE, "the model has none")
    [(prefix, clip)] = clips.items()
    prefix += "clip_model."
    fingerprint = weights.rest.get("clip") if weights is not None else None
    tensors = weights.tensors if weights is not None else {}
    held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    known = {key: value.shape for key, value in clip.clip_model.state_dict().items()}
    foreign = [key for key, value in held.items() if key not in CONSTANTS and known.get(key) != value.shape]
    if foreign:
        text = f"{len(foreign)} tensors of the CLIP in MODEL.WEIGHTS are unknown to it or of another shape"
        remedy = "set MODEL.FC_CLIP.CLIP_MODEL_NAME to the architecture of the weights"
        issues.add(ERROR, f"{cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME}: {text}: {listed(foreign)}", remedy)
    if cfg.MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS:
        _check_file(issues, cfg, fingerprint, family=type(clip), is_replaced=bool(held))
    else:
        missing = [key for key in known if key not in held and not key.endswith("num_batches_tracked")]
        _check_without_file(issues, cfg, held=len(held), missing=missing, fingerprint=fingerprint)
    if held:  # a text tower brings its activation
        own = {f"clip_model.{key}": value for key, value in held.items()}
        clip.check(fingerprint or {}, own, source="MODEL.WEIGHTS", complete=True)
    return None


def _check_file(
    issues: Issues, cfg: CfgNode, fingerprint: Any, *, family: type[CLIPBackbone], is_replaced: bool
) -> None:
    """The weights that the config names; they must be those of the fingerprint, unless MODEL.WEIGHTS replace them."""
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
    compares = bool(fingerprint) and not is_replaced
    with torch.device("cpu" if compares else "meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that tensors without values are not written to
        clip = build_clip(name, str(path), quick_gelu=quick_gelu, families=(family,))
    issues.add(OK, f"{name}: the weights '{pretrained}' fit")
    if compares:
        clip.check(fingerprint, {}, source="MODEL.WEIGHTS")
        issues.add(OK, "it is the CLIP that MODEL.WEIGHTS were trained on")
    return None


def _check_without_file(issues: Issues, cfg: CfgNode, *, held: int, missing: list[str], fingerprint: Any) -> None:
    """Where the config names no CLIP weights, MODEL.WEIGHTS must hold all."""
    name, remedy = cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME, f"set {_KEY} to the CLIP of the training"
    if held and not missing:
        issues.add(OK, f"{name}: its weights are those in MODEL.WEIGHTS")
    elif held:
        text = f"MODEL.WEIGHTS hold a part of the CLIP, and {_KEY} is empty: {len(missing)} tensors would be random"
        issues.add(ERROR, text, remedy)
    elif fingerprint:
        text = f"{name}: {_KEY} is empty, so MODEL.WEIGHTS would be put on a CLIP of random weights"
        issues.add(ERROR, text, remedy)
    else:
        remedy = f"set {_KEY} to a tag of open_clip or to a file"
        issues.add(WARNING, f"{name}: random weights, which recognise nothing", remedy)


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
