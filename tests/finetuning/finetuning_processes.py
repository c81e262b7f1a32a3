"""What two CPU processes do with a fine-tuning in test_finetuning.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from training_processes import WIDE, WORDS, images, noted_training, small_cfg, small_model

from fcclip.comm import get_rank, get_world_size
from fcclip.engine import build_trainer
from fcclip.finetuning.start import build_teacher
from fcclip.vocabulary import Vocabulary

FORMER = Vocabulary.from_names("star; sea:stuff; cat, kitty; tree", name="former")
COUNTS = (1, 4, 2, 3)  # segments of the images


def my_images(method: str) -> list[dict]:
    """This process's share of four images; for replay one image in two is a former one."""
    samples = images(COUNTS)
    if method == "replay":
        for sample in samples[1::2]:
            sample["vocabulary"] = FORMER
    share = len(samples) // get_world_size()
    return samples[get_rank() * share : (get_rank() + 1) * share]


def student(cfg, method: str) -> nn.Module:
    """The same weights in every process; a student has already left its teacher."""
    model = small_model(cfg)
    if method == "distill":
        model.extra_losses = [build_teacher(cfg, model, FORMER)]
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.sem_seg_head.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def three_steps(method: str, **changes) -> dict:
    """Three iterations on the same images; `losses`, `gradients` before they are clipped, and `weights`."""
    cfg = small_cfg(**(WIDE | {"SOLVER.IMS_PER_BATCH": len(COUNTS), "SOLVER.CE_NORM": "global"} | changes))

    def batches(start: int):
        while True:
            yield my_images(method)

    device = torch.device("cpu")
    trainer = build_trainer(cfg, student(cfg, method), batches=batches, device=device, vocabulary=WORDS)
    return noted_training(trainer)


def both(folder: str) -> None:
    """The steps of both methods, a file of each process."""
    for method in ("replay", "distill"):
        torch.save(three_steps(method), Path(folder, f"{method}_{get_rank()}.pth"))
