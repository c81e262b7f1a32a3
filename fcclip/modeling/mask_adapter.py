"""Mask-Adapter: attention maps in the place of mask pooling (Li et al., CVPR 2025, section 3), and its training.

Legend: B images, Q masks, C channels and h x w cells of the dense features, D embedding, M maps a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcclip.errors import InputError
from fcclip.modeling.classifier import cut_classes, resize_masks, text_logits, with_void

SLOTS = 32  # masks of an image that a step of its training looks at; of the mixed stage at most a quarter are predicted
MIXED_IOU = 0.7  # from which on a predicted mask shows what a true one shows
STRIDE, MASK_STRIDE = 32, 4  # of dense features, of masks


class MaskAdapter(nn.Module):
    """Predicts M maps of each mask and describes it by the mean of what a ConvNeXt CLIP sees in them.

    Parameters are called as published. It stands in a model as `classifier`; `mask_adapter` in a file is read so.

    Args:
        visual: the image tower; it is not copied and does not train.
        embed_dim: D.
        width, mask_channels, num_maps: 768, 16 and 16 as published.
        threshold: probability from which on a pixel is inside.
        query_chunk: masks looked at at once; only memory depends on it.

    Raises:
        InputError: a tower of another kind, a threshold outside 0..1.
    """

    needs_fine_masks = True  # at stride 4; pooling reads them at the stride of the dense features
    one_by_one = True  # each mask costs, and does not depend on the others

    def __init__(
        self,
        visual: nn.Module,
        *,
        embed_dim: int,
        width: int = 768,
        mask_channels: int = 16,
        num_maps: int = 16,
        threshold: float = 0.5,
        query_chunk: int = 32,
    ) -> None:
        super().__init__()
        if not hasattr(visual, "trunk"):
            raise InputError("a Mask-Adapter needs a ConvNeXt CLIP: that of a ResNet has no head for single cells")
        if not 0 < threshold < 1 or query_chunk < 1:
            raise InputError(
                f"MODEL.MASK_ADAPTER: MASK_THRESHOLD must lie between 0 and 1 and QUERY_CHUNK be at least 1, got "
                f"{threshold} and {query_chunk}"
            )
        self._visual = (visual,)  # in a tuple, so that its weights are not the adapter's
        self.threshold, self.query_chunk, self.num_maps = math.log(threshold / (1 - threshold)), query_chunk, num_maps
        few = mask_channels // 4
        self.fuse = nn.Conv2d(embed_dim, width, 1)
        self.cnext1, self.cnext2, self.cnext3 = (_ConvNeXtBlock(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.final = nn.Conv2d(width, num_maps, 1)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, few, 3, stride=2, padding=1),
            _ChannelNorm(few),
            nn.GELU(),
            nn.Conv2d(few, mask_channels, 3, stride=2, padding=1),
            _ChannelNorm(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, embed_dim, 1),
        )

    def forward(self, dense: Tensor, mask_logits: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Dense features (B, C, h, w) and mask logits (B, Q, ·, ·) -> region embeddings (B, Q, D); zeros of masks that
        are not `wanted` (B, Q) bool."""
        if wanted is not None:
            regions = dense.new_zeros(*wanted.shape, self.fuse.in_channels)
            for index, chosen in enumerate(wanted):
                own = dense[index : index + 1], mask_logits[index : index + 1, chosen]
                regions[index, chosen] = self(*own)[0].to(regions.dtype)
            return regions
        height, width = dense.shape[-2:]
        if not mask_logits.shape[1]:
            return dense.new_zeros(len(dense), 0, self.fuse.in_channels)
        cells = self._embed(dense.flatten(2).mT).mT.unflatten(2, (height, width))  # (B, D, h, w)
        fused = self.fuse(cells)
        binary = (mask_logits.detach() > self.threshold).to(dense.dtype)
        binary = F.interpolate(binary, (4 * height, 4 * width), mode="bilinear", align_corners=False)
        return torch.cat([self._regions(dense, fused, part) for part in binary.split(self.query_chunk, dim=1)], dim=1)

    def maps(self, fused: Tensor, binary: Tensor) -> Tensor:
        """Fused cells (B, width, h, w) and masks (B, q, 4h, 4w) of 0..1 -> (B, q M, h w), each map adding up to 1."""
        small = self.mask_downscaling[:-1](binary.flatten(0, 1)[:, None])  # (B q, mask_channels, h, w)
        last, weight = self.mask_downscaling[-1], self.fuse.weight[:, :, 0, 0]
        # two linear layers as one: the sum of cells and mask is never made in D channels
        joined = F.conv2d(small, (weight @ last.weight[:, :, 0, 0])[..., None, None], weight @ last.bias)
        x = (fused[:, None] + joined.unflatten(0, binary.shape[:2])).flatten(0, 1)
        x = self.cnext3(self.cnext2(self.cnext1(x)))
        x = self.final(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))  # (B q, M, h, w)
        return F.logsigmoid(x).flatten(2).softmax(-1).unflatten(0, binary.shape[:2]).flatten(1, 2)

    def _regions(self, dense: Tensor, fused: Tensor, binary: Tensor) -> Tensor:
        pooled = self.maps(fused, binary) @ dense.flatten(2).mT  # (B, q M, C)
        return self._embed(pooled).unflatten(1, (-1, self.num_maps)).mean(2)

    def _embed(self, vectors: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, D), by CLIP's norm and projection."""
        [visual] = self._visual
        return visual.head(visual.trunk.head(vectors.flatten(0, 1)[..., None, None])).unflatten(0, vectors.shape[:2])


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (n, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    """A block of ConvNeXt without stochastic depth (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(inner)))).permute(0, 3, 1, 2)


# ---- training ----


class NoCriterion(nn.Module):
    """In the place of a criterion: the decoders stay as they are."""

    deep_supervision = False

    def forward(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {}


class MaskAdapterLoss:
    """Both stages of its training, as the hook of `FCCLIP`.

    Warm-up: cross entropy of true masks among the training classes and void. Mixed: also of predicted masks that show
    what a true one shows, whose embeddings are drawn to that one's.

    Args:
        model: an `FCCLIP` with a `MaskAdapter`, which alone trains afterwards.
        mixed: the second stage.
        class_weight, cosine_weight: 2 and 5 as published.
    """

    def __init__(self, model: Any, *, mixed: bool, class_weight: float = 2.0, cosine_weight: float = 5.0) -> None:
        self.model, self.mixed, self.vocabularies = model, mixed, ()
        self.class_weight, self.cosine_weight = class_weight, cosine_weight
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        model.criterion = NoCriterion()

    def __call__(
        self, features: Any, proposals: Any, text: Any, classes: Mapping[Any, slice], batch: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """See `ExtraLosses`: `loss_mask_adapter_ce` and, mixed, `loss_mask_adapter_cosine`."""
        counts = getattr(batch, "segment_counts", None) or [len(sample["targets"]) for sample in batch]
        total = max(1, sum(min(count, SLOTS) for count in counts))
        named = with_void(text, self.model.void_embedding.weight)
        cross_entropy = cosine = 0 * self.model.classifier.final.bias.sum()  # of a batch without a segment
        predicted = proposals.mask_logits().detach() if self.mixed else [None] * len(batch)
        for index, sample in enumerate(batch):
            dense = features.dense[index : index + 1]
            own = classes[sample.get("vocabulary") or self.model.train_vocabulary]
            true, labels = self._true_masks(sample, dense)
            masks, pairs = [true], (true.new_zeros(0, dtype=torch.long),) * 2
            if self.mixed and len(true):
                pairs = similar_masks(predicted[index] > 0, resize_masks(true[None], predicted.shape[-2:])[0] > 0)
                masks += [resize_masks(predicted[index][None, pairs[0]], true.shape[-2:])[0]]
            regions = self.model.classifier(dense, torch.cat(masks)[None])[0]
            logits = text_logits(regions, named, self.model.backbone.logit_scale)
            logits = cut_classes(logits, own.start, own.stop)
            labels = torch.cat([labels, labels[pairs[1]]])
            cross_entropy = cross_entropy + F.cross_entropy(logits, labels, reduction="sum") / total
            found = F.cosine_similarity(regions[len(true) :], regions[pairs[1]].detach(), dim=-1)
            cosine = cosine + (1 - found).sum() / total
        losses = {"loss_mask_adapter_ce": self.class_weight * cross_entropy}
        return losses | ({"loss_mask_adapter_cosine": self.cosine_weight * cosine} if self.mixed else {})

    def _true_masks(self, sample: Mapping[str, Any], dense: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (n, 8h, 8w) of an image that are not empty, -20 and 20, and their labels; at most half of the slots
        where predicted ones come too."""
        targets = sample["targets"].to(dense.device)
        masks = targets.expand().float()
        size = [STRIDE * side for side in dense.shape[-2:]]
        masks = F.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))
        masks = F.adaptive_avg_pool2d(masks, [side // MASK_STRIDE for side in size])
        kept = (masks > 0.5).flatten(1).any(1).nonzero().flatten()
        kept = kept[torch.randperm(len(kept), device=kept.device)][: SLOTS // 2 if self.mixed else SLOTS]
        return torch.where(masks[kept] > 0.5, 20.0, -20.0), targets.labels[kept]


def similar_masks(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, h, w) and (n, h, w) bool -> the predicted and the true masks, (m,) int64 each, of at most `SLOTS` / 4 pairs,
    drawn at random: of each true mask a predicted one that overlaps it by an IoU above `MIXED_IOU`."""
    own, truth = predicted.flatten(1).float(), true.flatten(1).float()
    common = own @ truth.T
    iou = common / (own.sum(1)[:, None] + truth.sum(1)[None] - common).clamp(min=1)
    chances = torch.where(iou > MIXED_IOU, torch.rand_like(iou), 0.0)
    best, queries = chances.max(0) if len(predicted) else (chances.new_zeros(len(true)),) * 2
    matched = (best > 0).nonzero().flatten()
    matched = matched[torch.randperm(len(matched), device=matched.device)][: SLOTS // 4]
    return queries[matched].long(), matched
