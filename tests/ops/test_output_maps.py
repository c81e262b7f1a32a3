"""The compiled functions that outputs are made with against the plain ones; through the heads in tests/modeling."""

import pytest
import torch

from fcclip.ops import output_maps

SIZES = [(1, 1), (3, 11), (37, 90)]  # the last has more pixels than are looked at together


@pytest.fixture
def both(built, monkeypatch):
    """Function (name, arguments of it) -> its plain result and the compiled one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(built("cpp")))

    def run(name, *arguments):
        results = []
        for engine in ("torch", "cpp"):
            monkeypatch.setenv("FCCLIP_MSDA", engine)
            results.append(getattr(output_maps, name)(*arguments))
        return results

    return run


def some_maps(n, size):
    """Logits with many equal ones, some of them 0, and their probabilities."""
    torch.manual_seed(0)
    logits = torch.randint(-3, 4, (n, *size)) / 2
    return logits, logits.sigmoid()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("places", [None, [0, 2, 3, 6]])
def test_winners_are_the_same_with_the_first_of_equal_ones(both, size, places):
    _, shares = some_maps(7, size)
    places = None if places is None else torch.tensor(places)
    scores = torch.tensor([0.25, 0.5, 0.5, 0.0, 1.0, 1.0, 0.75])[: 7 if places is None else len(places)]
    plain, compiled = both("winners", scores, shares, places)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled))
    assert [tensor.dtype for tensor in compiled] == [torch.int64, torch.bool, torch.int64]


@pytest.mark.parametrize("size", SIZES)
def test_the_highest_is_the_same_with_the_first_of_equal_ones(both, size):
    plain, compiled = both("highest", some_maps(5, size)[0])
    assert torch.equal(plain, compiled)
    plain, compiled = both("highest", some_maps(5, (size[0], size[1] + 2))[0][..., 1:-1])  # not contiguous
    assert torch.equal(plain, compiled)


@pytest.mark.parametrize("number", [5, 1001, 1024, 1056])
def test_of_any_number_of_maps_the_first_highest_is_told(number):
    torch.manual_seed(0)
    maps = torch.randint(0, number // 4, (number, 3, 50)).float()
    expected = (maps == maps.amax(0)).int().cumsum(0).eq(0).sum(0)  # how many come before the first
    assert torch.equal(output_maps._plain_highest(maps), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("places", [None, [1, 4]])
def test_areas_and_sums_are_added_to_and_masks_written_into_their_rows(both, size, places, monkeypatch):
    logits, shares = some_maps(5, size)
    places = None if places is None else torch.tensor(places)
    n = 5 if places is None else len(places)
    larger = [torch.zeros(n, size[0] + 2, size[1], dtype=torch.bool) for _ in range(2)]
    areas, sums = ([torch.arange(n) for _ in range(2)], [torch.arange(n) / 2 for _ in range(2)])
    for index, engine in enumerate(("torch", "cpp")):
        monkeypatch.setenv("FCCLIP_MSDA", engine)
        output_maps.measure(logits, shares, places, larger[index][:, 1:-1], areas[index], sums[index])
    assert torch.equal(*larger) and not larger[1][:, [0, -1]].any()
    assert torch.equal(*areas)
    torch.testing.assert_close(*sums)  # another order of a sum


def test_sigmoids_are_those_of_torch_to_two_units_in_the_last_place(both, monkeypatch):
    monkeypatch.setenv("FCCLIP_MSDA", "cpp")
    logits = torch.cat([torch.linspace(-90, 90, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-8, 200, -200])])
    identity = torch.stack([torch.arange(len(logits))] * 2).int(), torch.tensor([[1.0], [0.0]]).repeat(1, len(logits))
    row = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([[1.0], [0.0]])
    compiled = output_maps.library(logits)
    same, shares = output_maps.enlarge(compiled, logits[None, None], torch.tensor([0]), row, identity)
    assert torch.equal(same[0, 0], logits)
    torch.testing.assert_close(shares[0, 0], logits.sigmoid(), rtol=2.4e-7, atol=1e-37)


def test_the_plain_functions_serve_other_types_and_autograd(both, monkeypatch):
    monkeypatch.setenv("FCCLIP_MSDA", "cpp")
    maps = torch.rand(2, 3, 4)
    assert output_maps.library(maps) is not None
    assert output_maps.library(maps.double()) is output_maps.library(maps.half()) is None
    assert output_maps.library(maps.clone().requires_grad_()) is None
    assert output_maps.library(maps.to("meta")) is None


def test_without_a_library_the_plain_functions_serve(monkeypatch):
    monkeypatch.delenv("FCCLIP_MSDA", raising=False)
    monkeypatch.setattr(output_maps, "automatic_engine", lambda device_type: "torch")
    assert output_maps.library(torch.rand(2, 3, 4)) is None
    assert output_maps.highest(torch.eye(2)[:, None]).tolist() == [[0, 1]]
