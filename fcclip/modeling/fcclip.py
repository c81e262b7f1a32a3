"""FC-CLIP put together (Yu et al., NeurIPS 2023): frozen CLIP, both decoders, both classifiers, three outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcclip.losses import SetCriterion
from fcclip.modeling.architecture import BaseArchitecture, ScoredMasks
from fcclip.modeling.backbones.clip import CLIPBackbone
from fcclip.modeling.classifier import cut_classes, own_classes, resize_masks, text_logits, with_void
from fcclip.modeling.head import FCCLIPHead
from fcclip.modeling.inputs import (
    Samples,
    batch_vocabularies,
    class_slices,
    output_size,
    point_seeds,
    vocabulary_of,
)
from fcclip.modeling.mask_decoder import MaskProposals
from fcclip.modeling.out_of_vocabulary import RegionClassifier
from fcclip.modeling.output_masks import OutputMasks
from fcclip.structures import Features, TextEmbeddings
from fcclip.vocabulary import Vocabulary


class FCCLIP(BaseArchitecture):
    """Segments images with any class names; an `Architecture`, which says what its attributes are.

    One pass has four steps: `features = backbone(images)`, `proposals = sem_seg_head(levels, text)`,
    `regions = classifier(dense, mask_logits)` and `outputs`. Classes come with every call; the model keeps those that
    it is trained with, and those to use when a call brings none.

    Args:
        backbone: the frozen CLIP.
        sem_seg_head, criterion: the trained parts and their losses.
        classifier: the out-of-vocabulary classifier.
        ensemble_on_valid_mask: no ensemble for queries whose mask is empty at the size of the dense features.
        settings: as for `BaseArchitecture`.
    """

    def __init__(
        self,
        *,
        backbone: CLIPBackbone,
        sem_seg_head: FCCLIPHead,
        classifier: RegionClassifier,
        criterion: SetCriterion,
        ensemble_on_valid_mask: bool,
        **settings: Any,
    ) -> None:
        super().__init__(backbone=backbone, **settings)
        self.sem_seg_head = sem_seg_head
        self.classifier = classifier
        self.criterion = criterion
        self.void_embedding = nn.Embedding(1, backbone.embed_dim)
        self.ensemble_on_valid_mask = ensemble_on_valid_mask

    def losses(self, batch: Samples) -> dict[str, Tensor]:
        """The weighted losses of a batch, or of a part of one (`structures.TrainingBatch`); see `SetCriterion`."""
        images, _ = self.preprocess(batch)
        vocabularies = batch_vocabularies(batch, self.train_vocabulary)
        targets = [sample["targets"].to(self.device) for sample in batch]
        extra = [vocabulary for hook in self.extra_losses for vocabulary in hook.vocabularies]
        scored = list(dict.fromkeys([*vocabularies, *extra]))
        text = TextEmbeddings.joined([self.text_encoder.encode(vocabulary) for vocabulary in scored])
        features = self.see(images, batch)
        proposals = self.propose(features, text, all_sets=self.criterion.deep_supervision)
        class_logits, targets = own_classes(proposals.class_logits, targets, vocabularies)
        losses = self.criterion(
            class_logits,
            proposals.mask_embeddings,
            proposals.mask_features,
            targets,
            padded_size=tuple(images.shape[-2:]),
            point_seeds=point_seeds(batch),
            segment_counts=getattr(batch, "segment_counts", None),
        )
        for hook in self.extra_losses:
            losses |= hook(features, proposals, text, class_slices(scored), batch)
        return losses

    @torch.no_grad()
    def score(
        self, inputs: Samples, vocabulary: Vocabulary | None = None, *, void_limit: float = 1.0
    ) -> list[ScoredMasks]:
        """One pass of the network, whatever the number of vocabularies; one record an image.

        Args:
            inputs, vocabulary: as for `forward`.
            void_limit: see `Architecture`; out-of-vocabulary opinions and region embeddings that it spares are zeros.
        """
        images, sizes = self.preprocess(inputs)
        default = self.test_vocabulary if vocabulary is None else vocabulary
        groups: dict[Vocabulary, list[int]] = {}  # the images of each vocabulary
        for index, sample in enumerate(inputs):
            groups.setdefault(vocabulary_of(sample, default), []).append(index)
        texts = [self.text_encoder.encode(own) for own in groups]
        with self.autocast():
            features = self.see(images, inputs)
            proposals = self.propose(features, TextEmbeddings.joined(texts))
            mask_logits = proposals.mask_logits()
        dense, mask_logits, class_logits = features.dense.float(), mask_logits.float(), proposals.class_logits[-1]
        records: list[ScoredMasks | None] = [None] * len(inputs)
        for (own, indices), text, classes in zip(groups.items(), texts, class_slices(groups).values()):
            # class names do not see each other before the softmax, so a vocabulary's logits can be cut out of all
            rows = slice(None) if len(groups) == 1 else indices
            in_logits = cut_classes(class_logits[rows], classes.start, classes.stop)
            wanted = in_logits.float().softmax(-1)[..., -1] <= void_limit if void_limit < 1 else None
            regions, valid = self.pool(dense[rows], mask_logits[rows], wanted)
            out_logits = self.name_regions(regions, dense[rows], text)
            for row, index in enumerate(indices):
                records[index] = ScoredMasks(
                    in_logits=in_logits[row],
                    out_logits=out_logits[row],
                    seen=own.seen_by(self.seen_vocabulary),
                    valid=None if valid is None else valid[row],
                    masks=OutputMasks(
                        mask_logits=mask_logits[index],
                        padded_size=tuple(images.shape[-2:]),
                        image_size=sizes[index],
                        output_size=output_size(inputs[index], sizes[index]),
                    ),
                    dense=dense[index],
                    vocabulary=own,
                    file_name=str(inputs[index].get("file_name", "")),
                    class_embeddings=proposals.class_embeddings[-1][index].float(),
                    region_embeddings=regions[row],
                )
        return records

    @torch.no_grad()
    def rescore(self, scored: ScoredMasks, vocabulary: Vocabulary) -> ScoredMasks:
        """See `Architecture`; both classifiers' embeddings meet other class names, and the masks stay."""
        text = self.text_encoder.encode(vocabulary)
        named, scale = with_void(text, self.void_embedding.weight), self.sem_seg_head.predictor.logit_scale
        return replace(
            scored,
            in_logits=text_logits(scored.class_embeddings, named, scale),
            out_logits=self.name_regions(scored.region_embeddings[None], scored.dense[None], text)[0],
            seen=vocabulary.seen_by(self.seen_vocabulary),
            vocabulary=vocabulary,
        )

    @torch.no_grad()
    def embed_regions(self, scored: ScoredMasks, masks: Tensor) -> Tensor:
        """See `Architecture`."""
        inside = scored.masks.cells_of(masks, self.mask_grid(scored))
        return F.normalize(self.classifier(scored.dense[None], inside[None])[0].float(), dim=-1)

    def mask_grid(self, scored: ScoredMasks) -> tuple[int, int]:
        """The size at which the out-of-vocabulary classifier reads masks of an image."""
        is_fine = getattr(self.classifier, "needs_fine_masks", False)
        return tuple((scored.masks.mask_logits if is_fine else scored.dense).shape[-2:])

    @property
    def added_parts(self) -> tuple[str, ...]:
        """Beginnings of the names of trained weights that a file of FC-CLIP does not have."""
        return ("classifier.",) if isinstance(self.classifier, nn.Module) else ()

    @torch.no_grad()
    def score_masks(self, scored: ScoredMasks, queries: Tensor, mask_logits: Tensor) -> ScoredMasks:
        """The same image with other masks.

        Args:
            scored: the image.
            queries: (n,) int64, whose in-vocabulary opinion each mask takes.
            mask_logits: (n, h, w) at the size of `mask_grid`.
        """
        text = self.text_encoder.encode(scored.vocabulary)
        regions, valid = self.pool(scored.dense[None], mask_logits[None])
        return replace(
            scored,
            in_logits=scored.in_logits[queries],
            out_logits=self.name_regions(regions, scored.dense[None], text)[0],
            valid=None if valid is None else valid[0],
            masks=replace(scored.masks, mask_logits=mask_logits),
            class_embeddings=scored.class_embeddings[queries],
            region_embeddings=regions[0],
        )

    # ---- steps ----

    def see(self, images: Tensor, inputs: Samples) -> Features:
        """What the frozen parts see in preprocessed images (B, 3, H, W), which were made of `inputs`."""
        return self.backbone(images)

    def propose(self, features: Features, text: TextEmbeddings, *, all_sets: bool = False) -> MaskProposals:
        """Masks with the opinion of the in-vocabulary classifier on K classes and void."""
        return self.sem_seg_head(features.levels, with_void(text, self.void_embedding.weight), all_sets=all_sets)

    def pool(self, dense: Tensor, mask_logits: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the out-of-vocabulary classifier names: dense features (B, C, h, w) and mask logits (B, Q, ·, ·) ->
        region embeddings (B, Q, D), and (B, Q) bool, queries to which the ensemble applies; None: all. A classifier
        that looks at masks one by one looks at the `wanted` (B, Q) bool; None: at all."""
        part = {"wanted": wanted} if getattr(self.classifier, "one_by_one", False) else {}
        regions = self.classifier(dense, mask_logits, **part)
        if not self.ensemble_on_valid_mask:
            return regions, None
        return regions, (resize_masks(mask_logits, dense.shape[-2:]) > 0).flatten(2).any(-1)

    def name_regions(self, regions: Tensor, dense: Tensor, text: TextEmbeddings) -> Tensor:
        """The out-of-vocabulary opinion: region embeddings (B, Q, D) of dense features (B, C, h, w) -> (B, Q, K)."""
        return text_logits(regions, text, self.backbone.logit_scale)
