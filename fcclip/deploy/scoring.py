"""The two classifiers and their geometric ensemble in NumPy, as `fcclip.modeling.classifier` has them.

Legend: Q queries, D embedding, K classes, W names.
"""

from __future__ import annotations

import numpy as np

from fcclip.deploy.metadata import Metadata
from fcclip.deploy.vocabulary import VocabularyFile
from fcclip.errors import InputError


def class_probabilities(
    class_embeddings: np.ndarray,
    region_embeddings: np.ndarray,
    not_empty: np.ndarray,
    vocabulary: VocabularyFile,
    metadata: Metadata,
    ensemble: tuple[float, float] | None = None,
) -> np.ndarray:
    """(Q, K + 1) float32, void last.

    Args:
        class_embeddings, region_embeddings: (Q, D), of any length.
        not_empty: (Q,) bool, masks with a cell inside.
        vocabulary: the classes.
        metadata: of the model.
        ensemble: weights (alpha, beta) of the frozen CLIP for seen and for other classes, 0..1; None: the model's.

    Raises:
        ValueError: a weight outside 0..1.
    """
    alpha, beta = (metadata.alpha, metadata.beta) if ensemble is None else ensemble
    if not (0 <= alpha <= 1 and 0 <= beta <= 1):
        raise InputError(f"the ensemble's alpha and beta must lie in 0..1, got {alpha} and {beta}")
    in_logits = _logits(class_embeddings, np.vstack([vocabulary.vectors, vocabulary.void]), metadata.decoder_scale)
    out_logits = _logits(region_embeddings, vocabulary.vectors, metadata.clip_scale)
    starts = np.flatnonzero(np.diff(vocabulary.class_of_vector, prepend=-1))  # the first name of each class
    in_logits = np.maximum.reduceat(in_logits, [*starts, len(vocabulary.vectors)], axis=-1)
    out_logits = np.maximum.reduceat(out_logits, starts, axis=-1)
    weight = np.where(vocabulary.seen, alpha, beta).astype(np.float32)
    log_in = _log_softmax(in_logits[:, :-1])
    joined = (1 - weight) * log_in + weight * _log_softmax(out_logits)
    if metadata.ensemble_on_valid_mask:
        joined = np.where(not_empty[:, None], joined, log_in)
    void = np.exp(_log_softmax(in_logits)[:, -1:])
    shares = np.concatenate([np.exp(_log_softmax(joined)) * (1 - void), void], axis=-1) + np.float32(1e-8)
    return shares / shares.sum(-1, keepdims=True)


def _logits(embeddings: np.ndarray, vectors: np.ndarray, scale: float) -> np.ndarray:
    """(Q, W) scaled cosines."""
    lengths = np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), np.float32(1e-12))
    return np.float32(scale) * (embeddings / lengths) @ vectors.T


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
