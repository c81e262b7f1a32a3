"""Fixtures of the engine and of data that tests of fine-tuning share."""

from tests.data.conftest import cfg, coco_root, coco_val
from tests.engine.conftest import shapes_world, train_net

__all__ = ["cfg", "coco_root", "coco_val", "shapes_world", "train_net"]
