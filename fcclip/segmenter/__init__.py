"""The three-line API: from an image and class names to its segments.

segmenter.py   Segmenter: a model without a vocabulary, called with images and class names
images.py      read_image_input: a path, bytes, a PIL image, an array or a tensor as pixels
naming.py      Naming: which class names, and how masks get theirs; read_vocabulary
result.py      Segmentation: what was found in an image, made when asked for, named anew, drawn, written
segments.py    NamedSegment, and masks as run lengths
tiles.py       large images: where tiles lie, and their segments joined across seams
pretrained.py  weights found by name, path or hub id with their config, and written so that they are found again
"""

from fcclip.segmenter.naming import Naming, read_vocabulary
from fcclip.segmenter.result import Computed, Segmentation
from fcclip.segmenter.segmenter import Segmenter
from fcclip.segmenter.segments import NamedSegment

__all__ = ["Computed", "NamedSegment", "Naming", "Segmentation", "Segmenter", "read_vocabulary"]
