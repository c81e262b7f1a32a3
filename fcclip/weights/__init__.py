"""Files of weights: read without running them, matched to a model, explained when they do not fit.

files.py         read_weight_file: every kind of file that holds weights
pickles.py       the reader of pickles behind it
checkpoint.py    load_weights, save_weights: what the weights of a file mean to a model
"""

from fcclip.weights.checkpoint import (
    initialise_from,
    is_mask2former,
    load_state,
    load_weights,
    model_weights,
    save_weights,
    trained_vocabulary,
    unwrap,
    vocabulary_note,
    weights_hash,
    write_safetensors,
)
from fcclip.weights.files import WeightFile, read_plain_data, read_weight_file

__all__ = [
    "WeightFile",
    "initialise_from",
    "is_mask2former",
    "load_state",
    "load_weights",
    "model_weights",
    "read_plain_data",
    "read_weight_file",
    "save_weights",
    "trained_vocabulary",
    "unwrap",
    "vocabulary_note",
    "weights_hash",
    "write_safetensors",
]
