"""The networks.

build.py          build_model: from a config to a model; the dicts in which names become parts
fcclip.py         FCCLIP: the parts put together; losses in training, predictions else
clip.py           the frozen CLIP: features, region embeddings, weights
text.py           words become vectors, cached
pixel_decoder.py  deformable encoder and top-down step
mask_decoder.py   masked transformer decoder with the in-vocabulary classifier
classifier.py     mask pooling, similarity to words, the geometric ensemble
inference.py      semantic, panoptic and instance post-processing
position.py       sine position embedding
"""

from fcclip.modeling.build import build_model, test_modes
from fcclip.modeling.clip import CLIPBackbone, build_clip
from fcclip.modeling.fcclip import FCCLIP, InferenceSettings

__all__ = ["FCCLIP", "CLIPBackbone", "InferenceSettings", "build_clip", "build_model", "test_modes"]
