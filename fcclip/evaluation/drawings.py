"""What a model sees in the first images of a data set, for the writers of a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode
from torch import nn

from fcclip.data import build_test_mapper, dataset_vocabulary, get_dataset, read_image
from fcclip.structures import Segment
from fcclip.visualization import draw_panoptic


def draw_predictions(model: nn.Module, cfg: CfgNode, *, images: int = 4) -> dict[str, np.ndarray]:
    """Drawings (H, W, 3) uint8 of the first images of DATASETS.TEST[0], by file name; none without panoptic maps."""
    if not cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON:
        return {}
    dataset, mapper = get_dataset(cfg.DATASETS.TEST[0]), build_test_mapper(cfg)
    vocabulary = dataset_vocabulary(dataset, cfg.MODEL.FC_CLIP.VOCABULARIES)
    drawings = {}
    for record in dataset.records()[:images]:
        (output,) = model([mapper(record)], vocabulary=vocabulary, heads=("panoptic",))
        id_map, segments = output["panoptic_seg"]
        segments = [Segment(**segment) for segment in segments]
        drawing = draw_panoptic(read_image(record["file_name"]), id_map.cpu().numpy(), segments, vocabulary.class_names)
        drawings[Path(record["file_name"]).name] = drawing
    return drawings
