"""Names that nobody asked for."""

from dataclasses import replace

import pytest
import torch

from fcclip.modeling.unknown import UNKNOWN, AskedMasks, UnknownMasks, other_names
from fcclip.vocabulary import Vocabulary
from tests.modeling.test_fcclip import sample_image

ASKED, OTHERS = Vocabulary.from_names("cup, mug; sea:stuff"), Vocabulary.from_names("dog; MUG, beaker; sand:stuff; cat")


def test_the_other_names_are_those_of_which_none_was_asked_for():
    assert other_names(ASKED, OTHERS).class_names == ("dog", "sand", "cat")
    with pytest.raises(ValueError, match="every class of 'words' was asked for"):
        other_names(ASKED, Vocabulary.from_names("Mug"))
    with pytest.raises(ValueError, match="a class is called 'unknown'"):
        other_names(Vocabulary.from_names("cup; Unknown"), OTHERS)


@pytest.fixture
def both(tiny_model):
    """The same masks among asked and other names, sharp enough to have opinions; and among all names."""
    model = tiny_model()
    others = other_names(ASKED, OTHERS)
    whole = Vocabulary("whole", (*ASKED.classes, *others.classes))
    torch.manual_seed(0)
    embeddings = {"class_embeddings": torch.randn(200, 16), "region_embeddings": torch.randn(200, 16)}
    [scored] = model.score([sample_image()])
    scored = replace(scored, **embeddings, valid=None)
    return model, *(model.rescore(scored, vocabulary) for vocabulary in (ASKED, others, whole))


def test_a_mask_is_unknown_where_its_best_name_is_one_of_the_others(both):
    model, asked, others, whole = both
    found = UnknownMasks.of(asked, others, void_threshold=1.0)
    assert found.vocabulary.class_names == ("cup", "sea", UNKNOWN) and found.vocabulary.thing_classes == (0, 2)
    best = whole.class_logits(model.ensemble).argmax(-1)
    expected = torch.tensor([0, 1, 2, 2, 2, 3])[best]  # dog, sand and cat are unknown, and void stays void
    assert torch.equal(found.class_logits(model.ensemble).argmax(-1), expected)
    assert len(expected.unique()) == 4


def test_probabilities_add_up_to_one_and_asked_names_keep_their_order(both):
    model, asked, others, whole = both
    shares = UnknownMasks.of(asked, others, void_threshold=1.0).class_logits(model.ensemble).exp()
    torch.testing.assert_close(shares.sum(-1), torch.ones(200))
    own = whole.class_logits(model.ensemble)[:, :2].exp()
    clear = (own > 1e-3).all(-1)  # beside 1e-8, which keeps logarithms finite
    assert clear.sum() > 20
    found = shares[clear]
    torch.testing.assert_close(found[:, 0] / found[:, 1], own[clear, 0] / own[clear, 1], rtol=1e-3, atol=0)


def test_a_mask_is_unknown_too_where_void_reaches_the_threshold(both):
    model, asked, others, _ = both
    plain, strict = (UnknownMasks.of(asked, others, void_threshold=each) for each in (1.0, 0.3))
    before, after = plain.class_logits(model.ensemble).exp(), strict.class_logits(model.ensemble).exp()
    doubtful = before[:, -1] >= 0.3
    assert 0 < doubtful.sum() < 200
    torch.testing.assert_close(after[~doubtful], before[~doubtful])
    assert (after[doubtful, :2] < 1e-7).all()
    torch.testing.assert_close(after[doubtful, 2], before[doubtful, :3].sum(-1))
    torch.testing.assert_close(after[:, -1], before[:, -1])  # what is dropped stays dropped


def test_the_probability_of_other_names_counts_as_void(both):
    model, asked, others, whole = both
    shares = AskedMasks.of(asked, others).class_logits(model.ensemble).exp()
    expected = whole.class_logits(model.ensemble).exp()
    torch.testing.assert_close(shares[:, :2], expected[:, :2], atol=1e-6, rtol=0)
    torch.testing.assert_close(shares[:, 2], expected[:, 2:].sum(-1), atol=1e-6, rtol=0)


def test_every_head_can_answer_unknown(both):
    model, asked, others, _ = both
    [scored] = model.score([sample_image()])
    asked, others = model.rescore(scored, ASKED), model.rescore(scored, other_names(ASKED, OTHERS))
    outputs = model.outputs(UnknownMasks.of(asked, others, void_threshold=0.4))
    assert outputs["sem_seg"].shape[0] == 3
    assert all(segment["category_id"] < 3 for segment in outputs["panoptic_seg"][1])
    assert outputs["instances"].pred_classes.max() <= 2
