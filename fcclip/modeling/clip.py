"""The frozen CLIP that is both backbone and classifier (FC-CLIP, section 3.2).

A family is a subclass of `CLIPBackbone`: how features are tapped, and how a region becomes an embedding in CLIP's
image-text space.
"""

from __future__ import annotations

import abc
import json
import logging
from pathlib import Path
from typing import ClassVar

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from fcclip.config import resolve_file
from fcclip.modeling.classifier import mask_pool

logger = logging.getLogger(__name__)

LEVELS = ("stem", "res2", "res3", "res4", "res5")
DENSE = "clip_vis_dense"
_NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")  # constants that some files hold


class CLIPBackbone(nn.Module, abc.ABC):
    """A frozen CLIP; always in evaluation mode, never with gradients.

    Attributes:
        channels: channels of each level; strides: pixels between its cells.
        embed_dim: D, the width of the joint space.
        pooling: name of the out-of-vocabulary classifier's pooling.
    """

    pooling: ClassVar[str]
    strides: ClassVar[dict[str, int]]

    def __init__(self, clip_model: nn.Module, *, channels: dict[str, int]) -> None:
        super().__init__()
        self.clip_model = clip_model.requires_grad_(False).eval()
        self.channels = channels
        self.embed_dim = int(clip_model.text_projection.shape[-1])

    def train(self, mode: bool = True) -> CLIPBackbone:
        """Marks the module as training; the CLIP inside stays in evaluation mode."""
        super().train(mode)
        self.clip_model.eval()
        return self

    @property
    def logit_scale(self) -> Tensor:
        """CLIP's own logit scale, a logarithm."""
        return self.clip_model.logit_scale

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> maps by level name, and `clip_vis_dense`, the features that region
        embeddings pool.
        """
        return self.tap(images)

    @abc.abstractmethod
    def tap(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of one family."""

    @abc.abstractmethod
    def region_embeddings(self, dense: Tensor, mask_logits: Tensor) -> Tensor:
        """Dense features (B, C, h, w) and mask logits (B, Q, h, w) -> (B, Q, D), of any length."""


class ConvNeXtCLIP(CLIPBackbone):
    """CLIP with a timm ConvNeXt of any size; regions are averages of the last stage (`mask_pool`)."""

    pooling = "mask_pool"
    strides: ClassVar[dict[str, int]] = {"stem": 4, "res2": 4, "res3": 8, "res4": 16, "res5": 32}

    def __init__(self, clip_model: nn.Module) -> None:
        trunk = clip_model.visual.trunk
        widths = [trunk.stem[0].out_channels, *(info["num_chs"] for info in trunk.feature_info)]
        super().__init__(clip_model, channels=dict(zip(LEVELS, widths, strict=True)))

    def tap(self, images: Tensor) -> dict[str, Tensor]:
        """Stem and the four stages."""
        trunk = self.clip_model.visual.trunk
        x = trunk.stem(images)
        maps = {"stem": x.contiguous()}
        for name, stage in zip(LEVELS[1:], trunk.stages):
            x = stage(x)
            maps[name] = x.contiguous()
        maps[DENSE] = trunk.norm_pre(x).contiguous()
        return maps

    @torch.no_grad()
    def region_embeddings(self, dense: Tensor, mask_logits: Tensor) -> Tensor:
        """Averages first, then CLIP's own head: norm and projection."""
        pooled = mask_pool(dense, mask_logits)  # (B, Q, C)
        visual = self.clip_model.visual
        embedded = visual.head(visual.trunk.head(pooled.flatten(0, 1)[..., None, None]))
        return embedded.unflatten(0, pooled.shape[:2])


class ResNetCLIP(CLIPBackbone):
    """CLIP with OpenAI's modified ResNet; regions go through its attention pool, masked (`masked_attention_pool`)."""

    pooling = "masked_attention_pool"
    strides: ClassVar[dict[str, int]] = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}

    def __init__(self, clip_model: nn.Module) -> None:
        visual = clip_model.visual
        layers = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        widths = [visual.conv3.out_channels, *(layer[-1].conv3.out_channels for layer in layers)]
        super().__init__(clip_model, channels=dict(zip(LEVELS, widths, strict=True)))

    def tap(self, images: Tensor) -> dict[str, Tensor]:
        """The stem before its average pool, and the four layers."""
        visual = self.clip_model.visual
        x = visual.act1(visual.bn1(visual.conv1(images)))
        x = visual.act2(visual.bn2(visual.conv2(x)))
        x = visual.act3(visual.bn3(visual.conv3(x)))
        maps = {"stem": x}
        x = visual.avgpool(x)
        for name, layer in zip(LEVELS[1:], (visual.layer1, visual.layer2, visual.layer3, visual.layer4)):
            x = layer(x)
            maps[name] = x
        maps[DENSE] = x
        return maps

    @torch.no_grad()
    def region_embeddings(self, dense: Tensor, mask_logits: Tensor) -> Tensor:
        """The attention pool once per mask, its mean query seeing only the cells inside; an empty mask sees every
        cell.
        """
        pool = self.clip_model.visual.attnpool
        heads, (height, width) = pool.num_heads, dense.shape[-2:]
        cells = dense.flatten(2).transpose(1, 2)  # (B, hw, C)
        grid = round((len(pool.positional_embedding) - 1) ** 0.5)
        spatial = pool.positional_embedding[1:].T.unflatten(-1, (grid, grid))[None]  # (1, C, s, s)
        spatial = F.interpolate(spatial, size=(height, width), mode="bilinear", align_corners=False)
        keys = cells + spatial.flatten(2).transpose(1, 2).to(cells.dtype)
        query = cells.mean(dim=1, keepdim=True) + pool.positional_embedding[0].to(cells.dtype)  # (B, 1, C)
        if mask_logits.shape[-2:] != dense.shape[-2:]:
            mask_logits = F.interpolate(mask_logits, size=(height, width), mode="bilinear", align_corners=False)
        visible = (mask_logits > 0).flatten(2)  # (B, Q, hw)
        visible = visible | ~visible.any(dim=-1, keepdim=True)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        num_queries = mask_logits.shape[1]
        q = split(pool.q_proj(query)).expand(-1, -1, num_queries, -1)
        attended = F.scaled_dot_product_attention(
            q, split(pool.k_proj(keys)), split(pool.v_proj(keys)), attn_mask=visible[:, None]
        )
        return pool.c_proj(attended.transpose(1, 2).flatten(2))


def build_clip(name: str, pretrained: str = "", *, quick_gelu: str = "auto") -> CLIPBackbone:
    """A frozen CLIP of any supported family.

    Args:
        name: an open_clip architecture ("convnext_large_d_320", "RN50"), or the path of an open_clip model JSON.
        pretrained: an open_clip tag, the path of a weights file, or "" for random weights.
        quick_gelu: "auto", "on" or "off" (MODEL.FC_CLIP.QUICK_GELU).

    Raises:
        ValueError: unknown architecture or tag, a family that is not supported, weights of another architecture.
        FileNotFoundError: a path that does not exist.
        ConnectionError: a tag whose weights are not on this machine and cannot be downloaded.
    """
    architecture = _architecture(name)
    quick = bool(architecture.pop("quick_gelu", False))
    if quick_gelu not in ("auto", "on", "off"):
        raise ValueError(f"MODEL.FC_CLIP.QUICK_GELU must be 'auto', 'on' or 'off', got '{quick_gelu}'")
    state = None if not pretrained else _pretrained_state(name, pretrained)
    openai = pretrained == "openai" or (state is not None and state.openai)
    from_file = state is not None and pretrained not in open_clip.list_pretrained_tags_by_model(name)
    resnet = isinstance(architecture["vision_cfg"].get("layers"), (list, tuple))
    if resnet and from_file and not openai and not quick and quick_gelu == "auto":
        raise ValueError(
            f"nothing says whether the ResNet weights in '{pretrained}' are OpenAI's, whose text tower has QuickGELU: "
            "set MODEL.FC_CLIP.QUICK_GELU to 'on' (OpenAI's weights) or 'off' (all others)"
        )
    quick = {"on": True, "off": False}.get(quick_gelu, quick or openai)
    model = open_clip.model.CLIP(**architecture, quick_gelu=quick)
    if state is None:
        logger.info("CLIP '%s': random weights (MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS is empty)", name)
    else:
        _load(model, state.tensors, source=f"'{pretrained}'", name=name)
        logger.info("CLIP '%s': weights from '%s'%s", name, pretrained, ", QuickGELU" if quick else "")
    return as_backbone(model, name=name)


def as_backbone(clip_model: nn.Module, *, name: str = "CLIP") -> CLIPBackbone:
    """The family that an open_clip model belongs to, told by its image tower.

    Raises:
        ValueError: a tower of another kind.
    """
    visual = clip_model.visual
    if isinstance(visual, ModifiedResNet):
        return ResNetCLIP(clip_model)
    trunk = getattr(visual, "trunk", None)
    if type(trunk).__name__ == "ConvNeXt":
        return ConvNeXtCLIP(clip_model)
    kind = type(trunk if trunk is not None else visual).__name__
    raise ValueError(
        f"CLIP '{name}' has the image tower {kind}; supported are timm's ConvNeXt (convnext_*) and OpenAI's ResNets "
        f"(RN50, RN101, "
        "RN50x4, RN50x16, RN50x64). FC-CLIP needs a convolutional tower."
    )


def _architecture(name: str) -> dict:
    if name.endswith(".json"):
        path = resolve_file(name, what="MODEL.FC_CLIP.CLIP_MODEL_NAME")
        config = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = open_clip.get_model_config(name)
        if config is None:
            import_names = sorted(one for one in open_clip.list_models() if one.startswith(("convnext", "RN")))
            raise ValueError(
                f"MODEL.FC_CLIP.CLIP_MODEL_NAME: open_clip {open_clip.__version__} knows no architecture '{name}'. "
                f"Known convolutional ones: {', '.join(import_names)}; or give the path of an open_clip model JSON."
            )
    config = dict(config)
    if config.pop("custom_text", False) or "hf_model_name" in config.get("text_cfg", {}):
        raise ValueError(f"CLIP '{name}' has a custom text tower; only CLIP's own text transformer is supported")
    return config


class _State:
    """Tensors of a weights file, and whether they are OpenAI's."""

    def __init__(self, tensors: dict[str, Tensor], openai: bool) -> None:
        self.tensors, self.openai = tensors, openai


def _pretrained_state(name: str, pretrained: str) -> _State:
    looks_like_a_path = Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors") or "/" in pretrained
    if looks_like_a_path:
        return _read_weights(resolve_file(pretrained, what="MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"))
    known = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in known:
        raise ValueError(
            f"MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS: '{pretrained}' is no open_clip tag of '{name}' (its tags: "
            f"{', '.join(known) or 'none'}) and no weights file (.pt, .pth, .bin, .safetensors)"
        )
    try:
        path = open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, pretrained))
    except Exception as error:  # every downloader behind open_clip has errors of its own
        raise ConnectionError(
            f"the weights '{pretrained}' of CLIP '{name}' are not on this machine and could not be downloaded "
            f"({type(error).__name__}: {error}). Download them where there is a network and give the path of the "
            f"file as "
            "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS, or '' for random weights."
        ) from error
    return _read_weights(Path(path))


def _read_weights(path: Path) -> _State:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _State(load_file(path), openai=False)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        try:
            archive = torch.jit.load(path, map_location="cpu")  # OpenAI publishes TorchScript archives
        except RuntimeError:
            raise ValueError(
                f"{path} holds no plain tensors ({type(error).__name__}: {error}). Files that need code to be read "
                f"are refused; "
                "convert it to .safetensors where you trust it."
            ) from error
        return _State(archive.state_dict(), openai=True)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return _State({key.removeprefix("module."): value for key, value in content.items()}, openai=False)


def _load(model: nn.Module, tensors: dict[str, Tensor], *, source: str, name: str) -> None:
    wanted = model.state_dict()
    tensors = {
        key: value.float() if value.is_floating_point() else value
        for key, value in tensors.items()
        if key not in _NO_WEIGHTS
    }
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted))
    shapes = [key for key in wanted if key in tensors and wanted[key].shape != tensors[key].shape]
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {what} (e.g. {keys[0]})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise ValueError(
            f"weights {source} do not fit CLIP '{name}': {', '.join(parts)}. Are they of another architecture?"
        )
    model.load_state_dict(tensors)
