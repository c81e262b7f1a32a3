"""FC-CLIP and FrozenSeg as projects of a real detectron2: its `build_model`, trainer, predictor, loaders, evaluators.

    from detectron2.config import get_cfg
    from fcclip.integrations.detectron2 import add_fcclip_config, register

    register()
    cfg = get_cfg()
    add_fcclip_config(cfg)
    cfg.merge_from_file("fcclip_convnext_large_eval_ade20k.yaml")

config.py      add_fcclip_config: the keys that detectron2's config lacks
records.py     targets, predictions and their detectron2 forms
catalog.py     data sets and their vocabularies in detectron2's catalogs, register_own_data; DatasetMapper
model.py       every architecture, and FC-CLIP's backbone, head and decoders, as detectron2 builds them
checkpoint.py  Checkpointer: strict, safe, without the frozen encoders
training.py    Trainer, and the evaluators of each kind of data set
registry.py    register: everything under its published name
"""

from fcclip.errors import NotInstalledError

try:
    import detectron2 as _detectron2  # noqa: F401 (the parts below need it)
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise NotInstalledError(
        "fcclip.integrations.detectron2 needs detectron2, which is not on PyPI. Install it with "
        "pip install --no-build-isolation 'fcclip[detectron2]', or from its repository with pip install "
        "--no-build-isolation git+https://github.com/facebookresearch/detectron2.git, or put a checkout of it on "
        "PYTHONPATH. Everything else in fcclip works without it."
    ) from error

from fcclip.integrations.detectron2.catalog import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    DatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
    metadata_vocabulary,
    register_own_data,
)
from fcclip.integrations.detectron2.checkpoint import Checkpointer
from fcclip.integrations.detectron2.config import add_fcclip_config, add_maskformer2_config
from fcclip.integrations.detectron2.model import FCCLIP, TRANSFORMER_DECODER_REGISTRY
from fcclip.integrations.detectron2.records import instances_from_targets, output_to_detectron2, targets_from_instances
from fcclip.integrations.detectron2.registry import register
from fcclip.integrations.detectron2.training import InstanceSegEvaluator, Trainer, build_evaluator

__all__ = [
    "FCCLIP",
    "TRANSFORMER_DECODER_REGISTRY",
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "Checkpointer",
    "DatasetMapper",
    "InstanceSegEvaluator",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "Trainer",
    "add_fcclip_config",
    "add_maskformer2_config",
    "build_evaluator",
    "instances_from_targets",
    "metadata_vocabulary",
    "output_to_detectron2",
    "register",
    "register_own_data",
    "targets_from_instances",
]
