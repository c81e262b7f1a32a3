"""Frozen parts are found by what they say of themselves, and a second one needs no change in this room."""

import copy

import pytest
import torch
from torch import nn

from fcclip.errors import InputError
from fcclip.weights import FrozenPart, frozen_notes, frozen_prefixes, load_weights, model_weights, read_weight_file
from tests.weight_files import save_weights


class Sam(FrozenPart):
    notes_key = "sam"
    config_keys = ("MODEL.SAM.NAME", "MODEL.SAM.WEIGHTS")
    constants = ("pixel_mean",)

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2)
        self.inner = nn.Sequential()
        self.inner.is_frozen = True  # a part of a part is not a part of its own


@pytest.fixture
def two(toy):
    def build(seed=0):
        model = toy(seed=seed)
        model.sam = Sam()
        return model

    return build


def test_every_frozen_part_is_left_out_and_named(two, tmp_path):
    model = two()
    assert frozen_prefixes(model) == ("backbone.", "sam.")
    assert not any(key.startswith(("backbone.", "sam.")) for key in model_weights(model))
    assert model_weights(model, full=True).keys() == model.state_dict().keys()
    save_weights(model, tmp_path / "a.safetensors")
    assert read_weight_file(tmp_path / "a.safetensors").rest == frozen_notes(model)
    assert frozen_notes(model).keys() == {"clip", "sam"}
    assert frozen_prefixes(nn.Linear(1, 1)) == () and frozen_notes(nn.Linear(1, 1)) == {}


def test_a_file_may_hold_any_of_them_and_each_is_checked(two, tmp_path):
    source, target = two(seed=0), two(seed=1)
    save_weights(source, tmp_path / "a.safetensors", dtype=None)
    target.backbone.load_state_dict(source.backbone.state_dict())
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(InputError, match="trained on another SAM(.|\n)*MODEL.SAM.NAME and MODEL.SAM.WEIGHTS"):
        load_weights(target, tmp_path / "a.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    weights = {key: value for key, value in source.state_dict().items() if not key.startswith("backbone.")}
    torch.save({"model": weights | {"sam.pixel_mean": torch.zeros(3)}, **frozen_notes(source)}, tmp_path / "b.pth")
    load_weights(target, tmp_path / "b.pth")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
