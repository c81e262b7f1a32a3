"""What two CPU processes do with a model in test_two_trainings.py and test_accumulation.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn

from fcclip.comm import all_gather_object, barrier, get_rank, get_world_size
from fcclip.config import load_config
from fcclip.engine import Trainer, build_trainer
from fcclip.finetuning import begin
from fcclip.modeling import build_model
from fcclip.structures import Targets
from fcclip.vocabulary import Vocabulary
from tests.conftest import tiny_frozenseg

WORDS = Vocabulary.from_names("cat; dog; bird; sand:stuff")
SEGMENTS = (1, 4, 0, 2)  # of the four images: unequal over the images and over two processes
# Of eight images: two of the first process have none at all, one of the second has more than there are queries.
CROWDED = (1, 4, 0, 0, 12, 2, 3, 5)
# Twice as wide: then a norm has two channels a group. With one, the gradient of the bias before it is nothing but
# rounding, which AdamW blows up.
WIDE = {"MODEL.SEM_SEG_HEAD.CONVS_DIM": 64, "MODEL.SEM_SEG_HEAD.MASK_DIM": 64, "MODEL.MASK_FORMER.HIDDEN_DIM": 64}
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FC_CLIP.CLIP_MODEL_NAME": "shapes_convnext.json",
    "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS": "",
    "MODEL.FC_CLIP.EMBED_DIM": 64,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(WORDS),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 128,
    "DATASETS.TRAIN": (),
    "DATASETS.TEST": (),
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_ITER": 3,
    "SOLVER.STEPS": (),
}


def small_cfg(**changes) -> CfgNode:
    """A small FC-CLIP on random CLIP weights."""
    values = SMALL | changes
    return load_config(
        "coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml",
        [word for pair in values.items() for word in pair],
    )


def small_model(cfg: CfgNode) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    return build_model(cfg, train_vocabulary=WORDS).train()


def images(counts: Sequence[int] = SEGMENTS) -> list[dict]:
    """Images of 64 x 64 with these numbers of segments, whose points are seeded per image."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index, count in enumerate(counts):
        id_map = (
            torch.randint(0, max(count, 1), (8, 8), generator=generator).repeat_interleave(8, 0).repeat_interleave(8, 1)
        )
        ids = torch.arange(count)
        targets = Targets(labels=ids % len(WORDS), id_map=id_map.to(torch.int32), ids=ids)
        image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        samples.append({"image": image, "targets": targets, "point_seed": 100 + index, "file_name": f"{index}.jpg"})
    return samples


def my_images(counts: Sequence[int] = SEGMENTS) -> list[dict]:
    """This process's share of them."""
    share = len(counts) // get_world_size()
    return images(counts)[get_rank() * share : (get_rank() + 1) * share]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of every trainable parameter, by name without the wrapper's prefix."""
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name without the wrapper's prefix."""
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def trainer_on_my_images(cfg: CfgNode, folder: str | Path | None = None, samples=my_images, model=None):
    """A trainer that sees the same batch at every iteration; without a model it has `small_model`."""

    def batches(start: int):
        while True:
            yield samples()

    model = small_model(cfg) if model is None else model
    return build_trainer(cfg, model, batches=batches, device=torch.device("cpu"), vocabulary=WORDS, output_dir=folder)


def save_gradients(folder: str, ce_norm: str) -> None:
    """Gradients of each process alone, and those that the trainer's wrapped model ends with."""
    cfg = small_cfg(**{"SOLVER.CE_NORM": ce_norm})
    alone = small_model(cfg)
    sum(alone(my_images()).values()).backward()
    of_each = all_gather_object(gradients(alone))
    wrapped = trainer_on_my_images(cfg).model.train()
    sum(wrapped(my_images()).values()).backward()
    torch.save({"alone": of_each, "together": gradients(wrapped)}, Path(folder, f"{ce_norm}_{get_rank()}.pth"))


def train(folder: str) -> None:
    """Three iterations; weights of both processes, and the first losses that rank 0 saw."""
    trainer = trainer_on_my_images(small_cfg(), folder)
    trainer.train()
    torch.save(trainer.model.module.state_dict(), Path(folder, f"weights_{get_rank()}.pth"))


def three_steps(counts: Sequence[int] = CROWDED, **changes) -> dict:
    """Three iterations on the same images: `losses` (a list by name), `gradients` of each iteration before they are
    clipped, and the `weights` after them."""
    cfg = small_cfg(**(WIDE | {"SOLVER.IMS_PER_BATCH": len(counts)} | changes))
    trainer = trainer_on_my_images(cfg, samples=lambda: my_images(counts))
    return noted_training(trainer)


def noted_training(trainer: Trainer) -> dict:
    """Trains to the end; `losses` (a list by name), `gradients` of each iteration before they are clipped, and the
    `weights` afterwards."""
    noted, clip = {"gradients": []}, trainer.clip_gradients

    def note_and_clip() -> float:
        noted["gradients"].append(gradients(trainer.model))
        return clip()

    trainer.clip_gradients = note_and_clip
    trainer.train()
    noted["losses"] = {key: values for key, values in trainer.history.state_dict().items() if "loss" in key}
    noted["weights"] = {name: parameter.detach().clone() for name, parameter in trainable(trainer.model).items()}
    return noted


def accumulate(folder: str) -> None:
    """The three steps with whole batches and in parts, by both rules of the class loss."""
    for ce_norm in ("rank", "global"):
        for parts in (1, 2, 4):
            found = three_steps(**{"SOLVER.CE_NORM": ce_norm, "SOLVER.ACCUMULATE": parts})
            torch.save(found, Path(folder, f"{ce_norm}_{parts}_{get_rank()}.pth"))


def break_one_loss(folder: str) -> None:
    """An image of rank 1 has a broken value."""

    def samples() -> list[dict]:
        mine = my_images()
        if get_rank() == 1:
            mine[0]["image"] = torch.full((3, 64, 64), torch.nan)
        return mine

    try:
        trainer_on_my_images(small_cfg(), samples=samples).train()
    except RuntimeError as error:
        Path(folder, f"broken_{get_rank()}.txt").write_text(str(error))
        barrier()


def train_frozenseg(folder: Path) -> None:
    """Two iterations from weights in the published layout, and the second once more from the checkpoint before it."""
    cfg = tiny_frozenseg()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = len(WORDS), (), ()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2, (), 1
    cfg.MODEL.WEIGHTS = str(folder / "published.pth")
    if get_rank() == 0:
        (folder / "whole").mkdir(parents=True)
        (folder / "resumed").mkdir()
        published = small_model(cfg)
        published.sem_seg_head.pixel_decoder.sam_transformer.use_layout("reference")
        torch.save({"model": published.state_dict()}, cfg.MODEL.WEIGHTS)
    barrier()
    for run, last in (("whole", None), ("resumed", folder / "whole" / "model_0000000.pth")):
        model = small_model(cfg)
        begin(cfg, model, last=last)
        trainer = trainer_on_my_images(cfg, folder / run, model=model)
        if last is not None:
            trainer.resume(last)
        trainer.train()
        torch.save(trainer.model.module.state_dict(), folder / f"{run}_{get_rank()}.pth")


def everything(folder: str) -> None:
    """All of the above in one start of two processes; each leaves files in the folder."""
    save_gradients(folder, "rank")
    save_gradients(folder, "global")
    train(folder)
    break_one_loss(folder)
    train_frozenseg(Path(folder, "frozenseg"))
