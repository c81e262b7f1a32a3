"""FC-CLIP put together (Yu et al., NeurIPS 2023): frozen CLIP, pixel decoder, masked decoder, two classifiers, three
outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcclip.losses import SetCriterion
from fcclip.modeling.classifier import geometric_ensemble, resize_masks, with_void, word_logits
from fcclip.modeling.clip import DENSE, CLIPBackbone
from fcclip.modeling.inference import (
    crop_and_resize,
    enlarge,
    instance_inference,
    panoptic_inference,
    semantic_inference,
    semantic_labels,
)
from fcclip.modeling.mask_decoder import MultiScaleMaskedTransformerDecoder, QueryPredictions
from fcclip.modeling.pixel_decoder import MSDeformAttnPixelDecoder
from fcclip.modeling.text import TextEncoder
from fcclip.structures import Targets, WordEmbeddings
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

    def __post_init__(self) -> None:
        if not (self.semantic_on or self.instance_on or self.panoptic_on):
            raise ValueError(
                "MODEL.MASK_FORMER.TEST turns SEMANTIC_ON, INSTANCE_ON and PANOPTIC_ON off: nothing would be computed"
            )


class FCCLIPHead(nn.Module):
    """Pixel decoder and masked decoder under their published names."""

    def __init__(
        self, *, pixel_decoder: MSDeformAttnPixelDecoder, predictor: MultiScaleMaskedTransformerDecoder
    ) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    def forward(self, features: Mapping[str, Tensor], words: WordEmbeddings, *, all_sets: bool) -> QueryPredictions:
        """Backbone levels and K classes with void -> predictions; see the decoder."""
        mask_features, pyramid = self.pixel_decoder(features)
        return self.predictor(pyramid, mask_features, words, all_sets=all_sets)


class FCCLIP(nn.Module):
    """Segments pictures with any words.

    The model keeps no words besides the two vocabularies it was given: the one it is trained with, and the one that is
        used when a call
    brings none.

    Args:
        backbone: the frozen CLIP.
        sem_seg_head, criterion: the trained parts and their losses.
        pixel_mean, pixel_std: three numbers each, 0..255, in the channel order of the pictures.
        size_divisibility: network inputs are padded to multiples of it; below 1 only to the largest of the batch.
        settings: what is made of the scored masks.
        text_encoder: turns vocabularies into vectors with the backbone's text tower.
        train_vocabulary: classes of the training labels; also decides which classes count as seen.
        test_vocabulary: classes to use when a call brings none.
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
            inputs: a mapping a picture: `image` (3, H, W) uint8 or float, 0..255, channels as the pixel statistics;
                optionally `height` and `width`, the size of the outputs (default: the picture's); in training `targets`
                (`structures.Targets`) and optionally `point_seed`, an int that fixes where its losses look.
            vocabulary: classes for this call; default: `set_vocabulary`'s.
            semantic: "scores" for (K, h, w) float, "labels" for (h, w) int64, None for no semantic map.
            modes: name -> (alpha, beta), to score one pass of the network in several ways.

        Returns:
            In training: weighted losses by name. Else a mapping a picture with `sem_seg`, `panoptic_seg` = (int32 (h,
                w), segment records) and
            `instances` (`structures.Instances`), as far as they are turned on; with `modes` a list of such mappings by
            mode name.

        Raises:
            ValueError: no vocabulary, no targets in training, pictures of another form.
        """
        if self.training:
            return self.losses(inputs)
        return self.predict(inputs, vocabulary=vocabulary, semantic=semantic, modes=modes)

    def preprocess(self, inputs: Sequence[Mapping]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised pictures padded with zeros to (B, 3, H, W), and the (height, width) of each without padding."""
        if not inputs:
            raise ValueError("the model needs at least one picture, got an empty list")
        images = []
        for index, sample in enumerate(inputs):
            image = sample["image"]
            if image.dim() != 3 or image.shape[0] != len(self.pixel_mean):
                raise ValueError(
                    f"picture {index} must be a ({len(self.pixel_mean)}, H, W) tensor, got {tuple(image.shape)}"
                )
            image = image.to(self.device, non_blocking=True).float()
            images.append((image - self.pixel_mean) / self.pixel_std)
        sizes = [tuple(image.shape[-2:]) for image in images]
        step = max(1, self.size_divisibility)
        height, width = (-(-max(one) // step) * step for one in zip(*sizes))
        padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes)]
        return torch.stack(padded), sizes

    def losses(self, inputs: Sequence[Mapping]) -> dict[str, Tensor]:
        """The weighted losses of a batch; see `SetCriterion`."""
        if self.train_vocabulary is None:
            raise ValueError("the model has no training vocabulary; build it with build_model(cfg, train_vocabulary=…)")
        missing = [index for index, sample in enumerate(inputs) if "targets" not in sample]
        if missing:
            raise ValueError(f"training needs 'targets' in every picture; pictures {missing} of this batch have none")
        for index, sample in enumerate(inputs):
            self._check_targets(index, sample["targets"], tuple(sample["image"].shape[-2:]))
        images, _ = self.preprocess(inputs)
        targets = [sample["targets"].to(self.device) for sample in inputs]
        features = self.backbone(images)
        words = with_void(self.text_encoder.encode(self.train_vocabulary), self.void_embedding.weight)
        found = self.sem_seg_head(features, words, all_sets=self.criterion.deep_supervision)
        seeds = [sample.get("point_seed") for sample in inputs]
        return self.criterion(
            found.class_logits,
            found.mask_embeddings,
            found.mask_features,
            targets,
            padded_size=tuple(images.shape[-2:]),
            point_seeds=None if None in seeds else seeds,
        )

    def _check_targets(self, index: int, targets: Targets, image_size: tuple[int, int]) -> None:
        """Refuses targets that would be read at a wrong scale or as void; on the CPU, so that no GPU is waited for."""
        if targets.image_size != image_size:
            raise ValueError(
                f"picture {index}: its targets are {targets.image_size} (height, width), but the image is {image_size}"
            )
        num_classes = len(self.train_vocabulary)
        if len(targets) and not 0 <= int(targets.labels.min()) <= int(targets.labels.max()) < num_classes:
            raise ValueError(
                f"picture {index}: labels must lie in 0..{num_classes - 1}, the classes of the training vocabulary "
                f"'{self.train_vocabulary.name}', got {sorted(set(targets.labels.tolist()))}"
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
            raise ValueError(f"semantic must be 'scores', 'labels' or None, got {semantic!r}")
        vocabulary = vocabulary or self.test_vocabulary
        if vocabulary is None:
            raise ValueError("no words to segment with: pass vocabulary=… or call set_vocabulary first")
        images, sizes = self.preprocess(inputs)
        features = self.backbone(images)
        words = self.text_encoder.encode(vocabulary)
        found = self.sem_seg_head(features, with_void(words, self.void_embedding.weight), all_sets=False)
        mask_logits = found.mask_logits()
        wanted = modes or {"": (self.settings.alpha, self.settings.beta)}
        scored = self.classify(found.class_logits[-1], mask_logits, features[DENSE], words, vocabulary, wanted)
        padded_size = tuple(images.shape[-2:])
        results: dict[str, list[dict]] = {name: [] for name in wanted}
        for index, (sample, size) in enumerate(zip(inputs, sizes)):
            output_size = (int(sample.get("height", size[0])), int(sample.get("width", size[1])))
            masks = enlarge(mask_logits[index], padded_size)
            if self._masks_first:
                masks = crop_and_resize(masks, size, output_size)
            for name, class_logits in scored.items():
                results[name].append(self._outputs(class_logits[index], masks, vocabulary, semantic, size, output_size))
        return results if modes else results[""]

    def classify(
        self,
        in_logits: Tensor,
        mask_logits: Tensor,
        dense: Tensor,
        words: WordEmbeddings,
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
        out_logits = word_logits(embeddings, words, self.backbone.logit_scale)
        valid = (small > 0).flatten(2).any(-1) if self.settings.ensemble_on_valid_mask else None
        if self.train_vocabulary is None:
            seen = torch.zeros(len(vocabulary), dtype=torch.bool)
        else:
            seen = vocabulary.seen_by(self.train_vocabulary)
        return {
            name: geometric_ensemble(in_logits, out_logits, seen, alpha=alpha, beta=beta, valid=valid)
            for name, (alpha, beta) in modes.items()
        }

    @property
    def _masks_first(self) -> bool:
        settings = self.settings
        return settings.postprocess_masks_first or settings.panoptic_on or settings.instance_on

    def _outputs(self, class_logits, masks, vocabulary, semantic, image_size, output_size) -> dict:
        settings, outputs = self.settings, {}
        things = vocabulary.thing_classes
        if settings.semantic_on and semantic is not None:
            if not self._masks_first:
                scores = crop_and_resize(semantic_inference(class_logits, masks), image_size, output_size)
                outputs["sem_seg"] = scores.argmax(0) if semantic == "labels" else scores
            elif semantic == "labels":
                outputs["sem_seg"] = semantic_labels(class_logits, masks)
            else:
                outputs["sem_seg"] = semantic_inference(class_logits, masks)
        if settings.panoptic_on:
            outputs["panoptic_seg"] = panoptic_inference(
                class_logits,
                masks,
                thing_classes=things,
                object_mask_threshold=settings.object_mask_threshold,
                overlap_threshold=settings.overlap_threshold,
            )
        if settings.instance_on:
            outputs["instances"] = instance_inference(
                class_logits, masks, thing_classes=things, topk=settings.topk, zero_boxes=settings.zero_boxes
            )
        return outputs
