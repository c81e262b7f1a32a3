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
from fcclip.modeling.fcclip import FCCLIP, Modes
from fcclip.vocabulary import Vocabulary

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


class AugmentedModel:
    """A model that looks at each image in several variants and gives the mean of their semantic scores.

    Called like the model, with `sem_seg` as the only output; panoptic and instance outputs have no mean, so they are
    not computed. Each variant is one pass of the network, whatever the number of modes; maps are summed up as they
    come, so that for each mode one is held and no more.

    Args:
        model: is used, not copied; DistributedDataParallel is taken off.
        variants: what to look at.
        batch_size: variants that may share a pass. Only neighbours of equal padded size do, in the first place a
            variant and its mirror image, since the network sees the padding.

    Raises:
        ValueError: a model whose semantic maps are turned off.
    """

    def __init__(
        self, model: FCCLIP | DistributedDataParallel, *, variants: ImageVariants, batch_size: int = 1
    ) -> None:
        self.model: FCCLIP = model.module if isinstance(model, DistributedDataParallel) else model
        if batch_size < 1:
            raise InputError(f"TEST.BATCH_SIZE must be at least 1, got {batch_size}")
        if not self.model.settings.semantic_on:
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

    @torch.no_grad()
    def __call__(
        self,
        inputs: Sequence[Mapping],
        *,
        vocabulary: Vocabulary | None = None,
        semantic: str | None = "scores",
        modes: Modes | None = None,
    ) -> list[dict[str, Tensor]] | dict[str, list[dict[str, Tensor]]]:
        """Predictions.

        Args:
            inputs: as for the model. `image` may be uint8, resized with Pillow as test images are, or floating point,
                resized by the same filter without rounding. Without `height` and `width` outputs have its size.
            vocabulary, modes: as for the model.
            semantic: "scores" for the mean scores (K, h, w) float32, "labels" for their argmax (h, w) int64.

        Returns:
            a mapping an image with `sem_seg`; with `modes` a list of such mappings by mode name.

        Raises:
            ValueError: a model in training mode, `semantic=None`, and what the model refuses.
        """
        if self.training:
            raise InputError("test-time augmentation is for predictions, but the model is training; call eval() first")
        if semantic not in ("scores", "labels"):
            raise InputError(
                f"semantic must be 'scores' or 'labels', got {semantic!r}: semantic maps are all that test-time "
                "augmentation gives"
            )
        self.model.check_images(inputs)
        results: dict[str, list[dict[str, Tensor]]] = {name: [] for name in modes or ("",)}
        for sample in inputs:
            for name, semantic_map in self._semantic_maps(sample, vocabulary, semantic, modes).items():
                results[name].append({"sem_seg": semantic_map})
        return results if modes else results[""]

    def _semantic_maps(
        self, sample: Mapping, vocabulary: Vocabulary | None, semantic: str, modes: Modes | None
    ) -> dict[str, Tensor]:
        """Mode name -> scores (K, h, w) or labels (h, w) of one image."""
        height, width = sample["image"].shape[-2:]
        sized = {"height": height, "width": width, **sample}
        totals: dict[str, Tensor] = {}
        for batch in self._batches(sample["image"]):
            variants = [{**sized, "image": image} for image, _ in batch]
            for index, name, scores in self.model.semantic_scores(variants, vocabulary=vocabulary, modes=modes):
                if name in totals:
                    _add(totals[name], scores, mirrored=batch[index][1])
                else:  # the first variant is never mirrored
                    totals[name] = scores.float()
                del scores  # before the next map is computed
        means = {name: total.div_(len(self.variants)) for name, total in totals.items()}
        return {name: mean.argmax(0) for name, mean in means.items()} if semantic == "labels" else means

    def _batches(self, image: Tensor) -> Iterator[list[tuple[Tensor, bool]]]:
        """The variants of an image in their order, together where they may be."""
        for _, group in groupby(self.variants.of(image), key=lambda one: self.model.padded_size([one[0].shape[-2:]])):
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


def build_augmented(cfg: CfgNode, model: FCCLIP | DistributedDataParallel) -> AugmentedModel:
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
