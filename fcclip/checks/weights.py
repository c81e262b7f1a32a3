"""The model on the meta device, and whether MODEL.WEIGHTS fit it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping

import torch
import yaml
from fvcore.common.config import CfgNode
from torch import nn

from fcclip.checks.issue import ERROR, NOTE, OK, WARNING, Issues
from fcclip.checks.machine import sized
from fcclip.config import flatten, keys_that, resolve_file, with_values
from fcclip.modeling import Architecture, build_model
from fcclip.vocabulary import Vocabulary
from fcclip.weights import (
    WeightFile,
    frozen_prefixes,
    initialise_from,
    is_base,
    is_mask2former,
    load_state,
    read_weight_file,
)
from fcclip.weights.checkpoint import own_names


def build_on_meta(cfg: CfgNode, **vocabularies: Vocabulary) -> Architecture:
    """The model of a config as shapes only; nothing is downloaded or read besides architecture and vocabularies, which
    may be given as for `build_model`."""
    sources = ("FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "SAM_WEIGHTS", "FUSIONER.TIMM_WEIGHTS")
    cfg = with_values(cfg, {"MODEL.DEVICE": "meta", **{f"MODEL.{key}": "" for key in sources}})
    with torch.device("meta"):
        return build_model(cfg, **vocabularies)


def check_model(issues: Issues, cfg: CfgNode) -> Architecture:
    """The model as shapes only.

    Raises:
        ValueError: the config cannot be built.
    """
    anything = Vocabulary.from_names("anything")
    model = build_on_meta(cfg, train_vocabulary=anything, test_vocabulary=anything)
    queries = f"; {cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES} queries" if hasattr(model, "sem_seg_head") else ""
    total = sum(weight.numel() for weight in model.parameters()) / 1e6
    learning = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) / 1e6
    issues.add(
        OK,
        f"{cfg.MODEL.META_ARCHITECTURE} on {cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME}: {total:,.1f} M parameters, of which "
        f"{learning:,.1f} M learn{queries}",
    )
    return model


def check_weights(issues: Issues, cfg: CfgNode, model: nn.Module | None, *, training: bool) -> WeightFile | None:
    """MODEL.WEIGHTS: readable, all keys and shapes those of the model, and made for the same settings."""
    name = cfg.MODEL.WEIGHTS
    if not name:
        if training:
            issues.add(NOTE, "MODEL.WEIGHTS is empty: training starts with freshly initialised heads")
        else:
            issues.add(ERROR, "nothing to evaluate: MODEL.WEIGHTS is empty", "--weights FILE, or MODEL.WEIGHTS FILE")
        return None
    path = resolve_file(name, what="MODEL.WEIGHTS")
    file = own_names(read_weight_file(path, what="MODEL.WEIGHTS"))
    frozen = sum("clip_model." in key for key in file.tensors)
    size = f"{sized(path.stat().st_size)}, {len(file.tensors)} tensors, {frozen} of them CLIP's"
    issues.add(OK, f"{name}: {file.kind}, {size}")
    if model is not None:
        with issues.attempt():
            _check_fit(issues, file, model, name, training=training)
    _compare_configs(issues, cfg, file, training=training)
    return file


def _check_fit(issues: Issues, file: WeightFile, model: nn.Module, name: str, *, training: bool) -> None:
    """The heads of the file in those of the model, by the code that loads; the model has no values to overwrite."""
    heads = nn.Module()  # the CLIP has a section of its own
    for part, module in model.named_children():
        if not getattr(module, "is_frozen", False):
            heads.add_module(part, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that tensors without values are not written to
        if training and is_mask2former(file.tensors):
            start = initialise_from(heads, file.tensors, source=name)
            what = f"{len(start.taken)} tensors taken, {len(start.fresh)} stay fresh"
            issues.add(OK, f"a start from Mask2Former: {what}")
            return
        frozen = frozen_prefixes(model)
        own = {key: value for key, value in file.tensors.items() if not key.startswith(frozen)}
        heads.added_parts = getattr(model, "added_parts", ())
        if training and is_base(heads, own):
            load_state(heads, own, source=name, may_lack=heads.added_parts)
            issues.add(OK, f"a start from weights without {', '.join(heads.added_parts)}")
            return
        load_state(heads, own, source=name)
    issues.add(OK, "keys and shapes are those of the model")


def _compare_configs(issues: Issues, cfg: CfgNode, file: WeightFile, *, training: bool) -> None:
    """Settings stored beside the weights against those of this config."""
    stored = file.rest.get("config")
    with contextlib.suppress(yaml.YAMLError):
        stored = yaml.safe_load(stored) if isinstance(stored, str) else stored
    if not isinstance(stored, Mapping):
        text = f"it was trained with {stored}" if stored else "it does not say with which settings it was trained"
        return issues.add(NOTE, text)
    trained, here = flatten(stored), flatten(cfg)
    levels = {"changes_meaning": WARNING if training else ERROR, "changes_shapes": WARNING}
    if not file.rest.get("clip"):  # where the file has a fingerprint, that is compared instead of names
        levels["chooses_clip"] = WARNING
    for fact, level in levels.items():
        for key in keys_that(fact):
            if trained.get(key) not in (None, here[key]):
                text = f"{key} is {here[key]!r}, but the weights were trained with {trained[key]!r}"
                issues.add(level, text, f"{key} {trained[key]!r}")
