"""From a config and a data set to batches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from fcclip.config import resolve_device
from fcclip.data.dataset import Dataset
from fcclip.data.mappers import (
    JitterMapper,
    ShortestEdgeMapper,
    build_test_mapper,
    build_train_mapper,
    check_ground_truth,
)
from fcclip.data.samplers import Draw, TrainingBatches, build_stream, inference_batches, inference_share
from fcclip.data.transport import CompactRecords, PackedBatch
from fcclip.errors import InputError, UserError
from fcclip.files import listed

logger = logging.getLogger(__name__)

WorkerInit = Callable[[int], None]
TIMEOUT_S = 600  # without a batch from the loading processes before they count as hung


class LoaderError(UserError, RuntimeError):
    """A process that loads images died or hangs."""


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
        worker_init: called in each of these processes with its number.
    """

    def __init__(
        self,
        *,
        records: CompactRecords,
        mapper: JitterMapper,
        batches: TrainingBatches,
        num_workers: int,
        pin_memory: bool = False,
        worker_init: WorkerInit | None = None,
    ) -> None:
        self.seed = batches.seed
        self.num_records = len(records)
        load = partial(_training_sample, records, mapper, batches.seed)
        self._batches = iter(_data_loader(load, batches, num_workers, pin_memory, worker_init))

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> list[dict[str, Any]]:
        return _next_batch(self._batches)


class TestLoader:
    """One pass over the share of one rank; every image exactly once.

    Args:
        records: of the data set.
        mapper: record -> sample.
        batches: record indices of each batch.
        num_workers, pin_memory: as for `TrainLoader`.
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
        self._loader = _data_loader(partial(_test_sample, records, mapper), batches, num_workers, pin_memory)

    def __len__(self) -> int:
        """Number of batches."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        batches = iter(self._loader)
        for _ in range(self._num_batches):
            yield _next_batch(batches)


def build_train_loader(
    cfg,
    *,
    dataset: Dataset,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    seed: int | None = None,
    worker_init: WorkerInit | None = None,
) -> TrainLoader:
    """Endless batches of `SOLVER.IMS_PER_BATCH / world_size` training samples.

    Args:
        cfg: reads INPUT, DATALOADER, SEED and SOLVER.IMS_PER_BATCH.
        dataset: to train on.
        rank, world_size: of how many processes this is which.
        start: batches already used, when a run is resumed.
        seed: of order and augmentation, equal on all ranks; None: SEED of the config, and one drawn and logged if that
            is negative. `loader.seed` tells which it is; a resumed run needs the same.
        worker_init: called in every loading process with its number.

    Raises:
        ValueError: a batch that the ranks cannot share equally, a drawn seed with several ranks, a broken data set, or
            one without the ground truth that the mapper reads.
    """
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {world_size} process(es) cannot share equally. "
            f"Set it to a multiple of {world_size}."
        )
    mapper = build_train_mapper(cfg, dataset.metadata)
    seed = _agreed_seed(cfg.SEED if seed is None else seed, world_size)
    records = training_records(cfg, dataset, mapper)
    batch_size = cfg.SOLVER.IMS_PER_BATCH // world_size
    share = {"rank": rank, "world_size": world_size, "start": start}
    batches = training_batches(cfg, records, seed=seed, batch_size=batch_size, **share)
    logger.info("training on %d images of '%s', order and augmentation from seed %d", len(records), dataset.name, seed)
    compact = CompactRecords(records)
    del records  # before processes are forked, which would each copy a hundred thousand dicts bit by bit
    return TrainLoader(
        records=compact,
        mapper=mapper,
        batches=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=resolve_device(cfg.MODEL.DEVICE).type == "cuda",
        worker_init=worker_init,
    )


def build_test_loader(cfg, dataset: Dataset, *, rank: int = 0, world_size: int = 1) -> TestLoader:
    """The images of one rank in batches of at most `TEST.BATCH_SIZE`.

    Images share a batch only if they have the same size after resizing and padding to `SIZE_DIVISIBILITY`, since the
    network sees the padding.
    """
    if cfg.TEST.BATCH_SIZE < 1:
        raise InputError(f"TEST.BATCH_SIZE must be at least 1, got {cfg.TEST.BATCH_SIZE}")
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


def training_batches(
    cfg, records: Sequence[Mapping[str, Any]], *, source: str | None = None, **options: int
) -> TrainingBatches:
    """Batches of these records in the order and groups that DATALOADER asks for.

    Args:
        cfg: reads DATALOADER.
        records: the training images.
        source: as for `build_stream`.
        options: as for `TrainingBatches`.
    """
    wide = [r["width"] > r["height"] for r in records] if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
    stream = build_stream(cfg, records, source=source)
    return TrainingBatches(stream=stream, num_records=len(records), wide=wide, **options)


def training_records(cfg, dataset: Dataset, mapper: JitterMapper) -> list[dict]:
    """The records of a data set that are trained on.

    Raises:
        FileNotFoundError, ValueError: a broken data set, or one without the ground truth that the mapper reads.
    """
    records = dataset.records()
    # the first record with each set of fields: data sets of different types may stand one after the other
    kinds = list({tuple(record): record for record in reversed(records)}.values())
    for record in kinds:
        where = f"data set '{dataset.name}'"
        check_ground_truth(record, mapper, where=where if len(kinds) == 1 else f"{where}: {record['file_name']}")
    _warn_of_ignored_classes(records, dataset)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = _with_instances(records, dataset.name)
    return records


def _agreed_seed(seed: int, world_size: int) -> int:
    if seed >= 0:
        return seed
    if world_size > 1:
        raise InputError(
            f"SEED is {seed}, so each of the {world_size} processes would draw its own order. "
            "Draw one on rank 0, share it, and pass it as `seed`; or set SEED to 0 or more."
        )
    return int(np.random.SeedSequence().generate_state(1)[0])  # takes nothing from any global generator


def _warn_of_ignored_classes(records: list[dict], dataset: Dataset) -> None:
    """Says which classes have ground truth, but none that is trained on: crowds, or labels that mean unlabelled."""
    names = dataset.metadata["stuff_classes"]
    crowd_only: dict[int, bool] = {}
    for record in records:
        for entry in record.get("segments_info") or record.get("annotations") or ():
            index = entry["category_id"]
            crowd_only[index] = crowd_only.get(index, True) and bool(entry.get("iscrowd", 0))
    if any(crowd_only.values()):
        logger.warning(
            "data set '%s': nothing but crowds, which are never trained on, of %s",
            *(dataset.name, listed([names[index] for index, crowd in sorted(crowd_only.items()) if crowd])),
        )
    ignored = dataset.metadata.get("ignore_label")
    if ignored is not None and ignored < len(names):
        logger.warning(
            "data set '%s': label %d is the class '%s' and its ignore_label, so all its pixels count as unlabelled; "
            "give unlabelled pixels another value",
            *(dataset.name, ignored, names[ignored]),
        )


def _with_instances(records: list[dict], name: str) -> list[dict]:
    """Without the images whose `annotations` are all crowd; records of other kinds of ground truth stay.

    Raises:
        ValueError: nothing is left.
    """
    kept = [
        record
        for record in records
        if "annotations" not in record or any(not instance.get("iscrowd", 0) for instance in record["annotations"])
    ]
    if not kept:
        raise InputError(
            f"data set '{name}': none of its {len(records)} images has an annotation that is not a crowd, so there is "
            "nothing to learn. DATALOADER.FILTER_EMPTY_ANNOTATIONS False would train on empty images."
        )
    if len(kept) < len(records):
        logger.info(
            "data set '%s': %d of %d images have no annotation but crowds; left out "
            "(DATALOADER.FILTER_EMPTY_ANNOTATIONS)",
            *(name, len(records) - len(kept), len(records)),
        )
    return kept


class _Samples:
    """What `load` makes of an entry of a batch, or the error that it raised about a file. That is raised where the
    batch is used, with its own words, instead of inside a worker."""

    def __init__(self, load: Callable[..., dict[str, Any]]) -> None:
        self.load = load

    def __getitem__(self, entry: Draw | int) -> dict[str, Any] | Exception:
        try:
            return self.load(entry)
        except (ValueError, OSError) as error:
            return error


def _training_sample(records: CompactRecords, mapper: JitterMapper, seed: int, draw: Draw) -> dict[str, Any]:
    return mapper(records[draw.record], np.random.default_rng((seed, draw.position)))


def _test_sample(records: CompactRecords, mapper: ShortestEdgeMapper, index: int) -> dict[str, Any]:
    return mapper(records[index])


def _data_loader(
    load: Callable[..., dict[str, Any]],
    batches: Any,
    num_workers: int,
    pin_memory: bool,
    worker_init: WorkerInit | None = None,
) -> DataLoader:
    if num_workers and "cv2" in sys.modules:
        # Here and not in the workers: a forked process that ends the threads of its parent waits for them for ever.
        sys.modules["cv2"].setNumThreads(1)
    return DataLoader(
        _Samples(load),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_pack,
        worker_init_fn=partial(_start_worker, worker_init),
        pin_memory=pin_memory,
        timeout=TIMEOUT_S if num_workers else 0,
        generator=torch.Generator().manual_seed(0),  # its own, so that loading never moves torch's global generator
    )


def _pack(batch: list[Any]) -> list[Any] | PackedBatch:
    return batch if get_worker_info() is None else PackedBatch(batch, shared=True)


def _next_batch(batches: Iterator[list[Any] | PackedBatch]) -> list[dict[str, Any]]:
    """The next batch of a `DataLoader`; what torch says of a dead or silent process becomes what can be done about it.

    Raises:
        LoaderError: a loading process died or hangs.
        ValueError, OSError: what is wrong with the files of a sample.
    """
    try:
        batch = next(batches)
    except RuntimeError as error:
        text = str(error).splitlines()[0] if str(error) else ""
        if "DataLoader timed out" in text:
            raise LoaderError(
                f"no batch came for {TIMEOUT_S} s: a loading process hangs ({text}). Usual causes: a network disk that "
                "does not answer, or too little shared memory. DATALOADER.NUM_WORKERS 0 loads in this process and "
                "shows where it stands."
            ) from error
        if "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text):
            raise LoaderError(
                f"a loading process died ({text}). Usual cause: no memory left, main or shared (/dev/shm). Lower "
                "DATALOADER.NUM_WORKERS; with 0 this process loads and shows the error itself."
            ) from error
        raise
    samples = batch.unpack() if isinstance(batch, PackedBatch) else batch
    for sample in samples:
        if isinstance(sample, Exception):
            raise sample
    return samples


def _start_worker(worker_init: WorkerInit | None, worker: int) -> None:
    """Workers share the cores already: one thread each."""
    torch.set_num_threads(1)
    if worker_init is not None:
        worker_init(worker)
