"""MAFT+: text vectors move towards each image before they name its masks (Jiao et al., ECCV 2024, section 3.3).

Evaluation only: its losses, which tune CLIP's image tower, are not here. The tuned tower comes with the weights.
Legend: B images, W synonyms, D embedding, C channels of the dense features, h x w cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fcclip.errors import InputError
from fcclip.modeling.classifier import text_logits
from fcclip.modeling.fcclip import FCCLIP
from fcclip.modeling.position import sine_positions
from fcclip.structures import TextEmbeddings

FORMS = ("panoptic", "semantic")
_CLASS_WEIGHTS = {172: "semantic", 134: "panoptic"}  # COCO-Stuff and COCO panoptic, with void -> what was trained


class TextTransfer(nn.Module):
    """The content-dependent transfer; parameters are called as published.

    Args:
        dim: D, a multiple of 16.
        form: "panoptic" gives T + norm(a), "semantic" norm(T + a), a being what texts T see in the image.
    """

    def __init__(self, *, dim: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.cross_atten = nn.ModuleDict(
            {
                "multihead_attn": nn.MultiheadAttention(dim, 8, batch_first=True),
                "norm": nn.LayerNorm(dim),
                "MLP": nn.Linear(dim, dim),
            }
        )
        nn.init.zeros_(self.cross_atten["MLP"].weight)
        nn.init.zeros_(self.cross_atten["MLP"].bias)

    def forward(self, text: Tensor, cells: Tensor) -> Tensor:
        """Vectors (W, D) and an image's cells (B, D, h, w) -> (B, W, D), of any length."""
        batch, dim, height, width = cells.shape
        values = cells.flatten(2).transpose(1, 2)  # (B, hw, D)
        keys = values + sine_positions(height, width, dim, cells.device).flatten(1).T
        text = text.expand(batch, -1, -1)
        seen = self.cross_atten["MLP"](self.cross_atten["multihead_attn"](text, keys, values, need_weights=False)[0])
        norm = self.cross_atten["norm"]
        return text + norm(seen) if self.form == "panoptic" else norm(text + seen)


class MAFTPlus(FCCLIP):
    """FC-CLIP whose out-of-vocabulary classifier meets texts that were moved towards the image.

    Args:
        transfer: moves them; no loss trains it.
        parts: as for `FCCLIP`.
    """

    def __init__(self, *, transfer: TextTransfer, **parts: Any) -> None:
        super().__init__(**parts)
        self.cdt = transfer.requires_grad_(False)

    def name_regions(self, regions: Tensor, dense: Tensor, text: TextEmbeddings) -> Tensor:
        """As FC-CLIP's. Moved texts are not of unit length, and their length counts."""
        moved = self.cdt(text.vectors, self.cells(dense))
        scale = self.backbone.logit_scale
        logits = [text_logits(own, replace(text, vectors=vectors), scale) for own, vectors in zip(regions, moved)]
        return torch.stack(logits)

    @torch.no_grad()
    def cells(self, dense: Tensor) -> Tensor:
        """Dense features (B, C, h, w) -> what the transfer sees, (B, D, h, w).

        The published code reads the (C, h, w) numbers of an image as (h w, C) without turning them, and its weights
        have learned with that.
        """
        visual, (batch, channels, height, width) = self.backbone.clip_model.visual, dense.shape
        tokens = dense.contiguous().reshape(batch * height * width, channels)
        embedded = visual.head(visual.trunk.head(tokens[..., None, None]))
        return embedded.reshape(batch, height, width, -1).permute(0, 3, 1, 2)

    def check_file(self, weights: Mapping[str, Tensor], *, source: str) -> None:
        """Refuses weights that were trained with the other form, as far as the number of their classes tells.

        Raises:
            InputError: names the key.
        """
        trained = _CLASS_WEIGHTS.get(len(weights.get("criterion.empty_weight", ())))
        if trained not in (None, self.cdt.form) and not any(key.startswith("classifier.") for key in weights):
            raise InputError(
                f"'{source}' was trained for {trained} segmentation, where the text transfer has another form than the "
                f"'{self.cdt.form}' one of this model: set MODEL.FC_CLIP.CDT_FORM {trained}"
            )
