"""The file or tag of the CLIP: it is there, of the architecture, with a known activation."""

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

from fcclip.checks.issue import OK, WARNING, Issues
from fcclip.config import resolve_file
from fcclip.errors import InputError
from fcclip.modeling.backbones.clip import CLIPBackbone, build_clip, tag_has_quick_gelu

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".pkl")
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_KEY = "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"


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
