"""Exported folders: whole, refused, or not there."""

import os
import signal

import numpy as np
import pytest
import torch

from fcclip.deploy import Metadata, Runner, VocabularyFile
from fcclip.errors import InputError
from fcclip.export import export_folder, folder, vocabulary_file
from fcclip.export.graphs import Images
from fcclip.modeling import Ensemble
from fcclip.vocabulary import Vocabulary
from tests.conftest import tiny_fusioner
from tests.export.conftest import NAMES, random_image


@pytest.fixture
def quick(monkeypatch):
    """Exports without the graphs: files of that name with other content."""
    monkeypatch.setattr(folder, "traced", lambda graph, engine: None)
    monkeypatch.setattr(folder, "write_onnx", lambda program, graph, path, **_: path.write_text("new"))
    monkeypatch.setattr(folder, "_LIBRARIES", ("torch",))


def panoptic_equal(result, expected):
    """Share of pixels with the same id, and whether the segments are the same."""
    same = [(one.id, one.category_id, one.isthing, one.name) for one in result.segments] == [
        (one.id, one.category_id, one.isthing, one.name) for one in expected.segments
    ]
    return (result.panoptic == expected.panoptic).mean(), same


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    ["boat", "cat, kitty, pussy cat; dog; grass:stuff", "; ".join(f"name {index}" for index in range(1000))],
    ids=["one", "synonyms", "1,000"],
)
def test_the_runner_finds_what_the_segmenter_finds_with_names_unknown_at_export(exported, names):
    vocabulary = Vocabulary.from_names(names)
    runner = Runner(exported.folder, vocabulary=vocabulary_file(exported.segmenter.model, vocabulary))
    for height, width in ((70, 100), (64, 64)):
        image = random_image(height, width)
        result, expected = runner(image), exported.segmenter(image, vocabulary)
        share, same_segments = panoptic_equal(result, expected)
        assert share >= 0.999 and same_segments
        assert (result.semantic == expected.semantic).mean() >= 0.999
        assert [one.category_id for one in result.instances[:3]] == [one.category_id for one in expected.instances[:3]]


@pytest.mark.slow
def test_other_names_and_weights_need_no_other_look(exported):
    image, names = random_image(70, 100), Vocabulary.from_names("boat; sea:stuff")
    runner, file = Runner(exported.folder), vocabulary_file(exported.segmenter.model, names)
    result = runner(image)
    assert result.vocabulary.class_names.tolist() == ["cat", "dog", "grass"]  # of the folder
    renamed = result.relabel(file, ensemble=(1, 1))
    assert np.array_equal(renamed.panoptic, runner(image, file, ensemble=(1, 1)).panoptic)
    expected = exported.segmenter(image, names, ensemble=(1, 1))
    assert panoptic_equal(renamed, expected)[0] >= 0.999


@pytest.mark.slow
def test_a_batch_of_any_size_gives_what_the_model_gives_and_nothing_undefined(exported):
    runner, graph = Runner(exported.folder), Images(exported.segmenter.model).eval()
    empty = 0
    for shape in ((1, 3, 96, 64), (3, 3, 64, 160)):
        images = np.random.default_rng(1).uniform(0, 255, shape).astype(np.float32)
        outputs = runner.run(images)
        with torch.no_grad():
            expected = dict(zip(graph.outputs, graph(torch.from_numpy(images))))
        assert outputs.keys() == expected.keys()
        for name, value in outputs.items():
            assert value.shape == expected[name].shape
            assert np.isfinite(value).all(), name
            # sums of some hundred products of about 1 in single precision, in another order
            np.testing.assert_allclose(value.astype(float), expected[name].double().numpy(), atol=1e-4, err_msg=name)
        empty += (~outputs["mask_not_empty"]).sum()
    assert empty  # the mean inside an empty mask is where an optimiser once deleted an epsilon


@pytest.mark.slow
def test_the_file_says_what_the_model_is(exported):
    model, metadata = exported.segmenter.model, Runner(exported.folder).metadata
    assert Metadata.of(metadata.strings(), source="x") == metadata
    assert Ensemble(metadata.alpha, metadata.beta) == model.ensemble and metadata.num_queries == 8
    assert metadata.training_vocabulary == model.seen_vocabulary.synonyms
    assert metadata.clip["weights"] == model.backbone.fingerprint()["weights"]
    assert {path.name for path in exported.folder.iterdir()} == {
        "image.onnx", "image.onnx.data", "all.onnx", "image.pt2", "vocabulary.npz"
    }  # fmt: skip


@pytest.mark.slow
def test_a_size_that_is_no_multiple_of_32_and_another_models_names_are_refused(exported):
    runner = Runner(exported.folder)
    with pytest.raises(InputError, match="multiples of 32"):
        runner.run(np.zeros((1, 3, 64, 100), np.float32))
    own = VocabularyFile.load(exported.folder / "vocabulary.npz")
    other = VocabularyFile(**{**vars(own), "fingerprint": np.array("other")})
    with pytest.raises(InputError, match="was made for another model"):
        runner(random_image(64, 64), other)


@pytest.mark.slow
def test_a_graph_without_its_weights_is_named(exported, tmp_path):
    (tmp_path / "image.onnx").write_bytes((exported.folder / "image.onnx").read_bytes())
    with pytest.raises(InputError, match=r"cannot be run .*Is image\.onnx\.data beside it"):
        Runner(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(60, 90), (96, 64)])
@pytest.mark.parametrize("names", ["boat", "cat, kitty; dog; sea:stuff"])
def test_the_graph_with_names_inside_gives_what_the_model_gives(exported, size, names):
    import onnxruntime

    model, vocabulary, image = exported.segmenter.model, Vocabulary.from_names(names), random_image(*size)
    text, runner = model.text_encoder.encode(vocabulary), Runner(exported.folder)
    [scored] = model.score([{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}], vocabulary)
    weight = torch.where(scored.seen, model.ensemble.alpha, model.ensemble.beta)
    tensors = {"vectors": text.vectors, "class_of_vector": text.class_of_vector, "clip_weight": weight}
    session = onnxruntime.InferenceSession(str(exported.folder / "all.onnx"))
    assert session.get_modelmeta().custom_metadata_map == runner.metadata.strings()
    inputs = {"image": runner.padded(image)} | {name: tensor.numpy() for name, tensor in tensors.items()}
    probabilities, mask_logits = session.run(["class_probabilities", "mask_logits"], inputs)
    expected = scored.class_logits(model.ensemble).softmax(-1)
    np.testing.assert_allclose(probabilities[0], expected.numpy(), atol=1e-4)  # the limit of a parity report
    np.testing.assert_allclose(mask_logits[0], scored.masks.mask_logits.numpy(), atol=1e-4)


def test_what_cannot_be_exported_is_refused(shallow, segmenter, tmp_path):
    for options, message in (
        ({"size": (64, 100)}, "multiple of 32 and at least 64 pixels, got 64x100"),
        ({"extras": ["video"]}, "there are all, text, pt2, not video"),
        ({"engine": "cpp"}, "torch or gather, not 'cpp'"),
    ):
        with pytest.raises(InputError, match=message):
            export_folder(segmenter, tmp_path / "never", **options)
    random = type(segmenter)(shallow, weights="random")
    with pytest.raises(InputError, match="CLIP of this model has random weights"):
        export_folder(random, tmp_path / "never")
    fusioner = type(segmenter)(tiny_fusioner(), weights="random", train_vocabulary=NAMES)
    with pytest.raises(InputError, match="Fusioner cannot be exported: its class names go through the network"):
        export_folder(fusioner, tmp_path / "never")
    trusting = shallow.clone()
    trusting.MODEL.FC_CLIP.CLIP_TRUST_WEIGHT = 0.5
    with pytest.raises(InputError, match="void trust"):
        export_folder(type(segmenter)(trusting, weights="random"), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_an_export_that_fails_leaves_an_earlier_one_as_it_was(quick, segmenter, tmp_path):
    def check(made):
        assert (made / "image.onnx").read_text() == "new"
        raise InputError("differs too much")

    for name in ("image.onnx", "all.onnx"):
        (tmp_path / name).write_text("old")
    with pytest.raises(InputError, match="differs too much"):
        export_folder(segmenter, tmp_path, vocabulary=NAMES, check=check)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"image.onnx": "old", "all.onnx": "old"}
    export_folder(segmenter, tmp_path, vocabulary=NAMES)
    assert (tmp_path / "image.onnx").read_text() == "new"
    assert not (tmp_path / "all.onnx").exists()  # its weights were those of the old graph


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_an_export_that_is_killed_leaves_nothing_under_the_final_names(quick, segmenter, tmp_path):
    child = os.fork()
    if child == 0:
        export_folder(segmenter, tmp_path, vocabulary=NAMES, check=lambda made: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert all(path.name.startswith(".exporting-") for path in tmp_path.iterdir())
    export_folder(segmenter, tmp_path, vocabulary=NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.onnx", "vocabulary.npz"]  # nothing is left


def test_the_folder_of_save_pretrained_takes_an_export_and_is_read_as_before(quick, segmenter, tmp_path):
    export_folder(segmenter, segmenter.save_pretrained(tmp_path), vocabulary=NAMES)
    read = type(segmenter).from_pretrained(tmp_path, device="cpu")
    assert read.model.test_vocabulary.class_names == ("cat", "dog", "grass")
    file = VocabularyFile.load(tmp_path / "vocabulary.npz")
    assert str(file.fingerprint) == str(vocabulary_file(read.model, NAMES).fingerprint)
