"""Writing graphs, with a module of three layers."""

import numpy as np
import pytest
import torch
from torch import nn

from fcclip.errors import InputError
from fcclip.export.graphs import Graph, halve, traced, write_onnx
from tests.export.conftest import needs_onnx


class Small(nn.Module):
    outputs = ("result",)

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, image):
        return self.norm(self.linear(image - 1))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Graph(Small().eval(), {"image": torch.randn(2, 64)}, {})


def test_half_precision_keeps_inputs_and_outputs_and_halves_the_weights(small, tmp_path):
    needs_onnx()
    import onnxruntime

    path, images = tmp_path / "small.onnx", small.inputs["image"]
    write_onnx(traced(small, engine="torch"), small, path, opset=18, notes={"about": '"it"'})
    full = (tmp_path / "small.onnx.data").stat().st_size
    halve(path)
    session = onnxruntime.InferenceSession(str(path))
    [result] = session.run(None, {"image": images.numpy()})
    assert result.dtype == np.float32 and session.get_modelmeta().custom_metadata_map["about"] == '"it"'
    assert (tmp_path / "small.onnx.data").stat().st_size < 0.6 * full
    # half precision has 11 bits, the sum has 64 products of up to 3
    np.testing.assert_allclose(result, small.module(images).detach().numpy(), atol=2e-2)


def test_an_opset_that_is_too_low_is_refused(small, tmp_path):
    needs_onnx()
    with pytest.raises(InputError, match="opset must be at least 18, .* got 17"):
        write_onnx(None, small, tmp_path / "small.onnx", opset=17, notes={})
    assert not any(tmp_path.iterdir())
