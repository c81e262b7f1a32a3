"""SAM, where the model has one: its weights are there, of the encoder, and those that were trained on."""

from __future__ import annotations

import warnings

import torch
from fvcore.common.config import CfgNode
from torch import nn

from fcclip.checks.issue import OK, WARNING, Issues
from fcclip.modeling.backbones.sam import build_sam
from fcclip.weights import WeightFile

_PREFIX = "sam.image_encoder."


def check_sam(issues: Issues, cfg: CfgNode, model: nn.Module, weights: WeightFile | None) -> None:
    """The SAM that a run would have, of the file that the config names and of what MODEL.WEIGHTS hold of it."""
    name, source = cfg.MODEL.SAM_NAME, cfg.MODEL.SAM_WEIGHTS
    fingerprint = (weights.rest.get("sam") if weights is not None else None) or {}
    tensors = weights.tensors if weights is not None else {}
    held = {key.removeprefix("sam."): value for key, value in tensors.items() if key.startswith(_PREFIX)}
    if not source and not held:
        remedy = "set MODEL.SAM_WEIGHTS to Meta's file, or to the folder with it"
        issues.add(WARNING, f"SAM '{name}': random weights, which see nothing", remedy)
        return
    compares = bool(source and fingerprint and not held)
    with torch.device("cpu" if compares else "meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that tensors without values are not written to
        sam = build_sam(name, source)
    if source:
        issues.add(OK, f"SAM '{name}': the weights '{source}' fit")
    if compares:
        sam.check(fingerprint, {}, source="MODEL.WEIGHTS")
        issues.add(OK, "it is the SAM that MODEL.WEIGHTS were trained on")
    if held:
        issues.add(OK, f"SAM '{name}': {len(held)} of its {len(model.sam.state_dict())} tensors are in MODEL.WEIGHTS")
