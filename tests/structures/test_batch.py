import pytest

from fcclip.structures import TrainingBatch


def batch_of(*counts: int) -> TrainingBatch:
    return TrainingBatch([{"targets": "x" * count, "number": number} for number, count in enumerate(counts)])


@pytest.mark.parametrize(
    ("num_images", "parts", "sizes"), [(8, 4, [2, 2, 2, 2]), (5, 2, [3, 2]), (3, 5, [1, 1, 1]), (4, 1, [4])]
)
def test_parts_hold_every_image_once_and_in_order(num_images, parts, sizes):
    split = batch_of(*range(num_images)).split(parts)
    assert [len(part) for part in split] == sizes
    assert [sample["number"] for part in split for sample in part] == list(range(num_images))


def test_every_part_knows_the_segments_of_the_whole_batch_and_a_whole_batch_need_not():
    batch = batch_of(2, 0, 1)
    assert [part.segment_counts for part in batch.split(2)] == [(2, 0, 1), (2, 0, 1)]
    assert batch.split(1) == [batch] and batch.segment_counts is None
