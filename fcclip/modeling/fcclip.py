"""FC-CLIP put together (Yu et al., NeurIPS 2023): frozen CLIP, pixel decoder, masked decoder, two classifiers, three
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcclip.errors import InputError
from fcclip.losses import SetCriterion
from fcclip.modeling.backbones.clip import DENSE, CLIPBackbone
from fcclip.modeling.classifier import (
    cut_classes,
    geometric_ensemble,
    own_classes,
    resize_masks,
    text_logits,
    with_void,
)
from fcclip.modeling.inference import InstanceSelection, PanopticMerge, mask_chunk, postprocess_masks
from fcclip.modeling.mask_decoder import MultiScaleMaskedTransformerDecoder, QueryPredictions
from fcclip.modeling.pixel_decoder import MSDeformAttnPixelDecoder
from fcclip.modeling.semantic_blocks import best_classes, semantic_blocks
from fcclip.modeling.text import TextEncoder
from fcclip.structures import Targets, TextEmbeddings
from fcclip.vocabulary import Vocabulary

Modes = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class InferenceSettings:
    """What is made of the scored masks; the keys of MODEL.MASK_FORMER.TEST and the ensemble's.

    Args:
        alpha, beta: weight of the frozen CLIP for seen and unseen classes.
        ensemble_on_valid_mask: no ensemble for queries whose mask is empty at stride 32.
        semantic_on, instance_on, panoptic_on: outputs that are computed.
        object_mask_threshold, overlap_threshold: of `panoptic_inference`.
        topk: (query, class) pairs taken as instances.
        postprocess_masks_first: resize mask logits to the output size, not class scores; implied by the other two
            outputs.
        zero_boxes: the published all-zero boxes.
        query_chunk: masks held at the output size at once; 0: chosen, see `mask_chunk`.
        class_chunk: classes whose scores are held at once while labels are computed; 0: all, for few rows.
    """

    alpha: float
    beta: float
    ensemble_on_valid_mask: bool
    semantic_on: bool
    instance_on: bool
    panoptic_on: bool
    object_mask_threshold: float
    overlap_threshold: float
    topk: int
    postprocess_masks_first: bool = False
    zero_boxes: bool = False
    query_chunk: int = 0
    class_chunk: int = 0

    def __post_init__(self) -> None:
        if not (self.semantic_on or self.instance_on or self.panoptic_on):
            raise InputError(
                "MODEL.MASK_FORMER.TEST turns SEMANTIC_ON, INSTANCE_ON and PANOPTIC_ON off: nothing would be computed"
            )
        if self.query_chunk < 0 or self.class_chunk < 0:
            raise InputError(
                "TEST.QUERY_CHUNK and TEST.CLASS_CHUNK must be 0 (chosen) or a number of queries and of classes, got "
                f"{self.query_chunk} and {self.class_chunk}"
            )


@dataclass(frozen=True)
class ScoredMasks:
    """What one pass of the network found in one image.

    Args:
        class_logits: mode name -> (Q, K + 1), void last.
        mask_logits: (Q, ·, ·) at the stride of the mask features, over the padded image.
        vocabulary: its K classes.
        padded_size, image_size, output_size: (height, width) of the network input with and without padding, and of the
            outputs.
    """

    class_logits: dict[str, Tensor]
    mask_logits: Tensor
    vocabulary: Vocabulary
    padded_size: tuple[int, int]
    image_size: tuple[int, int]
    output_size: tuple[int, int]


class FCCLIPHead(nn.Module):
    """Pixel decoder and masked decoder under their published names."""

    def __init__(
        self, *, pixel_decoder: MSDeformAttnPixelDecoder, predictor: MultiScaleMaskedTransformerDecoder
    ) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    def forward(self, features: Mapping[str, Tensor], words: TextEmbeddings, *, all_sets: bool) -> QueryPredictions:
        """Backbone levels and K classes with void -> predictions; see the decoder."""
        mask_features, pyramid = self.pixel_decoder(features)
        return self.predictor(pyramid, mask_features, words, all_sets=all_sets)


class FCCLIP(nn.Module):
    """Segments images with any words.

    The model keeps no words besides the two vocabularies it was given: the one it is trained with, and the one that is
    used when a call brings none.

    Args:
        backbone: the frozen CLIP.
        sem_seg_head, criterion: the trained parts and their losses.
        pixel_mean, pixel_std: three numbers each, 0..255, in the channel order of the images.
        size_divisibility: network inputs are padded to multiples of it; below 1 only to the largest of the batch.
        settings: what is made of the scored masks.
        text_encoder: turns vocabularies into vectors with the backbone's text tower.
        train_vocabulary: classes of the training labels; also decides which classes count as seen.
        test_vocabulary: classes to use when a call brings none.

    Attributes:
        former_vocabulary: classes that the weights were trained on before a fine-tuning, which count as seen too; None:
            there was none.
        teacher: the start of a fine-tuning, whose answers the losses keep to; None: they do not.
    """

    def __init__(
        self,
        *,
        backbone: CLIPBackbone,
        sem_seg_head: FCCLIPHead,
        criterion: SetCriterion,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        settings: InferenceSettings,
        text_encoder: TextEncoder,
        train_vocabulary: Vocabulary | None = None,
        test_vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.void_embedding = nn.Embedding(1, backbone.embed_dim)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.size_divisibility = size_divisibility
        self.settings = settings
        self.text_encoder = text_encoder
        self.train_vocabulary = train_vocabulary
        self.test_vocabulary = test_vocabulary
        self.former_vocabulary: Vocabulary | None = None
        self._joined: tuple[Vocabulary, Vocabulary, Vocabulary] | None = None  # former and training words, and both
        self.teacher = None

    @property
    def seen_vocabulary(self) -> Vocabulary | None:
        """The classes that count as seen: of the training labels, and of the trainings before."""
        if self.train_vocabulary is None or self.former_vocabulary is None:
            return self.train_vocabulary or self.former_vocabulary
        parts = (self.former_vocabulary, self.train_vocabulary)
        if self._joined is None or any(one is not other for one, other in zip(self._joined, parts)):
            self._joined = (*parts, parts[0].joined(parts[1]))
        return self._joined[2]

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its inputs go."""
        return self.void_embedding.weight.device

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """The classes to use when a call brings none."""
        self.test_vocabulary = vocabulary

    def forward(
        self,
        inputs: Sequence[Mapping],
        *,
        vocabulary: Vocabulary | None = None,
        semantic: str | None = "scores",
        modes: Modes | None = None,
    ) -> dict[str, Tensor] | list[dict] | dict[str, list[dict]]:
        """Losses while training, else predictions.

        Args:
            inputs: a mapping an image: `image` (3, H, W) uint8 or float, 0..255, channels as the pixel statistics;
                optionally `height` and `width`, the size of the outputs (default: the image's), and `vocabulary`,
                classes for this image alone, which in training its labels mean; in training `targets`
                (`structures.Targets`) and optionally `point_seed`, an int that fixes where its losses look. A
                `structures.TrainingBatch` may be a part of a batch: the losses of the parts then add up.
            vocabulary: classes for the images that bring none; default: `set_vocabulary`'s.
            semantic: "scores" for (K, h, w) float, "labels" for (h, w) int64, None for no semantic map.
            modes: name -> (alpha, beta), to score one pass of the network in several ways.

        Returns:
            In training: weighted losses by name. Else a mapping an image with `sem_seg`, `panoptic_seg` = (int32
            (h, w), segment records) and `instances` (`structures.Instances`), as far as they are turned on; with
            `modes` a list of such mappings by mode name.

        Raises:
            ValueError: no vocabulary, no targets in training, images of another form.
        """
        if self.training:
            return self.losses(inputs)
        return self.predict(inputs, vocabulary=vocabulary, semantic=semantic, modes=modes)

    def preprocess(self, inputs: Sequence[Mapping]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised images padded with zeros to (B, 3, H, W), and the (height, width) of each without padding."""
        self.check_images(inputs)
        images = []
        for sample in inputs:
            image = sample["image"].to(self.device, non_blocking=True).float()
            images.append((image - self.pixel_mean) / self.pixel_std)
        sizes = [tuple(image.shape[-2:]) for image in images]
        height, width = self.padded_size(sizes)
        padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes)]
        return torch.stack(padded), sizes

    def check_images(self, inputs: Sequence[Mapping]) -> None:
        """Refuses what is no list of images.

        Raises:
            ValueError: an empty list, or a sample whose `image` is missing or no (3, H, W) tensor.
        """
        if not inputs:
            raise InputError("the model needs at least one image, got an empty list")
        wanted = f"({len(self.pixel_mean)}, H, W)"
        for index, sample in enumerate(inputs):
            image = sample.get("image")
            if not isinstance(image, Tensor):
                got = "nothing" if image is None else type(image).__name__
                raise InputError(f"image {index} must bring its pixels under 'image', a {wanted} tensor; got {got}")
            if image.dim() != 3 or image.shape[0] != len(self.pixel_mean):
                raise InputError(f"image {index} must be a {wanted} tensor, got {tuple(image.shape)}")

    def padded_size(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(height, width) of the network input for a batch of images of these sizes."""
        step = max(1, self.size_divisibility)
        height, width = (-(-max(sides) // step) * step for sides in zip(*sizes))
        return height, width

    def losses(self, inputs: Sequence[Mapping]) -> dict[str, Tensor]:
        """The weighted losses of a batch; see `SetCriterion`."""
        segment_counts = getattr(inputs, "segment_counts", None)
        if self.train_vocabulary is None:
            raise InputError("the model has no training vocabulary; build it with build_model(cfg, train_vocabulary=…)")
        self.check_images(inputs)
        missing = [index for index, sample in enumerate(inputs) if "targets" not in sample]
        if missing:
            raise InputError(f"training needs 'targets' in every image; images {missing} of this batch have none")
        vocabularies = [sample.get("vocabulary") or self.train_vocabulary for sample in inputs]
        for index, (sample, own) in enumerate(zip(inputs, vocabularies)):
            self._check_targets(index, sample["targets"], own, tuple(sample["image"].shape[-2:]))
        images, _ = self.preprocess(inputs)
        targets = [sample["targets"].to(self.device) for sample in inputs]
        features = self.backbone(images)
        asked = [*dict.fromkeys(vocabularies), *([self.teacher.vocabulary] if self.teacher else [])]
        words = _joined([self.text_encoder.encode(one) for one in asked])
        void = self.void_embedding.weight
        found = self.sem_seg_head(features, with_void(words, void), all_sets=self.criterion.deep_supervision)
        class_logits, targets = own_classes(found.class_logits, targets, vocabularies)
        seeds = [sample.get("point_seed") for sample in inputs]
        point_seeds = None if None in seeds else seeds
        losses = self.criterion(
            class_logits,
            found.mask_embeddings,
            found.mask_features,
            targets,
            padded_size=tuple(images.shape[-2:]),
            point_seeds=point_seeds,
            segment_counts=segment_counts,
        )
        if self.teacher is not None:
            num_images = len(inputs if segment_counts is None else segment_counts)
            losses |= self.teacher.losses(features, words, found, point_seeds=point_seeds, num_images=num_images)
        return losses

    def _check_targets(self, index: int, targets: Targets, vocabulary: Vocabulary, image_size: tuple[int, int]) -> None:
        """Refuses targets that would be read at a wrong scale or as void; on the CPU, so that no GPU is waited for."""
        if targets.image_size != image_size:
            raise InputError(
                f"image {index}: its targets are {targets.image_size} (height, width), but the image is {image_size}"
            )
        num_classes = len(vocabulary)
        if len(targets) and not 0 <= int(targets.labels.min()) <= int(targets.labels.max()) < num_classes:
            whose = "the training vocabulary" if vocabulary is self.train_vocabulary else "its vocabulary"
            raise InputError(
                f"image {index}: labels must lie in 0..{num_classes - 1}, the classes of {whose} "
                f"'{vocabulary.name}', got {sorted(set(targets.labels.tolist()))}"
            )

    @torch.no_grad()
    def predict(
        self,
        inputs: Sequence[Mapping],
        *,
        vocabulary: Vocabulary | None = None,
        semantic: str | None = "scores",
        modes: Modes | None = None,
    ) -> list[dict] | dict[str, list[dict]]:
        """Predictions; arguments and result as in `forward`."""
        if semantic not in ("scores", "labels", None):
            raise InputError(f"semantic must be 'scores', 'labels' or None, got {semantic!r}")
        wanted = self._modes(modes)
        results: dict[str, list[dict]] = {name: [] for name in wanted}
        for found in self._scored_masks(inputs, vocabulary, wanted):
            for name, output in self._outputs(found, semantic).items():
                results[name].append(output)
        return results if modes else results[""]

    def semantic_scores(
        self, inputs: Sequence[Mapping], *, vocabulary: Vocabulary | None = None, modes: Modes | None = None
    ) -> Iterator[tuple[int, str, Tensor]]:
        """The semantic maps of `predict` and nothing else, each computed when it is asked for, so that only one is
        held.

        Args:
            inputs, vocabulary, modes: as in `forward`.

        Yields:
            index of the image, mode name ("" without `modes`), scores (K, h, w); image after image.

        Raises:
            ValueError: as `forward`, or semantic maps are turned off.
        """
        if not self.settings.semantic_on:
            raise InputError("semantic maps are turned off; set MODEL.MASK_FORMER.TEST.SEMANTIC_ON True")
        for index, found in enumerate(self._scored_masks(inputs, vocabulary, self._modes(modes))):
            for name in found.class_logits:
                yield index, name, self._semantic_scores(found, [name])[name]

    def _modes(self, modes: Modes | None) -> Modes:
        return modes or {"": (self.settings.alpha, self.settings.beta)}

    @torch.no_grad()
    def _scored_masks(
        self, inputs: Sequence[Mapping], vocabulary: Vocabulary | None, modes: Modes
    ) -> list[ScoredMasks]:
        """One pass of the network, whatever the number of modes and of vocabularies; one record an image."""
        images, sizes = self.preprocess(inputs)
        groups: dict[Vocabulary, list[int]] = {}  # the images of each vocabulary
        for index, sample in enumerate(inputs):
            groups.setdefault(self._words_of(sample, vocabulary), []).append(index)
        words = [self.text_encoder.encode(one) for one in groups]
        features = self.backbone(images)
        found = self.sem_seg_head(features, with_void(_joined(words), self.void_embedding.weight), all_sets=False)
        in_logits, mask_logits, dense = found.class_logits[-1], found.mask_logits(), features[DENSE]
        results: list[ScoredMasks | None] = [None] * len(inputs)
        start = 0
        for (one, indices), own_words in zip(groups.items(), words):
            # words do not see each other before the softmax, so a vocabulary's logits can be cut out of all
            end = start + own_words.num_classes
            own_logits = cut_classes(in_logits, start, end)
            rows = slice(None) if len(groups) == 1 else indices
            scored = self.classify(own_logits[rows], mask_logits[rows], dense[rows], own_words, one, modes)
            for row, index in enumerate(indices):
                size = sizes[index]
                results[index] = ScoredMasks(
                    class_logits={name: class_logits[row] for name, class_logits in scored.items()},
                    mask_logits=mask_logits[index],
                    vocabulary=one,
                    padded_size=tuple(images.shape[-2:]),
                    image_size=size,
                    output_size=(int(inputs[index].get("height", size[0])), int(inputs[index].get("width", size[1]))),
                )
            start = end
        return results

    def _words_of(self, sample: Mapping, vocabulary: Vocabulary | None) -> Vocabulary:
        for one in (sample.get("vocabulary"), vocabulary, self.test_vocabulary):
            if one is not None:
                return one
        raise InputError("no words to segment with: pass vocabulary=… or call set_vocabulary first")

    def classify(
        self,
        in_logits: Tensor,
        mask_logits: Tensor,
        dense: Tensor,
        words: TextEmbeddings,
        vocabulary: Vocabulary,
        modes: Modes,
    ) -> dict[str, Tensor]:
        """Scores the masks with the frozen CLIP and joins both opinions, once per mode.

        Args:
            in_logits: (B, Q, K + 1) of the decoder.
            mask_logits: (B, Q, ·, ·).
            dense: (B, C, h, w), the backbone's dense features.
            words: K classes without void.
            vocabulary: the same classes, to tell seen ones.
            modes: name -> (alpha, beta).

        Returns:
            name -> (B, Q, K + 1) log-probabilities.
        """
        small = resize_masks(mask_logits, dense.shape[-2:])
        embeddings = self.backbone.region_embeddings(dense, small)
        out_logits = text_logits(embeddings, words, self.backbone.logit_scale)
        valid = (small > 0).flatten(2).any(-1) if self.settings.ensemble_on_valid_mask else None
        known = self.seen_vocabulary
        seen = torch.zeros(len(vocabulary), dtype=torch.bool) if known is None else vocabulary.seen_by(known)
        return {
            name: geometric_ensemble(in_logits, out_logits, seen, alpha=alpha, beta=beta, valid=valid)
            for name, (alpha, beta) in modes.items()
        }

    @property
    def _masks_first(self) -> bool:
        settings = self.settings
        return settings.postprocess_masks_first or settings.panoptic_on or settings.instance_on

    def _outputs(self, found: ScoredMasks, semantic: str | None) -> dict[str, dict]:
        """Mode name -> outputs of one image."""
        settings = self.settings
        outputs: dict[str, dict] = {name: {} for name in found.class_logits}
        if settings.semantic_on and semantic is not None:
            maps = self._semantic_labels(found) if semantic == "labels" else self._semantic_scores(found, list(outputs))
            for name, semantic_map in maps.items():
                outputs[name]["sem_seg"] = semantic_map
        makers: dict[tuple[str, str], PanopticMerge | InstanceSelection] = {}
        things = found.vocabulary.thing_classes
        for name, class_logits in found.class_logits.items():
            if settings.panoptic_on:
                makers[name, "panoptic_seg"] = PanopticMerge(
                    class_logits,
                    thing_classes=things,
                    object_mask_threshold=settings.object_mask_threshold,
                    overlap_threshold=settings.overlap_threshold,
                )
            if settings.instance_on:
                makers[name, "instances"] = InstanceSelection(
                    class_logits, thing_classes=things, topk=settings.topk, zero_boxes=settings.zero_boxes
                )
        self._hand_out_masks(found, list(makers.values()))
        for (name, output), maker in makers.items():
            outputs[name][output] = maker.result(found.output_size)
        return outputs

    @torch.no_grad()
    def _hand_out_masks(self, found: ScoredMasks, makers: Sequence[PanopticMerge | InstanceSelection]) -> None:
        """Brings the masks that are wanted to the output size, each once and few at a time."""
        wanted = [_numbers(maker.queries) for maker in makers]
        queries = sorted(set().union(*wanted))
        step = mask_chunk(found.output_size, found.mask_logits.device, self.settings.query_chunk)
        for start in range(0, len(queries), step):
            chunk = queries[start : start + step]
            row_of = {query: row for row, query in enumerate(chunk)}
            masks = postprocess_masks(found.mask_logits[chunk], found.padded_size, found.image_size, found.output_size)
            for maker, its_queries in zip(makers, wanted):
                rows = [row_of[query] for query in its_queries if query in row_of]
                maker.add(masks if len(rows) == len(chunk) else masks[rows])

    def _blocks(self, found: ScoredMasks, *, class_chunk: int = 0) -> Iterator[tuple[slice, Callable]]:
        return semantic_blocks(
            found.mask_logits,
            len(found.vocabulary),
            padded_size=found.padded_size,
            image_size=found.image_size,
            output_size=found.output_size,
            masks_first=self._masks_first,
            class_chunk=class_chunk,
        )

    @torch.no_grad()
    def _semantic_scores(self, found: ScoredMasks, modes: Sequence[str]) -> dict[str, Tensor]:
        """Mode name -> (K, h, w) scores."""
        shares = {name: found.class_logits[name].softmax(-1)[:, :-1] for name in modes}
        shape = (len(found.vocabulary), *found.output_size)
        maps = {name: share.new_empty(shape) for name, share in shares.items()}
        for rows, scores in self._blocks(found):
            for name, share in shares.items():
                maps[name][:, rows] = scores(share)
        return maps

    @torch.no_grad()
    def _semantic_labels(self, found: ScoredMasks) -> dict[str, Tensor]:
        """Mode name -> (h, w) int64."""
        chunk = self.settings.class_chunk
        shares = {name: class_logits.softmax(-1)[:, :-1] for name, class_logits in found.class_logits.items()}
        parts: dict[str, list[Tensor]] = {name: [] for name in shares}
        for _, scores in self._blocks(found, class_chunk=chunk):
            for name, share in shares.items():
                parts[name].append(best_classes(scores, share, class_chunk=chunk))
        return {name: torch.cat(labels) for name, labels in parts.items()}


def _numbers(queries: Tensor) -> list[int]:
    """(n,) int64 ascending -> the same; on the meta device, which knows shapes alone, the first n numbers."""
    return list(range(len(queries))) if queries.is_meta else queries.tolist()


def _joined(words: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """Several vocabularies as one, their classes one after the other."""
    if len(words) == 1:
        return words[0]
    starts = [sum(one.num_classes for one in words[:index]) for index in range(len(words))]
    return TextEmbeddings(
        vectors=torch.cat([one.vectors for one in words]),
        class_of_vector=torch.cat([one.class_of_vector + start for one, start in zip(words, starts)]),
        num_classes=sum(one.num_classes for one in words),
    )
