"""Former images among new ones: how many, which, and the same ones however they are loaded."""

import itertools
from dataclasses import replace

import pytest
import torch

from fcclip.data import build_train_loader
from fcclip.finetuning import build_replay_loader, replayed_images
from fcclip.vocabulary import Vocabulary

WORDS = Vocabulary.from_names("person; sky:stuff; dog", name="former")
OTHERS = Vocabulary.from_names("human; heaven:stuff; hound", name="others")
NEW, FORMER = range(100, 103), range(103, 106)  # image ids


@pytest.fixture
def halves(coco_val):
    """(new data set, former data set) of three images each."""

    def part(name, ids):
        return replace(coco_val, name=name, load=lambda: [r for r in coco_val.load() if int(r["image_id"]) in ids])

    return part("new", NEW), part("former", FORMER)


@pytest.fixture
def replay(cfg, halves):
    """Function (count=6, **options) -> that many batches with FINETUNE.REPLAY_SHARE of the config."""
    cfg.SOLVER.IMS_PER_BATCH, cfg.FINETUNE.REPLAY_SHARE = 4, 0.25
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    def batches(count=6, **options):
        new, former = halves
        loader = build_replay_loader(cfg, dataset=new, former=[(former, WORDS)], **options)
        return list(itertools.islice(loader, count))

    return batches


def ids(batch):
    return [int(sample["image_id"]) for sample in batch]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert ids(batch) == ids(other)
        for one, two in zip(batch, other, strict=True):
            assert torch.equal(one["image"], two["image"]) and one["point_seed"] == two["point_seed"]
            assert one.get("vocabulary") == two.get("vocabulary")


def test_each_batch_has_its_share_of_former_images_with_their_own_words(replay):
    for batch in replay():
        assert [one in FORMER for one in ids(batch)] == [False, False, False, True]
        assert ["vocabulary" in sample for sample in batch] == [False, False, False, True]
        assert batch[-1]["vocabulary"] is WORDS
    assert {ids(batch)[-1] for batch in replay()} == set(FORMER)


def test_new_images_are_those_that_they_would_be_without_the_former_ones(cfg, replay, halves):
    mixed = [batch[:3] for batch in replay()]
    cfg.SOLVER.IMS_PER_BATCH = 3
    assert_same(mixed, list(itertools.islice(build_train_loader(cfg, dataset=halves[0]), 6)))


def test_no_two_images_share_their_random_numbers(replay):
    seeds = [sample["point_seed"] for batch in replay() for sample in batch]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(cfg, replay, num_workers):
    expected = replay()
    cfg.DATALOADER.NUM_WORKERS = num_workers
    assert_same(replay(), expected)


@pytest.mark.parametrize("grouping", [True, False])
def test_a_resumed_loader_goes_on_where_the_other_stopped(cfg, replay, grouping):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    assert_same(replay(2, start=4), replay(6)[4:])


def test_two_ranks_load_what_one_would(cfg, replay):
    cfg.SOLVER.IMS_PER_BATCH = 8
    whole = replay(3)
    first, second = (replay(3, rank=rank, world_size=2) for rank in range(2))
    for batch, one, other in zip(whole, first, second):
        new = [sample for pair in zip(one[:3], other[:3]) for sample in pair]
        assert_same([[*new, one[3], other[3]]], [batch])


def test_several_former_data_sets_keep_their_own_words(cfg, replay, halves):
    cfg.FINETUNE.REPLAY_SHARE = 0.75
    new, former = halves
    loader = build_replay_loader(cfg, dataset=new, former=[(former, WORDS), (new, OTHERS)])
    samples = [sample for batch in itertools.islice(loader, 6) for sample in batch[1:]]
    assert {sample["vocabulary"].name for sample in samples} == {"former", "others"}
    assert all((sample["vocabulary"] is WORDS) == (int(sample["image_id"]) in FORMER) for sample in samples)


def test_former_images_may_have_a_mapper_of_their_own(cfg, replay):
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"
    cfg.FINETUNE.REPLAY_MAPPER = "mask_former_panoptic"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.SIZE_DIVISIBILITY = (20,), 48, 48
    shapes = [[tuple(sample["image"].shape[-2:]) for sample in batch] for batch in replay(2)]
    assert all(batch == [(32, 32)] * 3 + [(48, 48)] for batch in shapes)


@pytest.mark.parametrize(
    ("share", "batch", "world_size", "expected"), [(0.0, 4, 1, 0), (0.25, 8, 2, 1), (0.5, 4, 1, 2), (0.1, 10, 1, 1)]
)
def test_a_share_is_a_number_of_images(cfg, share, batch, world_size, expected):
    cfg.FINETUNE.REPLAY_SHARE, cfg.SOLVER.IMS_PER_BATCH = share, batch
    assert replayed_images(cfg, world_size) == expected


@pytest.mark.parametrize("share", [-0.25, 1.0, float("nan")])
def test_shares_that_are_none_are_refused(cfg, share):
    cfg.FINETUNE.REPLAY_SHARE = share
    with pytest.raises(ValueError, match=r"FINETUNE.REPLAY_SHARE must be 0 or more and less than 1"):
        replayed_images(cfg)


def test_a_share_of_no_whole_number_of_images_is_refused_with_those_that_are(cfg):
    cfg.FINETUNE.REPLAY_SHARE, cfg.SOLVER.IMS_PER_BATCH = 0.3, 8
    with pytest.raises(ValueError, match=r"has 4 images .* 1.2 former ones\. Choose one of 0, 0.25, 0.5, 0.75"):
        replayed_images(cfg, 2)


def test_replay_of_nothing_is_refused(cfg, replay):
    cfg.FINETUNE.REPLAY_SHARE = 0.0
    with pytest.raises(ValueError, match="a share above 0"):
        replay()
