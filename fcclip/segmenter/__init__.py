"""The three-line API: from an image and class names to its segments.

segmenter.py   Segmenter: a model without a vocabulary, called with images and class names
images.py      read_image_input: a path, bytes, a PIL image, an array or a tensor as pixels
naming.py      Naming: which class names, and how masks get theirs; read_vocabulary
examples.py    ExampleBank: classes that are shown by regions of images
result.py      Segmentation: what was found in an image, made when asked for, named anew, drawn, written
segments.py    NamedSegment, and masks as run lengths
tiles.py       large images: where tiles lie, and their segments joined across seams
video.py       Tracker: which segments of successive frames are one thing
video_files.py frames of video files and cameras, and video files that browsers play (extra `video`)
exported.py    ExportedSegmenter: an exported folder in place of a model
pretrained.py  weights found by name, path or hub id with their config, and written so that they are found again
"""

from fcclip.segmenter.exported import ExportedSegmenter
from fcclip.segmenter.naming import Naming, read_vocabulary
from fcclip.segmenter.result import Computed, Segmentation
from fcclip.segmenter.segmenter import Segmenter
from fcclip.segmenter.segments import NamedSegment
from fcclip.segmenter.video import Tracker
from fcclip.segmenter.video_files import VIDEO_SUFFIXES, Camera, VideoFile, VideoWriter

__all__ = [
    "VIDEO_SUFFIXES",
    "Camera",
    "Computed",
    "ExportedSegmenter",
    "NamedSegment",
    "Naming",
    "Segmentation",
    "Segmenter",
    "Tracker",
    "VideoFile",
    "VideoWriter",
    "read_vocabulary",
]
