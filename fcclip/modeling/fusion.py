"""The trained parts of Fusioner (Ma et al., BMVC 2022, section 3): cross-modality fusion and visual decoder.

Legend: B images, L = h * w visual tokens, N class names, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fcclip.errors import InputError

_SHORTEST = 1e-12  # of vectors that cosines are taken of, as torch has it
NUM_UPSAMPLINGS = 3  # by two each, after the first three convolutions of the decoder


class Fusion(nn.Module):
    """Self-attention over visual tokens and class tokens together; no positions, no mask.

    Args:
        vision_dim, text_dim: width of the tokens of the two encoders.
        width: D.
        num_layers, heads: of the transformer.
        dropout: of its projections.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        text_dim: int,
        width: int,
        num_layers: int,
        heads: int,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise InputError(f"MODEL.FUSIONER.WIDTH {width} must be divisible by MODEL.FUSIONER.HEADS {heads}")
        self.visual_proj = nn.Sequential(nn.LayerNorm(vision_dim), nn.Linear(vision_dim, width), nn.LayerNorm(width))
        self.text_proj = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.cls_emb = nn.Parameter(torch.randn(1, width))
        rates = [drop_path_rate * layer / max(num_layers - 1, 1) for layer in range(num_layers)]
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, proj_drop=dropout, drop_path=rate, norm_layer=nn.LayerNorm)
            for rate in rates
        )
        self.norm = nn.LayerNorm(width)
        self.proj_patch = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.proj_classes = nn.Parameter(width**-0.5 * torch.randn(width, width))

    def forward(self, patches: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """patches (B, L, ·) and classes (B, N, ·), of unit length -> fused (B, L, D) and (B, N, D)."""
        x = torch.cat([self.visual_proj(patches), self.text_proj(classes) + self.cls_emb], dim=1)
        for block in self.blocks:
            x = block(x)
        patches, classes = self.norm(x).split([patches.shape[1], classes.shape[1]], dim=1)
        return patches @ self.proj_patch, classes @ self.proj_classes


class ConvDecoder(nn.Module):
    """Upsamples a map of `width` channels by eight: 3 x 3 convolutions with instance norm, the last one 1 x 1."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        for index in range(NUM_UPSAMPLINGS + 1):
            self.add_module(f"conv_{index}", nn.Conv2d(width, width, 3, padding=1))
        self.conv_4 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, 8 h, 8 w), channels last in memory as between all steps."""
        x = _instance_norm_relu(self.conv_0(x.contiguous(memory_format=torch.channels_last)))
        for conv in (self.conv_1, self.conv_2, self.conv_3):
            x = _instance_norm_relu(upsampled_conv(x, conv.weight, conv.bias))
        return F.linear(x.permute(0, 2, 3, 1), self.conv_4.weight[..., 0, 0], self.conv_4.bias).permute(0, 3, 1, 2)


def _instance_norm_relu(x: Tensor) -> Tensor:
    """As groups of one channel, since torch's instance norm does not know channels last."""
    return F.relu(F.group_norm(x, x.shape[1]), inplace=True)


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3 x 3 convolution, padding 1, of what is upsampled bilinearly by two, without upsampling the input.

    Upsampling treats all channels alike, so the nine taps can mix channels before it, at a quarter of the pixels; then
    it shifts and adds what they gave, column by column and row by row. The same numbers up to rounding.

    Args:
        x: (B, C, h, w), best channels last.
        weight, bias: (D, C, 3, 3) and (D,).

    Returns:
        (B, D, 2 h, 2 w), channels last.
    """
    batch, _, height, width = x.shape
    columns, rows = (_shifted_upsampling(length, x) for length in (width, height))
    columns, rows = columns.transpose(1, 2).flatten(1), rows.flatten(1)  # (2 w, w * tap), (2 h, tap * h)
    pixels, wide = x.permute(0, 2, 3, 1).flatten(0, 2), []
    for taps in weight.permute(2, 1, 3, 0):  # of a row of the kernel, (C, column, D)
        mixed = (pixels @ taps.flatten(1)).view(batch * height, 3 * width, -1)
        wide.append((columns.expand(len(mixed), -1, -1) @ mixed).view(batch, height, -1))  # (B, h, 2 w * D)
    result = torch.baddbmm(bias.repeat(2 * width), rows.expand(batch, -1, -1), torch.cat(wide, dim=1))
    return result.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def _shifted_upsampling(length: int, like: Tensor) -> Tensor:
    """(2 length, tap, length): bilinear upsampling by two, seen one before, at and one after each place; there is 0
    beyond the ends."""
    return F.pad(_bilinear(length, 2 * length, like), (0, 0, 1, 1)).unfold(0, 2 * length, 1).permute(2, 0, 1)


def cosine_logits(pixels: Tensor, classes: Tensor, size: tuple[int, int], *, temperature: float) -> Tensor:
    """Cosines of pixels, resized bilinearly, with classes, over the temperature.

    No embedding is resized: its products with the classes are, which is the same, and its squared length is a quadratic
    form of the products of neighbours, since a resized pixel is a mean of four.

    Args:
        pixels: (B, D, h, w) float, best channels last.
        classes: (B, N, D) float.
        size: (height, width).

    Returns:
        (B, N, *size), within ± 1 / temperature; also under autocast in float32.
    """
    pixels, classes = (tensor.to(_full_precision(tensor)) for tensor in (pixels, classes))
    with torch.autocast(pixels.device.type, enabled=False):
        rows, columns = (_bilinear(*lengths, pixels) for lengths in zip(pixels.shape[-2:], size))
        pixels = pixels.permute(0, 2, 3, 1)
        products = F.normalize(classes, dim=-1)[:, None] / temperature @ pixels.mT  # (B, h, N, w)
        return rows @ products.transpose(1, 2) @ columns.T / _squared_lengths(pixels, rows, columns).sqrt()


def _full_precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _squared_lengths(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, 1, H, W) of what (H, h) and (W, w) matrices of two neighbours a row make of the pixels."""
    own, below = pixels @ pixels.mT, pixels[:, :-1] @ pixels[:, 1:].mT  # a row with itself and with the next
    same, horizontal = own.diagonal(0, -2, -1), own.diagonal(1, -2, -1)
    vertical, diagonal = below.diagonal(0, -2, -1), (below.diagonal(1, -2, -1) + below.diagonal(-1, -2, -1)) / 2
    (up, up_both), (across, across_both) = ((side**2, 2 * side[:, :-1] * side[:, 1:]) for side in (rows, columns))
    lengths = (up @ same + up_both @ vertical) @ across.T + (up @ horizontal + up_both @ diagonal) @ across_both.T
    return lengths[:, None].clamp_min(_SHORTEST**2)


def _bilinear(length: int, new_length: int, like: Tensor) -> Tensor:
    """(new_length, length), the bilinear resize of a line."""
    eye = torch.eye(length, dtype=_full_precision(like), device=like.device)
    return F.interpolate(eye[None], size=new_length, mode="linear", align_corners=False)[0].T.to(like)


def binary_loss(logits: Tensor, truth: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of one image, summed over its classes and its valid pixels, over the number of the latter.

    Args:
        logits: (N, h, w) float.
        truth: (N, h, w) float, 0 or 1.
        ignored: (h, w) bool, pixels that do not count. Where none would be left, all of them count.

    Returns:
        A scalar.
    """
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(0)
    if ignored is None:
        return losses.mean()
    valid = torch.where(ignored.all(), torch.ones_like(ignored), ~ignored)
    return (losses * valid).sum() / valid.sum()
