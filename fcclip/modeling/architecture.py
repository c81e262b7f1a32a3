"""What engine, evaluation and tools know of a model, whatever its architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fcclip.modeling.classifier import geometric_ensemble
from fcclip.modeling.inputs import Samples, normalised_images
from fcclip.modeling.mask_decoder import MaskProposals
from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.outputs import OutputSettings, make_outputs
from fcclip.modeling.text import TextEncoder
from fcclip.structures import Features, TextEmbeddings
from fcclip.vocabulary import Vocabulary


@dataclass(frozen=True)
class Ensemble:
    """How the opinions of both classifiers are joined; see `geometric_ensemble`.

    Args:
        alpha, beta: weights of the frozen CLIP for seen and for unseen classes, 0..1.
        trust, trust_unseen_only: how far the frozen CLIP may overrule the decoder where that says void.
        trust_heads: outputs that this is for, of `HEADS`.

    Example:
        >>> print(Ensemble.of((0.4, 0.8)), "|", Ensemble(0.4, 0.8, trust=0.5))
        alpha 0.4, beta 0.8 | alpha 0.4, beta 0.8, void trust 0.5 (unseen; panoptic)
    """

    alpha: float
    beta: float
    trust: float = 0.0
    trust_unseen_only: bool = True
    trust_heads: tuple[str, ...] = ("panoptic",)

    @classmethod
    def of(cls, given: Ensemble | tuple[float, float]) -> Ensemble:
        """The same, or that of a pair (alpha, beta)."""
        return given if isinstance(given, Ensemble) else cls(*given)

    def of_head(self, head: str) -> Ensemble:
        """What one output takes."""
        return self if head in self.trust_heads else replace(self, trust=0.0)

    @property
    def void_limit(self) -> float:
        """A mask that the decoder calls void with a higher probability v is void in the panoptic map, whatever the
        frozen CLIP says of it; 1: none is.

        `geometric_ensemble` leaves v * (1 - trust * m) to void, m being at most 1, so at least v * (1 - trust). Above
        one half that is more than all classes have together; 0.501 is further from it than rounding reaches.
        """
        trust = self.of_head("panoptic").trust
        return 0.501 / (1 - trust) if trust < 0.499 else 1.0

    def __str__(self) -> str:
        heads = ", ".join(self.trust_heads)
        trust = f", void trust {self.trust:g} ({'unseen' if self.trust_unseen_only else 'all'}; {heads})"
        return f"alpha {self.alpha:g}, beta {self.beta:g}" + (trust if self.trust else "")


@dataclass(frozen=True)
class ScoredMasks:
    """What one pass of the network says of one image: Q masks, and two opinions on their classes.

    Args:
        in_logits: (Q, K + 1) of the in-vocabulary classifier, void last.
        out_logits: (Q, K) of the out-of-vocabulary classifier.
        seen: (K,) bool, classes that training knew.
        valid: (Q,) bool, queries to which the ensemble applies; None: all.
        masks: of the queries, at any size.
        dense: (C, h, w), the backbone's dense features.
        vocabulary: the K classes.
        file_name: of the image; "" for none.
        class_embeddings, region_embeddings: (Q, D), of which the logits of both are made; None: there are none.
    """

    in_logits: Tensor
    out_logits: Tensor
    seen: Tensor
    valid: Tensor | None
    masks: OutputMasks
    dense: Tensor
    vocabulary: Vocabulary
    file_name: str = field(default="", kw_only=True)
    class_embeddings: Tensor | None = field(default=None, kw_only=True)
    region_embeddings: Tensor | None = field(default=None, kw_only=True)

    @torch.no_grad()
    def class_logits(self, ensemble: Ensemble | tuple[float, float]) -> Tensor:
        """(Q, K + 1) log-probabilities: both opinions joined; see `geometric_ensemble`."""
        ensemble = Ensemble.of(ensemble)
        return geometric_ensemble(
            self.in_logits,
            self.out_logits,
            self.seen,
            alpha=ensemble.alpha,
            beta=ensemble.beta,
            valid=self.valid,
            trust=ensemble.trust,
            trust_unseen_only=ensemble.trust_unseen_only,
        )

    def logits_of_heads(self, ensemble: Ensemble | tuple[float, float], heads: Sequence[str]) -> dict[str, Tensor]:
        """Output -> what `class_logits` gives for it; computed once for those that take the same."""
        own = {head: Ensemble.of(ensemble).of_head(head) for head in heads}
        joined = {each: self.class_logits(each) for each in set(own.values())}
        return {head: joined[each] for head, each in own.items()}


class ExtraLosses(Protocol):
    """The one hook of training: more losses on what a batch was seen as. Fine-tuning and trained classifiers use it.

    Attributes:
        vocabularies: whose classes must be among the scored ones, besides the batch's own.
    """

    vocabularies: Sequence[Vocabulary]

    def __call__(
        self,
        features: Features,
        proposals: MaskProposals,
        text: TextEmbeddings,
        classes: Mapping[Vocabulary, slice],
        batch: Sequence[Mapping[str, Any]],
    ) -> dict[str, Tensor]:
        """Weighted losses by name; those of the parts of a batch add up.

        Args:
            features: of the backbone.
            proposals: class logits have a column a class of `text`, and void last.
            text: all scored classes, without void.
            classes: where those of each vocabulary stand in `text`.
            batch: the samples; `structures.TrainingBatch` where they are a part of a larger one.
        """


class Architecture(Protocol):
    """An entry of `META_ARCHITECTURES`, an `nn.Module`.

    Frozen parts are modules with `is_frozen`; checkpoints hold everything else (see `fcclip.weights`).

    Attributes:
        device: where the model is, and where its inputs go.
        heads: outputs that the config asks for, of `HEADS`.
        ensemble: weights of the ensemble that the config asks for.
        train_vocabulary: classes of the training labels.
        seen_vocabulary: classes that count as seen; may be set.
        test_vocabulary: classes to use when a call brings none; may be set.
        extra_losses: the hook of training; may be changed.
        size_divisibility: network inputs are padded to multiples of it; below 1 only to the largest of the batch.
    """

    device: torch.device
    heads: tuple[str, ...]
    ensemble: Ensemble
    train_vocabulary: Vocabulary | None
    seen_vocabulary: Vocabulary | None
    test_vocabulary: Vocabulary | None
    extra_losses: list[ExtraLosses]
    size_divisibility: int

    def losses(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The weighted losses of a batch, or of a part of one (`structures.TrainingBatch`): parts add up."""

    def score(
        self, inputs: Sequence[Mapping[str, Any]], vocabulary: Vocabulary | None = None, *, void_limit: float = 1.0
    ) -> list[ScoredMasks]:
        """One pass of the network; one record an image, which can be weighed and drawn as often as wanted.

        With an `Ensemble.void_limit` it is for panoptic maps of this vocabulary by that ensemble alone: where looking
        at a mask costs much, those that the limit makes void are not looked at.
        """

    def rescore(self, scored: ScoredMasks, vocabulary: Vocabulary) -> ScoredMasks:
        """What `score` gives for the same image and another vocabulary, without looking at the image again."""

    def embed_regions(self, scored: ScoredMasks, masks: Tensor) -> Tensor:
        """What the frozen CLIP sees in any regions of a scored image: (n, h, w) bool at the size of its outputs ->
        (n, D), unit length."""

    def outputs(
        self,
        scored: ScoredMasks,
        *,
        heads: Sequence[str] | None = None,
        ensemble: Ensemble | tuple[float, float] | None = None,
        semantic: str = "scores",
        settings: OutputSettings | None = None,
    ) -> dict[str, Any]:
        """`sem_seg`, `panoptic_seg` and `instances` of one image, as far as `heads` ask for them; what is None is the
        model's, and `semantic` is "scores" or "labels"."""


class BaseArchitecture(nn.Module):
    """What the architectures here share of an `Architecture`: their settings, and the way from images to outputs.

    Args:
        backbone: the frozen vision encoder.
        text_encoder: turns vocabularies into vectors.
        pixel_mean, pixel_std: three numbers each, 0..255, in the channel order of the images.
        size_divisibility: network inputs are padded to multiples of it; below 1 only to the largest of the batch.
        heads: outputs of a call that does not say, of `HEADS`.
        ensemble: how both classifiers are joined in a call that does not say.
        output_settings: how outputs are made.
        train_vocabulary: classes of the training labels; they count as seen.
        test_vocabulary: classes to use when a call brings none.

    Attributes:
        amp_dtype: autocast type of the network pass of `score`; None for fp32. May be set.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        text_encoder: TextEncoder,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        heads: Sequence[str],
        ensemble: Ensemble,
        output_settings: OutputSettings,
        train_vocabulary: Vocabulary | None = None,
        test_vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.size_divisibility = size_divisibility
        self.heads = tuple(heads)
        self.ensemble = ensemble
        self.output_settings = output_settings
        self.train_vocabulary = train_vocabulary
        self.seen_vocabulary = train_vocabulary
        self.test_vocabulary = test_vocabulary
        self.extra_losses: list[ExtraLosses] = []
        self.amp_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """See `Architecture`."""
        return self.pixel_mean.device

    def autocast(self) -> contextlib.AbstractContextManager:
        """What the network pass of `score` runs in; text, ensemble and outputs are not in it."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def forward(
        self,
        inputs: Samples,
        *,
        vocabulary: Vocabulary | None = None,
        heads: Sequence[str] | None = None,
        semantic: str = "scores",
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses while training, else predictions.

        Args:
            inputs: a mapping an image: `image` (3, H, W) uint8 or float, 0..255, channels as the pixel statistics;
                optionally `height` and `width`, the size of the outputs (default: the image's), and `vocabulary`,
                classes for this image alone, which in training its labels mean; in training `targets`
                (`structures.Targets`) and optionally `point_seed`, an int that fixes where its losses look.
            vocabulary: classes for the images that bring none; default: `test_vocabulary`.
            heads: outputs to compute, of `HEADS`; default: the model's.
            semantic: "scores" for (K, h, w) float, "labels" for (h, w) int64.

        Returns:
            In training: weighted losses by name. Else a mapping an image with `sem_seg`, `panoptic_seg` = (int32
            (h, w), segment records) and `instances` (`structures.Instances`), as far as `heads` ask for them.

        Raises:
            ValueError: no vocabulary, no targets in training, images of another form.
        """
        if self.training:
            return self.losses(inputs)
        heads = self.heads if heads is None else tuple(heads)
        limit = self.ensemble.void_limit if heads == ("panoptic",) else 1.0
        records = self.score(inputs, vocabulary, void_limit=limit)
        return [self.outputs(scored, heads=heads, semantic=semantic) for scored in records]

    @torch.no_grad()
    def outputs(
        self,
        scored: ScoredMasks,
        *,
        heads: Sequence[str] | None = None,
        ensemble: Ensemble | tuple[float, float] | None = None,
        semantic: str = "scores",
        settings: OutputSettings | None = None,
    ) -> dict[str, Any]:
        """See `Architecture`."""
        heads = self.heads if heads is None else heads
        return make_outputs(
            scored.logits_of_heads(self.ensemble if ensemble is None else ensemble, heads),
            scored.masks,
            scored.vocabulary.thing_classes,
            heads=heads,
            settings=settings or self.output_settings,
            semantic=semantic,
        )

    def preprocess(self, inputs: Samples) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised images padded with zeros to (B, 3, H, W), and the (height, width) of each without padding."""
        return normalised_images(inputs, mean=self.pixel_mean, std=self.pixel_std, divisibility=self.size_divisibility)
