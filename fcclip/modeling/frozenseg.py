"""FrozenSeg (Chen et al. 2024): FC-CLIP whose decoder also looks at the features of a frozen SAM.

Legend: B images, Q queries, d width, hw cells of a level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcclip.errors import InputError
from fcclip.modeling.architecture import Ensemble, ScoredMasks
from fcclip.modeling.backbones.sam import SamImageEncoder
from fcclip.modeling.classifier import mask_pool, resize_masks, text_logits, with_void
from fcclip.modeling.fcclip import FCCLIP
from fcclip.modeling.head import FCCLIPHead
from fcclip.modeling.inputs import Samples
from fcclip.modeling.mask_decoder import (
    NO_HOOKS,
    CrossAttentionLayer,
    DecoderHooks,
    MaskProposals,
    MultiScaleMaskedTransformerDecoder,
    mask_product,
)
from fcclip.modeling.openseg import OpenSegEnsemble, ensembled_semantic, on_grid, read_sam_masks, unseen_shares
from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.outputs import OutputSettings
from fcclip.modeling.position import sine_positions
from fcclip.modeling.sam_pixel_decoder import FrozenSegPixelDecoder
from fcclip.structures import Features, TextEmbeddings

SAM_LEVEL = "sam"  # name of SAM's features among the levels


class FrozenSeg(FCCLIP):
    """FC-CLIP with a second frozen encoder; an `Architecture`.

    Args:
        sam: the frozen SAM; None where no injector looks at it.
        openseg: the ensemble of semantic maps with SAM's masks; None: there is none.
        parts: as for `FCCLIP`.

    Attributes:
        added_parts: beginnings of the names of trained weights that FC-CLIP does not have.
    """

    added_parts = (
        "sem_seg_head.pixel_decoder.fpn3.",
        "sem_seg_head.pixel_decoder.sam_transformer.",
        "sem_seg_head.predictor.transformer_cross_attention_layers_sam.",
    )

    def __init__(self, *, sam: SamImageEncoder | None, openseg: OpenSegEnsemble | None = None, **parts: Any) -> None:
        super().__init__(**parts)
        self.sam, self.openseg = sam, openseg

    def see(self, images: Tensor, inputs: Samples) -> Features:
        """CLIP's features, and SAM's as one more level."""
        sam = None if self.sam is None else self.sam(inputs, divisibility=self.size_divisibility)
        return self.with_sam(super().see(images, inputs), sam)

    @staticmethod
    def with_sam(features: Features, sam: Tensor | None) -> Features:
        """CLIP's features with SAM's (B, C, h, w) as one more level; None: there are none."""
        return features if sam is None else Features({**features.levels, SAM_LEVEL: sam}, dense=features.dense)

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
        """As `FCCLIP.outputs`; SAM's masks take part in semantic maps and in recall alone."""
        heads, settings = self.heads if heads is None else heads, settings or self.output_settings
        options = {"ensemble": ensemble, "semantic": semantic, "settings": settings}
        if self.openseg is None or not {"semantic", "recall"} & set(heads):
            return super().outputs(scored, heads=heads, **options)
        masks = scored.masks
        logits = read_sam_masks(self.openseg.folder, scored.file_name, masks.output_size).to(self.device)
        others = [head for head in heads if head != "semantic" or not len(logits)]
        outputs = super().outputs(scored, heads=others, **options)
        if "recall" in heads:
            size = tuple(logits.shape[-2:])
            outputs["recall_seg"].append(OutputMasks(logits, size, size, masks.output_size))
        if len(logits) and "semantic" in heads:
            seen = scored.seen.to(self.device)
            outputs["sem_seg"] = ensembled_semantic(
                scored.class_logits(Ensemble.of(ensemble or self.ensemble).of_head("semantic")),
                masks,
                sam_logits=logits,
                sam_shares=unseen_shares(self.name_masks(scored, logits), seen),
                seen=seen,
                epsilon=self.openseg.epsilon,
                masks_first=settings.masks_first,
                labels=semantic == "labels",
            )
        return outputs

    def name_masks(self, scored: ScoredMasks, logits: Tensor) -> Tensor:
        """What CLIP alone says of SAM's masks (J, ·, ·) over the image: (J, K + 1) logits, void last."""
        text = with_void(self.text_encoder.encode(scored.vocabulary), self.void_embedding.weight)
        small = on_grid(logits, scored.masks, scored.dense.shape[-2:])
        return text_logits(self.classifier(scored.dense[None], small[None]), text, self.backbone.logit_scale)[0]


class FrozenSegDecoder(MultiScaleMaskedTransformerDecoder):
    """FC-CLIP's decoder with FrozenSeg's two injectors.

    Args:
        feature_level: level whose memory looks at SAM's features before its layers do, 0..2 coarse to fine; 3: none.
        query_level: level after whose layers the queries are given what SAM sees in their masks; 3: none.
        decoder: as for `MultiScaleMaskedTransformerDecoder`.
    """

    def __init__(self, *, feature_level: int, query_level: int, **decoder: Any) -> None:
        super().__init__(**decoder)
        for name, level in (("FEATURE", feature_level), ("QUERY", query_level)):
            if level not in range(self.num_levels + 1):
                raise InputError(
                    f"MODEL.MASK_FORMER.SAM_{name}_FUSE_LAYER must be 0, 1 or 2, the level of stride 32, 16 or 8, or 3 "
                    f"for none; got {level}"
                )
        self.query_level = query_level
        injected = range(feature_level, decoder["num_layers"], self.num_levels) if feature_level < 3 else ()
        self.transformer_cross_attention_layers_sam = nn.ModuleDict(
            {
                str(layer): CrossAttentionLayer(dim=decoder["dim"], heads=decoder["heads"], pre_norm=False)
                for layer in injected
            }
        )

    def sam_vectors(self, mask_logits: Tensor, sam: Tensor) -> Tensor:
        """What SAM sees in each mask, by the projection of the in-vocabulary classifier.

        Args:
            mask_logits: (B, Q, ·, ·); no gradient flows into them.
            sam: (B, d, h, w).

        Returns:
            (B, Q, d); of an empty mask the projection of zeros.
        """
        return self._mask_pooling_proj(mask_pool(sam, mask_logits))


class Injectors(DecoderHooks):
    """Both injectors in one call of the decoder (FrozenSeg, section 3.3).

    Args:
        decoder: holds their weights.
        mask_features: (B, d, H/4, W/4).
        sam: (B, d, h, w), for the queries.
        refined: (B, d, h, w), for the memory, resized to `size`; None without feature injector.
        size: of the coarsest level.
    """

    def __init__(
        self,
        decoder: FrozenSegDecoder,
        *,
        mask_features: Tensor,
        sam: Tensor,
        refined: Tensor | None,
        size: tuple[int, int],
    ) -> None:
        self.decoder, self.sam = decoder, sam
        self.sized_features = resize_masks(mask_features.detach(), sam.shape[-2:])
        if refined is not None:
            self.value = resize_masks(refined, size).flatten(2).transpose(1, 2)  # (B, hw, d)
            self.position = sine_positions(*size, refined.shape[1], refined.device).flatten(1).T

    def after_heads(self, layer: int, x: Tensor, embedding: Tensor) -> Tensor:
        """The query injector: after the layers of one level, whose masks are predicted already."""
        decoder = self.decoder
        if layer == 0 or (layer - 1) % decoder.num_levels != decoder.query_level:
            return x
        with torch.no_grad():
            mask_logits = mask_product(embedding, self.sized_features)
        return x + decoder.sam_vectors(mask_logits, self.sam)

    def memory(self, layer: int, memory: Tensor, position: Tensor) -> tuple[Tensor, Tensor | int]:
        """The feature injector: the memory looks at SAM's map, which has its level embedding; as published, the queries
        then find keys without positions."""
        injectors = self.decoder.transformer_cross_attention_layers_sam
        if str(layer) not in injectors:
            return memory, position
        value = self.value + self.decoder.level_embed.weight[layer % self.decoder.num_levels]
        return injectors[str(layer)](memory, position, value, self.position, None), 0


class FrozenSegHead(FCCLIPHead):
    """Pixel decoder and masked decoder under their published names, and SAM's features injected between its layers."""

    pixel_decoder: FrozenSegPixelDecoder
    predictor: FrozenSegDecoder

    def forward(self, levels: Mapping[str, Tensor], text: TextEmbeddings, *, all_sets: bool) -> MaskProposals:
        """Backbone levels with SAM's among them, and K classes with void -> mask proposals; see the decoder."""
        mask_features, pyramid = self.pixel_decoder(levels)
        hooks = NO_HOOKS
        if SAM_LEVEL in levels:
            hooks = Injectors(
                self.predictor,
                mask_features=mask_features,
                sam=levels[SAM_LEVEL],
                refined=self.pixel_decoder.refine(levels[SAM_LEVEL])
                if self.predictor.transformer_cross_attention_layers_sam
                else None,
                size=pyramid[0].shape[-2:],
            )
        return self.predictor(pyramid, mask_features, text, all_sets=all_sets, hooks=hooks)
