"""Segments an image of 512 x 683 into 847 classes with the tiny model; prints how much the peak memory grew, in MiB.

python tests/modeling/predict_many_classes.py True|False    # panoptic maps and instances too, or not
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

NUM_CLASSES = 847


def peak_mib() -> float:
    """Largest resident memory of this process so far; on Linux getrusage would count its parent's too."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    cfg = tiny_config()
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = sys.argv[1] == "True"
    words = Vocabulary.from_names([f"class {index}" for index in range(NUM_CLASSES)])
    model = build_model(cfg, train_vocabulary=words, test_vocabulary=words).eval()
    vectors = torch.nn.functional.normalize(torch.randn(NUM_CLASSES, model.backbone.embed_dim), dim=-1)
    embeddings = TextEmbeddings(vectors, torch.arange(NUM_CLASSES), NUM_CLASSES)
    model.text_encoder.encode = lambda _: embeddings  # prompts are not what is measured
    model([{"image": torch.zeros(3, 64, 64)}], semantic="labels")
    before = peak_mib()
    found = model([{"image": torch.rand(3, 512, 683) * 255}], semantic="labels")[0]
    assert found["sem_seg"].shape == (512, 683) and ("panoptic_seg" in found) == test.PANOPTIC_ON
    print(peak_mib() - before)


if __name__ == "__main__":
    main()
