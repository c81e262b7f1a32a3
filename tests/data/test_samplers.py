import itertools

import pytest
import torch

from fcclip.config import get_cfg
from fcclip.data.samplers import (
    TrainingBatches,
    build_stream,
    inference_batches,
    inference_share,
    permutation_stream,
    repeat_factors,
    repeated_stream,
)


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


# ---- repeat factors ----

CATEGORIES = [(0,), (0, 0), (0, 1), (0, 2), (0,), (0,), (0,), (0,), (), (0, 1)]  # in 9, 2 and 1 of 10 images


def test_a_image_is_repeated_as_its_rarest_category_asks():
    factors = repeat_factors(CATEGORIES, threshold=0.4)
    expected = [1.0] * 10
    expected[2] = expected[9] = (0.4 / 0.2) ** 0.5
    expected[3] = (0.4 / 0.1) ** 0.5
    torch.testing.assert_close(factors, torch.tensor(expected))
    assert factors.dtype == torch.float32
    plain = repeat_factors(CATEGORIES, threshold=0.4, square_root=False)
    torch.testing.assert_close(plain[[2, 3, 0]], torch.tensor([2.0, 4.0, 1.0]))


def test_classes_of_records_of_different_sources_are_counted_apart():
    cfg = get_cfg()
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "RepeatFactorTrainingSampler", 0.5
    first = [{"source": 0, "segments_info": [{"category_id": 0}]}] * 9
    rare = [{"source": 1, "annotations": [{"category_id": 0}]}]  # another class 0, in 1 of 10 images
    factors = build_stream(cfg, first + rare, source="source").keywords["factors"]
    torch.testing.assert_close(factors, torch.tensor([1.0] * 9 + [(0.5 / 0.1) ** 0.5]))


def test_a_threshold_of_zero_repeats_nothing_and_a_negative_one_is_refused():
    assert repeat_factors(CATEGORIES, threshold=0.0).tolist() == [1.0] * 10
    with pytest.raises(ValueError, match=r"DATALOADER\.REPEAT_THRESHOLD must be a share of images, 0 or more, got -1"):
        repeat_factors(CATEGORIES, threshold=-1)


def test_an_epoch_has_each_record_as_often_as_its_factor_says_on_average():
    factors = torch.tensor([1.0, 2.0, 1.25, 3.5])
    counts = torch.bincount(torch.tensor(list(itertools.islice(repeated_stream(4, 0, factors=factors), 7750))))
    torch.testing.assert_close(counts / 1000, factors, rtol=0, atol=0.06)


def test_the_repeated_stream_is_that_of_detectron2():
    factors = torch.tensor([1.0, 2.0, 1.25, 3.5])
    generator, expected = torch.Generator().manual_seed(9), []
    for _ in range(3):
        chance = torch.rand(4, generator=generator)
        times = [int(factor) + (draw < factor - int(factor)).item() for factor, draw in zip(factors.tolist(), chance)]
        epoch = torch.tensor([index for index in range(4) for _ in range(times[index])])
        expected += epoch[torch.randperm(len(epoch), generator=generator)].tolist()
    assert list(itertools.islice(repeated_stream(4, 9, factors=factors), len(expected))) == expected


@pytest.mark.parametrize("key", ["annotations", "segments_info"])
def test_categories_come_from_instances_or_segments(key):
    cfg = get_cfg()
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "RepeatFactorTrainingSampler", 0.4
    records = [{key: [{"category_id": category} for category in categories]} for categories in CATEGORIES]
    factors = repeat_factors(CATEGORIES, threshold=0.4)
    values = {"num_records": 10, "seed": 3, "batch_size": 2}
    for cfg.DATALOADER.REPEAT_SQRT in (True, False):
        made = list(itertools.islice(TrainingBatches(stream=build_stream(cfg, records), **values), 9))
        again = list(itertools.islice(TrainingBatches(stream=build_stream(cfg, records), **values, start=4), 5))
        assert made[4:] == again
        records_drawn = [draw.record for batch in made for draw in batch]
        expected = list(itertools.islice(repeated_stream(10, 3, factors=factors), 18))
        assert (records_drawn == expected) == cfg.DATALOADER.REPEAT_SQRT


def test_records_that_do_not_say_their_categories_are_refused():
    cfg = get_cfg()
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(
        ValueError, match="needs to know the categories .* no annotations and no segments_info. Use 'Tr"
    ):
        build_stream(cfg, [{"sem_seg_file_name": "a.png"}])


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
