"""FrozenSeg's pixel decoder: FC-CLIP's, and beside it a deformable encoder on the one level that SAM gives (FrozenSeg,
section 3.2).

The encoder comes in two layouts. The published one, `reference`, was made for three levels and given one, so that its
kernel read other tokens' offsets and weights; released weights fit no other. `clean` has one level.

Legend: B images, d width, S cells, M heads, P points.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcclip.modeling.pixel_decoder import DeformableEncoder, MSDeformAttn, MSDeformAttnPixelDecoder
from fcclip.ops import ms_deform_attn

LAYOUTS = {"clean": 1, "reference": 3}  # name -> levels that the parameters are made for


class SamAttention(MSDeformAttn):
    """Deformable attention that may have parameters for more levels than it is given."""

    def forward(self, query: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """As `MSDeformAttn`. With parameters for three levels and one level given, each token computes three times as
        many offsets and weights as are read, and they are read one after the other: what token q samples stands with
        token q // 3. The weights of a head then do not sum up to 1. The published kernel ran over the images of a batch
        in the same way; here each image is read by itself, as with a batch of one.
        """
        if self.levels == len(shapes):
            return super().forward(query, value, shapes)
        [(height, width)] = shapes
        values = self.value_proj(value).unflatten(-1, (self.heads, -1))
        sizes = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*sizes, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, sizes[1:])
        x = (torch.arange(width, device=query.device) + 0.5) / width
        y = (torch.arange(height, device=query.device) + 0.5) / height
        centres = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)  # (S, 2)
        locations = centres[:, None, None, None] + offsets / torch.stack([x.new_tensor(width), x.new_tensor(height)])
        read = (self._as_read(locations), self._as_read(weights))
        return self.output_proj(ms_deform_attn(values, shapes, *read, engine=self.engine))

    def _as_read(self, computed: Tensor) -> Tensor:
        """(B, S, M, 3, P, ...) -> (B, S, M, 1, P, ...), the first third of memory."""
        tokens = computed.shape[1]
        return computed.flatten(1, 3)[:, : tokens * self.heads].unflatten(1, (tokens, self.heads, 1))

    def use_levels(self, levels: int) -> None:
        """Gives the projections that depend on levels another shape and fresh values, in place, so that an optimiser
        and others who hold the parameters keep them."""
        self.levels = levels
        for projection, per_point in ((self.sampling_offsets, 2), (self.attention_weights, 1)):
            projection.out_features = self.heads * levels * self.points * per_point
            projection.weight.data = projection.weight.new_empty(projection.out_features, projection.in_features)
            projection.bias.data = projection.bias.new_empty(projection.out_features)
        self.reset_parameters()


class SamTransformer(DeformableEncoder):
    """The deformable encoder on SAM's one level; weights that are loaded decide its layout.

    Args:
        layout: of `LAYOUTS`.
        encoder: as for `DeformableEncoder`.
    """

    def __init__(self, *, layout: str = "clean", **encoder: Any) -> None:
        super().__init__(levels=LAYOUTS[layout], attention=SamAttention, **encoder)

    @property
    def layout(self) -> str:
        """Its name."""
        return next(name for name, levels in LAYOUTS.items() if levels == len(self.level_embed))

    def use_layout(self, layout: str) -> None:
        """Changes the layout; what depends on it has fresh values afterwards."""
        levels = LAYOUTS[layout]
        if levels == len(self.level_embed):
            return
        self.level_embed.data = self.level_embed.new_empty(levels, self.level_embed.shape[1]).normal_()
        for layer in self.encoder.layers:
            layer.self_attn.use_levels(levels)

    def state_like(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict that it would have in the layout of these weights, which have its own names; no values."""
        shapes = copy.deepcopy(self).to("meta")
        shapes.use_layout(_layout_of(weights.get("level_embed"), self.layout))
        return shapes.state_dict()

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        """Called by torch before the layers inside are loaded."""
        self.use_layout(_layout_of(state_dict.get(f"{prefix}level_embed"), self.layout))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _layout_of(level_embed: Tensor | None, default: str) -> str:
    names = {levels: name for name, levels in LAYOUTS.items()}
    return default if level_embed is None else names.get(len(level_embed), default)


class FrozenSegPixelDecoder(MSDeformAttnPixelDecoder):
    """FC-CLIP's pixel decoder, and SAM's features made ready for the decoder.

    Args:
        sam_channels: channels of SAM's features.
        decoder: as for `MSDeformAttnPixelDecoder`; the encoder on SAM's level has the same width, heads, layers, …
    """

    def __init__(self, *, sam_channels: int, **decoder: Any) -> None:
        super().__init__(**decoder)
        dim = decoder["dim"]
        self.fpn3 = nn.Sequential(
            nn.Conv2d(sam_channels, dim, 3, stride=2, padding=1), nn.GroupNorm(32, dim), nn.ReLU()
        )
        shared = ("dim", "heads", "num_layers", "feedforward", "dropout", "engine", "use_checkpoint")
        self.sam_transformer = SamTransformer(**{key: decoder[key] for key in shared})

    def refine(self, sam: Tensor) -> Tensor:
        """SAM's features (B, sam_channels, h, w) -> (B, d, h / 2, w / 2), rounded up; always fp32."""
        with torch.autocast(sam.device.type, enabled=False):
            return self.sam_transformer([self.fpn3(sam.float())])[0]
