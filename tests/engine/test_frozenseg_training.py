"""FrozenSeg from its published layout of weights in two processes, which resume to the bit."""

import subprocess
import sys

import pytest
import torch

from fcclip.data.training_set import training_vocabulary
from fcclip.modeling import build_model
from tests.conftest import tiny_frozenseg
from tests.tools.conftest import REPOSITORY, root, world  # noqa: F401


@pytest.mark.slow
def test_two_processes_start_from_the_published_layout_and_resume_to_the_bit(root, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    cfg, out = tiny_frozenseg(), tmp_path / "out"
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = (), str(out), str(tmp_path / "published.pth")
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 2, 2, (), 1
    model = build_model(cfg, train_vocabulary=training_vocabulary(cfg))
    model.sem_seg_head.pixel_decoder.sam_transformer.use_layout("reference")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    (tmp_path / "config.yaml").write_text(cfg.dump())

    def train(*words):
        program = [sys.executable, REPOSITORY / "train_net.py", "--config-file", tmp_path / "config.yaml"]
        done = subprocess.run([*program, "--num-gpus", "2", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return torch.load(out / "model_final.pth", weights_only=True)["model"]

    whole = train()
    (out / "last_checkpoint").write_text("model_0000000.pth")
    resumed = train("--resume")
    assert len(whole["sem_seg_head.pixel_decoder.sam_transformer.level_embed"]) == 3
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())
