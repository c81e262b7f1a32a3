"""Models as graphs that other runtimes run, with class names as an input (extra `export`).

graphs.py  the graphs: image, all in one, text; from a model to torch's exported program and to ONNX
folder.py  export_folder: graphs, vocabulary and metadata, whole or not at all; vocabulary_file
parity.py  what a graph gives beside what the model gives: a record a case, limits, a table
"""

from fcclip.export.folder import EXTRAS, export_folder, vocabulary_file
from fcclip.export.parity import Case, Limits, as_record, as_table, made_up_images, measure, placement

__all__ = [
    "EXTRAS",
    "Case",
    "Limits",
    "as_record",
    "as_table",
    "export_folder",
    "made_up_images",
    "measure",
    "placement",
    "vocabulary_file",
]
