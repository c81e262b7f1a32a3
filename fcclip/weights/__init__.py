"""Files of weights: read without running them, matched to a model, explained when they do not fit.

files.py       read_weight_file: every kind of file that holds weights
pickles.py     the reader of pickles behind it
checkpoint.py  load_weights, write_safetensors: what the weights of a file mean to a model
frozen.py      FrozenPart: an encoder that no training changes, which files name by its fingerprint
"""

from fcclip.weights.checkpoint import (
    FORMER,
    has_layouts,
    initialise_from,
    is_base,
    is_mask2former,
    load_state,
    load_weights,
    model_weights,
    seen_vocabulary,
    trained_vocabulary,
    vocabulary_note,
    weights_hash,
    write_safetensors,
)
from fcclip.weights.files import WeightFile, read_plain_data, read_weight_file
from fcclip.weights.frozen import (
    FrozenPart,
    frozen_notes,
    frozen_parts,
    frozen_prefixes,
    sampled_hash,
    unnamed_parts,
    unwrap,
)

__all__ = [
    "FORMER",
    "FrozenPart",
    "WeightFile",
    "frozen_notes",
    "frozen_parts",
    "frozen_prefixes",
    "has_layouts",
    "initialise_from",
    "is_base",
    "is_mask2former",
    "load_state",
    "load_weights",
    "model_weights",
    "read_plain_data",
    "read_weight_file",
    "sampled_hash",
    "seen_vocabulary",
    "trained_vocabulary",
    "unnamed_parts",
    "unwrap",
    "vocabulary_note",
    "weights_hash",
    "write_safetensors",
]
