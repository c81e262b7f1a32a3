"""The whole model, its losses, the training loop and the evaluation agree: four images can be learnt by heart."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcclip.config import load_config
from fcclip.data import dataset_vocabulary, get_dataset, read_id_map, read_image
from fcclip.engine import build_trainer, seed_everything
from fcclip.evaluation import evaluate
from fcclip.modeling import build_model
from fcclip.structures import Targets

SIDE = 128  # pixels, half of the rendered images
ITERATIONS = 250
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS": "",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD": 128,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 128,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 16,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 512,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "INPUT.MIN_SIZE_TEST": SIDE,
    "INPUT.MAX_SIZE_TEST": SIDE,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.BASE_LR": 0.002,
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.STEPS": (200,),
    "SOLVER.WARMUP_ITERS": 10,
    "DATALOADER.NUM_WORKERS": 0,
}


@pytest.fixture
def four_images(tmp_path, monkeypatch):
    """A data set of four rendered training images."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "datasets")
    importlib.import_module("prepare_shapes").prepare(
        out=tmp_path, seed=3, num_images=4, num_workers=1, num_evaluation=1
    )
    return get_dataset("shapes_train", tmp_path)


def sample_of(record: dict) -> dict:
    """The image at half size, without augmentation, and its segments."""
    image = torch.from_numpy(np.array(read_image(record["file_name"]))).permute(2, 0, 1)[None].float()
    id_map = torch.from_numpy(np.array(read_id_map(record["pan_seg_file_name"])).astype(np.int32))
    step = id_map.shape[0] // SIDE
    segments = record["segments_info"]
    targets = Targets(
        labels=torch.tensor([segment["category_id"] for segment in segments]),
        id_map=id_map[step // 2 :: step, step // 2 :: step].contiguous(),
        ids=torch.tensor([segment["id"] for segment in segments]),
    )
    image = F.interpolate(image, (SIDE, SIDE), mode="area")[0].round().to(torch.uint8)
    return {"image": image, "targets": targets, "file_name": record["file_name"]}


@pytest.mark.slow
def test_four_images_are_learnt_by_heart(four_images):
    cfg = load_config("shapes/fcclip_shapes.yaml", [word for pair in SMALL.items() for word in pair])
    vocabulary = dataset_vocabulary(four_images)
    samples = [sample_of(record) for record in four_images.records()]

    def batches(start):
        while True:
            yield samples

    seed_everything(0)
    model = build_model(cfg, train_vocabulary=vocabulary)
    trainer = build_trainer(cfg, model, batches=batches, device=model.device, vocabulary=vocabulary)
    stream = batches(0)
    model.train()
    trainer.step(stream)
    first = trainer.history.medians()["total_loss"]
    trainer.train()
    last = trainer.history.medians()["total_loss"]
    decoder_only = {"in_vocabulary": (0.0, 0.0)}  # the CLIP is random and has nothing to say
    results = evaluate(model, cfg, four_images, modes=decoder_only, vocabulary=vocabulary, progress=False)
    quality = results["in_vocabulary"]["panoptic_seg"]["PQ"]
    print(f"loss {first:.2f} -> {last:.2f} ({100 * (1 - last / first):.1f} % less), PQ {quality:.1f}")
    assert last < 0.1 * first
    assert quality > 85
