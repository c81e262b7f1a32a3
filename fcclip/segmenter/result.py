"""What was found in an image. h x w are its pixels."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
import torch
from PIL import Image

from fcclip.config import lookup
from fcclip.errors import InputError
from fcclip.files import write_atomically
from fcclip.modeling import Architecture, Ensemble, ScoredMasks
from fcclip.modeling.unknown import AskedMasks, UnknownMasks
from fcclip.segmenter.naming import Naming, VocabularyInput, read_distractors, read_vocabulary
from fcclip.segmenter.segments import NamedSegment, named_segments, run_lengths
from fcclip.visualization import draw_instances, draw_labels, draw_panoptic
from fcclip.vocabulary import Vocabulary

KINDS = ("panoptic", "instances", "semantic")


@dataclass(frozen=True)
class Computed:
    """The parts of a result, of which `Segmentation` says what they are, without anything to make others of."""

    vocabulary: Vocabulary
    panoptic: np.ndarray
    segments: tuple[NamedSegment, ...]
    instances: tuple[NamedSegment, ...]
    semantic: np.ndarray
    embeddings: np.ndarray


class Scored:
    """Parts that are made of kept masks when they are asked for.

    Args:
        model: made the masks.
        scored: of the vocabulary of `naming`.
        naming: how the masks get names.
    """

    def __init__(self, model: Architecture, scored: ScoredMasks, naming: Naming) -> None:
        self.model, self.scored, self.naming, self.named = model, scored, naming, scored
        if naming.others is not None:
            others = model.rescore(scored, naming.others)
            if naming.distractors_are_void:
                self.named = AskedMasks.of(scored, others)
            else:
                self.named = UnknownMasks.of(scored, others, void_threshold=naming.void_threshold)
        self.vocabulary = self.named.vocabulary

    def renamed(self, naming: Naming) -> Scored:
        """The same masks, named in another way."""
        scored = self.scored
        if naming.vocabulary is not self.naming.vocabulary or self.model.text_encoder.shown:
            scored = self.model.rescore(scored, naming.vocabulary)
        return Scored(self.model, scored, naming)

    def _head(self, head: str) -> dict[str, Any]:
        options = {"ensemble": self.naming.ensemble, "semantic": "labels"}
        with torch.no_grad():
            return self.model.outputs(self.named, heads=(head,), **options)

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """(Q, K + 1) float32, the probabilities of all masks in the panoptic map, void last."""
        ensemble = Ensemble.of(self.naming.ensemble or self.model.ensemble).of_head("panoptic")
        return self.named.class_logits(ensemble).softmax(-1).cpu().numpy()

    @functools.cached_property
    def _panoptic(self) -> tuple[np.ndarray, tuple[NamedSegment, ...]]:
        ids, records = self._head("panoptic")["panoptic_seg"]
        id_map = ids.cpu().numpy().astype(np.int32)
        kept = [record for record in records if not record["isthing"] or record["score"] >= self.naming.min_score]
        if len(kept) < len(records):
            id_map[~np.isin(id_map, [record["id"] for record in kept])] = 0
        return id_map, named_segments(id_map, kept, self.vocabulary.class_names)

    @property
    def panoptic(self) -> np.ndarray:
        return self._panoptic[0]

    @property
    def segments(self) -> tuple[NamedSegment, ...]:
        return self._panoptic[1]

    @functools.cached_property
    def instances(self) -> tuple[NamedSegment, ...]:
        instances = self._head("instances")["instances"].to("cpu")
        segments = []
        for index in instances.scores.argsort(descending=True, stable=True).tolist():
            score, label = float(instances.scores[index]), int(instances.pred_classes[index])
            left, top, right, bottom = (int(side) for side in instances.pred_boxes[index])
            if score < self.naming.min_score or right == 0:
                continue
            mask = instances.pred_masks[index, top:bottom, left:right].numpy()
            rle = run_lengths(mask, top=top, left=left, size=instances.pred_masks.shape[1:])
            place = {"name": self.vocabulary.class_names[label], "rle": rle, "box": (left, top, right, bottom)}
            segments.append(NamedSegment(len(segments) + 1, label, True, score, int(mask.sum()), **place))
        return tuple(segments)

    @functools.cached_property
    def semantic(self) -> np.ndarray:
        return self._head("semantic")["sem_seg"].cpu().numpy().astype(np.int32)

    def embed(self, masks: np.ndarray) -> np.ndarray:
        """See `Segmentation.embed`; one mask at a time, so that memory does not grow with their number."""
        parts = np.array_split(np.asarray(masks, bool), max(1, len(masks)))
        rows = [self.model.embed_regions(self.scored, torch.from_numpy(part)) for part in parts]
        return torch.cat(rows).cpu().numpy()

    @functools.cached_property
    def embeddings(self) -> np.ndarray:
        nothing = self.embed(np.zeros((0, *self.panoptic.shape), bool))
        return np.concatenate([nothing, *(self.embed(segment.mask[None]) for segment in self.segments)])


@dataclass(frozen=True)
class Tracked:
    """The parts of a frame of a video: of `outputs`, but for the panoptic map and its segments, whose ids are
    identities."""

    outputs: Computed | Scored
    panoptic: np.ndarray
    segments: tuple[NamedSegment, ...]

    @property
    def vocabulary(self) -> Vocabulary:
        return self.outputs.vocabulary

    @property
    def instances(self) -> tuple[NamedSegment, ...]:
        return self.outputs.instances

    @property
    def semantic(self) -> np.ndarray:
        return self.outputs.semantic

    @property
    def embeddings(self) -> np.ndarray:
        return self.outputs.embeddings


Outputs = Computed | Scored | Tracked


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What was found in one image.

    Each part is made when it is first asked for. Until the result is dropped it keeps the masks of all queries at a
    quarter of the network's input (250 masks of a photograph: about 60 MB), of which `relabel` makes other parts; that
    of a tiled image keeps none.

    Args:
        image: (h, w, 3) uint8 RGB, upright.
        outputs: where the parts come from.
        file_name: of the image; "" if it was given as pixels.
    """

    image: np.ndarray
    outputs: Outputs
    file_name: str = ""

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes that could be found; "unknown" is the last where it was an answer."""
        return self.outputs.vocabulary

    @property
    def class_names(self) -> tuple[str, ...]:
        """Their names, by `category_id`."""
        return self.vocabulary.class_names

    @property
    def panoptic(self) -> np.ndarray:
        """(h, w) int32, segment id of each pixel; 0 where nothing was found."""
        return self.outputs.panoptic

    @property
    def segments(self) -> tuple[NamedSegment, ...]:
        """The segments of the panoptic map, largest score first."""
        return self.outputs.segments

    @property
    def instances(self) -> tuple[NamedSegment, ...]:
        """Things as a detector gives them, largest score first: they may overlap, and one may come with several
        names."""
        return self.outputs.instances

    @property
    def semantic(self) -> np.ndarray:
        """(h, w) int32, class index of each pixel."""
        return self.outputs.semantic

    @property
    def embeddings(self) -> np.ndarray:
        """(n, D) float32, unit length: what the frozen CLIP sees in each of `segments`."""
        return self.outputs.embeddings

    def embed(self, masks: np.ndarray) -> np.ndarray:
        """What the frozen CLIP sees in any regions: masks (n, h, w) bool -> (n, D) float32, unit length.

        Raises:
            ValueError: the result of a tiled image, or a frame of a video.
        """
        return self._kept("embed").embed(masks)

    def relabel(
        self,
        vocabulary: VocabularyInput | None = None,
        *,
        min_score: float | None = None,
        ensemble: Ensemble | tuple[float, float] | None = None,
        unknown: bool | VocabularyInput | None = None,
        others: bool | VocabularyInput | None = None,
    ) -> Segmentation:
        """The same image with other class names, without looking at it again: what a fresh call gives.

        Args:
            vocabulary, min_score, ensemble: as for a call of the segmenter; None: as this result has it.
            unknown, others: the same; one that is given ends the other.

        Raises:
            ValueError: as a call; the result of a tiled image, or a frame of a video.
        """
        scored = self._kept("relabel")
        changes = {"min_score": min_score, "ensemble": ensemble}
        changes["vocabulary"] = None if vocabulary is None else read_vocabulary(vocabulary)
        changes = {name: value for name, value in changes.items() if value is not None}
        if unknown is not None or others is not None:
            changes |= read_distractors(unknown or False, others or False, scored.model)
        return replace(self, outputs=scored.renamed(replace(scored.naming, **changes)))

    def _kept(self, what: str) -> Scored:
        if isinstance(self.outputs, Scored):
            return self.outputs
        raise InputError(
            f"{what} needs the masks of all queries, which the result of a tiled image and a frame of a video do not "
            "have; call the segmenter again"
        )

    def draw(self, kind: str = "panoptic", *, scores: bool = True, legend: bool = False) -> np.ndarray:
        """The image with masks, outlines and names: (H, W, 3) uint8 RGB; small images are enlarged.

        Args:
            kind: "panoptic"; "instances", all of them, so ask for them with `min_score`; or "semantic".
            scores: write scores after names.
            legend: a list of the classes below the image.
        """
        lookup("kind of drawing", kind, dict.fromkeys(KINDS))
        names = self.class_names
        if kind == "semantic":
            return draw_labels(self.image, self.semantic, names, legend=legend)
        options = {"scores": scores, "legend": legend}
        if kind == "panoptic":
            options["identities"] = isinstance(self.outputs, Tracked)
            return draw_panoptic(self.image, self.panoptic, self.segments, names, **options)
        masks = [segment.mask for segment in self.instances]
        return draw_instances(self.image, masks, self.instances, names, **options)

    def to_json(self) -> str:
        """Name and size of the image, class names, and of each segment id, name, score, area, box and mask.

        Boxes are (x, y, width, height) in pixels. Masks are compressed run lengths as in COCO files, which
        `pycocotools.mask.decode` reads.
        """
        height, width = self.image.shape[:2]
        content = {
            "file_name": self.file_name,
            "height": height,
            "width": width,
            "class_names": list(self.class_names),
            "segments": [segment.record() for segment in self.segments],
        }
        return json.dumps(content, ensure_ascii=False, indent=1)

    def to_coco(self, *, image_id: int = 1) -> dict[str, list[dict[str, Any]]]:
        """The segments as a COCO instance file, which `pycocotools.coco.COCO` and labelling programs read: `images`,
        `annotations` and `categories`, whose ids are class indices."""
        height, width = self.image.shape[:2]
        own = {"image_id": image_id, "iscrowd": 0}
        return {
            "images": [{"id": image_id, "file_name": self.file_name, "height": height, "width": width}],
            "annotations": [{**segment.record(), **own} for segment in self.segments],
            "categories": [
                {"id": index, "name": entry.name, "isthing": int(entry.thing)}
                for index, entry in enumerate(self.vocabulary.classes)
            ],
        }

    def to_supervision(self, segments: Sequence[NamedSegment] | None = None) -> sv.Detections:
        """Segments as supervision has them, by default those of the panoptic map; `class_name` is in `data`."""
        segments = self.segments if segments is None else segments
        if not segments:
            return sv.Detections.empty()
        return sv.Detections(
            xyxy=np.array([segment.box for segment in segments], np.float32),
            mask=np.stack([segment.mask for segment in segments]),
            confidence=np.array([segment.score for segment in segments], np.float32),
            class_id=np.array([segment.category_id for segment in segments]),
            data={"class_name": np.array([segment.name for segment in segments])},
        )

    def save(self, path: str | Path, kind: str = "panoptic") -> Path:
        """Writes the drawing (.png, .jpg, .webp, …) of a kind that `draw` knows; to a .json file what `to_json` gives;
        into a folder, a path without an ending, both, called as the image.

        Missing folders are made. A file appears whole or not at all.

        Returns:
            the path.

        Raises:
            ValueError: an extension that is not an image format.
            OSError: the folder cannot be made or written to.
        """
        path = Path(path).expanduser()
        if not path.suffix or path.is_dir():
            for ending in ("png", "json"):
                self.save(path / f"{Path(self.file_name).stem or 'image'}.{ending}", kind)
            return path
        format_name = Image.registered_extensions().get(path.suffix.lower())
        if path.suffix.lower() == ".json":
            content = (self.to_json() + "\n").encode()
        elif format_name in Image.SAVE:
            drawing, options = io.BytesIO(), {"quality": 95} if format_name == "JPEG" else {}
            Image.fromarray(self.draw(kind)).save(drawing, format=format_name, **options)
            content = drawing.getvalue()
        else:
            raise InputError(f"cannot save '{path}': '{path.suffix}' is not an image format; use .png, .jpg or .json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
        return path
