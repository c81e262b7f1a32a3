"""Three lines from an image and class names to its segments.

    from fcclip import Segmenter
    segmenter = Segmenter.from_pretrained("shapes")
    result = segmenter("photo.jpg", vocabulary="red circle; blue star, azure star; sand:stuff")

h x w are pixels of the image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from pycocotools import mask as coco_mask

from fcclip.config import load_config, lookup, resolve_device, resolve_file
from fcclip.data import build_test_mapper, read_image, resize_image
from fcclip.data.images import upright_rgb
from fcclip.errors import InputError, MissingFileError
from fcclip.files import write_atomically
from fcclip.modeling import build_model
from fcclip.structures import Segment
from fcclip.visualization import draw_panoptic
from fcclip.vocabulary import Vocabulary
from fcclip.weights import load_weights

ImageInput = str | Path | np.ndarray | Image.Image

PRETRAINED = {  # name -> config file, weights
    "shapes": ("shapes/fcclip_shapes.yaml", "shapes_fcclip.safetensors"),
}


@dataclass(frozen=True)
class NamedSegment(Segment):
    """A segment that knows what it is called.

    Args:
        name: canonical name of its class, the first synonym of the entry.
    """

    name: str


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What was found in one image.

    Args:
        image: (h, w, 3) uint8 RGB, upright.
        panoptic_map: (h, w) int32, segment id of each pixel; 0 where nothing was found.
        segments: largest score first.
        class_names: K names, by `category_id`.
        file_name: of the image; "" if it was given as pixels.
    """

    image: np.ndarray
    panoptic_map: np.ndarray
    segments: tuple[NamedSegment, ...]
    class_names: tuple[str, ...]
    file_name: str = ""

    def draw(self, *, scores: bool = True) -> np.ndarray:
        """The image with masks, outlines, names and scores: (H, W, 3) uint8 RGB; small images are enlarged."""
        return draw_panoptic(self.image, self.panoptic_map, self.segments, self.class_names, scores=scores)

    def mask(self, segment: Segment) -> np.ndarray:
        """(h, w) bool, the pixels of one segment."""
        return self.panoptic_map == segment.id

    def to_json(self) -> str:
        """Name and size of the image, class names, and of each segment id, name, score, area, box and mask.

        Boxes are (x, y, width, height) in pixels. Masks are compressed run lengths as in COCO files, which
        `pycocotools.mask.decode` reads.
        """
        height, width = self.panoptic_map.shape
        content = {
            "file_name": self.file_name,
            "height": height,
            "width": width,
            "class_names": list(self.class_names),
            "segments": [self._segment_record(segment) for segment in self.segments],
        }
        return json.dumps(content, ensure_ascii=False, indent=1)

    def save(self, path: str | Path) -> Path:
        """Writes the drawing (.png, .jpg, .webp, …) or, to a .json file, what `to_json` gives.

        Missing folders are made. The file appears whole or not at all.

        Raises:
            ValueError: an extension that is not an image format.
            OSError: the folder cannot be made or written to.
        """
        path = Path(path).expanduser()
        kind = Image.registered_extensions().get(path.suffix.lower())
        if path.suffix.lower() == ".json":
            content = (self.to_json() + "\n").encode()
        elif kind in Image.SAVE:
            content = io.BytesIO()
            Image.fromarray(self.draw()).save(content, format=kind, **({"quality": 95} if kind == "JPEG" else {}))
            content = content.getvalue()
        else:
            raise InputError(f"cannot save '{path}': '{path.suffix}' is not an image format; use .png, .jpg or .json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
        return path

    def _segment_record(self, segment: NamedSegment) -> dict:
        code = coco_mask.encode(np.asfortranarray(self.mask(segment).astype(np.uint8)))
        return {
            "id": segment.id,
            "name": segment.name,
            "category_id": segment.category_id,
            "isthing": segment.isthing,
            "score": round(segment.score, 4),
            "area": segment.area,
            "bbox": [int(side) for side in coco_mask.toBbox(code)],
            "segmentation": {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")},
        }


class Segmenter:
    """Segments images with any class names.

    Holds a model and no vocabulary: it comes with every call, so one segmenter may serve threads with different ones.

    Args:
        cfg: the whole config.
        weights: a checkpoint or a shipped asset; None: the config's MODEL.WEIGHTS; "random": none, only useful to try
            out whether a config builds.
        device: a torch device, or "auto"; None: the config's MODEL.DEVICE.

    Raises:
        FileNotFoundError: the weights do not exist.
        ValueError: no weights given, weights of another config, or a device that this machine does not have.
    """

    def __init__(self, cfg: CfgNode, *, weights: str | Path | None = None, device: str | None = None) -> None:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = str(resolve_device(device or cfg.MODEL.DEVICE))
        cfg.freeze()
        weights = weights or cfg.MODEL.WEIGHTS
        if not weights:
            raise InputError(
                "no weights: the config's MODEL.WEIGHTS is empty, and an untrained segmenter finds nothing. Give "
                'the path of a checkpoint; "random" builds the model without one.'
            )
        self._mapper = build_test_mapper(cfg)
        path = None if str(weights) == "random" else resolve_file(weights, what="weights")
        self.model = build_model(cfg).eval()
        if path is not None:
            load_weights(self.model, path)

    @classmethod
    def from_pretrained(cls, name: str, *, device: str | None = None) -> Segmenter:
        """A segmenter with weights that come with the package.

        Args:
            name: one of `PRETRAINED`: "shapes", the small world of coloured shapes.
            device: as for the constructor.
        """
        config_file, weights = lookup("pretrained segmenter", name, PRETRAINED)
        return cls(load_config(config_file), weights=weights, device=device)

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        vocabulary: str | Sequence[str] | Vocabulary | None = None,
        *,
        min_score: float = 0.0,
    ) -> Segmentation | list[Segmentation]:
        """Finds the segments of an image.

        Args:
            image: a path, an RGB array (h, w, 3) uint8, a PIL image, or a list of these.
            vocabulary: the only classes that can be found. `;` separates classes, `,` the synonyms of a class;
                `:stuff` or `:thing` at the end of a class says whether its instances are one segment or many
                (unmarked: many). A list has one string a class. None: the vocabulary of the config's first test set.
            min_score: things with a lower score are left out (their pixels become 0); stuff always stays.

        Returns:
            One result, or for a list of images a list of results in the same order.

        Raises:
            FileNotFoundError: there is no such image.
            ValueError: an image that cannot be read or is not an RGB array, no vocabulary, or `min_score` outside 0..1.
        """
        if not 0 <= min_score <= 1:
            raise InputError(f"min_score must be in 0..1, got {min_score}")
        vocabulary = self._vocabulary(vocabulary)
        if isinstance(image, (list, tuple)):
            return [self._segment(single, vocabulary, min_score) for single in image]
        return self._segment(image, vocabulary, min_score)

    def _vocabulary(self, vocabulary: str | Sequence[str] | Vocabulary | None) -> Vocabulary:
        if vocabulary is not None:
            return vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.from_names(vocabulary)
        if self.model.test_vocabulary is None:
            raise InputError("no vocabulary given, and the config names no test set (DATASETS.TEST) with classes")
        return self.model.test_vocabulary

    @torch.no_grad()
    def _segment(self, source: ImageInput, vocabulary: Vocabulary, min_score: float) -> Segmentation:
        image = _read(source)
        height, width = image.shape[:2]
        resized = resize_image(image, *self._mapper.resized(height, width))
        if self._mapper.channel_order == "BGR":
            resized = resized[..., ::-1]
        channels = torch.from_numpy(resized.transpose(2, 0, 1).copy())
        sample = {"image": channels, "height": height, "width": width}
        (output,) = self.model([sample], vocabulary=vocabulary, heads=("panoptic",))
        ids, records = output["panoptic_seg"]
        panoptic_map = ids.cpu().numpy().astype(np.int32)
        segments = [NamedSegment(**record, name=vocabulary.class_names[record["category_id"]]) for record in records]
        dropped = [segment.id for segment in segments if segment.isthing and segment.score < min_score]
        panoptic_map[np.isin(panoptic_map, dropped)] = 0
        kept = sorted(
            (segment for segment in segments if segment.id not in dropped), key=lambda segment: -segment.score
        )
        file_name = str(source) if isinstance(source, (str, Path)) else ""
        return Segmentation(image, panoptic_map, tuple(kept), vocabulary.class_names, file_name)


def _read(image: ImageInput) -> np.ndarray:
    """(h, w, 3) uint8 RGB, upright."""
    if isinstance(image, Image.Image):
        return np.array(upright_rgb(image))
    if isinstance(image, (str, Path)):
        path = Path(image).expanduser()
        if not path.is_file():
            raise MissingFileError(f"image '{image}' does not exist (looked at {path.absolute()})")
        return read_image(path)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
        got = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"an image is a path, a PIL image or an RGB array (h, w, 3) uint8 with pixels, got {got}")
    return image
