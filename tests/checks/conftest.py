"""The small data sets of tests/data."""

from tests.data.conftest import cfg, coco_root, coco_val, edit_json

__all__ = ["cfg", "coco_root", "coco_val", "edit_json"]
