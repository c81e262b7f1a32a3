"""From a config and a data set to batches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from fcclip.config import lookup, resolve_device
from fcclip.data.dataset import Dataset
from fcclip.data.mappers import PanopticJitterMapper, ShortestEdgeMapper, build_test_mapper, build_train_mapper
from fcclip.data.samplers import SAMPLERS, Draw, TrainingBatches, inference_batches, inference_share
from fcclip.data.transport import CompactRecords, PackedBatch

__all__ = ["TestLoader", "TrainLoader", "build_test_loader", "build_train_loader"]

logger = logging.getLogger(__name__)


class TrainLoader:
    """Endless iterator over batches (lists of samples) of one rank.

    A sample depends on the seed and its position in the stream only: not on the number of workers, nor on what was
    loaded before.

    Args:
        records: of the data set.
        mapper: (record, random generator) -> sample.
        batches: which samples, in which order; its seed also seeds the augmentation.
        num_workers: processes; 0 loads here.
        pin_memory: batches in page-locked memory.
    """

    def __init__(
        self,
        *,
        records: CompactRecords,
        mapper: PanopticJitterMapper,
        batches: TrainingBatches,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self.seed = batches.seed
        self.num_records = len(records)
        samples = _TrainingSamples(records, mapper, batches.seed)
        self._batches = iter(_data_loader(samples, batches, num_workers, pin_memory))

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> list[dict[str, Any]]:
        return _unpacked(next(self._batches))


class TestLoader:
    """One pass over the share of one rank; every picture exactly once.

    Args:
        records: of the data set.
        mapper: record -> sample.
        batches: record indices of each batch.
        num_workers: processes; 0 loads here.
        pin_memory: batches in page-locked memory.
    """

    __test__ = False  # not a test class, whatever pytest thinks of the name

    def __init__(
        self,
        *,
        records: CompactRecords,
        mapper: ShortestEdgeMapper,
        batches: list[list[int]],
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self.num_images = sum(len(batch) for batch in batches)
        self._num_batches = len(batches)
        self._loader = _data_loader(_TestSamples(records, mapper), batches, num_workers, pin_memory)

    def __len__(self) -> int:
        """Number of batches."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return map(_unpacked, self._loader)


def build_train_loader(
    cfg,
    *,
    dataset: Dataset,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    seed: int | None = None,
) -> TrainLoader:
    """Endless batches of `SOLVER.IMS_PER_BATCH / world_size` training samples.

    Args:
        cfg: reads INPUT, DATALOADER, SEED and SOLVER.IMS_PER_BATCH.
        dataset: to train on.
        rank, world_size: of how many processes this is which.
        start: batches already used, when a run is resumed.
        seed: of order and augmentation, equal on all ranks; None: SEED of the config, and one drawn and logged if that
            is negative. `loader.seed` tells which it is; a resumed run needs the same.

    Raises:
        ValueError: a batch that the ranks cannot share equally, a drawn seed with several ranks, or a broken data set.
    """
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {world_size} process(es) cannot share equally. "
            f"Set it to a multiple of {world_size}."
        )
    if cfg.DATALOADER.MAX_BAD_IMAGES != 0:
        raise ValueError(
            f"DATALOADER.MAX_BAD_IMAGES is {cfg.DATALOADER.MAX_BAD_IMAGES}, but pictures cannot be skipped: "
            "the first unreadable one stops training. Set it to 0."
        )
    stream = lookup("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, SAMPLERS)
    mapper = build_train_mapper(cfg)
    seed = _agreed_seed(cfg.SEED if seed is None else seed, world_size)
    records = dataset.records()
    batches = TrainingBatches(
        stream=stream,
        num_records=len(records),
        seed=seed,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // world_size,
        rank=rank,
        world_size=world_size,
        start=start,
        wide=[r["width"] > r["height"] for r in records] if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
    )
    logger.info(
        "training on %d pictures of '%s', order and augmentation from seed %d", len(records), dataset.name, seed
    )
    return TrainLoader(
        records=CompactRecords(records),
        mapper=mapper,
        batches=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=resolve_device(cfg.MODEL.DEVICE).type == "cuda",
    )


def build_test_loader(cfg, dataset: Dataset, *, rank: int = 0, world_size: int = 1) -> TestLoader:
    """The pictures of one rank in batches of at most `TEST.BATCH_SIZE`.

    Pictures share a batch only if they have the same size after resizing and padding to `SIZE_DIVISIBILITY`, since the
    network sees the padding.
    """
    if cfg.TEST.BATCH_SIZE < 1:
        raise ValueError(f"TEST.BATCH_SIZE must be at least 1, got {cfg.TEST.BATCH_SIZE}")
    mapper = build_test_mapper(cfg)
    records = dataset.records()
    share = inference_share(len(records), rank, world_size)
    divisor = max(cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY, 1)
    sizes = [mapper.resized(records[index]["height"], records[index]["width"]) for index in share]
    padded = [tuple(-(-side // divisor) * divisor for side in size) for size in sizes]
    return TestLoader(
        records=CompactRecords(records),
        mapper=mapper,
        batches=inference_batches(share, padded, cfg.TEST.BATCH_SIZE),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=resolve_device(cfg.MODEL.DEVICE).type == "cuda",
    )


def _agreed_seed(seed: int, world_size: int) -> int:
    if seed >= 0:
        return seed
    if world_size > 1:
        raise ValueError(
            f"SEED is {seed}, so each of the {world_size} processes would draw its own order. "
            "Draw one on rank 0, share it, and pass it as `seed`; or set SEED to 0 or more."
        )
    return int(np.random.SeedSequence().generate_state(1)[0])  # takes nothing from any global generator


class _TrainingSamples:
    def __init__(self, records: CompactRecords, mapper: PanopticJitterMapper, seed: int) -> None:
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __getitem__(self, draw: Draw) -> dict[str, Any] | _Bad:
        try:
            return self.mapper(self.records[draw.record], np.random.default_rng((self.seed, draw.position)))
        except (ValueError, OSError) as error:
            return _Bad(error)


class _TestSamples:
    def __init__(self, records: CompactRecords, mapper: ShortestEdgeMapper) -> None:
        self.records = records
        self.mapper = mapper

    def __getitem__(self, index: int) -> dict[str, Any] | _Bad:
        try:
            return self.mapper(self.records[index])
        except (ValueError, OSError) as error:
            return _Bad(error)


@dataclass(frozen=True)
class _Bad:
    """Takes the place of a sample whose files are bad: the error travels as data and is raised where the batch is used,
    with its own words, instead of inside a worker."""

    error: ValueError | OSError


def _data_loader(samples: Any, batches: Any, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_pack,
        worker_init_fn=_one_thread,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),  # its own, so that loading never moves torch's global generator
    )


def _pack(batch: list[dict | _Bad]) -> list[dict | _Bad] | PackedBatch:
    return batch if get_worker_info() is None else PackedBatch(batch, shared=True)


def _unpacked(batch: list[dict | _Bad] | PackedBatch) -> list[dict[str, Any]]:
    samples = batch.unpack() if isinstance(batch, PackedBatch) else batch
    for sample in samples:
        if isinstance(sample, _Bad):
            raise sample.error
    return samples


def _one_thread(worker: int) -> None:
    """Workers share the cores already: one thread each."""
    torch.set_num_threads(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)
