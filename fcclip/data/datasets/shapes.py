"""The shapes world: images that datasets/prepare_shapes.py renders, stored as COCO panoptic files."""

from __future__ import annotations

from pathlib import Path

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.panoptic import panoptic_dataset


def shapes_panoptic(root: Path, *, name: str, split: str) -> Dataset:
    """Split train (seen classes only, which are its vocabulary), tune, val, val_seen or val_unseen."""
    shapes = root / "shapes"
    return panoptic_dataset(
        name=name,
        vocabulary="shapes_seen" if split == "train" else "shapes",
        evaluator_type="coco_panoptic_seg",
        image_root=shapes / split,
        panoptic_root=shapes / f"panoptic_{split}",
        panoptic_json=shapes / "annotations" / f"panoptic_{split}.json",
        sem_seg_root=shapes / f"panoptic_semseg_{split}",
        json_file=shapes / "annotations" / f"instances_{split}.json",
        image_id=int,
    )
