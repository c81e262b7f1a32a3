"""Which parameters learn how fast, and how far one step may go: parameter groups, AdamW and SGD, gradient clipping.

The published recipe makes one group per tensor. Groups with the same learning rate and weight decay are merged here:
the updates are the same, and the fused kernels see a few long lists instead of hundreds of short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from fcclip.config import lookup
from fcclip.errors import InputError

# Layers whose affine parameters take WEIGHT_DECAY_NORM; batch and instance norms have a base class of their own.
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
# Parts of parameter names that are never decayed, whatever layer owns them.
_UNDECAYED = ("relative_position_bias_table", "absolute_pos_embed")
# Devices on which torch updates a whole group in one kernel.
_FUSED_DEVICES = {"cpu", "cuda", "mps"}

GradientClipping = Callable[[Sequence[nn.Parameter]], "Tensor | None"]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    weight_decay_norm: float,
    weight_decay_embed: float,
    backbone_multiplier: float,
) -> list[dict]:
    """The trainable parameters of a model in groups of equal learning rate and weight decay.

    Frozen parameters are left out and shared ones are taken once. Of the rules, later ones win: everything decays by
    `weight_decay`; a module whose path contains "backbone" learns at `lr * backbone_multiplier`; position tables do
    not decay; norm layers and embeddings decay by their own values. Biases decay like weights.

    Returns:
        torch optimiser groups in module order, each with `params` as (name, parameter) pairs, `lr` and `weight_decay`.

    Raises:
        ValueError: nothing in the model is trainable.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> decay = {"weight_decay": 0.05, "weight_decay_norm": 0.0, "weight_decay_embed": 0.0}
        >>> groups = parameter_groups(model, lr=1e-4, backbone_multiplier=0.1, **decay)
        >>> [([name for name, _ in group["params"]], group["weight_decay"]) for group in groups]
        [(['0.weight', '0.bias'], 0.05), (['1.weight', '1.bias'], 0.0)]
    """
    groups: dict[tuple[float, float], dict] = {}
    taken: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in taken:
                continue
            taken.add(parameter)
            own_lr = lr * backbone_multiplier if "backbone" in path else lr
            decay = weight_decay
            if any(part in name for part in _UNDECAYED):
                decay = 0.0
            if isinstance(module, NORM_LAYERS):
                decay = weight_decay_norm
            if isinstance(module, nn.Embedding):
                decay = weight_decay_embed
            group = groups.setdefault((own_lr, decay), {"params": [], "lr": own_lr, "weight_decay": decay})
            group["params"].append((f"{path}.{name}" if path else name, parameter))
    if not groups:
        raise InputError("the model has no trainable parameter: every one has requires_grad False")
    return list(groups.values())


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of SOLVER.* for the trainable parameters of `model`.

    Raises:
        ValueError: unknown SOLVER.OPTIMIZER, or nothing to train.
    """
    solver = cfg.SOLVER
    known = {"ADAMW": (torch.optim.AdamW, {}), "SGD": (torch.optim.SGD, {"momentum": solver.MOMENTUM})}
    optimizer, options = lookup("SOLVER.OPTIMIZER", solver.OPTIMIZER, known)
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if hasattr(model, "parameter_groups"):
        groups = model.parameter_groups(**common, decoder_lr=solver.DECODER_LR, decay_end=solver.WEIGHT_DECAY_END)
    else:
        groups = parameter_groups(
            model,
            **common,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            weight_decay_embed=solver.WEIGHT_DECAY_EMBED,
            backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        )
    devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
    return optimizer(groups, lr=solver.BASE_LR, fused=devices <= _FUSED_DEVICES or None, **options)


def build_gradient_clipping(cfg: CfgNode) -> GradientClipping:
    """The gradient clipping of SOLVER.CLIP_GRADIENTS, to be called on unscaled gradients just before the step.

    Returns:
        A function of the trainable parameters that clips their gradients in place and returns the 2-norm of all
        gradients before clipping as a scalar tensor, or None where the type does not compute it.

    Raises:
        ValueError: unknown CLIP_TYPE, or a negative CLIP_VALUE.
    """
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    known = {"full_model": _clip_full_model, "norm": _clip_each_norm, "value": _clip_each_value}
    chosen = lookup("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clipping.CLIP_TYPE, known)
    if clipping.CLIP_VALUE < 0:
        raise InputError(f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must not be negative, got {clipping.CLIP_VALUE}")
    if not clipping.ENABLED or (clipping.CLIP_TYPE == "full_model" and clipping.CLIP_VALUE == 0):
        return _no_clip
    return lambda parameters: chosen(parameters, value=clipping.CLIP_VALUE, norm_type=clipping.NORM_TYPE)


def trainable_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Every parameter the optimiser updates, in group order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_same_groups(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, source: str | Path) -> None:
    """Refuses the state, in the file `source`, of an optimiser of other parameter groups."""
    own = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    stored = [group.get("param_names") or [] for group in state["param_groups"]]
    if own != stored:
        raise InputError(
            f"the optimiser state in '{source}' belongs to other parameter groups ({list(map(len, stored))} parameters "
            f"a group, here {list(map(len, own))}): SOLVER.OPTIMIZER, BASE_LR, the WEIGHT_DECAY keys and the frozen "
            "parts must be those of the run that is resumed"
        )


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step is taken.

    Args:
        gradient_clipping: clips gradients before the step.
        amp_dtype: autocast type of the forward pass; None for full precision. float16 adds a loss scaler.
        accumulate: equal parts that a batch is cut into, one after the other through the model.
        max_skips: steps in a row that may be left out because a loss or a gradient is not finite.
    """

    gradient_clipping: GradientClipping
    amp_dtype: torch.dtype | None = None
    accumulate: int = 1
    max_skips: int = 0

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise InputError(f"SOLVER.ACCUMULATE must be at least 1, got {self.accumulate}")


def _clip_full_model(parameters: Iterable[nn.Parameter], *, value: float, norm_type: float) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, value)  # always the 2-norm; the published code ignores NORM_TYPE here


def _clip_each_norm(parameters: Iterable[nn.Parameter], *, value: float, norm_type: float) -> None:
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, value, norm_type=norm_type)


def _clip_each_value(parameters: Iterable[nn.Parameter], *, value: float, norm_type: float) -> None:
    nn.utils.clip_grad_value_(parameters, value)


def _no_clip(parameters: Iterable[nn.Parameter]) -> None:
    return None
