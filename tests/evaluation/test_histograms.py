from collections import Counter

import numpy as np
import pytest
import torch

from fcclip.data import segmentations
from fcclip.evaluation.histograms import as_array, compact, joint_histogram, summed


def maps(seed):
    """One of long runs, one of noise, and one of a single value."""
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.integers(-1, 5, (6, 4)), np.ones((3, 7), int))
    return blocks, rng.integers(0, 2**24, blocks.shape), np.full(blocks.shape, 9), np.roll(blocks, 2, 1) + 1


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_a_joint_histogram_counts_every_pair(monkeypatch, dtype, block):
    monkeypatch.setattr(segmentations, "_BLOCK", block)
    blocks, noise, flat, shifted = maps(0)
    for first, second in ((blocks, noise), (blocks, shifted), (flat, flat), (noise, shifted), (blocks.T, shifted.T)):
        found = joint_histogram(first.astype(dtype), second.astype(dtype))
        expected = Counter(zip(first.ravel().tolist(), second.ravel().tolist()))
        assert dict(zip(zip(found.first.tolist(), found.second.tolist()), found.pixels.tolist())) == expected
        assert list(zip(found.first, found.second)) == sorted(expected)


def test_equal_pairs_are_added_up_and_none_stay_none():
    found = summed(np.array([2, 0, 2]), np.array([1, 3, 1]), np.array([10, 20, 30]))
    assert [column.tolist() for column in found] == [[0, 2], [3, 1], [20, 40]]
    assert all(column.size == 0 for column in summed(*(np.zeros(0, int) for _ in range(3))))


def test_compact_values_are_those_of_numpy():
    for values in maps(1):
        distinct, position = compact(values)
        expected, inverse = np.unique(values, return_inverse=True)
        np.testing.assert_array_equal(distinct, expected)
        np.testing.assert_array_equal(position, inverse.reshape(values.shape))


def test_tensors_and_arrays_are_the_same_to_evaluators():
    np.testing.assert_array_equal(as_array(torch.arange(3)), as_array(np.arange(3)))
