"""The keys that detectron2's config lacks, and what a config must say before something is built from it."""

from __future__ import annotations

import copy
from typing import Any

from detectron2.config import CfgNode

from fcclip.config import flatten, get_cfg
from fcclip.errors import InputError


def add_fcclip_config(cfg: CfgNode) -> None:
    """Adds every key of fcclip (DeepLab's, Mask2Former's, FC-CLIP's and our own) that the config does not have yet.

    Values that are there stay: the defaults of detectron2, and those of other projects. Published YAML files can be
    merged afterwards. It may be called again, before or after DeepLab's or Mask2Former's own function.

    Raises:
        ValueError: not a config of detectron2, or one with a value where a group of keys belongs.
    """
    if not isinstance(cfg, CfgNode):
        raise InputError(
            f"add_fcclip_config takes a config made by detectron2.config.get_cfg(), got {type(cfg).__module__}."
            f"{type(cfg).__name__}"
        )
    _complete(cfg, get_cfg(), prefix="")


def add_maskformer2_config(cfg: CfgNode) -> None:
    """The same as `add_fcclip_config`: published scripts call both."""
    add_fcclip_config(cfg)


def check_config(cfg: CfgNode) -> None:
    """Refuses a config that this model cannot be built from, or of which a key would silently do nothing.

    Raises:
        ValueError: names the key and the remedy.
    """
    if "FC_CLIP" not in cfg.MODEL:
        raise InputError(
            "the config has no MODEL.FC_CLIP: call fcclip.integrations.detectron2.add_fcclip_config(cfg) before "
            "cfg.merge_from_file(...)"
        )
    if cfg.MODEL.DEVICE == "auto":
        raise InputError("MODEL.DEVICE is 'auto', which detectron2 does not know: set it to 'cuda', 'mps' or 'cpu'")
    why = "nothing reads it inside detectron2 (compile a part: model.backbone.compile())"
    check_unread(cfg, ("MODEL.COMPILE",), why)
    check_unread(cfg, ("TEST.AMP.ENABLED",), "nothing reads it inside detectron2 (set model.amp_dtype)")
    why = "detectron2 has no such evaluator (train_net.py --eval-only has)"
    check_unread(cfg, ("MODEL.MASK_FORMER.TEST.RECALL_ON",), why)


def check_unread(cfg: CfgNode, keys: tuple[str, ...], why: str) -> None:
    """Refuses other values than the default of keys that nothing would read.

    Raises:
        ValueError: names the key, its value and the reason.
    """
    values, defaults = flatten(cfg), flatten(get_cfg())
    for key in keys:
        if values[key] != defaults[key]:
            raise InputError(f"'{key}' is {values[key]!r}, but {why}; leave the key at its default, {defaults[key]!r}")


def _complete(cfg: CfgNode, defaults: Any, *, prefix: str) -> None:
    for name, value in defaults.items():
        if isinstance(value, dict):
            if name not in cfg:
                setattr(cfg, name, type(cfg)())
            if not isinstance(cfg[name], CfgNode):
                raise InputError(f"'{prefix}{name}' is a group of keys in fcclip, but the config has {cfg[name]!r}")
            _complete(cfg[name], value, prefix=f"{prefix}{name}.")
        elif name not in cfg:
            setattr(cfg, name, copy.deepcopy(value))
