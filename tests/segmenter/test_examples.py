"""Classes that are shown by regions of images."""

import numpy as np
import pytest
import torch

from fcclip import Segmenter
from fcclip.segmenter import read_vocabulary
from fcclip.segmenter.examples import ExampleBank

NAMES = "glorp; blue star; sand:stuff"


@pytest.fixture
def pupil(segmenter):
    """The shipped segmenter, which forgets what a test taught it."""
    yield segmenter
    segmenter.examples = ExampleBank(segmenter.model)
    segmenter.model.text_encoder.shown = {}


def mask_of(result, name):
    return next(segment.mask for segment in result.segments if segment.name == name)


def test_a_word_that_means_nothing_finds_what_it_was_shown(pupil, image, result):
    before = result.relabel(NAMES)
    assert "glorp" not in {segment.name for segment in before.segments}
    circle = mask_of(result, "red circle")
    pupil.teach("glorp", image, circle)
    found = pupil(image, NAMES)
    overlap = mask_of(found, "glorp") & circle
    assert overlap.sum() > 0.9 * circle.sum()
    assert "blue star" in {segment.name for segment in found.segments}
    assert before.relabel().segments == found.segments == result.relabel(NAMES).segments  # of results before, too
    assert "glorp" not in {segment.name for segment in before.segments}  # what was made stays


def test_a_result_teaches_without_another_look(pupil, image, result, monkeypatch):
    circle = mask_of(result, "red circle")
    pupil.teach("glorp", image, circle)
    seen = pupil.examples.classes["glorp"]
    monkeypatch.setattr(pupil.model, "score", lambda *_: pytest.fail("looked at the image"))
    pupil.teach("wug", result, circle)
    torch.testing.assert_close(pupil.examples.classes["wug"].regions, seen.regions)
    torch.testing.assert_close(pupil.examples.classes["wug"].beside, seen.beside)


def test_a_word_is_the_mean_of_its_examples_moved_from_regions_to_texts(pupil, result):
    for name in ("red circle", "blue star"):
        pupil.teach("glorp", result, mask_of(result, name))
    examples, encoder = pupil.examples.classes["glorp"], pupil.model.text_encoder
    texts = encoder.encode(pupil.model.seen_vocabulary).vectors.mean(0)
    expected = examples.regions.mean(0) - examples.beside.mean(0) + texts
    torch.testing.assert_close(encoder.shown["glorp"], expected / expected.norm())
    torch.testing.assert_close(encoder.encode(read_vocabulary("sand; glorp")).vectors[1], encoder.shown["glorp"])


def test_a_name_that_was_not_shown_is_read_to_the_bit_as_before(pupil, result):
    scores = result.outputs.scores
    pupil.teach("glorp", result, mask_of(result, "red circle"))
    np.testing.assert_array_equal(result.relabel().outputs.scores, scores)


def test_examples_are_kept_in_a_file_for_the_same_clip(pupil, result, tmp_path):
    pupil.teach("glorp", result, mask_of(result, "red circle"))
    pupil.teach("model", result, mask_of(result, "blue star"))
    pupil.teach("model", result, mask_of(result, "sand"))
    pupil.examples.save(tmp_path / "bank.safetensors")
    words = pupil.model.text_encoder.shown
    bank = ExampleBank(pupil.model)
    bank.load(tmp_path / "bank.safetensors")
    assert [len(examples.regions) for examples in bank.classes.values()] == [1, 2]
    assert all(torch.equal(words[name], vector) for name, vector in pupil.model.text_encoder.shown.items())
    bank.model = type("Other", (), {"backbone": type("B", (), {"weights_hash": lambda _: "0" * 64})(), "classifier": 0})
    with pytest.raises(ValueError, match=r"not of this segmenter's CLIP: they are of CLIP .*, MaskPool, it has CLIP"):
        bank.load(tmp_path / "bank.safetensors")


def test_what_is_no_example_is_refused(pupil, image, result, tmp_path, tiny_cfg):
    with pytest.raises(ValueError, match="a mask of 256 x 256 pixels.* got 8 x 8 with 64 true"):
        pupil.teach("glorp", image, np.ones((8, 8), bool))
    with pytest.raises(ValueError, match="got 256 x 256 with 0 true"):
        pupil.teach("glorp", result, np.zeros((256, 256), bool))
    with pytest.raises(ValueError, match="finds nothing beside the mask"):
        pupil.teach("glorp", result, np.ones((256, 256), bool))
    with pytest.raises(ValueError, match="the result of a tiled image"):
        pupil.teach("glorp", pupil(image, NAMES, tile=128), np.ones((256, 256), bool))
    Segmenter(tiny_cfg, weights="random").save_pretrained(tmp_path / "weights")
    with pytest.raises(ValueError, match="is not a file of examples"):
        pupil.examples.load(tmp_path / "weights" / "model.safetensors")
