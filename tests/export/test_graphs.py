"""Writing graphs, with a module of three layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fcclip.errors import InputError
from fcclip.export.graphs import Graph, Images, Names, halve, image_graph, traced, write_onnx
from fcclip.modeling import build_model
from fcclip.modeling.classifier import resize_masks
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
        probabilities = Names(model)(classes, regions, not_empty, text.vectors, text.class_of_vector, weight)
    # padding is zero after normalisation, so all is equal but for the order of sums
    torch.testing.assert_close(mask_logits[0], scored.masks.mask_logits)
    torch.testing.assert_close(classes[0], scored.class_embeddings)
    torch.testing.assert_close(regions[0], scored.region_embeddings)
    torch.testing.assert_close(probabilities[0], scored.class_logits(model.ensemble).softmax(-1), atol=1e-5, rtol=1e-4)
    assert not_empty.shape == (1, 8)


class Frozen(nn.Module):
    """What a model has of CLIP alone, dense features and the classifier of masks on them; the masks are where the
    channels of an image are bright, of the first nowhere."""

    outputs = ("dense", "regions")

    def __init__(self, model):
        super().__init__()
        self.backbone, self.pool = model.backbone, model.classifier
        self.register_buffer("limits", torch.tensor([300.0, 128.0, 128.0])[:, None, None])

    def forward(self, image):
        dense = self.backbone(image / 255).dense
        return dense, self.pool(dense, resize_masks(image - self.limits, dense.shape[-2:]))


def test_a_resnet_exports_too_and_torch_reads_its_program_again(tmp_path):
    needs_onnx()
    import onnxruntime

    cfg, path = tiny_config(), tmp_path / "frozen.onnx"
    cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME = cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME.replace("convnext", "resnet")
    cfg.MODEL.FC_CLIP.QUICK_GELU = "off"
    torch.manual_seed(0)
    model = build_model(cfg, train_vocabulary=TRAIN, test_vocabulary=NAMES)
    graph = replace(image_graph(model, size=(64, 96)), module=Frozen(model).eval())
    program = traced(graph, engine="torch")
    torch.export.save(program, tmp_path / "frozen.pt2")
    write_onnx(program, graph, path, opset=18, notes={})
    image = np.random.default_rng(0).uniform(0, 255, (1, 3, 64, 96)).astype(np.float32)
    with torch.no_grad():
        expected = graph.module(torch.from_numpy(image))
        again = torch.export.load(tmp_path / "frozen.pt2").module()(torch.from_numpy(image))
    assert all(map(torch.equal, again, expected))
    for value, own in zip(onnxruntime.InferenceSession(str(path)).run(None, {"image": image}), expected):
        assert np.isfinite(value).all()
        np.testing.assert_allclose(value, own.numpy(), atol=1e-4)  # sums of hundreds of products in another order


class Sam(nn.Module):
    """What a model has of SAM alone."""

    outputs = ("features",)

    def __init__(self, model):
        super().__init__()
        self.sam = model.sam

    def forward(self, image):
        return self.sam.encode((image - self.sam.pixel_mean) / self.sam.pixel_std)


@pytest.mark.slow
def test_sam_exports_for_any_size(tmp_path):
    needs_onnx()
    import onnxruntime

    torch.manual_seed(0)
    model, path = build_model(tiny_frozenseg(), train_vocabulary=TRAIN, test_vocabulary=NAMES), tmp_path / "sam.onnx"
    graph = replace(image_graph(model), module=Sam(model).eval())
    write_onnx(traced(graph, engine="torch"), graph, path, opset=18, notes={})
    session = onnxruntime.InferenceSession(str(path))
    for shape in ((1, 3, 64, 128), (3, 3, 96, 64)):
        image = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
        [found] = session.run(None, {"image": image})
        with torch.no_grad():
            expected = graph.module(torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)  # sums of hundreds of products in another order


def test_a_graph_of_one_size_takes_one_image():
    torch.manual_seed(0)
    graph = image_graph(build_model(tiny_config(), train_vocabulary=TRAIN, test_vocabulary=NAMES), size=(64, 128))
    assert graph.inputs["image"].shape == (1, 3, 64, 128) and graph.dynamic == {"image": {}}
