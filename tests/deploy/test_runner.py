"""What surrounds the graph: vocabulary files, metadata, scores, sizes, images, errors. Nothing here needs onnx."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fcclip.data.transforms import shortest_edge_size
from fcclip.deploy import Metadata, Runner, VocabularyFile
from fcclip.deploy.runner import fitting, read_image
from fcclip.deploy.scoring import class_probabilities
from fcclip.errors import InputError, MissingFileError
from fcclip.modeling.classifier import geometric_ensemble, text_logits, with_void
from fcclip.structures import TextEmbeddings

METADATA = Metadata(
    fingerprint="abc", clip={"architecture": "tiny"}, num_queries=5, embed_dim=8, size_divisibility=32,
    pixel_mean=(122.77, 116.75, 104.09), pixel_std=(68.5, 66.6, 70.3), min_size=800, max_size=1333, square=0,
    channel_order="RGB", decoder_scale=14.3, clip_scale=100.0, alpha=0.4, beta=0.8, ensemble_on_valid_mask=False,
    object_mask_threshold=0.0, overlap_threshold=0.8, topk=100, masks_first=True,
    training_vocabulary=(("cat", "kitty"), ("sand",)), config_sha256="c", weights_sha256="w", precision="float32",
    opset=18, versions={"fcclip": "0"}, license="not stated",
)  # fmt: skip


def random_vocabulary(classes=(0, 0, 1, 2, 2, 2), **changes):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(classes) + 1, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    num = classes[-1] + 1
    arrays = {
        "vectors": vectors[:-1],
        "class_of_vector": np.array(classes),
        "synonyms": np.array([f"name {index}" for index in range(len(classes))]),
        "class_names": np.array([f"class {index}" for index in range(num)]),
        "things": np.arange(num) > 0,
        "seen": np.arange(num) < 1,
        "void": vectors[-1],
        "templates": np.array(["a photo of a {}."]),
        "fingerprint": np.array("abc"),
    }
    return VocabularyFile(**{**arrays, **changes})


def runner_of(metadata):
    """A runner without a graph."""
    runner = object.__new__(Runner)
    runner.metadata = metadata
    return runner


@pytest.mark.parametrize("on_valid", [False, True])
def test_probabilities_are_those_of_the_model(on_valid):
    generator, vocabulary = torch.Generator().manual_seed(0), random_vocabulary()
    classes, regions = torch.randn(2, 5, 8, generator=generator).unbind(0)
    valid = torch.tensor([True, False, True, True, False])
    text = TextEmbeddings(torch.from_numpy(vocabulary.vectors), torch.from_numpy(vocabulary.class_of_vector), 3)
    in_logits = text_logits(classes, with_void(text, torch.from_numpy(vocabulary.void)[None]), torch.tensor(14.3).log())
    out_logits = text_logits(regions, text, torch.tensor(100.0).log())
    options = {"alpha": 0.4, "beta": 0.8, "valid": valid if on_valid else None}
    expected = geometric_ensemble(in_logits, out_logits, torch.from_numpy(vocabulary.seen), **options).softmax(-1)
    metadata = Metadata(**{**vars(METADATA), "ensemble_on_valid_mask": on_valid})
    found = class_probabilities(classes.numpy(), regions.numpy(), valid.numpy(), vocabulary, metadata)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)  # fp32 logits of up to 100
    with pytest.raises(InputError, match=r"alpha and beta must lie in 0\.\.1, got 2"):
        class_probabilities(classes.numpy(), regions.numpy(), valid.numpy(), vocabulary, metadata, (2, 0))


def test_metadata_round_trips():
    assert Metadata.of(METADATA.strings(), source="image.onnx") == METADATA


def test_a_graph_without_metadata_or_of_another_format_is_refused():
    with pytest.raises(InputError, match=r"'x\.onnx' was not written by tools/export\.py: .*fingerprint"):
        Metadata.of({"format": "1"}, source="x.onnx")
    with pytest.raises(InputError, match="has format 7, this fcclip runs format 1"):
        Metadata.of({**METADATA.strings(), "format": "7"}, source="x.onnx")


def test_vocabulary_files_round_trip(tmp_path):
    vocabulary = random_vocabulary()
    vocabulary.save(tmp_path / "names.npz")
    read = VocabularyFile.load(tmp_path / "names.npz")
    assert all(np.array_equal(getattr(read, name), value) for name, value in vars(vocabulary).items())
    assert fitting(tmp_path / "names.npz", METADATA).class_names.tolist() == ["class 0", "class 1", "class 2"]


def test_a_vocabulary_of_another_model_is_refused():
    with pytest.raises(InputError, match=r"class 0, class 1, .* was made for another model: its fingerprint is other"):
        fitting(random_vocabulary(fingerprint=np.array("other")), METADATA)
    with pytest.raises(InputError, match=r"no classes to look for: .*vocabulary\.npz"):
        fitting(None, METADATA)


def test_files_that_are_no_vocabulary_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"gone\.npz' does not exist"):
        VocabularyFile.load(tmp_path / "gone.npz")
    (tmp_path / "text.npz").write_text("cat; dog")
    with pytest.raises(InputError, match=r"text\.npz' is no vocabulary file"):
        VocabularyFile.load(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", vectors=np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"other\.npz' is no vocabulary file"):
        VocabularyFile.load(tmp_path / "other.npz")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"class_of_vector": np.array([0, 0, 2, 2, 2, 2])}, "leave no class out"),
        ({"class_of_vector": np.array([0, 1, 0, 2, 2, 2])}, "must ascend"),
        ({"void": np.zeros(7)}, r"void \(7,\) instead of \(8,\)"),
        ({"seen": np.array([True])}, r"seen \(1,\) instead of \(3,\)"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        random_vocabulary(**changes)


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (100, 400), (1, 10_000), (333, 333)])
def test_images_are_resized_as_in_evaluation(size):
    assert runner_of(METADATA).resized(*size) == shortest_edge_size(*size, min_size=800, max_size=1333)


def test_an_image_is_padded_with_the_mean_colour():
    padded = runner_of(METADATA).padded(np.full((50, 70, 3), 7, np.uint8))
    assert padded.shape == (1, 3, 64, 96) and padded.dtype == np.float32
    assert (padded[..., :50, :70] == 7).all()
    assert (padded[0, :, 50:] == np.float32(METADATA.pixel_mean)[:, None, None]).all()


@pytest.mark.parametrize("shape", [(1, 3, 64, 100), (1, 3, 32, 64), (3, 64, 64), (1, 4, 64, 64)])
def test_inputs_that_the_graph_does_not_take_are_refused(shape):
    with pytest.raises(InputError, match="multiples of 32 and at least 64, got float32"):
        runner_of(METADATA).run(np.zeros(shape, np.float32))


def test_images_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"gone\.jpg' does not exist"):
        read_image(tmp_path / "gone.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"text\.jpg' cannot be read as an image"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(InputError, match=r"must be RGB \(h, w, 3\) uint8 with pixels, got \(4, 4\) float64"):
        read_image(np.zeros((4, 4)))
    with pytest.raises(InputError, match="mode I;16"):
        read_image(Image.fromarray(np.zeros((4, 4), np.uint16)))


def test_a_folder_without_a_graph_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"image\.onnx' does not exist .*tools/export\.py writes it"):
        Runner(tmp_path)


def test_importing_the_runner_imports_neither_torch_nor_onnxruntime():
    code = "import sys, fcclip.deploy; print(sorted({'torch', 'onnxruntime', 'cv2', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
