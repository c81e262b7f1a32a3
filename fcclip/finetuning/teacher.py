"""The frozen start of a fine-tuning keeps telling what it sees (Li and Hoiem 2016, Learning without Forgetting)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcclip.finetuning.distillation import DistillationLoss
from fcclip.modeling.classifier import cut_classes, with_void
from fcclip.modeling.inputs import point_seeds
from fcclip.modeling.mask_decoder import MaskProposals
from fcclip.structures import Features, TextEmbeddings
from fcclip.vocabulary import Vocabulary


class Teacher:
    """Extra losses (`fcclip.modeling.architecture.ExtraLosses`): how far a model is from what it was at the start.

    Holds a copy of the trained parts as they are now; the frozen CLIP is shared with the model. It is not a module, so
    it never shows among the parameters, the weights or the wrapped parts of the model it teaches.

    Args:
        head: pixel decoder and decoder; copied.
        void_embedding: (1, D); copied.
        vocabulary: the classes in which it answers, those that it was trained on.
        loss: the distance of a student's answers from its own.
    """

    def __init__(
        self, *, head: nn.Module, void_embedding: Tensor, vocabulary: Vocabulary, loss: DistillationLoss
    ) -> None:
        self.head = copy.deepcopy(head).requires_grad_(False).eval()
        self.void_embedding = void_embedding.detach().clone()
        self.vocabularies = (vocabulary,)
        self.loss = loss

    def __call__(
        self,
        features: Features,
        proposals: MaskProposals,
        text: TextEmbeddings,
        classes: Mapping[Vocabulary, slice],
        batch: Sequence[Mapping[str, Any]],
    ) -> dict[str, Tensor]:
        """The weighted distance of a student's answers."""
        all_sets = len(proposals.class_logits) > 1
        with torch.no_grad():
            own = self.head(features.levels, with_void(text, self.void_embedding), all_sets=all_sets)
        former = classes[self.vocabularies[0]]
        answers = [
            (
                [cut_classes(logits, former.start, former.stop) for logits in answer.class_logits],
                answer.mask_embeddings,
                answer.mask_features,
            )
            for answer in (proposals, own)
        ]
        counts = getattr(batch, "segment_counts", None)
        num_images = len(batch if counts is None else counts)
        return self.loss(*answers, point_seeds=point_seeds(batch), num_images=num_images)
