"""How often a GPU is waited for between an image and its outputs; what the CPU can say of it, and what a GPU says."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fcclip.modeling import ScoredMasks, output_masks
from fcclip.structures import TextEmbeddings
from tests.conftest import DATA
from tests.modeling.test_fcclip import sample_image

# Operations whose result has a size, or goes to Python, and so is waited for.
WAITING = {f"aten::{name}" for name in ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "bincount")}
OF_OUTPUTS = 7  # used queries; kept queries, areas, and two lists of segments; things, and their different queries


class Waits(TorchDispatchMode):
    """Names of operations that wait, and of copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        indices = args[1] if function.name().startswith("aten::index") else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        first = args[0] if args else None
        moved = [each.device for each in (first, result) if isinstance(each, torch.Tensor)]
        if function.name().split(".")[0] in WAITING or by_mask or ("copy" in function.name() and len(set(moved)) > 1):
            self.names.append(function.name())
        return result


def without_void(scored: ScoredMasks) -> ScoredMasks:
    """Every query has a class."""
    in_logits = scored.in_logits.clone()
    in_logits[:, -1] -= 20
    return replace(scored, in_logits=in_logits)


@pytest.fixture(params=["tiny_convnext.json", "tiny_resnet.json"])
def model(request, tiny_model, tiny_cfg):
    tiny_cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME = str(DATA / request.param)
    return tiny_model(cfg=tiny_cfg)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU says it")
def test_scoring_an_image_that_lies_on_a_gpu_waits_for_nothing(model):
    """On one that knows shapes alone and refuses to say a number."""
    text, image = model.text_encoder.encode(model.test_vocabulary), sample_image()["image"]
    with FakeTensorMode(allow_non_fake_inputs=True):

        def moved(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        for module in model.modules():
            module.engine = "cuda"
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: moved(tensor) for name, tensor in tensors.items() if tensor is not None})
        text = TextEmbeddings(moved(text.vectors), moved(text.class_of_vector), text.num_classes)
        model.text_encoder.encode = lambda vocabulary: text
        sample = {"image": moved(image)}
        model.score([sample])  # constants of this size
        with Waits() as waits:
            [scored] = model.score([sample])
    assert scored.in_logits.device.type == "cuda" and not waits.names


def test_outputs_wait_a_few_times_whatever_they_are_made_of(model, monkeypatch):
    to_list, sources = torch.Tensor.tolist, output_masks._sources

    def uncounted(*arguments):  # numbers of rows, which lie on the CPU always
        with _disable_current_modes():
            return sources(*arguments)

    monkeypatch.setattr(output_masks, "_sources", uncounted)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.names.append("tolist") or to_list(tensor))
    for settings in ({}, {"height": 300, "width": 200}):
        scored = without_void(*model.score([{**sample_image(), **settings}]))
        with Waits() as waits:
            outputs = model.outputs(scored)
        assert len(outputs) == 3 and "aten::bincount" in waits.names  # some queries are kept
        assert len(waits.names) <= OF_OUTPUTS, waits.names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_gpu_says_the_same(model, autocast):
    model.cuda().amp_dtype = autocast
    sample = {"image": sample_image()["image"].cuda()}
    for _ in range(2):
        [scored] = model.score([sample])
    scored = without_void(scored)
    model.outputs(scored)
    try:
        torch.cuda.set_sync_debug_mode("error")
        model.score([sample])
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            model.outputs(scored)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 2 * OF_OUTPUTS, [str(each.message) for each in waits]  # some wait twice inside
