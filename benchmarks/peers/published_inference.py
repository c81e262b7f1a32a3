"""FC-CLIP's inference and its text classifier as published, step by step in plain PyTorch, on the weights of our model.

What both have in common is borrowed: the layers of the frozen CLIP, of the pixel decoder and of the masked decoder. On
a GPU the sum of deformable attention is the published operator, the engine `published` of tools/benchmark_ops.py; on a
CPU, for which it has no form, it is written with `grid_sample`, level by level, as the plain form beside it is.
Arithmetic of the formulas: FC-CLIP section 3.2, Mask2Former section 3, Deformable DETR section 4.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcclip.modeling import FCCLIP, pixel_decoder
from fcclip.modeling.pixel_decoder import MSDeformAttn
from fcclip.ops import ms_deform_attn
from fcclip.vocabulary import Vocabulary, prompts

CHUNK = 128  # prompts


@torch.no_grad()
def encode_names(clip: nn.Module, names: Sequence[str]) -> Tensor:
    """Every prompt at its full length -> (names, D)."""
    tokens = open_clip.tokenize(prompts(names))
    embeddings = torch.cat([F.normalize(clip.encode_text(chunk), dim=-1) for chunk in tokens.split(CHUNK)])
    return F.normalize(embeddings.unflatten(0, (len(names), -1)).mean(1), dim=-1)


@torch.no_grad()
def predict(model: FCCLIP, sample: dict, vocabulary: Vocabulary, class_logits: Tensor | None = None) -> dict:
    """`sem_seg`, `panoptic_seg` and `instances` of one image as a model gives them.

    Args:
        model: whose weights; in evaluation mode.
        sample: as for the model.
        vocabulary: the classes.
        class_logits: (Q, K + 1), what the heads take instead of the image's own, which is computed all the same.
    """
    images, [size] = model.preprocess([sample])
    text = model.text_encoder.encode(vocabulary)
    counts = [len(names) for names in vocabulary.synonyms]
    with_void = torch.cat([text.vectors, F.normalize(model.void_embedding.weight, dim=-1)])
    features = model.backbone(images)
    with attention_as_published():
        mask_features, pyramid = model.sem_seg_head.pixel_decoder(features.levels)
    scores, masks = decode(model.sem_seg_head.predictor, pyramid, mask_features, with_void, counts)
    own = join(model, features.dense, masks, scores, with_void, counts, vocabulary)
    class_logits = own if class_logits is None else class_logits
    masks = F.interpolate(masks, size=images.shape[-2:], mode="bilinear", align_corners=False)[0]
    output_size = sample.get("height", size[0]), sample.get("width", size[1])
    masks = F.interpolate(masks[None, :, : size[0], : size[1]], output_size, mode="bilinear", align_corners=False)[0]
    settings = model.output_settings
    return {
        "sem_seg": torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], masks.sigmoid()),
        "panoptic_seg": panoptic(class_logits, masks, vocabulary.thing_classes, settings),
        "instances": instances(class_logits, masks, vocabulary.thing_classes, settings.topk),
    }


@contextlib.contextmanager
def attention_as_published() -> Iterator[None]:
    """And no layer is computed again for the gradient."""
    with (
        mock.patch.object(MSDeformAttn, "forward", deformable_attention),
        mock.patch.object(pixel_decoder, "checkpoint", lambda layer, *inputs, use_reentrant: layer(*inputs)),
    ):
        yield


def deformable_attention(self: MSDeformAttn, query: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    batch, cells = query.shape[:2]
    sizes = self.heads, self.levels, self.points
    values = self.value_proj(value).view(batch, cells, self.heads, -1)
    offsets = self.sampling_offsets(query).view(batch, cells, *sizes, 2)
    weights = self.attention_weights(query).view(batch, cells, self.heads, -1).softmax(-1).view(batch, cells, *sizes)
    centres = []
    for height, width in shapes:
        sides = (torch.arange(side, device=value.device) + 0.5 for side in (height, width))
        y, x = torch.meshgrid(*sides, indexing="ij")
        centres.append(torch.stack([x / width, y / height], dim=-1).flatten(0, 1))
    by_size = torch.tensor([(width, height) for height, width in shapes], dtype=offsets.dtype, device=value.device)
    locations = torch.cat(centres)[None, :, None, None, None] + offsets / by_size[:, None]
    if value.device.type == "cuda":
        return self.output_proj(ms_deform_attn(values, shapes, locations, weights, engine="published"))
    grids, sampled, start = 2 * locations - 1, [], 0
    for level, (height, width) in enumerate(shapes):
        own = values[:, start : start + height * width].flatten(2).transpose(1, 2)
        own = own.reshape(batch * self.heads, -1, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(own, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        start += height * width
    weights = weights.transpose(1, 2).reshape(batch * self.heads, 1, cells, -1)
    output = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)
    return self.output_proj(output.view(batch, -1, cells).transpose(1, 2))


def decode(
    decoder: nn.Module, pyramid: Sequence[Tensor], mask_features: Tensor, text: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Every layer predicts classes and whole masks, of which the last are used -> (1, Q, K + 1), (1, Q, H/4, W/4)."""
    return decode_all(decoder, pyramid, mask_features, text, counts)[-1]


def decode_all(
    decoder: nn.Module, pyramid: Sequence[Tensor], mask_features: Tensor, text: Tensor, counts: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """(B, Q, K + 1) and (B, Q, H/4, W/4) before the first layer and after each."""
    memories = [
        project(level).flatten(2).transpose(1, 2) + embed
        for project, level, embed in zip(decoder.input_proj, pyramid, decoder.level_embed.weight)
    ]
    positions = [sine_positions(level) for level in pyramid]
    layers = (
        decoder.transformer_cross_attention_layers,
        decoder.transformer_self_attention_layers,
        decoder.transformer_ffn_layers,
    )
    x = decoder.query_feat.weight.expand(len(mask_features), -1, -1)
    query, sets = decoder.query_embed.weight, []
    for step in range(len(layers[0]) + 1):
        normed = decoder.decoder_norm(x)
        masks = torch.einsum("bqc,bchw->bqhw", decoder.mask_embed(normed), mask_features)
        pooled = decoder._mask_pooling_proj(pool(mask_features, masks.detach()))
        sets.append((similarities(decoder.class_embed(pooled + normed), text, counts, decoder.logit_scale), masks))
        if step == len(layers[0]):
            break
        level = step % len(pyramid)
        resized = F.interpolate(masks, size=pyramid[level].shape[-2:], mode="bilinear", align_corners=False)
        blocked = resized.detach().sigmoid().flatten(2) < 0.5
        blocked[blocked.all(-1)] = False
        cross, attend, feed = (kind[step] for kind in layers)
        x = feed(attend(cross(x, query, memories[level], positions[level], blocked), query))
    return sets


def sine_positions(level: Tensor) -> Tensor:
    """(h * w, d), half of it for y, half for x."""
    height, width = level.shape[-2:]
    half = level.shape[1] // 2
    ones = torch.ones(height, width, device=level.device)
    scaled = [ones.cumsum(0) / (height + 1e-6), ones.cumsum(1) / (width + 1e-6)]
    rates = 10000 ** (2 * (torch.arange(half, device=level.device) // 2) / half)
    angles = [2 * torch.pi * place[..., None] / rates for place in scaled]
    waves = [torch.stack([angle[..., ::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2) for angle in angles]
    return torch.cat(waves, -1).flatten(0, 1)


def pool(features: Tensor, masks: Tensor) -> Tensor:
    if masks.shape[-2:] != features.shape[-2:]:
        masks = F.interpolate(masks, size=features.shape[-2:], mode="bilinear", align_corners=False)
    inside = (masks > 0).to(features.dtype)
    return torch.einsum("bchw,bqhw->bqc", features, inside / (inside.sum((-1, -2), keepdim=True) + 1e-8))


def similarities(x: Tensor, text: Tensor, counts: list[int], scale: Tensor) -> Tensor:
    """The best synonym of each class, class after class; void, the last, has one."""
    scores = scale.exp().clamp(max=100) * F.normalize(x, dim=-1) @ text.T
    best, start = [], 0
    for count in [*counts, 1]:
        best.append(scores[..., start : start + count].max(-1).values)
        start += count
    return torch.stack(best, dim=-1)


def join(
    model: FCCLIP, dense: Tensor, masks: Tensor, scores: Tensor, text: Tensor, counts: list[int], vocabulary: Vocabulary
) -> Tensor:
    """Both classifiers -> (Q, K + 1), logarithms of probabilities."""
    small = F.interpolate(masks, size=dense.shape[-2:], mode="bilinear", align_corners=False)
    visual = model.backbone.clip_model.visual
    if model.backbone.region_classifier == "mask_pool":
        pooled = pool(dense, small)[0]
        regions = visual.head(visual.trunk.head(pooled[..., None, None]))[None]
    else:
        regions = attention_pool(visual.attnpool, dense, small)
    others = similarities(regions, text, counts, model.backbone.logit_scale)[..., :-1].softmax(-1)
    own, ensemble = scores[..., :-1].softmax(-1), model.ensemble
    seen = vocabulary.seen_by(model.seen_vocabulary).to(own)
    alpha, beta = ensemble.alpha, ensemble.beta
    if model.ensemble_on_valid_mask:
        valid = (small > 0).flatten(2).any(-1, keepdim=True).to(own.dtype)
        alpha, beta = alpha * valid, beta * valid
    joined = (own ** (1 - alpha) * others**alpha).log() * seen + (own ** (1 - beta) * others**beta).log() * (1 - seen)
    void = scores.softmax(-1)[..., -1:]
    return (torch.cat([joined.softmax(-1) * (1 - void), void], -1) + 1e-8).log()[0]


def attention_pool(pool: nn.Module, dense: Tensor, masks: Tensor) -> Tensor:
    """The attention pool of the CLIP with as many equal queries as there are masks."""
    grid = round((len(pool.positional_embedding) - 1) ** 0.5)
    spatial = pool.positional_embedding[1:].T.view(1, -1, grid, grid)
    spatial = F.interpolate(spatial, size=dense.shape[-2:], mode="bilinear", align_corners=False)
    cells = dense.flatten(2).permute(2, 0, 1)
    keys = cells + spatial.flatten(2).permute(2, 0, 1)
    query = (cells.mean(0, keepdim=True) + pool.positional_embedding[0]).repeat(masks.shape[1], 1, 1)
    blocked = masks.flatten(2) <= 0
    blocked[blocked.all(-1)] = False
    output, _ = F.multi_head_attention_forward(
        query,
        keys,
        keys,
        embed_dim_to_check=keys.shape[-1],
        num_heads=pool.num_heads,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
        need_weights=False,
        training=False,
        attn_mask=blocked.repeat_interleave(pool.num_heads, dim=0),
    )
    return output.transpose(0, 1)


def panoptic(
    class_logits: Tensor, masks: Tensor, thing_classes: Sequence[int], settings: object
) -> tuple[Tensor, list[dict]]:
    """Query after query; both thresholds are the settings'."""
    scores, labels = class_logits.softmax(-1).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > settings.object_mask_threshold)
    scores, labels, shares = scores[kept], labels[kept], masks[kept].sigmoid()
    id_map, records, stuff = torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device), [], {}
    if not len(scores):
        return id_map, records
    owner = (scores.view(-1, 1, 1) * shares).argmax(0)
    for query, label in enumerate(labels.tolist()):
        own = owner == query
        area, original = own.sum().item(), (shares[query] >= 0.5).sum().item()
        own = own & (shares[query] >= 0.5)
        if not (area and original and own.sum().item()) or area / original < settings.overlap_threshold:
            continue
        if label in stuff:
            id_map[own] = stuff[label]
            continue
        records.append({"id": len(records) + 1, "isthing": label in thing_classes, "category_id": label})
        if label not in thing_classes:
            stuff[label] = len(records)
        id_map[own] = len(records)
    return id_map, records


def instances(
    class_logits: Tensor, masks: Tensor, thing_classes: Sequence[int], topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, classes and masks (n, h, w) float of the best pairs that are things."""
    shares = class_logits.softmax(-1)[:, :-1]
    scores, index = shares.flatten().topk(min(topk, shares.numel()), sorted=False)
    labels, masks = index % shares.shape[-1], masks[index // shares.shape[-1]]
    things = torch.tensor([label in thing_classes for label in labels.tolist()], device=labels.device)
    scores, labels, masks = scores[things], labels[things], masks[things]
    inside = (masks > 0).float()
    means = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    return scores * means, labels, inside
