"""The operator of multi-scale deformable attention (Zhu et al., Deformable DETR, section 4.1) and its engines."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from torch import Tensor

from fcclip.config import lookup
from fcclip.ops.torch_engine import ms_deform_attn_torch

logger = logging.getLogger(__name__)

Engine = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]
ENGINES: dict[str, Engine] = {"torch": ms_deform_attn_torch}


def select_engine(name: str = "auto") -> str:
    """The name of the engine to use; the variable FCCLIP_MSDA wins over `name` (the key MODEL.MSDA_ENGINE).

    Raises:
        ValueError: an engine that does not exist.
    """
    wanted = os.environ.get("FCCLIP_MSDA") or name
    engine = "torch" if wanted == "auto" else wanted
    lookup("engine of multi-scale deformable attention (MODEL.MSDA_ENGINE)", engine, ENGINES)
    logger.info("multi-scale deformable attention: engine '%s'%s", engine, "" if wanted == engine else " (auto)")
    return engine


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    engine: str = "torch",
) -> Tensor:
    """Weighted sum of values sampled bilinearly around each query, over all levels.

    B batch, S = sum of H_l * W_l, M heads, D channels a head, N queries, L levels, P points.

    Args:
        value: (B, S, M, D) float, the levels one after the other, each row-major.
        spatial_shapes: L pairs (H_l, W_l), Python ints, in pixels.
        sampling_locations: (B, N, M, L, P, 2) float as `value`, (x, y), 0..1 inside a level, unbounded; pixel centres
            lie at (i + 0.5) / W_l and everything outside counts as 0.
        attention_weights: (B, N, M, L, P) float as `value`.
        engine: a key of `ENGINES`.

    Returns:
        (B, N, M * D) float as `value`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown engine.
    """
    total = sum(height * width for height, width in spatial_shapes)
    if value.dim() != 4 or value.shape[1] != total:
        raise ValueError(
            f"value must be (B, S, M, D) with S = {total} for the levels {list(spatial_shapes)}, got "
            f"{tuple(value.shape)}"
        )
    batch, _, heads, _ = value.shape
    expected = (batch, sampling_locations.shape[1], heads, len(spatial_shapes), attention_weights.shape[-1])
    if tuple(attention_weights.shape) != expected or tuple(sampling_locations.shape) != (*expected, 2):
        raise ValueError(
            f"expected attention_weights {expected} and sampling_locations {(*expected, 2)}, got "
            f"{tuple(attention_weights.shape)} and {tuple(sampling_locations.shape)}"
        )
    run = lookup("engine of multi-scale deformable attention", engine, ENGINES)
    return run(value, spatial_shapes, sampling_locations, attention_weights)
