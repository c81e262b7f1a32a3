"""Runs an exported model: an image in, what was found out. Needs NumPy, Pillow and onnxruntime."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps

from fcclip.deploy import maps
from fcclip.deploy.metadata import Metadata
from fcclip.deploy.scoring import class_probabilities
from fcclip.deploy.vocabulary import VocabularyFile
from fcclip.errors import InputError, MissingFileError, NotInstalledError

GRAPH, VOCABULARY = "image.onnx", "vocabulary.npz"  # of a folder that tools/export.py writes
SMALLEST = 64  # pixels of a side of the input; at one cell of the coarsest level shapes would be 1 and spread
ImageInput = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Result:
    """What was found in an image; each part is made when it is first asked for.

    Args:
        class_embeddings, region_embeddings: (Q, D) float32, what both classifiers compare with names.
        query_embeddings: (Q, d) float32, which tell a thing from others over the frames of a video.
        not_empty: (Q,) bool.
        masks: of the queries.
        vocabulary: the classes.
        metadata: of the model.
        ensemble: weights (alpha, beta); None: the model's.
    """

    class_embeddings: np.ndarray
    region_embeddings: np.ndarray
    query_embeddings: np.ndarray
    not_empty: np.ndarray
    masks: maps.Masks
    vocabulary: VocabularyFile
    metadata: Metadata
    ensemble: tuple[float, float] | None = None

    def relabel(
        self, vocabulary: str | Path | VocabularyFile | None = None, *, ensemble: tuple[float, float] | None = None
    ) -> Result:
        """The same image with other class names or weights, without looking at it again; None: as this result has it.

        Raises:
            FileNotFoundError, ValueError: as a call of the runner.
        """
        own = self.vocabulary if vocabulary is None else fitting(vocabulary, self.metadata)
        return replace(self, vocabulary=own, ensemble=self.ensemble if ensemble is None else ensemble)

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """(Q, K + 1) float32, of all queries, void last."""
        embeddings = self.class_embeddings, self.region_embeddings, self.not_empty
        return class_probabilities(*embeddings, self.vocabulary, self.metadata, self.ensemble)

    @functools.cached_property
    def _panoptic(self) -> tuple[np.ndarray, tuple[maps.Segment, ...]]:
        names = {"object_mask_threshold", "overlap_threshold"}
        thresholds = {name: getattr(self.metadata, name) for name in names}
        own = self.vocabulary
        return maps.panoptic(self.probabilities, self.masks, own.things, own.class_names, **thresholds)

    @property
    def panoptic(self) -> np.ndarray:
        """(h, w) int32, segment id of each pixel; 0 where nothing was found."""
        return self._panoptic[0]

    @property
    def segments(self) -> tuple[maps.Segment, ...]:
        """The segments of the panoptic map, largest score first."""
        return self._panoptic[1]

    @functools.cached_property
    def instances(self) -> tuple[maps.Segment, ...]:
        """Things as a detector gives them, largest score first; they may overlap."""
        own = self.vocabulary
        return maps.instances(self.probabilities, self.masks, own.things, own.class_names, topk=self.metadata.topk)

    @functools.cached_property
    def semantic(self) -> np.ndarray:
        """(h, w) int32, class index of each pixel."""
        return maps.semantic(self.probabilities, self.masks, masks_first=self.metadata.masks_first)


class Runner:
    """An exported model, to be called with images and vocabularies.

    Args:
        folder: written by tools/export.py.
        vocabulary: a vocabulary file for calls that bring none; None: that of the folder.
        threads: of the processor; 0: onnxruntime decides.
        providers: of onnxruntime, the first that can run an operation does.

    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: the folder holds no graph.
        ValueError: the graph was not written by tools/export.py, the vocabulary is another model's, or this onnxruntime
            does not have the providers.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vocabulary: str | Path | VocabularyFile | None = None,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        path = Path(folder).expanduser() / GRAPH
        if not path.is_file():
            raise MissingFileError(f"'{path}' does not exist (looked at {path.absolute()}); tools/export.py writes it")
        onnxruntime = runtime(providers)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime has an error of its own for each way in which a file can be broken
            raise InputError(
                f"'{path}' cannot be run ({' '.join(str(error).split())[:300]}). Is {GRAPH}.data beside it? Was a copy "
                "interrupted?"
            ) from error
        self.metadata = Metadata.of(self.session.get_modelmeta().custom_metadata_map, source=str(path))
        beside = path.with_name(VOCABULARY)
        self.vocabulary = fitting(vocabulary or beside, self.metadata) if vocabulary or beside.is_file() else None

    def __call__(
        self,
        image: ImageInput,
        vocabulary: str | Path | VocabularyFile | None = None,
        *,
        ensemble: tuple[float, float] | None = None,
    ) -> Result:
        """Finds the segments of an image.

        Args:
            image: a path, a PIL image, or an RGB array (h, w, 3) uint8.
            vocabulary: the only classes that can be found, a file or its content; None: the runner's.
            ensemble: weights (alpha, beta) of the frozen CLIP for seen and for other classes, 0..1; None: the model's.

        Raises:
            FileNotFoundError: there is no such image or vocabulary.
            ValueError: an image that cannot be read, no vocabulary, or one of another model.
        """
        pixels = read_image(image)
        height, width = pixels.shape[:2]
        size = self.resized(height, width)
        if size != (height, width):
            pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
        return self.look(pixels, vocabulary, output_size=(height, width), ensemble=ensemble)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which the network sees an image: see `fcclip.data.transforms.shortest_edge_size`."""
        own = self.metadata
        if own.square or own.min_size == 0:
            return (own.square, own.square) if own.square else (height, width)
        scale = own.min_size / min(height, width)
        size = (own.min_size, scale * width) if height < width else (scale * height, own.min_size)
        shrink = min(1.0, own.max_size / max(size))
        return max(int(size[0] * shrink + 0.5), 1), max(int(size[1] * shrink + 0.5), 1)

    def look(
        self,
        pixels: np.ndarray,
        vocabulary: str | Path | VocabularyFile | None = None,
        *,
        output_size: tuple[int, int] | None = None,
        ensemble: tuple[float, float] | None = None,
    ) -> Result:
        """As a call, with an image (h, w, 3) uint8 RGB that has the size at which it is to be seen; `output_size` is
        (height, width) of the maps, None that of the image."""
        named = fitting(vocabulary or self.vocabulary, self.metadata)
        padded = self.padded(pixels)
        outputs = {name: value[0] for name, value in self.run(padded).items()}
        sizes = {"padded_size": padded.shape[2:], "image_size": pixels.shape[:2]}
        masks = maps.Masks(outputs.pop("mask_logits"), **sizes, output_size=output_size or pixels.shape[:2])
        not_empty = outputs.pop("mask_not_empty")
        options = {"not_empty": not_empty, "masks": masks, "vocabulary": named, "metadata": self.metadata}
        return Result(**outputs, **options, ensemble=ensemble)

    def padded(self, pixels: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8 RGB -> (1, 3, H, W) float32, what the graph takes."""
        own, (height, width) = self.metadata, pixels.shape[:2]
        step = max(1, own.size_divisibility)
        size = [max(-(-side // step) * step, SMALLEST) for side in (height, width)]
        padded = np.tile(np.array(own.pixel_mean, np.float32)[:, None, None], (1, *size))
        padded[:, :height, :width] = (pixels[..., ::-1] if own.channel_order == "BGR" else pixels).transpose(2, 0, 1)
        return padded[None]

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What the graph says of images (B, 3, H, W) float32, 0..255, padded: its outputs by name.

        Raises:
            ValueError: another shape or type, a side that is no multiple of the model's.
        """
        step = max(1, self.metadata.size_divisibility)
        shape = np.shape(images)
        wrong = len(shape) != 4 or shape[1] != 3 or any(side % step or side < SMALLEST for side in shape[2:])
        if wrong or images.dtype != np.float32:
            raise InputError(
                f"the graph takes float32 images (B, 3, H, W) whose sides are multiples of {step} and at least "
                f"{SMALLEST}, got {images.dtype} {shape}; pad them with the colour {self.metadata.pixel_mean}"
            )
        outputs = self.session.run(None, {"image": images})
        return dict(zip((output.name for output in self.session.get_outputs()), outputs))


def runtime(providers: Sequence[str]) -> ModuleType:
    """onnxruntime, which would pass over a provider that it does not have in silence.

    Raises:
        ImportError: it is not installed.
        ValueError: it has not all of these providers.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise NotInstalledError(f"running a graph needs onnxruntime ({error}): pip install onnxruntime") from error
    known = onnxruntime.get_available_providers()
    if missing := sorted(set(providers) - set(known)):
        raise InputError(f"this onnxruntime has no {', '.join(missing)}; it has {', '.join(known)}")
    return onnxruntime


def fitting(vocabulary: str | Path | VocabularyFile | None, metadata: Metadata) -> VocabularyFile:
    """A vocabulary that was made for a model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is none, or it is another model's.
    """
    if vocabulary is None:
        raise InputError(f"no classes to look for: give a vocabulary, or put one beside the graph as {VOCABULARY}")
    own = vocabulary if isinstance(vocabulary, VocabularyFile) else VocabularyFile.load(vocabulary)
    if str(own.fingerprint) != metadata.fingerprint:
        raise InputError(
            f"the vocabulary ({', '.join(own.class_names[:3])}, …) was made for another model: its fingerprint is "
            f"{str(own.fingerprint)[:12]}, that of the graph {metadata.fingerprint[:12]} "
            f"({metadata.clip.get('architecture', 'CLIP')}). Make it again: tools/export.py with its weights"
        )
    return own


def read_image(image: ImageInput) -> np.ndarray:
    """(h, w, 3) uint8 RGB, upright.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            raise InputError(f"an array must be RGB (h, w, 3) uint8 with pixels, got {image.shape} {image.dtype}")
        return image
    if isinstance(image, (str, Path)) and not Path(image).expanduser().is_file():
        raise MissingFileError(f"image '{image}' does not exist (looked at {Path(image).expanduser().absolute()})")
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(Path(image).expanduser())
        if opened.mode[0] in "IF":
            raise InputError(f"'{image}' has pixels of mode {opened.mode}; store it with 8 bits a channel")
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise InputError(f"'{image}' cannot be read as an image: {error}") from error
