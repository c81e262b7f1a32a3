"""Class names as vectors, so that a runner needs no text tower.

Legend: K classes, W names with their synonyms, D width of the joint space.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from fcclip.errors import InputError, MissingFileError
from fcclip.files import write_atomically


@dataclass(frozen=True)
class VocabularyFile:
    """The arrays of a vocabulary file.

    Args:
        vectors: (W, D) float32, unit length, classes in order.
        class_of_vector: (W,) int64, 0..K-1, ascending; each class has a vector.
        synonyms: (W,) str, the name that each vector stands for.
        class_names: (K,) str.
        things, seen: (K,) bool: countable; known to the training of the model.
        void: (D,) float32, unit length, the model's vector of nothing.
        templates: (T,) str, the sentences that names were put into.
        fingerprint: () str, `Metadata.fingerprint` of the model.
    """

    vectors: np.ndarray
    class_of_vector: np.ndarray
    synonyms: np.ndarray
    class_names: np.ndarray
    things: np.ndarray
    seen: np.ndarray
    void: np.ndarray
    templates: np.ndarray
    fingerprint: np.ndarray

    def __post_init__(self) -> None:
        sizes = {name: np.shape(value) for name, value in vars(self).items()}
        num_names, dim = sizes["vectors"] if len(sizes["vectors"]) == 2 else (0, 0)
        num_classes = self.class_names.size
        wanted = {"class_of_vector": (num_names,), "synonyms": (num_names,), "things": (num_classes,)}
        wanted |= {"seen": (num_classes,), "void": (dim,), "class_names": (num_classes,)}
        wrong = [f"{name} {sizes[name]} instead of {size}" for name, size in wanted.items() if sizes[name] != size]
        if wrong or not num_classes:
            raise InputError(f"the arrays of a vocabulary do not fit together: {', '.join(wrong) or 'it has no class'}")
        steps = np.diff(self.class_of_vector, prepend=-1, append=num_classes)
        if steps[0] != 1 or steps[-1] != 1 or not np.isin(steps, (0, 1)).all():
            raise InputError(f"class_of_vector must ascend from 0 to {num_classes - 1} and leave no class out")

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        write_atomically(Path(path), lambda file: np.savez_compressed(file, **vars(self)))

    @classmethod
    def load(cls, path: str | Path) -> VocabularyFile:
        """Reads a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is something else, or its arrays do not fit together.
        """
        path = Path(path).expanduser()
        advice = "tools/export.py --only-vocabulary --vocabulary NAMES writes vocabularies"
        if not path.is_file():
            raise MissingFileError(f"vocabulary '{path}' does not exist (looked at {path.absolute()}); {advice}")
        try:
            with np.load(path) as arrays:
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"'{path}' is no vocabulary file ({error}); {advice}") from error
