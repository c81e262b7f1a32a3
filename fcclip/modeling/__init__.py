"""The networks.

architecture.py   Architecture: what every model can be asked; ScoredMasks, Ensemble, the hook of extra losses
build.py          build_model: from a config to a model; the dicts in which names become parts
fcclip.py         FCCLIP: the parts put together; losses in training, predictions else
frozenseg.py      FrozenSeg: FC-CLIP, and a frozen SAM that its decoder looks at
openseg.py        automatic masks of SAM in semantic maps: read, named, weighed
fusioner.py       Fusioner: the same for tokens of two encoders and one binary decision a class
fusion.py         its trained parts: fusion, decoder, cosines and loss
windows.py        Windows: what a network of a fixed input size says of a larger image
backbones/        one module a frozen encoder
inputs.py         what models are called with: checked, and made into one tensor
text.py           class names become vectors, cached
pixel_decoder.py  deformable encoder and top-down step
sam_pixel_decoder.py  the same, and a deformable encoder on SAM's features, in two layouts
mask_decoder.py   masked transformer decoder with the in-vocabulary classifier
head.py           FCCLIPHead: both decoders
classifier.py     mask pooling, similarity to class names, the geometric ensemble
out_of_vocabulary.py  OUT_OF_VOCABULARY_CLASSIFIERS: region embeddings by the frozen CLIP
mask_adapter.py   MaskAdapter, a classifier that trains, and its losses
maft.py           MAFTPlus: texts move towards the image
outputs.py        semantic, panoptic and instance inference
output_masks.py   masks at the output size, a few queries or a few rows at a time
unknown.py        UnknownMasks: names that nobody asked for, scored beside the asked ones
augmentation.py   test-time augmentation: AugmentedModel, the mean semantic maps of an image's variants
position.py       sine position embedding
"""

from fcclip.modeling.architecture import Architecture, Ensemble, ScoredMasks
from fcclip.modeling.augmentation import AugmentedModel, build_augmented, build_variants
from fcclip.modeling.backbones.clip import CLIPBackbone, build_clip
from fcclip.modeling.build import amp_dtype, build_model, enabled_heads, options_of, test_modes
from fcclip.modeling.fcclip import FCCLIP
from fcclip.modeling.frozenseg import FrozenSeg
from fcclip.modeling.outputs import HEADS

__all__ = [
    "FCCLIP",
    "HEADS",
    "Architecture",
    "AugmentedModel",
    "CLIPBackbone",
    "Ensemble",
    "FrozenSeg",
    "ScoredMasks",
    "amp_dtype",
    "build_augmented",
    "build_clip",
    "build_model",
    "build_variants",
    "enabled_heads",
    "options_of",
    "test_modes",
]
