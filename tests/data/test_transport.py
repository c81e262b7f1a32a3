import pickle

import pytest
import torch

from fcclip.data.transport import CompactRecords, PackedBatch
from fcclip.structures import Targets


def test_records_come_back_equal_and_new():
    original = [{"image_id": i, "segments_info": [{"id": i}] * i} for i in range(5)]
    records = CompactRecords(original)
    assert [records[i] for i in range(len(records))] == original
    assert records[2] is not records[2]


def test_records_survive_the_way_to_a_worker():
    records = pickle.loads(pickle.dumps(CompactRecords([{"a": 1}, {"b": "two"}])))
    assert [records[0], records[1]] == [{"a": 1}, {"b": "two"}]


def sample(size):
    generator = torch.Generator().manual_seed(size)
    return {
        "image": torch.randint(0, 256, (3, size, size + 1), generator=generator, dtype=torch.uint8),
        "targets": Targets(
            labels=torch.arange(size), id_map=torch.full((size, size), 70000, dtype=torch.int32), ids=torch.arange(size)
        ),
        "file_name": f"{size}.jpg",
    }


@pytest.mark.parametrize("shared", [False, True])
def test_a_packed_batch_comes_back_equal(shared):
    batch = [sample(5), sample(3), sample(0)]
    batch[1]["odd"] = [torch.tensor(True), torch.tensor(1.5, dtype=torch.float16), torch.rand(4, 6)[:, ::2]]
    packed = pickle.loads(pickle.dumps(PackedBatch(batch, shared=shared)))
    back = packed.unpack()
    for before, other in zip(batch, back, strict=True):
        assert before.keys() == other.keys() and before["file_name"] == other["file_name"]
        torch.testing.assert_close(other["image"], before["image"], rtol=0, atol=0)
        for name, value in vars(before["targets"]).items():
            torch.testing.assert_close(getattr(other["targets"], name), value, rtol=0, atol=0)
    for tensor, other in zip(batch[1]["odd"], back[1]["odd"], strict=True):
        torch.testing.assert_close(other, tensor, rtol=0, atol=0)


def test_all_tensors_of_a_batch_lie_in_one_block():
    back = PackedBatch([sample(5), sample(4)]).unpack()
    blocks = {
        value.untyped_storage().data_ptr() for sample in back for value in (sample["image"], sample["targets"].id_map)
    }
    assert len(blocks) == 1
