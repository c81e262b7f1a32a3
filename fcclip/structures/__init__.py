"""Records that travel between rooms; a leaf that imports nothing of fcclip.

targets.py    Targets: what a training image contains
boxes.py     boxes_of_masks: tight boxes
predictions.py  Instances and Segment: what a model found
words.py      TextEmbeddings: a vocabulary as vectors
"""

from fcclip.structures.boxes import boxes_of_masks
from fcclip.structures.predictions import Instances, Segment
from fcclip.structures.targets import Targets
from fcclip.structures.text import TextEmbeddings

__all__ = ["Instances", "Segment", "Targets", "TextEmbeddings", "boxes_of_masks"]
