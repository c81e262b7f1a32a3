"""An exported model without PyTorch: NumPy, Pillow and onnxruntime are all that is imported here.

    from fcclip.deploy import Runner
    result = Runner("folder")("photo.jpg", "names.npz")  # result.panoptic, .segments, .instances, .semantic

runner.py      Runner: an image in, what was found out; Result: named anew without another look
metadata.py    Metadata: what a graph says of itself
vocabulary.py  VocabularyFile: class names as vectors, in an .npz that tools/export.py writes
scoring.py     both classifiers and their ensemble
maps.py        panoptic maps, instances and semantic maps of scored masks
"""

from fcclip.deploy.metadata import Metadata
from fcclip.deploy.runner import Result, Runner
from fcclip.deploy.vocabulary import VocabularyFile

__all__ = ["Metadata", "Result", "Runner", "VocabularyFile"]
