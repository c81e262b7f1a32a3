"""Which record comes when: pure index streams, the same in every process and whatever the number of workers.

In training every sample has a position: its place in one endless stream that all ranks share. The stream depends on the
seed alone, and what is drawn for a sample on seed and position, so any batch can be made again without those before it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcclip.config import lookup
from fcclip.errors import InputError

Stream = Callable[[int, int], Iterator[int]]  # (number of records, seed) -> endless record indices


class Draw(NamedTuple):
    """One training sample: its position in the stream, and the record that stands there."""

    position: int
    record: int


def permutation_stream(num_records: int, seed: int) -> Iterator[int]:
    """Endless: one permutation of all records after the other, from one torch generator, as detectron2 draws them."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    while True:
        yield from torch.randperm(num_records, generator=generator).tolist()


def repeated_stream(num_records: int, seed: int, *, factors: Tensor) -> Iterator[int]:
    """Endless: epoch after epoch in which a record comes as often as its factor says, in random order.

    What a factor has behind its point is the probability of one more time, drawn anew in each epoch. All draws come
    from one torch generator, as detectron2 makes them.

    Args:
        num_records: n.
        seed: of the generator.
        factors: (n,) float32, at least 1; see `repeat_factors`.
    """
    generator = torch.Generator()
    generator.manual_seed(seed)
    whole = factors.trunc()
    while True:
        times = whole + (torch.rand(num_records, generator=generator) < factors - whole).float()
        epoch = torch.arange(num_records).repeat_interleave(times.long())
        yield from epoch[torch.randperm(len(epoch), generator=generator)].tolist()


def repeat_factors(categories: Iterable[Iterable[Hashable]], *, threshold: float, square_root: bool = True) -> Tensor:
    """How often each image should come in an epoch, so that rare categories are seen more often (Gupta et al. 2019,
    LVIS, section 5.2).

    A category in a share f of all images gets the factor max(1, sqrt(threshold / f)), an image the largest factor of
    its categories.

    Args:
        categories: of each image, in any order and number.
        threshold: share of images below which a category is repeated; 0: nothing is.
        square_root: False: threshold / f without the root.

    Returns:
        (n,) float32, at least 1.

    Example:
        >>> repeat_factors([{0}, {0}, {0}, {0, 7}], threshold=1.0)
        tensor([1., 1., 1., 2.])
    """
    if threshold < 0:
        raise InputError(f"DATALOADER.REPEAT_THRESHOLD must be a share of images, 0 or more, got {threshold}")
    images = [frozenset(shown) for shown in categories]
    shares = {category: count / len(images) for category, count in Counter(itertools.chain(*images)).items()}
    ratios = {category: threshold / share for category, share in shares.items()}
    factors = {category: max(1.0, math.sqrt(ratio) if square_root else ratio) for category, ratio in ratios.items()}
    return torch.tensor([max((factors[category] for category in shown), default=1.0) for shown in images])


def build_stream(cfg, records: Sequence[Mapping[str, Any]], *, source: str | None = None) -> Stream:
    """The order of the training images that `DATALOADER.SAMPLER_TRAIN` names.

    Args:
        cfg: reads DATALOADER.
        records: the training images.
        source: field of the records that tells data sets with different classes apart; None: all have the same ones.

    Raises:
        ValueError: an unknown name, or records that do not say which categories an image shows.
    """
    return lookup("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, SAMPLERS)(cfg.DATALOADER, records, source)


def _build_repeated(settings, records: Sequence[Mapping[str, Any]], source: str | None) -> Stream:
    categories = [[(record.get(source), category) for category in _categories(record)] for record in records]
    factors = repeat_factors(categories, threshold=settings.REPEAT_THRESHOLD, square_root=settings.REPEAT_SQRT)
    return partial(repeated_stream, factors=factors)


def _categories(record: Mapping[str, Any]) -> list[int]:
    """The classes an image shows."""
    for key in ("annotations", "segments_info"):
        if key in record:
            return [annotation["category_id"] for annotation in record[key]]
    raise InputError(
        "DATALOADER.SAMPLER_TRAIN 'RepeatFactorTrainingSampler' needs to know the categories of each image, but the "
        f"record of {record.get('file_name', 'an image')} has no annotations and no segments_info. Use "
        "'TrainingSampler'."
    )


SAMPLERS: dict[str, Callable[..., Stream]] = {
    "TrainingSampler": lambda settings, records, source: permutation_stream,
    "RepeatFactorTrainingSampler": _build_repeated,
}


@dataclass(frozen=True, kw_only=True)
class TrainingBatches:
    """Endless batches of one rank, which takes one of every `world_size` draws of the shared stream.

    Args:
        stream: (number of records, seed) -> endless record indices.
        num_records: how many records there are.
        seed: the same on every rank.
        batch_size: samples a batch of this rank.
        rank, world_size: of how many processes this is which.
        start: number of batches that were already used; they are counted, not loaded.
        wide: (num_records,) bool, images wider than high; a batch then holds images of one kind only, and comes
            when it is complete. None: batches in the order of the stream.
    """

    stream: Stream
    num_records: int
    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    start: int = 0
    wide: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        if self.num_records < 1:
            raise InputError("training needs at least one record")
        if self.batch_size < 1 or not 0 <= self.rank < self.world_size or self.start < 0:
            raise InputError(
                f"need batch_size >= 1, 0 <= rank < world_size and start >= 0, got batch_size {self.batch_size}, "
                f"rank {self.rank}, world_size {self.world_size}, start {self.start}"
            )

    def __iter__(self) -> Iterator[list[Draw]]:
        return itertools.islice(self._all(), self.start, None)

    def _all(self) -> Iterator[list[Draw]]:
        positions = itertools.count(self.rank, self.world_size)
        records = itertools.islice(self.stream(self.num_records, self.seed), self.rank, None, self.world_size)
        open_batches: tuple[list[Draw], list[Draw]] = ([], [])
        kinds = [False] * self.num_records if self.wide is None else [bool(wide) for wide in self.wide]
        for position, record in zip(positions, records):
            batch = open_batches[kinds[record]]
            batch.append(Draw(position, record))
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()


def inference_share(num_records: int, rank: int, world_size: int) -> range:
    """The records of one rank: contiguous shares, the first ones one longer if they cannot be equal.

    Example:
        >>> [list(inference_share(5, rank, 2)) for rank in range(2)]
        [[0, 1, 2], [3, 4]]
    """
    share, longer = divmod(num_records, world_size)
    begin = rank * share + min(rank, longer)
    return range(begin, begin + share + (rank < longer))


def inference_batches(indices: Sequence[int], kinds: Sequence[object], batch_size: int) -> list[list[int]]:
    """Every index once, in batches of one kind (a padded size): full ones as they fill up, the others at the end.

    Args:
        indices: record indices.
        kinds: kind of each of these records; equal kinds may share a batch.
        batch_size: most records a batch.

    Example:
        >>> inference_batches([4, 5, 6, 7], ["a", "b", "a", "a"], batch_size=2)
        [[4, 6], [5], [7]]
    """
    batches, open_batches = [], {}
    for index, kind in zip(indices, kinds, strict=True):
        batch = open_batches.setdefault(kind, [])
        batch.append(index)
        if len(batch) == batch_size:
            batches.append(open_batches.pop(kind))
    return [*batches, *open_batches.values()]
