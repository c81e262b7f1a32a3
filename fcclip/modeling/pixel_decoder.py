"""The pixel decoder of Mask2Former: a deformable encoder over strides 32, 16 and 8, then one top-down step to stride 4.

Legend: B images, d width, S = sum of H_l * W_l over the encoder's levels, M heads, L levels, P points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fcclip.errors import InputError
from fcclip.modeling.position import sine_positions
from fcclip.ops import ms_deform_attn_fused

NUM_POINTS = 4  # per level, as published


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections (Deformable DETR, equation 3).

    Args:
        dim: d, divisible by `heads`.
        levels, heads, points: L, M, P.
        engine: of `fcclip.ops.ms_deform_attn`.
    """

    def __init__(self, *, dim: int, levels: int, heads: int, points: int = NUM_POINTS, engine: str = "auto") -> None:
        super().__init__()
        if dim % heads:
            raise InputError(
                f"the width {dim} of deformable attention must be divisible by its {heads} heads "
                f"(MODEL.MASK_FORMER.NHEADS)"
            )
        self.heads, self.levels, self.points, self.engine = heads, levels, points, engine
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start on a ring of `heads` directions, one step further for each point; attention starts uniform."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (M, 2)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        ring = direction[:, None, None] * steps[None, None, :, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """query (B, S, d) and value (B, S, d) of the cells of all levels, whose shapes are given -> (B, S, d)."""
        values = self.value_proj(value).unflatten(-1, (self.heads, -1))
        sizes = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*sizes, 2))
        logits = self.attention_weights(query).unflatten(-1, sizes)
        return self.output_proj(ms_deform_attn_fused(values, shapes, offsets, logits, engine=self.engine))


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a ReLU network; norms after the residuals."""

    def __init__(
        self,
        *,
        dim: int,
        levels: int,
        heads: int,
        feedforward: int,
        dropout: float,
        engine: str,
        attention: type[MSDeformAttn] = MSDeformAttn,
    ) -> None:
        super().__init__()
        self.self_attn = attention(dim=dim, levels=levels, heads=heads, engine=engine)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """x (B, S, d), position (S, d) -> (B, S, d)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, x, shapes)))
        hidden = self.dropout(F.relu_(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class _Encoder(nn.Module):
    """Holds the layers under their published name."""

    def __init__(self, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class DeformableEncoder(nn.Module):
    """`num_layers` encoder layers over the concatenated levels; an embedding of the level is added to the position."""

    def __init__(self, *, dim: int, levels: int, num_layers: int, use_checkpoint: bool = False, **layer: Any) -> None:
        """`use_checkpoint`: what a layer computes is not kept for the gradient but computed again; `layer`: what each
        `EncoderLayer` takes besides its width and its levels."""
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.encoder = _Encoder([EncoderLayer(dim=dim, levels=levels, **layer) for _ in range(num_layers)])
        self.level_embed = nn.Parameter(torch.empty(levels, dim))
        nn.init.normal_(self.level_embed)
        for layer in self.encoder.layers:
            nn.init.xavier_uniform_(layer.linear1.weight)
            nn.init.xavier_uniform_(layer.linear2.weight)
            # as published: the layers start with the same biases
            layer.linear1.bias.data.copy_(self.encoder.layers[0].linear1.bias.data)
            layer.linear2.bias.data.copy_(self.encoder.layers[0].linear2.bias.data)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, d, H_l, W_l) -> the same shapes, each cell having looked at all levels."""
        shapes = [tuple(level.shape[-2:]) for level in maps]
        device = maps[0].device
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        positions = [sine_positions(*shape, x.shape[-1], device).flatten(1).T for shape in shapes]
        position = torch.cat([place + embed for place, embed in zip(positions, self.level_embed)])  # (S, d)
        for layer in self.encoder.layers:
            if self.use_checkpoint and self.training:
                x = checkpoint(layer, x, position, shapes, use_reentrant=False)
            else:
                x = layer(x, position, shapes)
        levels = x.transpose(1, 2).split([height * width for height, width in shapes], dim=-1)
        return [level.unflatten(-1, shape) for level, shape in zip(levels, shapes)]


class ConvNorm(nn.Conv2d):
    """A convolution followed by a group norm, the norm inside under the name `norm` as in detectron2; `norm=""` has a
    bias instead.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, norm: str) -> None:
        if norm not in ("GN", ""):
            raise InputError(f"MODEL.SEM_SEG_HEAD.NORM must be 'GN' or '', got '{norm}'")
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.norm = nn.GroupNorm(32, out_channels) if norm else nn.Identity()
        nn.init.kaiming_uniform_(self.weight, a=1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return self.norm(super().forward(x))


class MSDeformAttnPixelDecoder(nn.Module):
    """Turns backbone levels into mask features and a pyramid for the decoder.

    Args:
        in_channels: channels of each level given to `forward`, by name; the finest is stride 4.
        encoder_levels: names of the levels that enter the deformable encoder, fine to coarse.
        top_down_levels: names of the finer levels that are merged afterwards, fine to coarse.
        dim: d; mask_dim: channels of the mask features.
        feedforward: hidden width of the encoder layers.
        use_checkpoint: see `DeformableEncoder`.
    """

    def __init__(
        self,
        *,
        in_channels: Mapping[str, int],
        encoder_levels: Sequence[str],
        top_down_levels: Sequence[str],
        dim: int,
        mask_dim: int,
        heads: int,
        num_layers: int,
        feedforward: int = 1024,
        dropout: float = 0.0,
        norm: str = "GN",
        engine: str = "auto",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if dim % 32:
            raise InputError(f"MODEL.SEM_SEG_HEAD.CONVS_DIM must be divisible by the 32 groups of its norms, got {dim}")
        self.encoder_levels = list(encoder_levels)[::-1]  # coarse to fine, as the encoder sees them
        self.top_down_levels = list(top_down_levels)[::-1]
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_channels[name], dim, 1), nn.GroupNorm(32, dim)) for name in self.encoder_levels
        )
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        self.transformer = DeformableEncoder(
            dim=dim,
            levels=len(self.encoder_levels),
            heads=heads,
            feedforward=feedforward,
            num_layers=num_layers,
            dropout=dropout,
            engine=engine,
            use_checkpoint=use_checkpoint,
        )
        self.mask_features = nn.Conv2d(dim, mask_dim, 1)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)
        # published names: adapter_1 and layer_1 belong to the finest level
        for index, name in enumerate(top_down_levels, start=1):
            self.add_module(f"adapter_{index}", ConvNorm(in_channels[name], dim, 1, norm=norm))
            self.add_module(f"layer_{index}", ConvNorm(dim, dim, 3, norm=norm))

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Backbone levels -> mask features (B, mask_dim, H/4, W/4) and three maps (B, d, ·, ·) at strides 32, 16, 8;
        always fp32.
        """
        device = features[self.encoder_levels[0]].device
        with torch.autocast(device.type, enabled=False):
            projected = [
                projection(features[name].float()) for projection, name in zip(self.input_proj, self.encoder_levels)
            ]
            pyramid = self.transformer(projected)
            x = pyramid[-1]
            for index in range(len(self.top_down_levels), 0, -1):
                name = self.top_down_levels[-index]
                lateral = getattr(self, f"adapter_{index}")(features[name].float())
                x = lateral.add_(F.interpolate(x, size=lateral.shape[-2:], mode="bilinear", align_corners=False))
                del lateral  # in place and let go: two maps at stride 4 are much of the memory
                x = F.relu_(getattr(self, f"layer_{index}")(x))
            return self.mask_features(x), pyramid[:3]
