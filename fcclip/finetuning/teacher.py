"""The frozen start of a fine-tuning keeps telling what it sees (Li and Hoiem 2016, Learning without Forgetting)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fcclip.finetuning.distillation import DistillationLoss
from fcclip.modeling.classifier import cut_classes, with_void
from fcclip.modeling.mask_decoder import QueryPredictions
from fcclip.structures import TextEmbeddings
from fcclip.vocabulary import Vocabulary


class Teacher:
    """A copy of the trained parts of a model as they are now; the frozen CLIP is shared with the model.

    It is no module, so it never shows among the parameters, the weights or the wrapped parts of the model it teaches.

    Args:
        head: pixel decoder and decoder; copied.
        void_embedding: (1, D); copied.
        vocabulary: the words in which it answers, those that it was trained on.
        loss: the distance of a student's answers from its own.
    """

    def __init__(
        self, *, head: nn.Module, void_embedding: Tensor, vocabulary: Vocabulary, loss: DistillationLoss
    ) -> None:
        self.head = copy.deepcopy(head).requires_grad_(False).eval()
        self.void_embedding = void_embedding.detach().clone()
        self.vocabulary = vocabulary
        self.loss = loss

    def losses(
        self,
        features: Mapping[str, Tensor],
        words: TextEmbeddings,
        found: QueryPredictions,
        *,
        point_seeds: Sequence[int] | None,
        num_images: int,
    ) -> dict[str, Tensor]:
        """The weighted distance of a student's answers.

        Args:
            features: the backbone's levels, which both looked at.
            words: what the student was asked for, without void; the classes of `vocabulary` are the last.
            found: the student's answers, void last.
            point_seeds, num_images: as for `DistillationLoss`.
        """
        with torch.no_grad():
            own = self.head(features, with_void(words, self.void_embedding), all_sets=len(found.class_logits) > 1)
        former = slice(words.num_classes - len(self.vocabulary), words.num_classes)
        answers = [
            (
                [cut_classes(one, former.start, former.stop) for one in answer.class_logits],
                answer.mask_embeddings,
                answer.mask_features,
            )
            for answer in (found, own)
        ]
        return self.loss(*answers, point_seeds=point_seeds, num_images=num_images)
