"""Writing graphs, with a module of three layers."""

import numpy as np
import pytest
import torch
from torch import nn

from fcclip.errors import InputError
from fcclip.export.graphs import Graph, Images, Whole, halve, traced, write_onnx
from fcclip.modeling import build_model
from tests.conftest import tiny_config, tiny_frozenseg
from tests.export.conftest import NAMES, TRAIN, needs_onnx, random_image


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


@pytest.mark.parametrize("config", [tiny_config, tiny_frozenseg])
def test_the_modules_of_the_graphs_give_what_the_model_gives_of_an_image_with_padding(config):
    torch.manual_seed(0)
    model = build_model(config(), train_vocabulary=TRAIN, test_vocabulary=NAMES)
    image = torch.from_numpy(random_image(50, 70)).permute(2, 0, 1)
    [scored] = model.score([{"image": image}])
    padded = model.pixel_mean.expand(1, 3, 64, 96).clone()
    padded[..., :50, :70] = image
    text = model.text_encoder.encode(NAMES)
    weight = torch.where(scored.seen, model.ensemble.alpha, model.ensemble.beta)
    with torch.no_grad():
        mask_logits, classes, regions, _, not_empty = Images(model)(padded)
        probabilities, _ = Whole(model)(padded, text.vectors, text.class_of_vector, weight)
    # padding is zero after normalisation, so all is equal but for the order of sums
    torch.testing.assert_close(mask_logits[0], scored.masks.mask_logits)
    torch.testing.assert_close(classes[0], scored.class_embeddings)
    torch.testing.assert_close(regions[0], scored.region_embeddings)
    torch.testing.assert_close(probabilities[0], scored.class_logits(model.ensemble).softmax(-1), atol=1e-5, rtol=1e-4)
    assert not_empty.shape == (1, 8)
