"""Fusioner put together (Ma et al., BMVC 2022): two frozen encoders, fusion, decoder, one binary decision a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.modeling.architecture import BaseArchitecture, ScoredMasks
from fcclip.modeling.classifier import mask_pool
from fcclip.modeling.fusion import ConvDecoder, Fusion, binary_loss, cosine_logits
from fcclip.modeling.inputs import (
    Samples,
    batch_vocabularies,
    class_slices,
    output_size,
    vocabulary_of,
)
from fcclip.modeling.mask_decoder import MaskProposals
from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.windows import Windows
from fcclip.structures import Features, TextEmbeddings
from fcclip.vocabulary import Vocabulary
from fcclip.weights.frozen import FrozenPart

NEVER = -1e4  # the logit of a class that a plane is not of


class Fusioner(BaseArchitecture):
    """Says of every pixel and every class name whether they belong together; an `Architecture`.

    To the rest of the house it is a model with one query a class, whose mask is the class's plane and whose class is
    sure: semantic maps, panoptic maps (one segment a class; 0 where no class is above 0.5, the published prediction)
    and everything made of them come from the common code, and the ensemble has nothing to decide. What names a call
    asks for changes the planes, since they see each other in the fusion.

    Args:
        text_backbone: the frozen text encoder, where it is not that of the vision encoder.
        fusion, decoder: the trained parts.
        temperature: that divides cosines.
        windows: how predictions look at an image; None: at all of it, the position embedding resized.
        settings: as for `BaseArchitecture`; training images should have one size, since padding is decided upon like
            any pixel.

    In training every class of a sample's vocabulary is prompted, of which the published training has one; its `ignored`
    (H, W) bool may name pixels that no loss looks at. With `extra_losses` a step has one more pass, of all classes.
    """

    def __init__(
        self,
        *,
        text_backbone: FrozenPart | None,
        fusion: Fusion,
        decoder: ConvDecoder,
        temperature: float,
        windows: Windows | None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.text_backbone = text_backbone
        self.fusion = fusion
        self.decoder = decoder
        self.temperature = temperature
        self.windows = windows

    def losses(self, batch: Samples) -> dict[str, Tensor]:
        """The loss of a batch, the mean of those of its images, or the share of a part of one
        (`structures.TrainingBatch`)."""
        images, _ = self.preprocess(batch)
        vocabularies = batch_vocabularies(batch, self.train_vocabulary)
        features, size = self.backbone(images), tuple(images.shape[-2:])
        planes = self.planes(features.dense, vocabularies, size)
        losses = [self.image_loss(sample, own) for sample, own in zip(batch, planes)]
        num_images = len(getattr(batch, "segment_counts", None) or batch)
        named = {"loss_bce": torch.stack(losses).sum() / num_images}
        if self.extra_losses:
            extra = [vocabulary for hook in self.extra_losses for vocabulary in hook.vocabularies]
            scored = list(dict.fromkeys([*vocabularies, *extra]))
            text = TextEmbeddings.joined([self.text_encoder.encode(vocabulary) for vocabulary in scored])
            proposals = self.propose(features, text, size)
            for hook in self.extra_losses:
                named |= hook(features, proposals, text, class_slices(scored), batch)
        return named

    def image_loss(self, sample: Any, planes: Tensor) -> Tensor:
        """See `binary_loss`; a pixel belongs to a class if it lies in any of its segments."""
        targets, ignored = sample["targets"].to(self.device), sample.get("ignored")
        height, width = targets.image_size
        truth = planes.new_zeros(len(planes), height, width)
        truth.index_add_(0, targets.labels, targets.expand().to(truth.dtype)).clamp_(max=1)
        return binary_loss(planes[:, :height, :width], truth, None if ignored is None else ignored.to(self.device))

    @torch.no_grad()
    def score(
        self, inputs: Samples, vocabulary: Vocabulary | None = None, *, void_limit: float = 1.0
    ) -> list[ScoredMasks]:
        """One pass of the network, or one a window; one record an image. The arguments are those of `forward`; there is
        no void that `void_limit` could concern."""
        images, sizes = self.preprocess(inputs)
        default = self.test_vocabulary if vocabulary is None else vocabulary
        vocabularies = [vocabulary_of(sample, default) for sample in inputs]
        size = tuple(images.shape[-2:])
        places = [
            OutputMasks(
                mask_logits=images.new_zeros(0, 1, 1),
                padded_size=own if self.windows else size,
                image_size=own,
                output_size=output_size(sample, own),
            )
            for sample, own in zip(inputs, sizes)
        ]
        with self.autocast():
            dense = images if self.windows else self.backbone(images).dense.float()
            if self.windows is None:
                planes = self.planes(dense, vocabularies, size)
            else:
                planes = [self.windowed(*image) for image in zip(dense, sizes, vocabularies)]
        return [self.scored(*image) for image in zip(planes, places, dense, vocabularies)]

    @torch.no_grad()
    def rescore(self, scored: ScoredMasks, vocabulary: Vocabulary) -> ScoredMasks:
        """See `Architecture`; names see each other in the fusion, which runs again, and below windows so does the
        vision encoder."""
        with self.autocast():
            if self.windows is None:
                [planes] = self.planes(scored.dense[None], [vocabulary], scored.masks.padded_size)
            else:
                planes = self.windowed(scored.dense, scored.masks.image_size, vocabulary)
        return self.scored(planes, scored.masks, scored.dense, vocabulary)

    @torch.no_grad()
    def embed_regions(self, scored: ScoredMasks, masks: Tensor) -> Tensor:
        """See `Architecture`; what the vision encoder sees: the mean of the tokens."""
        dense = (self.backbone(scored.dense[None]).dense if self.windows else scored.dense[None]).float()
        inside = scored.masks.cells_of(masks, tuple(dense.shape[-2:]))
        return F.normalize(mask_pool(dense, inside[None])[0], dim=-1)

    def parameter_groups(
        self, *, lr: float, decoder_lr: float, weight_decay: float, decay_end: float
    ) -> list[dict[str, Any]]:
        """The published groups of the optimiser: matrices of the fusion decay, to `decay_end` by and by unless that is
        negative; its vectors do not; the decoder learns at a constant rate without decay, by Adam, which AdamW is then.
        """
        matrices, vectors = [], []
        for name, weight in self.fusion.named_parameters():
            (vectors if weight.dim() == 1 else matrices).append((f"fusion.{name}", weight))
        decoder = [(f"decoder.{name}", weight) for name, weight in self.decoder.named_parameters()]
        ends = {} if decay_end < 0 else {"decays": (weight_decay, decay_end)}
        return [
            {"params": matrices, "lr": lr, "weight_decay": weight_decay, **ends},
            {"params": vectors, "lr": lr, "weight_decay": 0.0},
            {"params": decoder, "lr": decoder_lr, "weight_decay": 0.0, "constant_lr": True},
        ]

    # ---- steps ----

    def planes(self, dense: Tensor, vocabularies: Sequence[Vocabulary], size: tuple[int, int]) -> list[Tensor]:
        """Tokens of the vision encoder (B, C, h, w) and the vocabularies of the images -> the logits (K, *size) of the
        classes of each; images with as many names go through the network together."""
        texts = [self.text_encoder.encode(vocabulary) for vocabulary in vocabularies]
        groups: dict[int, list[int]] = {}
        for index, text in enumerate(texts):
            groups.setdefault(len(text.vectors), []).append(index)
        planes: dict[int, Tensor] = {}
        for indices in groups.values():
            pixels, classes = self.fuse(dense[indices], torch.stack([texts[index].vectors for index in indices]))
            logits = cosine_logits(pixels, classes, size, temperature=self.temperature)
            planes |= {index: best_names(names, texts[index]) for index, names in zip(indices, logits)}
        return [planes[index] for index in range(len(texts))]

    def scored(self, planes: Tensor, place: OutputMasks, dense: Tensor, vocabulary: Vocabulary) -> ScoredMasks:
        """The record of an image: its planes (K, ·, ·) as masks at a place, and what they were made of."""
        logits = sure(len(vocabulary), self.device)
        return ScoredMasks(
            in_logits=logits,
            out_logits=logits[:, :-1],
            seen=vocabulary.seen_by(self.seen_vocabulary),
            valid=None,
            masks=replace(place, mask_logits=planes),
            dense=dense,
            vocabulary=vocabulary,
        )

    def windowed(self, image: Tensor, size: tuple[int, int], vocabulary: Vocabulary) -> Tensor:
        """A normalised image (3, ·, ·), of which `size` is not padding -> the planes (K, *size) by windows."""

        def network(window: Tensor) -> Tensor:
            return self.planes(self.backbone(window[None]).dense, [vocabulary], tuple(window.shape[-2:]))[0]

        return self.windows.mean(image[:, : size[0], : size[1]], network)

    def fuse(self, dense: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
        """dense (B, C, h, w) and names (B, N, ·) -> pixels (B, D, 8 h, 8 w) and class tokens (B, N, D)."""
        patches = F.normalize(dense.flatten(2).transpose(1, 2), dim=-1)
        patches, classes = self.fusion(patches, names.to(patches))
        return self.decoder(patches.transpose(1, 2).unflatten(-1, dense.shape[-2:])), classes

    def propose(self, features: Features, text: TextEmbeddings, size: tuple[int, int]) -> MaskProposals:
        """All names prompted for every image, as proposals: one a name."""
        pixels, classes = self.fuse(features.dense, text.vectors.expand(len(features.dense), -1, -1))
        pixels = F.normalize(F.interpolate(pixels, size=size, mode="bilinear", align_corners=False), dim=1)
        logits = sure(text.num_classes, self.device)[text.class_of_vector.to(self.device)]
        embeddings = F.normalize(classes, dim=-1) / self.temperature
        return MaskProposals([logits.expand(len(pixels), -1, -1)], [embeddings], pixels)


def best_names(planes: Tensor, text: TextEmbeddings) -> Tensor:
    """(W, h, w) of names -> (K, h, w) of classes: a class scores as its best synonym."""
    if len(planes) == text.num_classes:
        return planes
    owner = text.class_of_vector.to(planes.device)[:, None, None].expand_as(planes)
    result = planes.new_full((text.num_classes, *planes.shape[1:]), -torch.inf)
    return result.scatter_reduce(0, owner, planes, "amax")


def sure(num_classes: int, device: torch.device) -> Tensor:
    """(K, K + 1) class logits of K queries, each of its own class, none void."""
    logits = torch.full((num_classes, num_classes + 1), NEVER, device=device)
    return logits.fill_diagonal_(0.0)
