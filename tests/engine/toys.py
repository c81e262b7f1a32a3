"""A model with the shape of FC-CLIP's state dict and none of its cost, and what a trainer needs around it."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fcclip.config import get_cfg
from fcclip.engine import (
    Checkpointer,
    PeriodicEvaluation,
    Recorder,
    Saving,
    StepSettings,
    Trainer,
    build_gradient_clipping,
    build_lr_scheduler,
    build_optimizer,
    parameter_groups,
)
from fcclip.weights import FrozenPart

CLASSES = 3


class _Block(nn.Module):
    """A module whose children have the given names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class _FrozenClip(_Block, FrozenPart):
    notes_key = "clip"
    config_keys = ("MODEL.FC_CLIP.CLIP_MODEL_NAME", "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS")
    constants = ("clip_model.attn_mask",)


class ToyModel(nn.Module):
    """Keys as FC-CLIP names them; the loss is the distance of a projected image to its target."""

    def __init__(self, queries: int = 4, dim: int = 8, channels: int = 6, layers: int = 2, embed: int = 5) -> None:
        super().__init__()
        clip = _Block(visual=nn.Linear(channels, embed), ln_final=nn.LayerNorm(embed))
        self.backbone = _FrozenClip(clip_model=clip.requires_grad_(False))
        decoder = _Block(
            input_proj=nn.Sequential(nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(2, dim))),
        )
        decoder.level_embed = nn.Parameter(torch.zeros(3, dim))
        predictor = _Block(
            query_feat=nn.Embedding(queries, dim),
            transformer_ffn_layers=nn.Sequential(*(_Block(linear1=nn.Linear(dim, 2 * dim)) for _ in range(layers))),
        )
        predictor.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.sem_seg_head = _Block(pixel_decoder=decoder, predictor=predictor)
        self.void_embedding = nn.Embedding(1, embed)
        self.criterion = _Block()
        self.criterion.register_buffer("empty_weight", torch.tensor([1.0] * CLASSES + [0.1]))
        self.register_buffer("pixel_mean", torch.zeros(3), persistent=False)

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        """Every trainable parameter takes part; a sample is {"x": (channels,), "y": scalar}. Parts add up."""
        x = torch.stack([sample["x"] for sample in batch])
        features = self.sem_seg_head.pixel_decoder.input_proj(x[..., None, None])[..., 0, 0]
        predictor = self.sem_seg_head.predictor
        out = (features @ predictor.query_feat.weight.T).mean(1) * predictor.logit_scale
        extra = sum((layer.linear1(features) ** 2).mean() for layer in predictor.transformer_ffn_layers)
        extra = extra + self.sem_seg_head.pixel_decoder.level_embed.sum() + self.void_embedding.weight.sum()
        wanted = torch.stack([sample["y"] for sample in batch])
        counts = getattr(batch, "segment_counts", None)
        share = len(batch) / len(counts) if counts else 1.0  # of the whole batch
        return {"loss_ce": share * 0.01 * extra, "loss_mask": share * ((out - wanted) ** 2).mean()}


def make_batch(position: int, size: int = 4) -> list[dict]:
    """The batch at a position of an endless stream."""
    generator = torch.Generator().manual_seed(position)
    return [
        {
            "x": torch.randn(6, generator=generator),
            "y": torch.randn((), generator=generator),
            "file_name": f"{position}_{index}.jpg",
        }
        for index in range(size)
    ]


def toy_batches(start: int) -> Iterator[list[dict]]:
    """Endless batches from a position on."""
    return map(make_batch, itertools.count(start))


def make_trainer(model: nn.Module, *, folder: Path, max_iter: int = 6, **changes) -> Trainer:
    """A trainer of a toy model, with a warm-up of 2 and a step at 4; keywords are those of the Trainer, or fields of
    its parts (`full`, `accumulate`, `eval_period`, …)."""
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.BASE_LR = max_iter, (4,), 2, 0.01
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED, cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = True, "full_model"
    optimizer = build_optimizer(cfg, model)
    parts = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": build_lr_scheduler(cfg, optimizer),
        "batches": toy_batches,
        "max_iter": max_iter,
        "device": torch.device("cpu"),
    }

    def chosen(**defaults) -> dict:
        return {name: changes.pop(name, value) for name, value in defaults.items()}

    period = {"period": changes.pop("eval_period", 0)}
    settings = chosen(gradient_clipping=build_gradient_clipping(cfg), amp_dtype=None, accumulate=1, max_skips=0)
    saving = chosen(checkpointer=Checkpointer(folder), notes={}, full=False)
    parts |= {
        "step": StepSettings(**settings),
        "saving": Saving(**saving, period=changes.pop("checkpoint_period", 2)),
        "evaluation": PeriodicEvaluation(**chosen(evaluate=None, best_metric="", draw=None), **period),
        "recorder": Recorder(**chosen(writers=lambda start: ())),
    }
    return Trainer(**(parts | changes))


def train_plainly(model: nn.Module, *, max_iter: int = 6, left_out: Container[int] = ()) -> None:
    """What the trainer of `make_trainer` does, in the words of torch alone; some iterations take no step."""
    rules = {"weight_decay": 1e-4, "weight_decay_norm": 0.0, "weight_decay_embed": 0.0, "backbone_multiplier": 0.1}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.01, **rules))
    for position in range(max_iter):
        if position in left_out:
            continue
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * ((0.001, 0.5005, 1.0, 1.0)[position] if position < 4 else 0.1)
        optimizer.zero_grad()
        sum(model(make_batch(position)).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def assert_trained_alike(one: nn.Module, other: nn.Module) -> None:
    """Equal parameters, to the rounding of fused and plain kernels."""
    for (name, value), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
