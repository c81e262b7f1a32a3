"""The masked transformer decoder with FC-CLIP's classification head (Mask2Former section 3.2, FC-CLIP section 3.2).

Legend: B images, Q queries, d width, D embedding of CLIP, hw cells of a level, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcclip.errors import InputError
from fcclip.modeling.classifier import resize_masks, text_logits
from fcclip.modeling.position import sine_positions
from fcclip.structures import TextEmbeddings


@dataclass(frozen=True)
class MaskProposals:
    """What the decoder says: masks and the in-vocabulary opinion on them; one entry a supervised prediction set, the
    final one last.

    Args:
        class_logits: tensors (B, Q, K + 1), void last.
        mask_embeddings: tensors (B, Q, mask_dim).
        mask_features: (B, mask_dim, h, w).
        class_embeddings: tensors (B, Q, D), of which `text_logits` makes the class logits; empty: not kept.
    """

    class_logits: list[Tensor]
    mask_embeddings: list[Tensor]
    mask_features: Tensor
    class_embeddings: Sequence[Tensor] = ()

    def mask_logits(self, index: int = -1) -> Tensor:
        """(B, Q, h, w) of one prediction set."""
        return mask_product(self.mask_embeddings[index], self.mask_features)


def mask_product(embeddings: Tensor, features: Tensor) -> Tensor:
    """(B, Q, C) and (B, C, h, w) -> mask logits (B, Q, h, w)."""
    return (embeddings @ features.flatten(2)).unflatten(-1, features.shape[-2:])


class MeansInsideMasks(torch.autograd.Function):
    """`mask_pool` of masks that are products of embeddings and the features themselves, with gradients to the features.

    Takes features (B, C, h, w), embeddings (B, N, C) and how many masks to make at once; gives (B, N, C). Of a mask a
    byte a cell is kept for the gradient, and the gradients of all masks are summed in place.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, embeddings: Tensor, at_once: int) -> Tensor:
        kind, pooled, masks, counts = features.device.type, [], [], []
        ctx.features, ctx.at_once = (features.shape, features.dtype), at_once
        cells = features.flatten(2)
        if torch.is_autocast_enabled(kind):
            cells = cells.to(torch.get_autocast_dtype(kind))
        for some in embeddings.split(at_once, dim=1):
            logits = some @ cells
            masks.append(logits > 0)
            share = logits.copy_(masks[-1])
            counts.append(share.sum(-1, keepdim=True, dtype=torch.float32).clamp(min=1))  # float16 ends at 65,504
            pooled.append(share.div_(counts[-1]) @ cells.transpose(1, 2))
        ctx.save_for_backward(*masks, *counts)
        return torch.cat(pooled, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        shape, dtype = ctx.features
        half = len(ctx.saved_tensors) // 2
        saved = zip(ctx.saved_tensors[:half], ctx.saved_tensors[half:])
        total = gradient.new_zeros(shape, dtype=dtype).flatten(2)
        for some, (mask, count) in zip(gradient.split(ctx.at_once, dim=1), saved):
            factors = some.transpose(1, 2), mask.to(some.dtype).div_(count)
            total = total.baddbmm_(*factors) if some.dtype == dtype else total.add_(factors[0] @ factors[1])
        return total.view(shape), None, None


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`, batch first, fused, the mask shared by all
    heads.
    """

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise InputError(f"MODEL.MASK_FORMER.HIDDEN_DIM {dim} must be divisible by NHEADS {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
        """query (B, Q, d), key and value (B, hw, d), blocked (B, Q, hw) bool, True may not be attended -> (B, Q, d)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases)
        )
        mask = None if blocked is None else ~blocked[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _Residual(nn.Module):
    """A sub-layer's norm, before (`pre_norm`) or after its residual."""

    def __init__(self, *, dim: int, pre_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pre_norm = pre_norm

    def before(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.pre_norm else x

    def after(self, x: Tensor, update: Tensor) -> Tensor:
        return x + update if self.pre_norm else self.norm(x + update)


class CrossAttentionLayer(_Residual):
    """Queries look at the cells of one level inside their masks."""

    def __init__(self, *, dim: int, heads: int, pre_norm: bool) -> None:
        super().__init__(dim=dim, pre_norm=pre_norm)
        self.multihead_attn = Attention(dim=dim, heads=heads)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor | int, blocked: Tensor | None
    ) -> Tensor:
        """x (B, Q, d), memory (B, hw, d), position (hw, d) or 0 for none, blocked (B, Q, hw) -> (B, Q, d)."""
        query = self.before(x) + query_position
        return self.after(x, self.multihead_attn(query, memory + position, memory, blocked))


class SelfAttentionLayer(_Residual):
    """Queries look at each other."""

    def __init__(self, *, dim: int, heads: int, pre_norm: bool) -> None:
        super().__init__(dim=dim, pre_norm=pre_norm)
        self.self_attn = Attention(dim=dim, heads=heads)

    def forward(self, x: Tensor, query_position: Tensor) -> Tensor:
        """x (B, Q, d) -> (B, Q, d)."""
        value = self.before(x)
        query = value + query_position
        return self.after(x, self.self_attn(query, query, value))


class FeedForwardLayer(_Residual):
    """Two linear layers with a ReLU between."""

    def __init__(self, *, dim: int, feedforward: int, pre_norm: bool) -> None:
        super().__init__(dim=dim, pre_norm=pre_norm)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, Q, d) -> (B, Q, d)."""
        return self.after(x, self.linear2(F.relu(self.linear1(self.before(x)))))


class MLP(nn.Module):
    """Linear layers with ReLU between, none after the last."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(…, widths[0]) -> (…, widths[-1])."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DecoderHooks:
    """What may come between the layers of the decoder in one call; as it is, nothing does."""

    def after_heads(self, layer: int, x: Tensor, embedding: Tensor) -> Tensor:
        """The queries that the next layer sees.

        Args:
            layer: the next one, counted from 0.
            x: (B, Q, d) queries, whose masks are predicted already.
            embedding: (B, Q, mask_dim), the embeddings of those masks.
        """
        return x

    def memory(self, layer: int, memory: Tensor, position: Tensor) -> tuple[Tensor, Tensor | int]:
        """What a layer looks at: memory (B, hw, d) and the position (hw, d) of its keys, 0 for none."""
        return memory, position


NO_HOOKS = DecoderHooks()


class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Queries that look at three levels in turn, each only inside the mask it predicted last.

    Args:
        in_channels: width of the pyramid (MODEL.SEM_SEG_HEAD.CONVS_DIM).
        dim, mask_dim: d; they must be equal, because the classifier adds a pooled mask feature to a query.
        embed_dim: D.
        num_queries, num_layers, heads, feedforward: as named.
        pre_norm: norms before the sub-layers instead of after the residuals.
        enforce_input_proj: 1x1 projections of the pyramid even where the widths agree.
    """

    num_levels = 3

    def __init__(
        self,
        *,
        in_channels: int,
        dim: int,
        mask_dim: int,
        embed_dim: int,
        num_queries: int,
        num_layers: int,
        heads: int,
        feedforward: int,
        pre_norm: bool = False,
        enforce_input_proj: bool = False,
    ) -> None:
        super().__init__()
        if mask_dim != dim:
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.MASK_DIM ({mask_dim}) must equal MODEL.MASK_FORMER.HIDDEN_DIM ({dim})"
            )
        if num_layers < 0:
            raise InputError(f"MODEL.MASK_FORMER.DEC_LAYERS must be at least 1, got {num_layers + 1}")
        layer = {"dim": dim, "pre_norm": pre_norm}
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(heads=heads, **layer) for _ in range(num_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(heads=heads, **layer) for _ in range(num_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(feedforward=feedforward, **layer) for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(dim)
        self.query_feat = nn.Embedding(num_queries, dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(self.num_levels, dim)
        self.input_proj = nn.ModuleList()
        for _ in range(self.num_levels):
            if in_channels == dim and not enforce_input_proj:
                self.input_proj.append(nn.Identity())
                continue
            projection = nn.Conv2d(in_channels, dim, 1)
            nn.init.kaiming_uniform_(projection.weight, a=1)
            nn.init.zeros_(projection.bias)
            self.input_proj.append(projection)
        self.mask_embed = MLP([dim, dim, dim, mask_dim])
        self._mask_pooling_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.class_embed = MLP([dim, dim, dim, embed_dim])
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        pyramid: Sequence[Tensor],
        mask_features: Tensor,
        text: TextEmbeddings,
        *,
        all_sets: bool,
        hooks: DecoderHooks = NO_HOOKS,
    ) -> MaskProposals:
        """Predictions of every layer or of the last.

        Args:
            pyramid: three maps (B, in_channels, ·, ·) at strides 32, 16, 8.
            mask_features: (B, mask_dim, H/4, W/4).
            text: K classes and void, which is the last.
            all_sets: also score the start queries and every layer but the last (deep supervision); else only the last.
            hooks: what comes between the layers.

        Returns:
            `num_layers` + 1 prediction sets, or one.
        """
        memories, positions, sized_features = [], [], []
        for index, level in enumerate(pyramid):
            projected = self.input_proj[index](level).flatten(2).transpose(1, 2)
            memories.append(projected + self.level_embed.weight[index])
            positions.append(sine_positions(*level.shape[-2:], projected.shape[-1], level.device).flatten(1).T)
            # resizing commutes with the product, so the masks of a level come from features resized once
            sized_features.append(resize_masks(mask_features.detach(), level.shape[-2:]))

        x = self.query_feat.weight[None].expand(mask_features.shape[0], -1, -1)  # len() would fix the size in an export
        query_position = self.query_embed.weight
        num_layers = len(self.transformer_cross_attention_layers)
        queries, mask_embeddings = [], []  # of the prediction sets
        for step in range(num_layers + 1):
            normed = self.decoder_norm(x)
            embedding = self.mask_embed(normed)
            if all_sets or step == num_layers:
                queries.append(normed)
                mask_embeddings.append(embedding)
            if step == num_layers:
                break
            level = step % self.num_levels
            blocked = attention_mask(embedding, sized_features[level])
            x = hooks.after_heads(step, x, embedding)
            memory, position = hooks.memory(step, memories[level], positions[level])
            x = self.transformer_cross_attention_layers[step](x, query_position, memory, position, blocked)
            x = self.transformer_self_attention_layers[step](x, query_position)
            x = self.transformer_ffn_layers[step](x)
        classes = self.embed_classes(torch.cat(queries, dim=1), torch.cat(mask_embeddings, dim=1), mask_features)
        class_embeddings = classes.chunk(len(queries), dim=1)
        class_logits = [text_logits(each, text, self.logit_scale) for each in class_embeddings]
        return MaskProposals(class_logits, mask_embeddings, mask_features, class_embeddings)

    def embed_classes(self, normed: Tensor, embedding: Tensor, mask_features: Tensor) -> Tensor:
        """The in-vocabulary classifier before it meets any class: normed queries (B, N, d), mask embeddings ->
        (B, N, D), of any length; N are the queries of one prediction set or of several."""
        pooled = MeansInsideMasks.apply(mask_features, embedding.detach(), self.query_feat.num_embeddings)
        return self.class_embed(self._mask_pooling_proj(pooled) + normed)


@torch.no_grad()
def attention_mask(embedding: Tensor, features: Tensor) -> Tensor:
    """Where queries may not look: outside their mask, unless that is everywhere.

    Args:
        embedding: (B, Q, C) mask embeddings.
        features: (B, C, h, w) mask features at the level's size.

    Returns:
        (B, Q, h * w) bool, True is blocked; no row is True throughout.
    """
    blocked = (embedding @ features.flatten(2)).sigmoid() < 0.5
    return blocked & ~blocked.all(dim=-1, keepdim=True)
