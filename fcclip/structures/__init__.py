"""Records that travel between rooms; a leaf that imports nothing of fcclip.

batch.py      TrainingBatch: training samples, whole or a part
targets.py    Targets: what a training image contains
predictions.py  Instances and Segment: what a model found; boxes_of_masks: tight boxes
text.py      TextEmbeddings: a vocabulary as vectors
features.py  Features: what a backbone gives
"""

from fcclip.structures.batch import TrainingBatch
from fcclip.structures.features import Features
from fcclip.structures.predictions import Instances, Segment, boxes_of_masks
from fcclip.structures.targets import Targets
from fcclip.structures.text import TextEmbeddings

__all__ = ["Features", "Instances", "Segment", "Targets", "TextEmbeddings", "TrainingBatch", "boxes_of_masks"]
