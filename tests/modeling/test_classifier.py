"""Pooling, similarity and the ensemble."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fcclip.modeling.classifier import geometric_ensemble, mask_pool, text_logits, with_void
from fcclip.structures import TextEmbeddings

RNG = torch.Generator().manual_seed(0)


def test_pooling_is_the_mean_inside_and_zero_for_an_empty_mask():
    features = torch.arange(8.0).view(1, 2, 2, 2)
    logits = torch.tensor([[[[1.0, -1], [1, 0]], [[-1, -1], [-1, -1]], [[9, 9], [9, 9]]]])  # a logit of 0 is outside
    assert mask_pool(features, logits).tolist() == [[[1.0, 5.0], [0.0, 0.0], [1.5, 5.5]]]


def test_masks_of_another_size_are_resized_before_they_are_cut():
    features = torch.randn(1, 3, 4, 4, generator=RNG)
    logits = torch.randn(1, 2, 8, 8, generator=RNG)
    small = F.interpolate(logits, size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(mask_pool(features, logits), mask_pool(features, small))


def test_no_gradient_flows_through_the_masks():
    features = torch.randn(1, 3, 4, 4, requires_grad=True)
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    mask_pool(features, logits).sum().backward()
    assert logits.grad is None and features.grad.abs().sum() > 0


def words(num_words=7, dim=5):
    vectors = F.normalize(torch.randn(num_words, dim, generator=RNG), dim=-1)
    return TextEmbeddings(vectors, torch.tensor([0, 0, 1, 2, 2, 2, 3]), 4)


def test_a_class_scores_as_its_best_word():
    vocabulary, x = words(), torch.randn(2, 3, 5, generator=RNG)
    logits = text_logits(x, vocabulary, torch.tensor(2.0))
    for b, q, k in itertools.product(range(2), range(3), range(4)):
        cosines = [
            F.cosine_similarity(x[b, q], vocabulary.vectors[w], dim=0)
            for w in range(7)
            if vocabulary.class_of_vector[w] == k
        ]
        torch.testing.assert_close(logits[b, q, k], max(cosines) * torch.tensor(2.0).exp())


def test_the_scale_is_at_most_100_and_a_zero_embedding_stays_finite():
    vocabulary = words()
    logits = text_logits(vocabulary.vectors[None, 3:4], vocabulary, torch.tensor(9.0))
    torch.testing.assert_close(logits.max(), torch.tensor(100.0))
    assert text_logits(torch.zeros(1, 1, 5), vocabulary, torch.tensor(1.0)).abs().max() == 0


def test_void_is_the_last_class_and_gets_the_only_gradient():
    vocabulary, void = words(), torch.randn(1, 5, generator=RNG).requires_grad_()
    extended = with_void(vocabulary, void)
    assert (extended.num_classes, len(extended.vectors)) == (5, 8)
    assert extended.class_of_vector[-1] == 4
    torch.testing.assert_close(extended.vectors[-1].norm(), torch.tensor(1.0))
    text_logits(torch.randn(1, 2, 5, generator=RNG), extended, torch.tensor(1.0)).sum().backward()
    assert void.grad.abs().sum() > 0


def published_ensemble(in_logits, out_logits, seen, alpha, beta):
    """The formula as the paper writes it, with powers of probabilities."""
    p_in, p_out = in_logits[..., :-1].softmax(-1), out_logits.softmax(-1)
    joined_seen = (p_in ** (1 - alpha) * p_out**alpha).log() * seen
    joined_unseen = (p_in ** (1 - beta) * p_out**beta).log() * (1 - seen)
    joined = (joined_seen + joined_unseen).softmax(-1)
    void = in_logits.softmax(-1)[..., -1:]
    return (torch.cat([joined * (1 - void), void], -1) + 1e-8).log()


def test_the_ensemble_in_log_space_equals_the_published_powers():
    in_logits = torch.randn(2, 6, 5, generator=RNG, dtype=torch.float64).float() * 3
    out_logits = torch.randn(2, 6, 4, generator=RNG) * 3
    seen = torch.tensor([True, False, True, False])
    ours = geometric_ensemble(in_logits, out_logits, seen, alpha=0.4, beta=0.8)
    torch.testing.assert_close(
        ours, published_ensemble(in_logits, out_logits, seen.float(), 0.4, 0.8), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(ours.exp().sum(-1), torch.ones(2, 6), atol=1e-6, rtol=0)


def test_the_ensemble_survives_probabilities_that_underflow():
    in_logits = torch.tensor([[[200.0, 0.0, -200.0, 1.0]]])
    out_logits = torch.tensor([[[-200.0, 200.0, 0.0]]])
    joined = geometric_ensemble(in_logits, out_logits, torch.tensor([True, False, True]), alpha=0.4, beta=0.8)
    assert joined.isfinite().all()


def test_weights_of_zero_and_one_give_either_classifier_and_void_always_the_decoder():
    in_logits, out_logits = torch.randn(1, 4, 5, generator=RNG), torch.randn(1, 4, 4, generator=RNG)
    seen = torch.tensor([True, False, False, True])
    inside = geometric_ensemble(in_logits, out_logits, seen, alpha=0.0, beta=0.0).exp()
    outside = geometric_ensemble(in_logits, out_logits, seen, alpha=1.0, beta=1.0).exp()
    torch.testing.assert_close(inside, in_logits.softmax(-1), atol=1e-6, rtol=1e-5)
    void = in_logits.softmax(-1)[..., -1:]
    torch.testing.assert_close(outside[..., :-1], out_logits.softmax(-1) * (1 - void), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(outside[..., -1:], void, atol=1e-6, rtol=1e-5)


def test_queries_without_a_valid_mask_keep_the_decoders_opinion():
    in_logits, out_logits = torch.randn(1, 2, 5, generator=RNG), torch.randn(1, 2, 4, generator=RNG)
    out_logits[0, 1] = torch.nan
    valid = torch.tensor([[True, False]])
    joined = geometric_ensemble(
        in_logits, out_logits, torch.ones(4, dtype=torch.bool), alpha=0.4, beta=0.8, valid=valid
    )
    torch.testing.assert_close(joined[0, 1].exp(), in_logits[0, 1].softmax(-1), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(joined[0, 0].exp(), in_logits[0, 0].softmax(-1))


def test_weights_outside_0_to_1_are_refused():
    with pytest.raises(ValueError, match="alpha and beta must lie in 0..1, got 1.5"):
        geometric_ensemble(
            torch.zeros(1, 1, 3), torch.zeros(1, 1, 2), torch.ones(2, dtype=torch.bool), alpha=1.5, beta=0.5
        )


def test_void_trust_by_hand():
    """Two queries, two classes, of which the first is seen. For the decoder both are void to 3/5; the frozen CLIP is
    sure of a class to 3/4, of the seen one for the first query and of the unseen one for the second."""
    in_logits = torch.tensor([[[1.0, 1.0, 3.0], [1.0, 1.0, 3.0]]]).log()
    out_logits = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]]).log()
    seen = torch.tensor([True, False])

    def void(**options):
        joined = geometric_ensemble(in_logits, out_logits, seen, alpha=1.0, beta=1.0, **options).exp()
        torch.testing.assert_close(joined.sum(-1), torch.ones(1, 2), atol=1e-6, rtol=0)
        if "valid" not in options:  # what a mask is, if it is something, stays the same
            torch.testing.assert_close(joined[..., 0] / (1 - joined[..., 2]), torch.tensor([[0.75, 0.25]]))
        return joined[0, :, 2].tolist()

    assert void() == pytest.approx([0.6, 0.6])
    assert void(trust=0.5, trust_unseen_only=False) == pytest.approx([0.375, 0.375])  # 0.6 * (1 - 0.5 * 0.75)
    assert void(trust=0.5) == pytest.approx([0.6, 0.375])
    assert void(trust=0.5, valid=torch.tensor([[True, False]])) == pytest.approx([0.6, 0.6])


def test_void_trust_only_takes_from_void_and_none_of_it_changes_nothing():
    in_logits, out_logits = torch.randn(2, 40, 6, generator=RNG) * 3, torch.randn(2, 40, 5, generator=RNG) * 3
    seen = torch.tensor([True, False, True, False, True])
    plain = geometric_ensemble(in_logits, out_logits, seen, alpha=0.4, beta=0.8)
    assert torch.equal(geometric_ensemble(in_logits, out_logits, seen, alpha=0.4, beta=0.8, trust=0.0), plain)
    for unseen_only in (True, False):
        options = {"trust": 0.7, "trust_unseen_only": unseen_only}
        trusted = geometric_ensemble(in_logits, out_logits, seen, alpha=0.4, beta=0.8, **options)
        lower = trusted[..., -1] < plain[..., -1]
        best_is_seen = seen[plain[..., :-1].argmax(-1)]
        assert torch.equal(lower, ~best_is_seen if unseen_only else torch.ones_like(lower))
        assert torch.equal(trusted[~lower], plain[~lower])
    unknown = torch.zeros(5, dtype=torch.bool)  # no training vocabulary: both forms are the same
    forms = [
        geometric_ensemble(in_logits, out_logits, unknown, alpha=0.4, beta=0.8, trust=0.5, trust_unseen_only=only)
        for only in (True, False)
    ]
    assert torch.equal(*forms)


def test_void_trust_of_one_class_or_outside_0_to_1_is_refused():
    seen = torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match="void trust needs two or more classes"):
        geometric_ensemble(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1), seen, alpha=0.4, beta=0.8, trust=0.5)
    with pytest.raises(ValueError, match="void trust must lie in 0..1, got 2"):
        geometric_ensemble(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1), seen, alpha=0.4, beta=0.8, trust=2)
