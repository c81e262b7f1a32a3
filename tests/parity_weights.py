"""Deterministic weights for parity fixtures: a pure function of (state-dict key, shape).

Any implementation whose state dict has the same keys and shapes as the published FC-CLIP
checkpoints gets bit-identical weights from this rule, so outputs can be compared with the
recorded fixtures without shipping hundreds of megabytes of parameters.
"""

import math
import zlib
from contextlib import AbstractContextManager
from unittest import mock

import numpy as np
import torch

EMBEDDINGS = ("level_embed", "query_embed.weight", "query_feat.weight", "void_embedding.weight")


def seeded_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 tensor of `shape` that depends on `key` alone (MT19937 seeded with crc32 of the key)."""
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("logit_scale"):
        value = np.full(shape, math.log(100.0), np.float32)
    elif key.endswith("running_mean"):
        value = 0.1 * noise
    elif key.endswith("running_var"):
        value = 1 + 0.1 * np.abs(noise)
    elif key.endswith("gamma"):  # ConvNeXt layer scale
        value = 0.3 + 0.05 * noise
    elif key.endswith("sampling_offsets.bias"):
        value = 2.0 * noise
    elif key.endswith(EMBEDDINGS):
        value = noise
    elif len(shape) <= 1:
        value = 1 + 0.05 * noise if key.endswith("weight") else 0.05 * noise
    else:
        value = noise / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, np.float32).reshape(shape))


def without_initialisation() -> AbstractContextManager:
    """For a model whose weights are all replaced: random ones take seconds."""

    def same(self: torch.Tensor, *_, **__) -> torch.Tensor:
        return self

    return mock.patch.multiple(torch.Tensor, uniform_=same, normal_=same, erfinv_=same)


def seeded_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The rule applied to every floating-point entry of `model.state_dict()`; integer entries are kept,
    and so are `criterion.*` buffers, which hold loss constants rather than learned weights."""
    return {
        key: seeded_tensor(key, tuple(value.shape)).to(value.dtype)
        if value.is_floating_point() and not key.startswith("criterion.") and not key.endswith("attn_mask")
        else value
        for key, value in model.state_dict().items()
    }


def seeded_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 RGB image (3, height, width): smooth colour blobs plus noise, so masks have structure."""
    rng = np.random.RandomState(seed)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    image = np.zeros((3, height, width), np.float32)
    for _ in range(12):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.08, 0.35) * min(height, width)
        inside = ((ys - cy) ** 2 + (xs - cx) ** 2) < radius**2
        image[:, inside] = rng.uniform(0, 255, (3, 1))
    image += rng.normal(0, 12, image.shape)
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8))


def seeded_mask_predictions(num_queries: int, num_classes: int, height: int, width: int, seed: int):
    """Inputs for post-processing fixtures: class logits (num_queries, num_classes + 1), last column = no object,
    and mask logits (num_queries, height, width) shaped like soft discs, so segments overlap and compete."""
    rng = np.random.RandomState(seed)
    class_logits = rng.normal(0, 1, (num_queries, num_classes + 1))
    winners = rng.randint(0, num_classes + 1, num_queries)
    class_logits[np.arange(num_queries), winners] += rng.uniform(2, 9, num_queries)
    ys, xs = np.mgrid[0:height, 0:width]
    cy, cx = rng.uniform(0, height, num_queries), rng.uniform(0, width, num_queries)
    radius = rng.uniform(0.05, 0.25, num_queries) * min(height, width)
    distance = np.sqrt((ys[None] - cy[:, None, None]) ** 2 + (xs[None] - cx[:, None, None]) ** 2)
    mask_logits = (radius[:, None, None] - distance) * rng.uniform(0.3, 2.0, (num_queries, 1, 1))
    mask_logits += rng.normal(0, 0.3, mask_logits.shape)
    return torch.from_numpy(class_logits.astype(np.float32)), torch.from_numpy(mask_logits.astype(np.float32))
