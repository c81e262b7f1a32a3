"""Training with several vocabularies in one batch, and beside a frozen start."""

import copy

import pytest
import torch

from fcclip.finetuning import DistillationLoss, Teacher
from fcclip.modeling.classifier import with_void
from fcclip.vocabulary import Vocabulary
from tests.modeling.test_fcclip import training_sample

FORMER = Vocabulary.from_names("red circle; sand:stuff; blue star, azure star; cat", name="former")


def samples():
    """Three images; the labels of the second mean `FORMER`."""
    found = [training_sample(0), training_sample(1, labels=(3, 1)), training_sample(2, labels=(1,))]
    found = [{**sample, "point_seed": 10 + index} for index, sample in enumerate(found)]
    found[1]["vocabulary"] = FORMER
    return found


def make_teacher(model, vocabulary=FORMER, weight=1.0):
    loss = DistillationLoss(
        class_weight=2.0 * weight,
        mask_weight=5.0 * weight,
        dice_weight=5.0 * weight,
        void_floor=0.1,
        num_points=64,
        oversample_ratio=3.0,
        importance_ratio=0.75,
    )
    void = model.void_embedding.weight
    return Teacher(head=model.sem_seg_head, void_embedding=void, vocabulary=vocabulary, loss=loss)


def disturb(model):
    """The student goes its own way."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.sem_seg_head.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def all_confident(monkeypatch):
    """The masks of all queries are kept, also of those that an untrained teacher takes for void."""
    monkeypatch.setattr("fcclip.finetuning.distillation.CONFIDENT", 0.0)


# ---- a vocabulary an image ----


def test_a_batch_of_two_vocabularies_has_the_losses_of_its_images_with_their_own_words(tiny_model):
    model = tiny_model().train()
    batch, counts = samples(), [3, 2, 1]
    assert [len(sample["targets"]) for sample in batch] == counts
    found = model(batch)
    images, _ = model.preprocess(batch)
    features = model.backbone(images)
    written_out = {}
    for index, sample in enumerate(batch):  # the words of the image alone, and the losses of this part of the batch
        words = model.text_encoder.encode(sample.get("vocabulary", model.train_vocabulary))
        own = {name: level[index : index + 1] for name, level in features.levels.items()}
        said = model.sem_seg_head(own, with_void(words, model.void_embedding.weight), all_sets=True)
        part = model.criterion(
            said.class_logits,
            said.mask_embeddings,
            said.mask_features,
            [sample["targets"]],
            padded_size=tuple(images.shape[-2:]),
            point_seeds=[sample["point_seed"]],
            segment_counts=counts,
        )
        for name, value in part.items():
            written_out[name] = written_out.get(name, 0) + value
    assert found.keys() == written_out.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, written_out[name], rtol=1e-5, atol=1e-6, msg=name)


def test_every_parameter_gets_a_finite_gradient_from_a_mixed_batch(tiny_model):
    model = tiny_model().train()
    sum(model(samples()).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_the_training_vocabulary_given_with_a_image_changes_nothing(tiny_model):
    model = tiny_model().train()
    batch = [{**training_sample(0), "point_seed": 1}, {**training_sample(1), "point_seed": 2}]
    worded = [batch[0], {**batch[1], "vocabulary": copy.deepcopy(model.train_vocabulary)}]
    assert all(torch.equal(value, model(worded)[name]) for name, value in model(batch).items())


# ---- a frozen start ----


def test_a_student_that_is_its_teacher_has_no_distance(tiny_model):
    model = tiny_model().train()
    plain = model(samples())
    model.extra_losses = [make_teacher(model)]
    found = model(samples())
    for name in ("loss_distill_ce", "loss_distill_mask", "loss_distill_dice"):
        assert found.pop(name).item() == pytest.approx(0, abs=1e-6)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value)


def test_a_teacher_keeps_the_start_and_shares_the_clip(tiny_model, all_confident):
    model = tiny_model().train()
    names = list(model.state_dict())
    model.extra_losses = [teacher := make_teacher(model)]
    disturb(model)
    found = model(samples())
    assert all(found[f"loss_distill_{term}"] > 1e-4 for term in ("ce", "mask", "dice"))
    sum(found.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.head.parameters())
    assert list(model.state_dict()) == names
    assert sum(parameter.numel() for parameter in teacher.head.parameters()) == sum(
        parameter.numel() for parameter in model.sem_seg_head.parameters()
    )


def test_a_teacher_stays_in_evaluation_mode(tiny_cfg, tiny_model):
    tiny_cfg.MODEL.MASK_FORMER.DROPOUT = 0.5
    model = tiny_model(cfg=tiny_cfg).train()
    model.extra_losses = [teacher := make_teacher(model)]
    model.train()
    assert not any(module.training for module in teacher.head.modules())


def test_the_distance_in_the_former_words_equals_the_written_out_one(tiny_model, all_confident):
    model = tiny_model().train()
    model.extra_losses = [teacher := make_teacher(model)]
    disturb(model)
    batch = samples()
    found = model(batch)
    images, _ = model.preprocess(batch)
    words = model.text_encoder.encode(FORMER)
    with torch.no_grad():
        features = model.backbone(images)
        student = model.sem_seg_head(features.levels, with_void(words, model.void_embedding.weight), all_sets=True)
        answers = teacher.head(features.levels, with_void(words, teacher.void_embedding), all_sets=True)
    alone = teacher.loss(
        *((one.class_logits, one.mask_embeddings, one.mask_features) for one in (student, answers)),
        num_images=len(batch),
        point_seeds=[sample["point_seed"] for sample in batch],
    )
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


# ---- what counts as seen ----


def test_former_classes_count_as_seen(tiny_model):
    model = tiny_model(train_words="cat; person; grass:stuff")
    words = Vocabulary.from_names("azure star; dog; grass:stuff")
    sample = {"image": torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))}

    def scores(alpha, beta):
        [scored] = model.score([sample], words)
        return model.outputs(scored, ensemble=(alpha, beta))["sem_seg"]

    assert model.seen_vocabulary is model.train_vocabulary
    assert words.seen_by(model.seen_vocabulary).tolist() == [False, False, True]
    before = scores(0.1, 0.9)
    model.seen_vocabulary = FORMER.joined(model.train_vocabulary)
    assert words.seen_by(model.seen_vocabulary).tolist() == [True, False, True]
    assert not torch.equal(scores(0.1, 0.9), before)
    model.seen_vocabulary = None
    assert model.score([sample], words)[0].seen.tolist() == [False, False, False]
