"""A model that segments images with any class names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode

from fcclip.config import resolve_device, resolve_file, with_values
from fcclip.data import build_test_mapper, resize_image
from fcclip.errors import InputError
from fcclip.modeling import Ensemble, ScoredMasks, build_model
from fcclip.modeling.inputs import padded_size
from fcclip.segmenter import pretrained
from fcclip.segmenter.examples import ExampleBank, example_of, usual_names
from fcclip.segmenter.images import ImageInput, read_image_input
from fcclip.segmenter.naming import Naming, VocabularyInput, read_distractors, read_vocabulary
from fcclip.segmenter.result import Computed, Scored, Segmentation
from fcclip.segmenter.tiles import segment_tiles
from fcclip.segmenter.video import MEMORY, Tracker
from fcclip.segmenter.video_files import VideoFile
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights

BATCH = 8  # images of a list that the network sees at once, unless told


class Segmenter:
    """Segments images with any class names.

    Holds a model and no vocabulary: it comes with every call, so one segmenter may serve threads with different ones.

    Args:
        cfg: the whole config.
        weights: a checkpoint or a shipped asset; None: the config's MODEL.WEIGHTS; "random": none, only useful to try
            out whether a config builds.
        device: a torch device, or "auto"; None: the config's MODEL.DEVICE.
        train_vocabulary, test_vocabulary: as for `build_model`.

    Raises:
        FileNotFoundError: the weights do not exist.
        ValueError: no weights given, weights of another config, or a device that this machine does not have.
    """

    def __init__(
        self,
        cfg: CfgNode,
        *,
        weights: str | Path | None = None,
        device: str | None = None,
        train_vocabulary: Vocabulary | None = None,
        test_vocabulary: Vocabulary | None = None,
    ) -> None:
        cfg = with_values(cfg, {"MODEL.DEVICE": str(resolve_device(device or cfg.MODEL.DEVICE))})
        weights = weights or cfg.MODEL.WEIGHTS
        if not weights:
            raise InputError(
                "no weights: the config's MODEL.WEIGHTS is empty, and an untrained segmenter finds nothing. Give "
                'the path of a checkpoint; "random" builds the model without one.'
            )
        self.cfg = cfg
        self._mapper = build_test_mapper(cfg)
        path = None if str(weights) == "random" else resolve_file(weights, what="weights")
        self.model = build_model(cfg, train_vocabulary=train_vocabulary, test_vocabulary=test_vocabulary).eval()
        if path is not None:
            load_weights(self.model, path)
        self.examples = ExampleBank(self.model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        config: str | Path | None = None,
        device: str = "auto",
        *,
        revision: str | None = None,
    ) -> Segmenter:
        """A segmenter with trained weights.

        Args:
            name: a name of `pretrained.SHIPPED` ("shapes", the small world of coloured shapes); a file of weights; a
                folder that `save_pretrained` wrote, or of a training; or "owner/name" on the Hugging Face hub, which is
                downloaded once, or "owner/name/file".
            config: a YAML file; None: what stands beside or inside the weights. Published files hold none.
            device: a torch device; "auto": the first of cuda, mps and cpu that this machine has.
            revision: of the hub: a branch, a tag or a commit.

        Raises:
            FileNotFoundError: there is no such file or folder, or nothing in it.
            ConnectionError: it is not on this machine, and the hub cannot be reached or has no such model.
            ValueError: no config, weights of another config, or on another CLIP.
        """
        parts = pretrained.find(name, config=config, revision=revision)
        return cls(
            parts.cfg,
            weights=parts.weights,
            device=device,
            train_vocabulary=parts.train_vocabulary,
            test_vocabulary=parts.test_vocabulary,
        )

    def save_pretrained(self, folder: str | Path, *, results: Mapping[str, Any] | None = None) -> Path:
        """Writes `model.safetensors`, `config.yaml` and a model card, from which `from_pretrained` makes the same.

        Args:
            folder: made if needed.
            results: numbers for the card, as `fcclip.evaluation` gives them: data set -> task -> metric -> percent.

        Returns:
            the folder.
        """
        return pretrained.save(self.model, self.cfg, Path(folder).expanduser(), results=results or {})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        results: Mapping[str, Any] | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Puts what `save_pretrained` writes on the Hugging Face hub and returns its address.

        Args:
            repo_id: "owner/name"; made if needed.
            results: as for `save_pretrained`.
            private: whether only its owner sees it, if it is made.
            token: of the hub; None: the one of `hf auth login`.

        Raises:
            ConnectionError: the hub cannot be reached, or refuses.
        """
        return pretrained.push(self.model, self.cfg, repo_id, results=results or {}, private=private, token=token)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        vocabulary: VocabularyInput | None = None,
        *,
        min_score: float = 0.0,
        ensemble: Ensemble | tuple[float, float] | None = None,
        unknown: bool | VocabularyInput = False,
        others: bool | VocabularyInput = False,
        tile: int = 0,
        channel_order: str = "RGB",
        batch_size: int = BATCH,
    ) -> Segmentation | list[Segmentation]:
        """Finds the segments of an image.

        Args:
            image: a path, the content of an image file, a PIL image, an array (h, w, 3) uint8, a tensor (3, h, w) of
                uint8 or of floats in 0..1, or a list of these. A list is seen in batches of equal padded size, so that
                each image gives what it gives alone.
            vocabulary: the only classes that can be found. `;` separates classes, `,` the synonyms of a class;
                `:stuff` or `:thing` at the end of a class says whether its instances are one segment or many
                (unmarked: many). A list has one string a class. The name of a built-in vocabulary stands for all of
                its classes. None: the vocabulary that the weights bring.
            min_score: things with a lower score are left out (their pixels become 0); stuff always stays.
            ensemble: (alpha, beta), how much the frozen CLIP decides for classes that training knew and for others, or
                an `Ensemble`, which has void trust too; None: the config's.
            unknown: True: what a class of the training vocabulary fits better than any of yours, or where void is
                likely, is called "unknown"; or a vocabulary to take instead of that of the training.
            others: the same names, but what fits them better is left out: their probability counts as void.
            tile: the image is cut into overlapping tiles of that many pixels, which are seen one by one; 0: it is seen
                whole, scaled down to the size of the test images.
            channel_order: "RGB" or "BGR" (OpenCV's), of arrays and tensors.
            batch_size: images of a list that the network sees at once, at most.

        Returns:
            One result, or for a list of images a list of results in the same order.

        Raises:
            FileNotFoundError: there is no such image.
            ValueError: an image that cannot be read, no vocabulary, or a number outside its range.
        """
        _check_batch(batch_size)
        naming = Naming(
            self._vocabulary(vocabulary),
            min_score=min_score,
            ensemble=ensemble,
            **read_distractors(unknown, others, self.model),
        )
        is_list = isinstance(image, (list, tuple))
        sources = image if is_list else [image]
        images = [read_image_input(source, channel_order=channel_order) for source in sources]
        if tile:
            outputs = [self._tiled(pixels, naming, tile) for pixels in images]
        else:
            masks = self._score(images, naming.vocabulary, batch_size)
            outputs = [Scored(self.model, scored, naming) for scored in masks]
        results = [
            Segmentation(pixels, parts, str(source) if isinstance(source, (str, Path)) else "")
            for pixels, parts, source in zip(images, outputs, sources)
        ]
        return results if is_list else results[0]

    @torch.no_grad()
    def teach(self, name: str, image: ImageInput | Segmentation, mask: np.ndarray) -> None:
        """Shows what a class name means, from when on calls and `relabel` know it: few-shot, and without training.

        Call it again with other images: five are much better than one. `segmenter.examples` has `save` and `load`.

        Args:
            name: as it will stand in a vocabulary, a class or a synonym; any word.
            image: as for a call; or a result, which is not looked at again.
            mask: (h, w) bool, the pixels of the image that show the class.

        Raises:
            FileNotFoundError, ValueError: as a call; a mask of another size or without a pixel.
        """
        names = usual_names(self.model)
        if isinstance(image, Segmentation):
            scored = self.model.rescore(image._kept("teach").scored, names)
        else:
            [scored] = self._score([read_image_input(image)], names)
        self.examples.add(name.strip(), example_of(self.model, scored, mask))

    def video(
        self,
        frames: str | Path | Iterable[ImageInput],
        vocabulary: VocabularyInput | None = None,
        *,
        memory: int = MEMORY,
        batch_size: int = 1,
        **options: Any,
    ) -> Iterator[Segmentation]:
        """Segments the frames of a video, in which a thing keeps its id: see `Tracker`.

        Takes `batch_size` frames at a time and keeps none, so memory does not grow with the length.

        Args:
            frames: the path of a video file (needs the extra `video`), or images in their order.
            vocabulary, **options: as for a call.
            memory: a thing that is hidden for so many frames has its id again when it comes back.
            batch_size: frames that the network sees at once; more are faster on a GPU, and later.

        Yields:
            the result of each frame. In `panoptic` and `segments` ids are identities, from 1, none for two things;
            `relabel` and `embed` are for images.

        Raises:
            FileNotFoundError, ValueError: as a call; a video that cannot be read.
        """
        _check_batch(batch_size)
        tracker = Tracker(memory=memory)
        images = iter((frame.image for frame in VideoFile(frames)) if isinstance(frames, (str, Path)) else frames)
        while batch := list(itertools.islice(images, batch_size)):
            for result in self(batch, vocabulary, batch_size=batch_size, **options):
                yield tracker.update(result)

    def _vocabulary(self, vocabulary: VocabularyInput | None) -> Vocabulary:
        if vocabulary is not None:
            return read_vocabulary(vocabulary)
        if self.model.test_vocabulary is None:
            raise InputError("no vocabulary given, and the config names no test set (DATASETS.TEST) with classes")
        return self.model.test_vocabulary

    def _score(
        self, images: Sequence[np.ndarray], vocabulary: Vocabulary, batch_size: int = BATCH
    ) -> list[ScoredMasks]:
        """The masks of images (h, w, 3), in their order."""
        samples = [self._sample(image) for image in images]
        batches: dict[tuple[int, int], list[int]] = {}  # images by the size of the network's input
        for index, sample in enumerate(samples):
            size = padded_size([tuple(sample["image"].shape[-2:])], self.model.size_divisibility)
            batches.setdefault(size, []).append(index)
        scored: dict[int, ScoredMasks] = {}
        for indices in batches.values():
            for start in range(0, len(indices), batch_size):
                part = indices[start : start + batch_size]
                scored |= zip(part, self.model.score([samples[index] for index in part], vocabulary))
        return [scored[index] for index in range(len(images))]

    def _sample(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        resized = resize_image(image, *self._mapper.resized(height, width))
        if self._mapper.channel_order == "BGR":
            resized = resized[..., ::-1]
        channels = torch.from_numpy(resized.transpose(2, 0, 1).copy())
        return {"image": channels, "height": height, "width": width}

    def _tiled(self, image: np.ndarray, naming: Naming, tile: int) -> Computed:
        def look(part: np.ndarray) -> Scored:
            [scored] = self._score([part], naming.vocabulary)
            return Scored(self.model, scored, naming)

        return segment_tiles(image, tile=tile, look=look)


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is a number of images, at least 1; got {batch_size}")
