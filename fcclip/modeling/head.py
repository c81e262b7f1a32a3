"""Pixel decoder and masked decoder, put together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fcclip.modeling.mask_decoder import MaskProposals, MultiScaleMaskedTransformerDecoder
from fcclip.modeling.pixel_decoder import MSDeformAttnPixelDecoder
from fcclip.structures import TextEmbeddings


class FCCLIPHead(nn.Module):
    """Pixel decoder and masked decoder under their published names."""

    def __init__(
        self, *, pixel_decoder: MSDeformAttnPixelDecoder, predictor: MultiScaleMaskedTransformerDecoder
    ) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    def forward(self, levels: Mapping[str, Tensor], text: TextEmbeddings, *, all_sets: bool) -> MaskProposals:
        """Backbone levels and K classes with void -> mask proposals; see the decoder."""
        mask_features, pyramid = self.pixel_decoder(levels)
        return self.predictor(pyramid, mask_features, text, all_sets=all_sets)
