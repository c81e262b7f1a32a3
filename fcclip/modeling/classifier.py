"""The two classifiers of FC-CLIP and what joins them (FC-CLIP, section 3.2 and equations 4 to 8).

Legend: B images, Q queries, D embedding, K classes, W synonyms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.errors import InputError
from fcclip.structures import Targets, TextEmbeddings
from fcclip.vocabulary import Vocabulary


def mask_pool(features: Tensor, mask_logits: Tensor) -> Tensor:
    """The mean feature inside each mask; no gradient flows into the masks.

    Args:
        features: (B, C, h, w) float.
        mask_logits: (B, Q, ·, ·) float, resized to (h, w) where they differ; above 0 means inside.

    Returns:
        (B, Q, C) float; zeros for an empty mask.
    """
    inside = (resize_masks(mask_logits.detach(), features.shape[-2:]) > 0).to(features.dtype).flatten(2)  # (B, Q, hw)
    # an exporter deletes the published + 1e-8 as if it were + 0; a count of at least 1 does not feel it
    share = inside / inside.sum(-1, keepdim=True, dtype=torch.float32).clamp(min=1).to(features.dtype)
    return share @ features.flatten(2).transpose(1, 2)


def resize_masks(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, Q, ·, ·) -> (B, Q, *size), bilinear; the input itself when the size is already right."""
    if tuple(mask_logits.shape[-2:]) == tuple(size):
        return mask_logits
    return F.interpolate(mask_logits, size=tuple(size), mode="bilinear", align_corners=False)


def text_logits(embeddings: Tensor, text: TextEmbeddings, logit_scale: Tensor) -> Tensor:
    """Scaled cosine similarity to every class, a class scoring as its best synonym; always fp32.

    Args:
        embeddings: (B, Q, D) float, of any length.
        text: the classes, with or without void.
        logit_scale: scalar, logarithm of the scale; the scale is at most 100.

    Returns:
        (B, Q, text.num_classes) float32.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        scaled = logit_scale.float().exp().clamp(max=100) * F.normalize(embeddings.float(), dim=-1)
        scores = scaled @ text.vectors.float().T  # (B, Q, W)
        logits = scores.new_full((*scores.shape[:-1], text.num_classes), -torch.inf)
        return logits.scatter_reduce(-1, text.class_of_vector.expand_as(scores), scores, "amax")


def cut_classes(class_logits: Tensor, start: int, stop: int) -> Tensor:
    """(…, K + 1) -> (…, stop - start + 1): some of the classes, and void.

    Classes do not see each other before the softmax, so what is cut out of many is what these alone would give.
    """
    return torch.cat([class_logits[..., start:stop], class_logits[..., -1:]], dim=-1)


def own_classes(
    class_logits: Sequence[Tensor], targets: Sequence[Targets], vocabularies: Sequence[Vocabulary]
) -> tuple[list[Tensor], list[Targets]]:
    """Leaves each image of a training batch the classes of its own vocabulary.

    Args:
        class_logits: tensors (B, Q, K + 1) for the distinct vocabularies, in the order of their first images, and
            then for classes that are no image's.
        targets: of the B images; labels are positions in their vocabularies.
        vocabularies: of the B images.

    Returns:
        class logits without the last kind, minus infinity where a class is another vocabulary's; and targets whose
        labels are positions among them.
    """
    lists = list(dict.fromkeys(vocabularies))
    starts = dict(zip(lists, accumulate(map(len, lists), initial=0)))
    num_classes = sum(map(len, lists))
    if num_classes + 1 < class_logits[0].shape[-1]:
        class_logits = [cut_classes(logits, 0, num_classes) for logits in class_logits]
    if len(lists) == 1:
        return list(class_logits), list(targets)
    foreign = torch.ones(len(targets), 1, num_classes + 1, dtype=torch.bool)
    foreign[..., -1] = False
    for row, own in zip(foreign, vocabularies):
        row[:, starts[own] : starts[own] + len(own)] = False
    foreign = foreign.to(class_logits[0].device, non_blocking=True)
    moved = [replace(target, labels=target.labels + starts[own]) for target, own in zip(targets, vocabularies)]
    return [logits.masked_fill(foreign, -torch.inf) for logits in class_logits], moved


def with_void(text: TextEmbeddings, void: Tensor) -> TextEmbeddings:
    """The vocabulary with one more class, void, as the last.

    Args:
        text: K classes.
        void: (1, D) float, of any length; gradients flow into it.
    """
    void = F.normalize(void.float(), dim=-1)
    last = text.class_of_vector.new_full((1,), text.num_classes)
    return TextEmbeddings(
        vectors=torch.cat([text.vectors.to(void.device), void]),
        class_of_vector=torch.cat([text.class_of_vector.to(void.device), last.to(void.device)]),
        num_classes=text.num_classes + 1,
    )


def geometric_ensemble(
    in_logits: Tensor,
    out_logits: Tensor,
    seen: Tensor,
    *,
    alpha: float,
    beta: float,
    valid: Tensor | None = None,
    trust: float = 0.0,
    trust_unseen_only: bool = True,
) -> Tensor:
    """Joins the two classifiers by a weighted geometric mean (FC-CLIP, equation 8), in log space, so nothing underflows
    to NaN.

    Void comes from the decoder. With `trust` it is less the surer the frozen CLIP is of a class (OVRCOAT, CVPR 2026):
    void * (1 - trust * m), m being CLIP's highest probability. What a mask is, if it is something, stays the same.

    Args:
        in_logits: (B, Q, K + 1) of the decoder, void last.
        out_logits: (B, Q, K) of the frozen CLIP.
        seen: (K,) bool, classes of the training vocabulary.
        alpha, beta: weight of the frozen CLIP for seen and for unseen classes, 0..1.
        valid: (B, Q) bool, queries to which the ensemble applies; the others keep the decoder's opinion. None: all.
        trust: the most that void loses, 0..1; 0: nothing (FC-CLIP). Published: 0.5.
        trust_unseen_only: only where the best of the joined classes is unseen; False: everywhere (published).

    Returns:
        (B, Q, K + 1) float32, logarithms of probabilities (plus 1e-8) that sum to 1.

    Raises:
        ValueError: a weight outside 0..1; trust with one class, of which CLIP is always sure.
    """
    if not (0 <= alpha <= 1 and 0 <= beta <= 1):
        raise InputError(f"the ensemble's alpha and beta must lie in 0..1, got {alpha} and {beta}")
    if not 0 <= trust <= 1:
        raise InputError(f"the ensemble's void trust must lie in 0..1, got {trust}")
    seen = seen.to(in_logits.device, non_blocking=in_logits.is_cuda)
    weight = torch.where(seen, alpha, beta).float()
    shares, void = _shares_and_void(in_logits, out_logits, weight, valid)
    if trust:
        if len(seen) < 2:
            raise InputError(
                "void trust needs two or more classes, since the frozen CLIP is always sure of an only one: name more, "
                "or set MODEL.FC_CLIP.CLIP_TRUST_WEIGHT 0"
            )
        sureness = out_logits.float().softmax(-1).amax(-1, keepdim=True)  # (B, Q, 1)
        trusted = torch.ones_like(void, dtype=torch.bool) if valid is None else valid[..., None]
        if trust_unseen_only:
            trusted = trusted & ~seen[shares.argmax(-1, keepdim=True)]
        void = torch.where(trusted, void * (1 - trust * sureness), void)
    return (torch.cat([shares * (1 - void), void], dim=-1) + 1e-8).log()


def ensemble_probabilities(
    in_logits: Tensor, out_logits: Tensor, weight: Tensor, valid: Tensor | None = None
) -> Tensor:
    """(B, Q, K + 1) float32, what `geometric_ensemble` without trust takes the logarithm of; `weight` (K,) is that of
    the frozen CLIP for each class."""
    shares, void = _shares_and_void(in_logits, out_logits, weight, valid)
    return torch.cat([shares * (1 - void), void], dim=-1)


def _shares_and_void(
    in_logits: Tensor, out_logits: Tensor, weight: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    log_in = in_logits[..., :-1].float().log_softmax(-1)
    joined = (1 - weight) * log_in + weight * out_logits.float().log_softmax(-1)
    if valid is not None:
        joined = torch.where(valid[..., None], joined, log_in)
    return joined.softmax(-1), in_logits.float().softmax(-1)[..., -1:]
