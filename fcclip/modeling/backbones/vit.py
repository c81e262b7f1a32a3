"""Frozen vision transformers that give dense features: CLIP's own, and timm's (DINO, MoCo v3) without a text tower.

A token of the last layer is a cell of `Features.dense`; the class token takes part and is dropped. Images of any size
that is a multiple of the patch are taken: the position embedding is resized to their grid.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from fcclip.config import resolve_file
from fcclip.errors import InputError, NotReachableError
from fcclip.modeling.backbones.clip import CLIPBackbone
from fcclip.structures import Features
from fcclip.weights.files import read_weight_file
from fcclip.weights.frozen import FrozenPart, load_frozen


class ViTCLIP(CLIPBackbone):
    """CLIP with a vision transformer; its tokens are projected into the joint space."""

    region_classifier = "mask_pool"
    needs_activation = True  # OpenAI's towers have QuickGELU; others have not

    def __init__(self, clip_model: nn.Module) -> None:
        super().__init__(clip_model, channels={"tokens": int(clip_model.text_projection.shape[-1])})
        self.strides = {"tokens": int(clip_model.visual.conv1.stride[0])}

    @staticmethod
    def fits(visual: nn.Module) -> bool:
        """See `CLIPBackbone`."""
        return isinstance(visual, VisionTransformer) and visual.proj is not None

    def tap(self, visual: nn.Module, images: Tensor) -> Features:
        """The projected tokens (B, D, h, w) of the last layer."""
        grid = token_grid(images, self.strides["tokens"])
        x = visual.conv1(images)
        first = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x.flatten(2).transpose(1, 2)], dim=1)
        x = visual.ln_pre(x + resized_positions(visual.positional_embedding, grid).to(x.dtype))
        batch_first = getattr(visual.transformer, "batch_first", True)  # open_clip before 2.25 swaps outside
        x = visual.transformer(x) if batch_first else visual.transformer(x.transpose(0, 1)).transpose(0, 1)
        x = visual.ln_post(x[:, 1:]) @ visual.proj
        dense = x.transpose(1, 2).unflatten(-1, grid)
        return Features({"tokens": dense}, dense=dense)

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) of any size -> (B, D): the mean token at 4 x 4 patches."""
        side = 4 * self.strides["tokens"]
        return self(F.interpolate(images, size=(side, side), mode="bilinear")).dense.flatten(2).mean(-1)


class TimmViT(FrozenPart):
    """A frozen vision transformer of timm.

    Args:
        name: of timm, such as "vit_base_patch16_224".
        weights: a tag of timm ("dino"), a file by the names of timm or the authors (DINO, MoCo v3), or "" for random.

    Raises:
        InputError: a model that is not a vision transformer of timm, or weights that do not fit.
        NotReachableError: a tag whose weights cannot be downloaded.
    """

    notes_key = "vision"
    config_keys = ("MODEL.FUSIONER.TIMM_MODEL", "MODEL.FUSIONER.TIMM_WEIGHTS")

    def __init__(self, name: str, weights: str = "") -> None:
        super().__init__()
        if not timm.is_model(name) or not name.startswith(("vit_", "deit", "test_vit")):
            raise InputError(f"{self.config_keys[0]}: '{name}' is not a vision transformer of timm {timm.__version__}")
        is_tag = bool(weights) and not set("./") & set(weights)
        full_name = f"{name}.{weights}" if is_tag else name
        try:
            self.vit = timm.create_model(full_name, pretrained=is_tag, num_classes=0, dynamic_img_size=True)
        except Exception as error:  # every downloader behind timm has errors of its own
            raise NotReachableError(
                f"timm cannot make '{full_name}' ({type(error).__name__}: {error}). Download the weights where there "
                f"is a network and give the file as {self.config_keys[1]}, or '' for random weights."
            ) from error
        if weights and not is_tag:
            file = read_weight_file(resolve_file(weights, what=self.config_keys[1]), what="weights of a ViT")
            tensors = {re.sub(r"^(module\.|base_encoder\.|backbone\.)+", "", key): v for key, v in file.tensors.items()}
            own = {key: value for key, value in tensors.items() if key in self.vit.state_dict()}
            load_frozen(self.vit, own, source=weights, what=f"the vision transformer '{name}'")
        self.vit.requires_grad_(False).eval()
        self.name, self.weights = name, weights
        self.channels = {"tokens": int(self.vit.embed_dim)}
        self.strides = {"tokens": int(self.vit.patch_embed.patch_size[0])}

    def load_named(self, name: str, weights: str) -> None:
        """See `FrozenPart`."""
        self.vit, self.weights = TimmViT(name, weights).vit, weights

    def train(self, mode: bool = True) -> TimmViT:
        """Marks the module as training; the encoder inside stays in evaluation mode."""
        super().train(mode)
        self.vit.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Normalised images (B, 3, H, W) -> the normalised tokens of the last layer as a map."""
        grid = token_grid(images, self.strides["tokens"])
        tokens = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
        dense = tokens.transpose(1, 2).unflatten(-1, grid)
        return Features({"tokens": dense}, dense=dense)

    @property
    def has_random_weights(self) -> bool:
        """Whether no weights were loaded."""
        return self.weights == ""

    def fingerprint(self) -> dict[str, Any]:
        """Name, weights as the config named them, and their hash."""
        return {"architecture": self.name, "pretrained": Path(self.weights).name, "weights": self.weights_hash()}


def token_grid(images: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of images (B, 3, H, W).

    Raises:
        InputError: their sides are no multiples of the patch.
    """
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise InputError(
            f"the vision transformer cuts images into patches of {patch} x {patch} pixels, which a network input of "
            f"{height} x {width} is no multiple of; set MODEL.MASK_FORMER.SIZE_DIVISIBILITY to {patch}"
        )
    return height // patch, width // patch


def resized_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1 + s * s, C), class token first, for another grid (bicubic); the input itself for its own.

    Returns:
        (1 + h * w, C).
    """
    side = round((len(positions) - 1) ** 0.5)
    if (side, side) == tuple(grid):
        return positions
    old = positions[1:].T.unflatten(-1, (side, side))
    new = F.interpolate(old[None], size=grid, mode="bicubic", antialias=True, align_corners=False)[0]
    return torch.cat([positions[:1], new.flatten(1).T])
