"""What models are called with: checked, and made into one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.errors import InputError
from fcclip.structures import Targets
from fcclip.vocabulary import Vocabulary

Samples = Sequence[Mapping[str, Any]]


def check_images(inputs: Samples, *, num_channels: int) -> None:
    """Refuses what is not a list of images.

    Raises:
        ValueError: an empty list, or a sample whose `image` is missing or not a (num_channels, H, W) tensor.
    """
    if not inputs:
        raise InputError("the model needs at least one image, got an empty list")
    expected = f"({num_channels}, H, W)"
    for index, sample in enumerate(inputs):
        image = sample.get("image")
        if not isinstance(image, Tensor):
            got = "nothing" if image is None else type(image).__name__
            raise InputError(f"image {index} must bring its pixels under 'image', a {expected} tensor; got {got}")
        if image.dim() != 3 or image.shape[0] != num_channels:
            raise InputError(f"image {index} must be a {expected} tensor, got {tuple(image.shape)}")


def padded_size(sizes: Sequence[tuple[int, int]], divisibility: int) -> tuple[int, int]:
    """(height, width) of the network input for a batch of images of these sizes.

    Args:
        sizes: (height, width) of each, pixels.
        divisibility: the result is a multiple of it; below 1: the largest of the batch.
    """
    step = max(1, divisibility)
    height, width = (-(-max(sides) // step) * step for sides in zip(*sizes))
    return height, width


def normalised_images(
    inputs: Samples, *, mean: Tensor, std: Tensor, divisibility: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Normalised images padded with zeros to (B, C, H, W), and the (height, width) of each without padding.

    Args:
        inputs: mappings with `image`.
        mean, std: (C, 1, 1), in the units of the pixels; images go to their device.
        divisibility: see `padded_size`.

    Raises:
        ValueError: see `check_images`.
    """
    check_images(inputs, num_channels=len(mean))
    images = [(sample["image"].to(mean.device, non_blocking=True).float() - mean) / std for sample in inputs]
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = padded_size(sizes, divisibility)
    padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes)]
    return torch.stack(padded), sizes


def batch_vocabularies(batch: Samples, train_vocabulary: Vocabulary | None) -> list[Vocabulary]:
    """What the labels of each image of a training batch mean: its own `vocabulary`, else `train_vocabulary`.

    Raises:
        ValueError: no training vocabulary; an image without targets, or with targets that would be read at a wrong
            scale or as void.
    """
    if train_vocabulary is None:
        raise InputError("the model has no training vocabulary; build it with build_model(cfg, train_vocabulary=…)")
    missing = [index for index, sample in enumerate(batch) if "targets" not in sample]
    if missing:
        raise InputError(f"training needs 'targets' in every image; images {missing} of this batch have none")
    vocabularies = [sample.get("vocabulary") or train_vocabulary for sample in batch]
    for index, (sample, vocabulary) in enumerate(zip(batch, vocabularies)):
        name = f"{'the training' if vocabulary is train_vocabulary else 'its'} vocabulary '{vocabulary.name}'"
        _check_targets(sample["targets"], tuple(sample["image"].shape[-2:]), len(vocabulary), index=index, name=name)
    return vocabularies


def _check_targets(targets: Targets, image_size: tuple[int, int], num_classes: int, *, index: int, name: str) -> None:
    """On the CPU, so that no GPU is waited for."""
    if targets.image_size != image_size:
        raise InputError(
            f"image {index}: its targets are {targets.image_size} (height, width), but the image is {image_size}"
        )
    if len(targets) and not 0 <= int(targets.labels.min()) <= int(targets.labels.max()) < num_classes:
        raise InputError(
            f"image {index}: labels must lie in 0..{num_classes - 1}, the classes of {name}, got "
            f"{sorted(set(targets.labels.tolist()))}"
        )


def vocabulary_of(sample: Mapping[str, Any], default: Vocabulary | None) -> Vocabulary:
    """The classes to look for in an image: its own `vocabulary`, else `default`.

    Raises:
        ValueError: neither is there.
    """
    own = sample.get("vocabulary")
    vocabulary = default if own is None else own
    if vocabulary is None:
        raise InputError("no classes to look for: pass vocabulary=… or set test_vocabulary first")
    return vocabulary


def output_size(sample: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the outputs of an image: its `height` and `width`, else its own `size`."""
    return int(sample.get("height", size[0])), int(sample.get("width", size[1]))


def point_seeds(batch: Samples) -> list[int] | None:
    """The `point_seed` of every image of a training batch; None where one has none."""
    seeds = [sample.get("point_seed") for sample in batch]
    return None if None in seeds else seeds


def class_slices(vocabularies: Iterable[Vocabulary]) -> dict[Vocabulary, slice]:
    """Where the classes of each vocabulary stand when all are put one after the other."""
    slices, start = {}, 0
    for vocabulary in vocabularies:
        slices[vocabulary] = slice(start, start + len(vocabulary))
        start += len(vocabulary)
    return slices
