import copy
import itertools
import logging

import numpy as np
import pytest
import torch

from fcclip.data import build_test_loader, build_train_loader
from fcclip.data.mappers import build_train_mapper
from fcclip.data.samplers import permutation_stream


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert [sample["image_id"] for sample in batch] == [sample["image_id"] for sample in other]
        for one, two in zip(batch, other, strict=True):
            assert torch.equal(one["image"], two["image"])
            assert torch.equal(one["targets"].id_map, two["targets"].id_map)
            assert torch.equal(one["targets"].labels, two["targets"].labels)


def test_batches_have_the_size_of_one_rank(cfg, coco_val):
    cfg.SOLVER.IMS_PER_BATCH = 6
    batches = take(build_train_loader(cfg, dataset=coco_val, rank=1, world_size=2), 3)
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert batches[0][0]["image"].shape == (3, 32, 32)


def test_two_loaders_with_one_seed_are_equal_and_with_two_are_not(cfg, coco_val):
    first = take(build_train_loader(cfg, dataset=coco_val), 4)
    assert_same(first, take(build_train_loader(cfg, dataset=coco_val), 4))
    other = take(build_train_loader(cfg, dataset=coco_val, seed=8), 4)
    assert any(not torch.equal(a["image"], b["image"]) for x, y in zip(first, other) for a, b in zip(x, y))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(cfg, coco_val, num_workers):
    expected = take(build_train_loader(cfg, dataset=coco_val), 5)
    cfg.DATALOADER.NUM_WORKERS = num_workers
    assert_same(take(build_train_loader(cfg, dataset=coco_val), 5), expected)


@pytest.mark.parametrize("grouping", [True, False])
def test_a_resumed_loader_goes_on_where_the_other_stopped(cfg, coco_val, grouping):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    whole = take(build_train_loader(cfg, dataset=coco_val), 7)
    assert_same(take(build_train_loader(cfg, dataset=coco_val, start=4), 3), whole[4:])


def test_resuming_reads_no_skipped_picture(cfg, coco_val, coco_root):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    loader = build_train_loader(cfg, dataset=coco_val, start=2)
    first_four = list(itertools.islice(permutation_stream(6, 7), 4))
    for index in first_four:
        (coco_root / "coco" / "val2017" / f"{100 + index:012d}.jpg").unlink()
    assert {sample["image_id"] - 100 for sample in next(loader)} == set(range(6)) - set(first_four)


def test_a_sample_is_drawn_from_seed_and_position(cfg, coco_val):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    records, order = coco_val.records(), list(itertools.islice(permutation_stream(6, 7), 8))
    samples = [
        one for batch in take(build_train_loader(cfg, dataset=coco_val, rank=1, world_size=2), 4) for one in batch
    ]
    for position, sample in zip(range(1, 8, 2), samples):
        again = build_train_mapper(cfg)(records[order[position]], np.random.default_rng((7, position)))
        assert torch.equal(sample["image"], again["image"])


def test_two_ranks_load_what_one_would(cfg, coco_val):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.SOLVER.IMS_PER_BATCH = 4
    whole = take(build_train_loader(cfg, dataset=coco_val), 3)
    ranks = [take(build_train_loader(cfg, dataset=coco_val, rank=rank, world_size=2), 3) for rank in range(2)]
    assert_same([[a, c, b, d] for (a, b), (c, d) in zip(*ranks)], whole)


def test_a_batch_is_wide_or_tall(cfg, coco_val):
    for batch in take(build_train_loader(cfg, dataset=coco_val), 8):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_states_alone(cfg, coco_val, num_workers):
    cfg.DATALOADER.NUM_WORKERS = num_workers
    cfg.SEED = -1
    torch_state, numpy_state = torch.get_rng_state(), copy.deepcopy(np.random.get_state()[1])
    take(build_train_loader(cfg, dataset=coco_val), 2)
    take(build_test_loader(cfg, coco_val), 2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_a_negative_seed_draws_one_and_reports_it(cfg, coco_val, caplog):
    cfg.SEED = -1
    with caplog.at_level(logging.INFO):
        loader = build_train_loader(cfg, dataset=coco_val)
    assert f"from seed {loader.seed}" in caplog.text
    assert_same(take(build_train_loader(cfg, dataset=coco_val, seed=loader.seed), 2), take(loader, 2))
    assert build_train_loader(cfg, dataset=coco_val).seed != loader.seed


def test_several_ranks_must_share_a_drawn_seed(cfg, coco_val):
    cfg.SEED = -1
    with pytest.raises(ValueError, match="SEED is -1, so each of the 2 processes would draw its own order"):
        build_train_loader(cfg, dataset=coco_val, world_size=2)
    assert build_train_loader(cfg, dataset=coco_val, world_size=2, seed=5).seed == 5


def test_a_batch_that_ranks_cannot_share_equally_is_refused(cfg, coco_val):
    cfg.SOLVER.IMS_PER_BATCH = 16
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH is 16, which 3 .* Set it to a multiple of 3"):
        build_train_loader(cfg, dataset=coco_val, world_size=3)


def test_an_unknown_sampler_is_refused(cfg, coco_val):
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainSampler"
    with pytest.raises(ValueError, match=r"DATALOADER\.SAMPLER_TRAIN 'TrainSampler'\. Did you mean 'TrainingSampler'"):
        build_train_loader(cfg, dataset=coco_val)


def test_skipping_bad_pictures_is_refused(cfg, coco_val):
    cfg.DATALOADER.MAX_BAD_IMAGES = 3
    with pytest.raises(ValueError, match=r"DATALOADER\.MAX_BAD_IMAGES is 3, .*Set it to 0"):
        build_train_loader(cfg, dataset=coco_val)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_picture_stops_training_and_is_named(cfg, coco_val, coco_root, num_workers):
    cfg.DATALOADER.NUM_WORKERS = num_workers
    (coco_root / "coco" / "val2017" / "000000000103.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^/.*000000000103\.jpg: cannot be read as a picture: the file is empty"):
        take(build_train_loader(cfg, dataset=coco_val), 6)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_test_picture_comes_once(cfg, coco_val, world_size, batch_size):
    cfg.TEST.BATCH_SIZE = batch_size
    loaders = [build_test_loader(cfg, coco_val, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    assert sorted(sample["image_id"] for batch in batches for sample in batch) == list(range(100, 106))
    assert sum(len(loader) for loader in loaders) == len(batches)
    assert sum(loader.num_images for loader in loaders) == 6


def test_test_pictures_share_a_batch_only_at_equal_padded_size(cfg, coco_val):
    cfg.TEST.BATCH_SIZE = 2
    batches = list(build_test_loader(cfg, coco_val))
    assert [[sample["image_id"] for sample in batch] for batch in batches] == [[100, 102], [101, 103], [104], [105]]


def test_a_test_loader_can_be_walked_twice_and_with_workers(cfg, coco_val):
    loader = build_test_loader(cfg, coco_val)
    first = [sample for batch in loader for sample in batch]
    cfg.DATALOADER.NUM_WORKERS = 2
    for again in (loader, build_test_loader(cfg, coco_val)):
        for one, two in zip(first, (sample for batch in again for sample in batch), strict=True):
            assert one["image_id"] == two["image_id"] and torch.equal(one["image"], two["image"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_for_a_gpu_are_in_pinned_memory(cfg, coco_val, num_workers):
    expected = take(build_train_loader(cfg, dataset=coco_val), 2)
    cfg.MODEL.DEVICE = "cuda"
    cfg.DATALOADER.NUM_WORKERS = num_workers
    batches = take(build_train_loader(cfg, dataset=coco_val), 2)
    assert_same(batches, expected)
    assert all(sample["image"].is_pinned() for batch in batches for sample in batch)


def test_a_test_batch_of_nothing_is_refused(cfg, coco_val):
    cfg.TEST.BATCH_SIZE = 0
    with pytest.raises(ValueError, match=r"TEST\.BATCH_SIZE must be at least 1, got 0"):
        build_test_loader(cfg, coco_val)
