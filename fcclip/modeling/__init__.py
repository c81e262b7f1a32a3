"""The networks.

build.py          build_model: from a config to a model; the dicts in which names become parts
fcclip.py         FCCLIP: the parts put together; losses in training, predictions else
teacher.py        Teacher: the frozen start of a fine-tuning
clip.py           the frozen CLIP: features, region embeddings, weights
fingerprint.py    what a CLIP is and computes, stored beside weights and compared when they are loaded
weight_files.py   files of weights, read without running what is in them
plain_pickle.py   the reader of pickles behind it
text.py           words become vectors, cached
pixel_decoder.py  deformable encoder and top-down step
mask_decoder.py   masked transformer decoder with the in-vocabulary classifier
classifier.py     mask pooling, similarity to words, the geometric ensemble
augmentation.py   test-time augmentation: AugmentedModel, the mean semantic maps of an image's variants
inference.py      semantic, panoptic and instance post-processing
semantic_blocks.py  semantic maps in blocks of rows, whatever the number of classes
position.py       sine position embedding
"""

from fcclip.modeling.augmentation import AugmentedModel, build_augmented, build_variants
from fcclip.modeling.backbones.clip import CLIPBackbone, build_clip
from fcclip.modeling.build import build_model, test_modes
from fcclip.modeling.fcclip import FCCLIP, InferenceSettings

__all__ = [
    "FCCLIP",
    "AugmentedModel",
    "CLIPBackbone",
    "InferenceSettings",
    "build_augmented",
    "build_clip",
    "build_model",
    "build_variants",
    "test_modes",
]
