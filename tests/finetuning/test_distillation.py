"""How far a student's answers are from a teacher's."""

import math

import pytest
import torch
import torch.nn.functional as F

from fcclip.finetuning import DistillationLoss
from fcclip.finetuning.distillation import CONFIDENT

SETTINGS = {
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 3.0,
    "void_floor": 0.1,
    "num_points": 64,
    "oversample_ratio": 3.0,
    "importance_ratio": 0.75,
}
SETS, IMAGES, QUERIES, CLASSES, WIDTH = 2, 3, 6, 4, 5


def answers(seed: int, *, grad: bool = False):
    """Class logits, mask embeddings and mask features as a decoder gives them; the logits differ in their void."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(SETS, IMAGES, QUERIES, CLASSES + 1, generator=generator)
    embeddings = torch.randn(SETS, IMAGES, QUERIES, WIDTH, generator=generator)
    features = torch.randn(IMAGES, WIDTH, 8, 8, generator=generator)
    tensors = [one.requires_grad_(grad) for one in (logits, embeddings, features)]
    return tensors, (list(tensors[0]), list(tensors[1]), tensors[2])


def parts_of(predictions, images: slice):
    logits, embeddings, features = predictions
    return [one[images] for one in logits], [one[images] for one in embeddings], features[images]


def test_equal_answers_have_no_loss_and_no_gradient():
    tensors, student = answers(0, grad=True)
    losses = DistillationLoss(**SETTINGS)(student, answers(0)[1], num_images=IMAGES, point_seeds=[1, 2, 3])
    assert set(losses) == {"loss_distill_ce", "loss_distill_mask", "loss_distill_dice"}
    for loss in losses.values():
        assert loss.item() == pytest.approx(0, abs=1e-6)
    sum(losses.values()).backward()
    assert all(one.grad.abs().max() < 1e-6 for one in tensors)


def test_other_answers_have_losses_above_zero_and_gradients():
    tensors, student = answers(0, grad=True)
    losses = DistillationLoss(**SETTINGS)(student, answers(1)[1], num_images=IMAGES)
    assert all(loss > 0.01 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(one.grad.abs().max() > 0 for one in tensors)


def test_the_class_term_is_the_divergence_weighted_by_what_the_teacher_sees():
    student, teacher = answers(0)[1], answers(1)[1]
    expected = 0.0
    for mine, theirs in zip(student[0], teacher[0]):
        for image in range(IMAGES):
            weighted = weights = 0.0
            for query in range(QUERIES):
                p, q = theirs[image, query].softmax(0), mine[image, query].softmax(0)
                weight = max(1 - p[-1].item(), 0.1)
                weighted += weight * sum((a * (a / b).log()).item() for a, b in zip(p, q))
                weights += weight
            expected += weighted / weights / IMAGES
    found = DistillationLoss(**SETTINGS)(student, teacher, num_images=IMAGES)["loss_distill_ce"]
    assert found.item() == pytest.approx(2.0 * expected, rel=1e-5)


def test_the_mask_terms_see_confident_queries_only():
    student, teacher = answers(0)[1], answers(1)[1]
    loss = DistillationLoss(**SETTINGS)
    seeds = [1, 2, 3]
    before = loss(student, teacher, num_images=IMAGES, point_seeds=seeds)
    unsure = [one.softmax(-1)[..., -1] >= 1 - CONFIDENT for one in teacher[0]]
    assert any(one.any() for one in unsure) and not all(one.all() for one in unsure)
    embeddings = [one + 7 * mask[..., None] for one, mask in zip(student[1], unsure)]
    after = loss((student[0], embeddings, student[2]), teacher, num_images=IMAGES, point_seeds=seeds)
    assert all(torch.equal(before[name], after[name]) for name in before)
    embeddings = [one + 7 * ~mask[..., None] for one, mask in zip(student[1], unsure)]
    after = loss((student[0], embeddings, student[2]), teacher, num_images=IMAGES, point_seeds=seeds)
    assert after["loss_distill_mask"] > before["loss_distill_mask"]


def test_the_gradient_of_the_mask_term_is_that_of_the_cross_entropy():
    settings = SETTINGS | {"class_weight": 0.0, "dice_weight": 0.0, "mask_weight": 1.0, "num_points": 4096}
    tensors, student = answers(0, grad=True)
    teacher = answers(1)[1]
    all_confident = [one.index_fill(-1, torch.tensor([CLASSES]), -30.0) for one in teacher[0]]
    teacher = (all_confident, *teacher[1:])
    torch.manual_seed(0)
    sum(DistillationLoss(**settings)(student, teacher, num_images=IMAGES).values()).backward()
    found, tensors[1].grad = tensors[1].grad.clone(), None

    def cross_entropy(logits, wanted):
        return F.binary_cross_entropy_with_logits(logits, wanted.sigmoid(), reduction="none").mean(-1)

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcclip.finetuning.distillation._bernoulli_divergence", cross_entropy)
        losses = DistillationLoss(**settings)(student, teacher, num_images=IMAGES)
    losses["loss_distill_mask"].backward()
    torch.testing.assert_close(found, tensors[1].grad)


def test_parts_of_a_batch_add_up_to_the_whole():
    student, teacher = answers(0)[1], answers(1)[1]
    loss, seeds = DistillationLoss(**SETTINGS), [5, 6, 7]
    whole = loss(student, teacher, num_images=IMAGES, point_seeds=seeds)
    cuts = (slice(0, 1), slice(1, 3))
    parts = [
        loss(parts_of(student, cut), parts_of(teacher, cut), num_images=IMAGES, point_seeds=seeds[cut]) for cut in cuts
    ]
    for name, value in whole.items():
        torch.testing.assert_close(sum(one[name] for one in parts), value)


def test_a_teacher_that_is_confident_of_nothing_leaves_void_alone():
    student, teacher = answers(0)[1], answers(1)[1]
    teacher = ([one.index_fill(-1, torch.tensor([CLASSES]), 30.0) for one in teacher[0]], *teacher[1:])
    losses = DistillationLoss(**SETTINGS)(student, teacher, num_images=IMAGES)
    assert losses["loss_distill_mask"] == losses["loss_distill_dice"] == 0
    assert losses["loss_distill_ce"] > 0 and math.isfinite(losses["loss_distill_ce"])


def test_void_that_counts_nothing_is_refused():
    with pytest.raises(ValueError, match="void_floor must lie in 0..1 and above 0, got 0"):
        DistillationLoss(**(SETTINGS | {"void_floor": 0}))
