"""Open-vocabulary segmentation with one frozen CLIP.

    from fcclip import Segmenter
    result = Segmenter.from_pretrained("shapes")("photo.jpg", vocabulary="red circle; blue star, azure star")

`import fcclip` alone is quick: PyTorch and the rooms are imported when `Segmenter` is first used.
"""

import importlib

from fcclip.version import __version__

__all__ = ["Segmenter", "__version__"]


# What the published package has at its top, all for detectron2; see docs/detectron2.md.
_PUBLISHED = (
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "FCCLIP",
    "InstanceSegEvaluator",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "SemanticSegmentorWithTTA",
    "add_fcclip_config",
    "add_maskformer2_config",
)


def __getattr__(name: str) -> object:
    if name == "Segmenter":
        from fcclip.segmenter import Segmenter

        return Segmenter
    if name == "SemanticSegmentorWithTTA":
        raise ImportError(
            "fcclip has no SemanticSegmentorWithTTA: test-time augmentation is TEST.AUG.ENABLED True of train_net.py "
            "--eval-only, and fcclip.modeling.AugmentedModel in Python"
        )
    if name in _PUBLISHED:
        return getattr(importlib.import_module("fcclip.integrations.detectron2"), name)
    raise AttributeError(f"module 'fcclip' has no attribute '{name}'")
