"""An exported folder in place of a model; the graph itself is stood in for by its result."""

import sys

import numpy as np
import pytest

from fcclip.deploy import Result
from fcclip.deploy.maps import Masks
from fcclip.errors import NotInstalledError
from fcclip.segmenter import ExportedSegmenter
from tests.deploy.test_runner import METADATA, random_vocabulary


def quadrants():
    """Four queries with a quarter of an image each, of the classes 1, 1, 0 and 0; 0 is stuff."""
    logits = np.full((4, 8, 8), -9, np.float32)
    for query, (row, column) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        logits[query, row : row + 4, column : column + 4] = 9
    vocabulary = random_vocabulary(class_names=np.array(["name 0", "name 2", "name 3"]))
    embeddings = vocabulary.vectors[[2, 2, 0, 1]]  # names 0 and 1 are of class 0, name 2 of class 1
    masks = Masks(logits, padded_size=(8, 8), image_size=(8, 8), output_size=(8, 8))
    return Result(embeddings, 3 * embeddings, embeddings, np.ones(4, bool), masks, vocabulary, METADATA)


@pytest.fixture
def segmenter():
    segmenter = object.__new__(ExportedSegmenter)
    segmenter.runner = lambda image, vocabulary: quadrants()
    return segmenter


IMAGE = np.zeros((8, 8, 3), np.uint8)


def test_a_result_has_the_parts_of_a_segmenters(segmenter):
    [result] = segmenter([IMAGE])
    assert result.class_names == ("name 0", "name 2", "name 3") and result.vocabulary.thing_classes == (1, 2)
    assert result.vocabulary.synonyms[0] == ("name 0", "name 1")
    assert {(segment.name, segment.area, segment.box) for segment in result.segments} == {
        ("name 0", 32, (0, 4, 8, 8)), ("name 2", 16, (0, 0, 4, 4)), ("name 2", 16, (4, 0, 8, 4))
    }  # fmt: skip
    assert all((segment.mask == (result.panoptic == segment.id)).all() for segment in result.segments)
    assert (result.semantic == [[1] * 8] * 4 + [[0] * 8] * 4).all()
    np.testing.assert_allclose(np.linalg.norm(result.embeddings, axis=-1), 1, atol=1e-6)
    assert result.draw().shape[2] == 3 and '"name 2"' in result.to_json()


def test_things_below_the_score_are_left_out_and_stuff_stays(segmenter):
    [result] = segmenter([IMAGE], min_score=1.0)
    assert [segment.name for segment in result.segments] == ["name 0"] and result.instances == ()
    assert (result.panoptic[:4] == 0).all() and (result.panoptic[4:] > 0).all()


def test_things_of_a_video_keep_their_ids(segmenter):
    first, second = segmenter.video([IMAGE, IMAGE], min_score=0.0)
    assert (first.panoptic == second.panoptic).all() and len(first.segments) == 3


def test_onnxruntime_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "image.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NotInstalledError, match="pip install onnxruntime"):
        ExportedSegmenter(tmp_path)
