"""Classes that are shown instead of told: regions of images become a word. Few-shot, and no longer zero-shot.

The frozen CLIP puts regions and texts into one space, but not into one place of it (the modality gap). So the mean of
the examples is moved as the mean of regions lies from the mean of texts, and what comes out is the vector of a name.
Both classifiers meet it as they meet a text.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.errors import InputError
from fcclip.modeling import Architecture, ScoredMasks
from fcclip.modeling.classifier import resize_masks
from fcclip.vocabulary import Vocabulary
from fcclip.weights import read_weight_file, write_safetensors


@dataclass(frozen=True)
class Examples:
    """Of one class, each as the frozen CLIP sees it.

    Args:
        regions: (n, D) float32, unit length.
        beside: (n, D) float32, mean of the other regions of the image.
    """

    regions: Tensor
    beside: Tensor


class ExampleBank:
    """The classes that a model was taught, by name; may be taught while threads use it.

    Args:
        model: its text encoder is told of the names.
    """

    def __init__(self, model: Architecture) -> None:
        self.model = model
        self.classes: dict[str, Examples] = {}
        self.words: dict[str, Tensor] = {}  # name -> its vector (D,)
        self._lock = threading.Lock()

    @property
    def source(self) -> str:
        """What the vectors depend on: the CLIP, and the part that pools regions."""
        return f"CLIP {self.model.backbone.weights_hash()[:16]}, {type(self.model.classifier).__name__}"

    def add(self, name: str, examples: Examples) -> None:
        """More examples of a class, new or known."""
        with self._lock:
            parts = [*filter(None, [self.classes.get(name)]), examples]
            self.classes[name] = Examples(*(torch.cat([getattr(p, key) for p in parts]) for key in vars(examples)))
            beside = torch.cat([part.beside for part in self.classes.values()]).mean(0)
            gap = beside - self.model.text_encoder.encode(usual_names(self.model)).vectors.mean(0).cpu()
            # a new one: others may be reading the old one
            self.words = {key: F.normalize(part.regions.mean(0) - gap, dim=0) for key, part in self.classes.items()}
            self.model.text_encoder.shown = self.words

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        tensors = {f"{key}.{name}": value for name, part in self.classes.items() for key, value in vars(part).items()}
        write_safetensors(path, tensors, {"format": "pt", "source": self.source})

    def load(self, path: str | Path) -> None:
        """Adds what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a file, or of another CLIP.
        """
        file = read_weight_file(Path(path).expanduser())
        source, names = file.rest.get("source"), dict.fromkeys(key.partition(".")[2] for key in file.tensors)
        if source is None or set(file.tensors) != {f"{key}.{name}" for name in names for key in ("regions", "beside")}:
            raise InputError(f"'{path}' is not a file of examples: `segmenter.examples.save` writes one")
        if source != self.source:
            raise InputError(
                f"the examples in '{path}' are not of this segmenter's CLIP: they are of {source}, it has "
                f"{self.source}; teach them again"
            )
        for name in names:
            self.add(name, Examples(file.tensors[f"regions.{name}"], file.tensors[f"beside.{name}"]))


def usual_names(model: Architecture) -> Vocabulary:
    """Names whose texts stand for texts as such."""
    return model.seen_vocabulary or Vocabulary.builtin("coco_panoptic")


def example_of(model: Architecture, scored: ScoredMasks, mask: np.ndarray) -> Examples:
    """One example.

    Args:
        model: made `scored`.
        scored: the image, among any names.
        mask: (h, w) bool, the pixels that show the class.

    Raises:
        ValueError: a mask of another size or without a pixel; an image with nothing beside it.
    """
    mask, size = np.asarray(mask, bool), scored.masks.output_size
    if mask.shape != tuple(size) or not mask.any():
        raise InputError(
            f"an example is a mask of {size[0]} x {size[1]} pixels, the size of its image, true where the class is; "
            f"got {' x '.join(map(str, mask.shape))} with {int(mask.sum())} true"
        )
    if scored.region_embeddings is None:
        raise InputError(f"{type(model).__name__} does not compare regions with names, so it cannot be taught")
    region, grid = torch.from_numpy(mask)[None], tuple(scored.dense.shape[-2:])
    cells = resize_masks(scored.masks.mask_logits[None], grid)[0] > 0  # (Q, *grid)
    beside = cells.flatten(1).any(1) & ~(cells & (scored.masks.cells_of(region, grid) > 0)).flatten(1).any(1)
    if not beside.any():
        raise InputError("the model finds nothing beside the mask to compare it with; take an image that shows more")
    others = F.normalize(scored.region_embeddings[beside].float(), dim=-1).mean(0, keepdim=True)
    return Examples(model.embed_regions(scored, region).float().cpu(), others.cpu())
