"""The out-of-vocabulary classifier: where a region lies in CLIP's image-text space (FC-CLIP, section 3.2).

A part is made from the frozen CLIP and called with the dense features (B, C, h, w) and mask logits (B, Q, ·, ·); it
gives region embeddings (B, Q, D) of any length. The two published ones borrow layers of the CLIP and train nothing. One
that trains is an `nn.Module` of its own; whether gradients flow is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcclip.modeling.classifier import mask_pool, resize_masks
from fcclip.modeling.mask_adapter import MaskAdapter


class RegionClassifier(Protocol):
    """What `FCCLIP` calls."""

    def __call__(self, dense: Tensor, mask_logits: Tensor) -> Tensor:
        """Dense features (B, C, h, w) and mask logits (B, Q, ·, ·) -> (B, Q, D), of any length."""


class MaskPool:
    """Averages the dense features inside each mask, then applies the head of a ConvNeXt CLIP: norm and projection.

    Args:
        visual: the image tower; it is not copied.
    """

    def __init__(self, visual: nn.Module) -> None:
        self.visual = visual

    @torch.no_grad()
    def __call__(self, dense: Tensor, mask_logits: Tensor) -> Tensor:
        pooled = mask_pool(dense, mask_logits)  # (B, Q, C)
        embedded = self.visual.head(self.visual.trunk.head(pooled.flatten(0, 1)[..., None, None]))
        return embedded.unflatten(0, pooled.shape[:2])


class MaskedAttentionPool:
    """The attention pool of a ResNet CLIP once per mask, its mean query seeing only the cells inside; an empty mask
    sees every cell.

    Args:
        visual: the image tower; it is not copied.
    """

    def __init__(self, visual: nn.Module) -> None:
        self.visual = visual

    @torch.no_grad()
    def __call__(self, dense: Tensor, mask_logits: Tensor) -> Tensor:
        pool = self.visual.attnpool
        heads, (height, width) = pool.num_heads, dense.shape[-2:]
        cells = dense.flatten(2).transpose(1, 2)  # (B, hw, C)
        grid = round((len(pool.positional_embedding) - 1) ** 0.5)
        spatial = pool.positional_embedding[1:].T.unflatten(-1, (grid, grid))[None]  # (1, C, s, s)
        spatial = F.interpolate(spatial, size=(height, width), mode="bilinear", align_corners=False)
        keys = cells + spatial.flatten(2).transpose(1, 2).to(cells.dtype)
        query = cells.mean(dim=1, keepdim=True) + pool.positional_embedding[0].to(cells.dtype)  # (B, 1, C)
        visible = (resize_masks(mask_logits, (height, width)) > 0).flatten(2)  # (B, Q, hw)
        visible = visible | ~visible.any(dim=-1, keepdim=True)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        # All masks share the query, so its scores are computed once: (B, heads, 1, hw), and each mask hides some.
        q = split(pool.q_proj(query))
        scores = (q * q.shape[-1] ** -0.5) @ split(pool.k_proj(keys)).transpose(-1, -2)
        shares = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)  # (B, heads, Q, hw)
        attended = shares @ split(pool.v_proj(keys))
        return pool.c_proj(attended.transpose(1, 2).flatten(2))


# Names of MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER: from the frozen CLIP, and the values of MODEL.MASK_ADAPTER for a
# part that trains, to the part.
OUT_OF_VOCABULARY_CLASSIFIERS: dict[str, Callable[..., RegionClassifier]] = {
    "mask_pool": lambda backbone, **_: MaskPool(backbone.clip_model.visual),
    "masked_attention_pool": lambda backbone, **_: MaskedAttentionPool(backbone.clip_model.visual),
    "mask_adapter": lambda backbone, **options: MaskAdapter(
        backbone.clip_model.visual, embed_dim=backbone.embed_dim, **options
    ),
}
