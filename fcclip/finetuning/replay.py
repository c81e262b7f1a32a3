"""Images of former data sets among the new ones, so that a fine-tuning does not forget: rehearsal (Rebuffi et al.
2017, iCaRL, section 3)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fcclip.config import resolve_device, with_values
from fcclip.data.catalog import Dataset
from fcclip.data.loaders import TrainLoader, WorkerInit, training_batches, training_records
from fcclip.data.mappers import JitterMapper, build_train_mapper
from fcclip.data.samplers import Draw, TrainingBatches
from fcclip.data.transforms import RandomNumbers
from fcclip.data.transport import CompactRecords
from fcclip.errors import InputError
from fcclip.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

REPLAYED_FROM = "replayed_from"  # field of a record and of a sample: number of the former data set
_FORMER_POSITIONS = 1 << 62  # where the positions of former images begin, so that no two images share a draw


class _MixedBatches:
    """Endless batches of one rank that join a batch of each of two streams.

    Args:
        new: its record numbers stay.
        former: its records stand behind those of `new`; its positions are moved, so that seed and position still tell
            every sample from every other.
    """

    def __init__(self, new: TrainingBatches, former: TrainingBatches) -> None:
        self.new = new
        self.former = former
        self.seed = new.seed

    def __iter__(self) -> Iterator[list[Draw]]:
        for new, former in zip(self.new, self.former):
            moved = [Draw(_FORMER_POSITIONS + draw.position, self.new.num_records + draw.record) for draw in former]
            yield [*new, *moved]


class _MixedMapper:
    """Gives each record to the mapper of its data set: the new one, or one of the former ones."""

    def __init__(self, new: JitterMapper, former: Sequence[JitterMapper]) -> None:
        self.new = new
        self.former = tuple(former)

    def __call__(self, record: dict, rng: RandomNumbers) -> dict[str, Any]:
        if REPLAYED_FROM not in record:
            return self.new(record, rng)
        return {**self.former[record[REPLAYED_FROM]](record, rng), REPLAYED_FROM: record[REPLAYED_FROM]}


def replayed_images(cfg, world_size: int = 1) -> int:
    """How many images of the batch of one process are former ones, as FINETUNE.REPLAY_SHARE says.

    Raises:
        ValueError: a share outside 0..1, of all images, or of no whole number of images.
    """
    share, size = cfg.FINETUNE.REPLAY_SHARE, cfg.SOLVER.IMS_PER_BATCH // world_size
    if not 0 <= share < 1:
        raise InputError(f"FINETUNE.REPLAY_SHARE must be 0 or more and less than 1, got {share}")
    count = round(share * size)
    if abs(count - share * size) > 1e-6 or count == size:
        shares = ", ".join(f"{number / size:.4g}" for number in range(size))
        raise InputError(
            f"FINETUNE.REPLAY_SHARE is {share}, and a process has {size} images of a batch (SOLVER.IMS_PER_BATCH "
            f"{cfg.SOLVER.IMS_PER_BATCH}, {world_size} process(es)): {share * size:.4g} former ones. Choose one of "
            f"{shares}, or another batch."
        )
    return count


def build_replay_loader(
    cfg,
    *,
    dataset: Dataset,
    former: Sequence[tuple[Dataset, Vocabulary]],
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    worker_init: WorkerInit | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Endless batches with FINETUNE.REPLAY_SHARE former images, drawn evenly from all former data sets together. These
    stand behind the new ones, and bring the `vocabulary` of their labels.

    A sample depends on SEED and its position alone, as with `build_train_loader`; the new images are those that a
    batch of their number would have without the former ones.

    Args:
        cfg: reads INPUT, DATALOADER, SEED, SOLVER.IMS_PER_BATCH and FINETUNE; SEED must not be negative.
        dataset: the new one.
        former: the former data sets, each with the vocabulary of its labels; at least one.
        rank, world_size, start, worker_init: as for `build_train_loader`.

    Raises:
        ValueError: a share that cannot be, a broken data set, or one without the ground truth that its mapper reads.
    """
    size, count = cfg.SOLVER.IMS_PER_BATCH // world_size, replayed_images(cfg, world_size)
    if cfg.SEED < 0 or not count:
        raise InputError(f"replay needs a SEED of 0 or more and a share above 0, got {cfg.SEED} and {count} images")
    mappers = [build_train_mapper(cfg, dataset.metadata)]
    mappers += [build_train_mapper(with_replay_mapper(cfg), former_set.metadata) for former_set, _ in former]
    records = training_records(cfg, dataset, mappers[0])
    former_records = [
        {**record, REPLAYED_FROM: source}
        for source, (former_set, _) in enumerate(former)
        for record in training_records(cfg, former_set, mappers[1 + source])
    ]
    options = {"source": REPLAYED_FROM, "rank": rank, "world_size": world_size, "start": start}
    former_seed = int(np.random.SeedSequence((cfg.SEED, 1)).generate_state(1)[0])  # of an order of their own
    mixed = _MixedBatches(
        training_batches(cfg, records, seed=cfg.SEED, batch_size=size - count, **options),
        training_batches(cfg, former_records, seed=former_seed, batch_size=count, **options),
    )
    logger.info(
        "each process trains on %d images of '%s' (%d) and %d of the former data sets %s (%d) in a batch, order and "
        "augmentation from seed %d",
        *(size - count, dataset.name, len(records), count),
        *(", ".join(f"'{former_set.name}'" for former_set, _ in former), len(former_records), cfg.SEED),
    )
    compact = CompactRecords(itertools.chain(records, former_records))
    del records, former_records  # before processes are forked
    loader = TrainLoader(
        records=compact,
        mapper=_MixedMapper(mappers[0], mappers[1:]),
        batches=mixed,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=resolve_device(cfg.MODEL.DEVICE).type == "cuda",
        worker_init=worker_init,
    )
    return _with_vocabularies(loader, [vocabulary for _, vocabulary in former])


def _with_vocabularies(
    loader: Iterator[list[dict[str, Any]]], vocabularies: Sequence[Vocabulary]
) -> Iterator[list[dict[str, Any]]]:
    """Here, so that no process sends a vocabulary with every image."""
    for batch in loader:
        for sample in batch:
            if REPLAYED_FROM in sample:
                sample["vocabulary"] = vocabularies[sample.pop(REPLAYED_FROM)]
        yield batch


def with_replay_mapper(cfg):
    """The config with FINETUNE.REPLAY_MAPPER as the mapper."""
    if not cfg.FINETUNE.REPLAY_MAPPER:
        return cfg
    return with_values(cfg, {"INPUT.DATASET_MAPPER_NAME": cfg.FINETUNE.REPLAY_MAPPER})
