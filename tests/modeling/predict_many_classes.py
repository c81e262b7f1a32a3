"""Segments an image with the tiny model; prints how much the peak memory grew, in MiB.

python tests/modeling/predict_many_classes.py 847 512 683 semantic    # classes, size; semantic labels or all outputs
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from fcclip.modeling import build_model
from fcclip.structures import TextEmbeddings
from fcclip.vocabulary import Vocabulary
from tests.conftest import tiny_config


def peak_mib() -> float:
    """Largest resident memory of this process so far; on Linux getrusage would count its parent's too."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    num_classes, *size = map(int, sys.argv[1:4])
    cfg = tiny_config()
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = sys.argv[4] == "all"
    words = Vocabulary.from_names([f"class {index}" for index in range(num_classes)])
    model = build_model(cfg, train_vocabulary=words, test_vocabulary=words).eval()
    vectors = torch.nn.functional.normalize(torch.randn(num_classes, model.backbone.embed_dim), dim=-1)
    embeddings = TextEmbeddings(vectors, torch.arange(num_classes), num_classes)
    model.text_encoder.encode = lambda _: embeddings  # prompts are not what is measured
    model([{"image": torch.zeros(3, 64, 64)}], semantic="labels")
    before = peak_mib()
    outputs = model([{"image": torch.rand(3, *size) * 255}], semantic="labels")[0]
    assert outputs["sem_seg"].shape == tuple(size) and ("panoptic_seg" in outputs) == test.PANOPTIC_ON
    print(peak_mib() - before)


if __name__ == "__main__":
    main()
