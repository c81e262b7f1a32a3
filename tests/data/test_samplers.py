import itertools

import pytest
import torch

from fcclip.data.samplers import TrainingBatches, inference_batches, inference_share, permutation_stream


def batches(count=8, **values):
    defaults = {"stream": permutation_stream, "num_records": 10, "seed": 3, "batch_size": 2}
    return list(itertools.islice(TrainingBatches(**{**defaults, **values}), count))


def test_the_stream_is_one_permutation_after_the_other():
    stream = list(itertools.islice(permutation_stream(7, seed=5), 21))
    epochs = [stream[:7], stream[7:14], stream[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    generator = torch.Generator().manual_seed(5)
    assert stream == [i for _ in range(3) for i in torch.randperm(7, generator=generator).tolist()]


def test_another_seed_gives_another_order():
    assert batches(seed=3) == batches(seed=3) != batches(seed=4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_stream_in_turn(world_size):
    draws = [batches(6, rank=rank, world_size=world_size) for rank in range(world_size)]
    merged = sorted(draw for rank in draws for batch in rank for draw in batch)
    assert [draw.position for draw in merged] == list(range(12 * world_size))
    assert [draw.record for draw in merged] == list(itertools.islice(permutation_stream(10, 3), 12 * world_size))


@pytest.mark.parametrize("wide", [None, [True, False, True, True, False, True, False, False, True, True]])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_starting_later_skips_exactly_the_used_batches(start, wide):
    values = {"rank": 1, "world_size": 2, "wide": wide, "batch_size": 3}
    assert batches(5, start=start, **values) == batches(12, **values)[start : start + 5]


def test_grouped_batches_hold_one_kind_and_lose_no_draw():
    wide = [True, False, True, True, False, True, False, False, True, True]
    grouped = batches(20, wide=wide, batch_size=4)
    assert all(len({wide[draw.record] for draw in batch}) == 1 and len(batch) == 4 for batch in grouped)
    positions = [draw.position for batch in grouped for draw in batch]
    assert len(set(positions)) == 80
    waiting = set(range(max(positions) + 1)) - set(positions)
    assert len(waiting) <= 3  # the kind that is not complete yet
    assert [batch[-1].position for batch in grouped] == sorted(batch[-1].position for batch in grouped)


@pytest.mark.parametrize(
    "values", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"start": -1}, {"num_records": 0}], ids=str
)
def test_values_that_cannot_work_are_refused(values):
    with pytest.raises(ValueError, match="need"):
        batches(**values)


@pytest.mark.parametrize("num_records", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_inference_shares_are_contiguous_and_nearly_equal(num_records, world_size):
    shares = [inference_share(num_records, rank, world_size) for rank in range(world_size)]
    assert [index for share in shares for index in share] == list(range(num_records))
    sizes = [len(share) for share in shares]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_inference_batches_hold_one_kind_and_every_index_once():
    indices, kinds = list(range(10, 21)), list("aabbabcabba")
    made = inference_batches(indices, kinds, batch_size=3)
    assert sorted(index for batch in made for index in batch) == indices
    assert all(len({kinds[index - 10] for index in batch}) == 1 and len(batch) <= 3 for batch in made)


def test_single_pictures_keep_their_order():
    assert inference_batches([3, 4, 5], ["a", "b", "a"], batch_size=1) == [[3], [4], [5]]
