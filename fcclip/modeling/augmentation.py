"""Test-time augmentation: semantic maps averaged over sizes and mirror images of an image (published as
`SemanticSegmentorWithTTA`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fcclip.data import resize_image, shortest_edge_size
from fcclip.errors import InputError
from fcclip.modeling.architecture import Architecture, Ensemble, ScoredMasks
from fcclip.modeling.inputs import Samples, check_images
from fcclip.modeling.outputs import OutputSettings
from fcclip.vocabulary import Vocabulary
from fcclip.weights import unwrap

_CLASSES = 32  # classes mirrored at once; a memory knob
_NO_SEMANTIC = (
    "TEST.AUG.ENABLED averages semantic maps, but MODEL.MASK_FORMER.TEST.SEMANTIC_ON is False; set "
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON True or TEST.AUG.ENABLED False"
)


@dataclass(frozen=True)
class ImageVariants:
    """What an image is looked at as; the keys of TEST.AUG.

    Args:
        min_sizes: the shorter side of each variant, pixels; one that is named twice counts twice.
        max_size: limit of the longer side, pixels; then the shorter one is below its `min_sizes`.
        flip: each size mirrored left to right too.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    flip: bool

    def __post_init__(self) -> None:
        wrong = [size for size in self.min_sizes if not _is_side(size)]
        if wrong or not self.min_sizes:
            raise InputError(
                "TEST.AUG.MIN_SIZES must name at least one size, each a whole number of pixels from 1 on; "
                f"got {wrong or 'none'}"
            )
        if not _is_side(self.max_size):
            raise InputError(f"TEST.AUG.MAX_SIZE must be a whole number of pixels from 1 on, got {self.max_size}")

    def __len__(self) -> int:
        """Number of variants of an image."""
        return len(self.min_sizes) * (2 if self.flip else 1)

    def of(self, image: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """An image (3, H, W) uint8 -> its variants (3, h, w), and whether each is mirrored; size after size, the mirror
        image second.

        Raises:
            ValueError: pixels of another dtype.
        """
        if image.dtype != torch.uint8:
            raise InputError(f"test-time augmentation takes images of uint8, got {image.dtype}")
        pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
        for min_size in self.min_sizes:
            size = shortest_edge_size(*image.shape[-2:], min_size=min_size, max_size=self.max_size)
            resized = torch.from_numpy(np.array(resize_image(pixels, *size).transpose(2, 0, 1), order="C"))
            yield resized, False
            if self.flip:
                yield resized.flip(-1), True


ScoredVariants = list[tuple[ScoredMasks, bool]]  # of one image, and whether each is mirrored; the first is not


class AugmentedModel:
    """A model that looks at each image in several variants and gives the mean of their semantic scores.

    Has `score` and `outputs` like the model, with `sem_seg` as the only output: panoptic and instance outputs have no
    mean. Each variant is one pass of the network, however often it is weighed; of the maps, which are summed up as they
    come, two are held and no more.

    Args:
        model: is used, not copied; DistributedDataParallel is taken off.
        variants: what to look at.

    Raises:
        ValueError: a model whose semantic maps are turned off.
    """

    heads = ("semantic",)

    def __init__(self, model: Architecture | DistributedDataParallel, *, variants: ImageVariants) -> None:
        self.model: Architecture = unwrap(model)
        if "semantic" not in self.model.heads:
            raise InputError(_NO_SEMANTIC)
        self.variants = variants

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.model.training

    def train(self, mode: bool = True) -> AugmentedModel:
        """Puts the model into training mode, or out of it."""
        self.model.train(mode)
        return self

    def eval(self) -> AugmentedModel:
        """Puts the model into evaluation mode."""
        return self.train(False)

    def score(self, inputs: Samples, vocabulary: Vocabulary | None = None) -> list[ScoredVariants]:
        """All variants of each image, scored.

        Args:
            inputs: as for the model; `image` is uint8. Without `height` and `width` outputs have its size.
            vocabulary: as for the model.

        Raises:
            ValueError: what the model refuses.
        """
        check_images(inputs, num_channels=3)
        return [self._score(sample, vocabulary) for sample in inputs]

    def _score(self, sample: Mapping, vocabulary: Vocabulary | None) -> ScoredVariants:
        height, width = sample["image"].shape[-2:]
        sized = {"height": height, "width": width, **sample}
        return [
            (self.model.score([{**sized, "image": image}], vocabulary)[0], mirrored)
            for image, mirrored in self.variants.of(sample["image"])
        ]

    @torch.no_grad()
    def outputs(
        self,
        scored: ScoredVariants,
        *,
        heads: Sequence[str] | None = None,
        ensemble: Ensemble | tuple[float, float] | None = None,
        semantic: str = "scores",
        settings: OutputSettings | None = None,
    ) -> dict[str, Tensor]:
        """`sem_seg` of one image: the mean scores (K, h, w) float32, or with `semantic` "labels" their argmax (h, w).

        Raises:
            ValueError: other heads than "semantic".
        """
        if heads is not None and tuple(heads) != self.heads:
            raise InputError(f"test-time augmentation gives semantic maps alone, not {', '.join(heads)}")
        if semantic not in ("scores", "labels"):
            raise InputError(f"semantic must be 'scores' or 'labels', got {semantic!r}")
        total = None
        for record, mirrored in scored:
            scores = self.model.outputs(record, heads=self.heads, ensemble=ensemble, settings=settings)["sem_seg"]
            if total is None:
                total = scores.float()
            else:
                _add(total, scores, mirrored=mirrored)
            del scores  # before the next map is computed
        mean = total.div_(len(scored))
        return {"sem_seg": mean.argmax(0) if semantic == "labels" else mean}


def build_variants(cfg: CfgNode) -> ImageVariants:
    """What TEST.AUG asks for; also the check, before a model is built, that it can work.

    Raises:
        ValueError: sizes that are none, or semantic maps turned off.
    """
    if not cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON:
        raise InputError(_NO_SEMANTIC)
    augmentation = cfg.TEST.AUG
    return ImageVariants(
        min_sizes=tuple(augmentation.MIN_SIZES), max_size=augmentation.MAX_SIZE, flip=augmentation.FLIP
    )


def build_augmented(cfg: CfgNode, model: Architecture | DistributedDataParallel) -> AugmentedModel:
    """The model with test-time augmentation as TEST.AUG describes it, whatever TEST.AUG.ENABLED says.

    Raises:
        ValueError: as `build_variants`.
    """
    return AugmentedModel(model, variants=build_variants(cfg))


def _add(total: Tensor, scores: Tensor, *, mirrored: bool) -> None:
    """total += scores, both (K, h, w), mirrored ones turned back; no third map is made."""
    if not mirrored:
        total += scores
        return
    for part, other in zip(total.split(_CLASSES), scores.split(_CLASSES)):
        part += other.flip(-1)


def _is_side(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 1
