"""What keeps a fine-tuned model near its start: Learning without Forgetting (Li and Hoiem 2016, section 3) for masks.

The start looks at the same new images, and its answers in the former classes take the place of labels that the new
images do not have. A query means the same in both models, because the one began as the other, so nothing is matched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fcclip.errors import InputError
from fcclip.losses.points import point_sources, sample_maps, uncertain_points

CONFIDENT = 0.5  # the start's probability of any class but void from which on a query's mask is kept


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """How far the student's answers are from the teacher's, for every supervised prediction set.

    Three terms, each zero with a zero gradient where both agree:

    - classes: the Kullback-Leibler divergence of the distributions over the former classes and void, a query weighing
      the teacher's 1 - p(void), but `void_floor` at least;
    - masks of the queries that the teacher is confident of (`CONFIDENT`), at sampled points: the binary cross entropy
      less that of the teacher with itself, and the dice loss with squares in its denominator (Milletari et al. 2016,
      V-Net), which alone is zero for equal soft masks.

    Each is a mean over the queries of an image, then over the images of the batch, so the parts of a batch add up.

    Args:
        class_weight, mask_weight, dice_weight: of the three.
        void_floor: least weight of a query in the class term, 0..1; above 0, so that void stays void.
        num_points, oversample_ratio, importance_ratio: see `uncertain_points`; it looks at the teacher's masks.
    """

    class_weight: float
    mask_weight: float
    dice_weight: float
    void_floor: float
    num_points: int
    oversample_ratio: float
    importance_ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.void_floor <= 1:
            raise InputError(f"void_floor must lie in 0..1 and above 0, got {self.void_floor}")

    def __call__(
        self,
        student: tuple[Sequence[Tensor], Sequence[Tensor], Tensor],
        teacher: tuple[Sequence[Tensor], Sequence[Tensor], Tensor],
        *,
        num_images: int,
        point_seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """The weighted losses, summed over S prediction sets.

        Args:
            student: class logits, S tensors (B, Q, K + 1) over the former classes and void; mask embeddings, S tensors
                (B, Q, D); mask features (B, D, h, w).
            teacher: the same, without gradient.
            num_images: of the whole batch, of which these may be a part.
            point_seeds: as for `SetCriterion`.

        Returns:
            scalars `loss_distill_ce`, `loss_distill_mask`, `loss_distill_dice`.
        """
        with torch.autocast(student[2].device.type, enabled=False):
            return self._losses(_stacked(student), _stacked(teacher), num_images, point_seeds)

    def _losses(self, student, teacher, num_images, point_seeds) -> dict[str, Tensor]:
        theirs = teacher[0].log_softmax(-1)  # (S, B, Q, K + 1)
        any_class = 1 - theirs[..., -1].exp()  # (S, B, Q), the probability of any class
        divergence = F.kl_div(student[0].log_softmax(-1), theirs, reduction="none", log_target=True).sum(-1)
        weight = any_class.clamp(min=self.void_floor)
        classes = (weight * divergence).sum(-1) / weight.sum(-1)  # (S, B)
        masks, dice = self._mask_losses(student, teacher, any_class > CONFIDENT, point_seeds)
        share = 1 / num_images
        return {
            "loss_distill_ce": self.class_weight * share * classes.sum(),
            "loss_distill_mask": self.mask_weight * share * masks,
            "loss_distill_dice": self.dice_weight * share * dice,
        }

    def _mask_losses(self, student, teacher, confident: Tensor, point_seeds) -> tuple[Tensor, Tensor]:
        """Two sums over sets and images of means over the confident queries."""
        sources = point_sources(point_seeds, confident.shape[1], confident.device)
        share = confident / confident.sum(-1, keepdim=True).clamp(min=1)  # (S, B, Q)
        total = [student[2].new_zeros(()), student[2].new_zeros(())]
        for image, source in enumerate(sources):
            sets, queries = confident[:, image].nonzero(as_tuple=True)
            if not len(sets):
                continue
            with torch.no_grad():
                masks = torch.einsum("nd,dhw->nhw", teacher[1][sets, image, queries], teacher[2][image])
                draw = partial(source, len(sets))
                points = uncertain_points(masks, self.num_points, self.oversample_ratio, self.importance_ratio, draw)
                teacher_logits = sample_maps(masks[:, None], points)[:, 0]  # (n, P) logits
            masks = torch.einsum("nd,dhw->nhw", student[1][sets, image, queries], student[2][image])
            logits = sample_maps(masks[:, None], points)[:, 0]
            weight = share[sets, image, queries]
            for index, loss in enumerate(
                (_bernoulli_divergence(logits, teacher_logits), _squared_dice(logits, teacher_logits))
            ):
                total[index] = total[index] + (weight * loss).sum()
        return total[0], total[1]


def _stacked(predictions) -> tuple[Tensor, Tensor, Tensor]:
    logits, embeddings, features = predictions
    return torch.stack(list(logits)).float(), torch.stack(list(embeddings)).float(), features.float()


def _bernoulli_divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(n, P) logits twice -> (n,), the mean over the points of KL(wanted, logits); its gradient is that of the binary
    cross entropy."""
    target = teacher_logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    own = F.binary_cross_entropy_with_logits(teacher_logits, target, reduction="none")
    return (cross - own).mean(-1)


def _squared_dice(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(n, P) logits twice -> (n,)."""
    student, teacher = logits.sigmoid(), teacher_logits.sigmoid()
    return 1 - (2 * (student * teacher).sum(-1) + 1) / (student.square().sum(-1) + teacher.square().sum(-1) + 1)
