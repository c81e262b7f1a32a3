"""Test-time augmentation: semantic maps averaged over sizes and mirror images of an image (published as
`SemanticSegmentorWithTTA`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fcclip.data import resize_image, shortest_edge_size
from fcclip.errors import InputError
from fcclip.modeling.architecture import Architecture, Ensemble, ScoredMasks
from fcclip.modeling.inputs import Samples, check_images, padded_size
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
        """An image (3, H, W) -> its variants (3, h, w) of the same dtype, and whether each is mirrored; size after
        size, the mirror image second.

        Raises:
            ValueError: see `resize_to`.
        """
        for min_size in self.min_sizes:
            size = shortest_edge_size(*image.shape[-2:], min_size=min_size, max_size=self.max_size)
            resized = resize_to(image, size)
            yield resized, False
            if self.flip:
                yield resized.flip(-1), True


@dataclass(frozen=True)
class ScoredVariants:
    """What `AugmentedModel.score` says of one image: its variants, and whether each is mirrored; the first is not."""

    variants: tuple[tuple[ScoredMasks, bool], ...]


class AugmentedModel:
    """A model that looks at each image in several variants and gives the mean of their semantic scores.

    Has `score` and `outputs` like the model, with `sem_seg` as the only output: panoptic and instance outputs have no
    mean. Each variant is one pass of the network, however often it is weighed; of the maps, which are summed up as they
    come, two are held and no more.

    Args:
        model: is used, not copied; DistributedDataParallel is taken off.
        variants: what to look at.
        batch_size: variants that may share a pass. Only neighbours of equal padded size do, in the first place a
            variant and its mirror image, since the network sees the padding.

    Raises:
        ValueError: a model whose semantic maps are turned off.
    """

    heads = ("semantic",)

    def __init__(
        self, model: Architecture | DistributedDataParallel, *, variants: ImageVariants, batch_size: int = 1
    ) -> None:
        self.model: Architecture = unwrap(model)
        if batch_size < 1:
            raise InputError(f"TEST.BATCH_SIZE must be at least 1, got {batch_size}")
        if "semantic" not in self.model.heads:
            raise InputError(_NO_SEMANTIC)
        self.variants = variants
        self.batch_size = batch_size

    @property
    def training(self) -> bool:
        """Whether the model is in training mode; then it cannot be called."""
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
            inputs: as for the model. `image` may be uint8, resized with Pillow as test images are, or floating point,
                resized by the same filter without rounding. Without `height` and `width` outputs have its size.
            vocabulary: as for the model.

        Raises:
            ValueError: a model in training mode, and what the model refuses.
        """
        if self.training:
            raise InputError("test-time augmentation is for predictions, but the model is training; call eval() first")
        check_images(inputs, num_channels=3)
        return [self._score(sample, vocabulary) for sample in inputs]

    def _score(self, sample: Mapping, vocabulary: Vocabulary | None) -> ScoredVariants:
        height, width = sample["image"].shape[-2:]
        sized = {"height": height, "width": width, **sample}
        scored: list[tuple[ScoredMasks, bool]] = []
        for batch in self._batches(sample["image"]):
            records = self.model.score([{**sized, "image": image} for image, _ in batch], vocabulary)
            scored += [(record, mirrored) for record, (_, mirrored) in zip(records, batch)]
        return ScoredVariants(tuple(scored))

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
        for record, mirrored in scored.variants:
            scores = self.model.outputs(record, heads=self.heads, ensemble=ensemble, settings=settings)["sem_seg"]
            if total is None:
                total = scores.float()
            else:
                _add(total, scores, mirrored=mirrored)
            del scores  # before the next map is computed
        mean = total.div_(len(scored.variants))
        return {"sem_seg": mean.argmax(0) if semantic == "labels" else mean}

    def _batches(self, image: Tensor) -> Iterator[list[tuple[Tensor, bool]]]:
        """The variants of an image in their order, together where they may be."""

        def size_of(variant: tuple[Tensor, bool]) -> tuple[int, int]:
            return padded_size([variant[0].shape[-2:]], self.model.size_divisibility)

        for _, group in groupby(self.variants.of(image), key=size_of):
            while batch := list(islice(group, self.batch_size)):
                yield batch


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
    return AugmentedModel(model, variants=build_variants(cfg), batch_size=cfg.TEST.BATCH_SIZE)


def resize_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) -> (3, *size) of the same dtype, bilinear with antialiasing; the image itself at its own size.

    Bytes go through Pillow, as test images do. Floating-point images are resized by the same filter without
    rounding, so that whole numbers come out at most one away from bytes.

    Raises:
        ValueError: pixels that are neither uint8 nor floating point.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if image.dtype == torch.uint8:
        resized = resize_image(image.permute(1, 2, 0).contiguous().cpu().numpy(), *size)
        return torch.from_numpy(np.array(resized.transpose(2, 0, 1), order="C"))
    if not image.is_floating_point():
        raise InputError(
            f"test-time augmentation resizes images of uint8 or floating-point numbers, 0..255, got {image.dtype}; "
            "convert with image.to(torch.uint8)"
        )
    resized = F.interpolate(image[None].float(), size=tuple(size), mode="bilinear", antialias=True)[0]
    return resized.to(image.dtype)


def _add(total: Tensor, scores: Tensor, *, mirrored: bool) -> None:
    """total += scores, both (K, h, w), mirrored ones turned back; no third map is made."""
    if not mirrored:
        total += scores
        return
    for part, other in zip(total.split(_CLASSES), scores.split(_CLASSES)):
        part += other.flip(-1)


def _is_side(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 1
