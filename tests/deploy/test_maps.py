"""Maps made in NumPy are those that PyTorch makes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcclip.deploy import maps
from fcclip.modeling.output_masks import OutputMasks
from fcclip.modeling.outputs import instance_inference, panoptic_inference, semantic_labels

SIZES = {"padded_size": (64, 96), "image_size": (50, 90), "output_size": (77, 131)}
SAME = {"padded_size": (64, 96), "image_size": (50, 90), "output_size": (50, 90)}
NAMES, THINGS = ("cat", "dog", "sand"), np.array([True, True, False])


def random_masks(sizes, seed=0, queries=12):
    """Smooth random masks, some of them empty, and the probabilities of three classes and void."""
    generator = torch.Generator().manual_seed(seed)
    logits = 20 * F.interpolate(torch.randn(1, queries, 4, 5, generator=generator), (16, 24), mode="bicubic")[0]
    logits[0] = -5
    class_logits = 3 * torch.randn(queries, 4, generator=generator)
    return class_logits, OutputMasks(logits, **sizes), maps.Masks(logits.numpy(), **sizes)


@pytest.mark.parametrize("size, resized", [(16, 64), (50, 77), (77, 50), (5, 5), (1, 9), (200, 1333)])
def test_an_axis_is_resized_as_torch_resizes_it(size, resized):
    line = np.random.default_rng(0).uniform(-40, 40, size).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(line)[None, None], resized, mode="linear", align_corners=False)
    # weights are equal; torch adds products of up to 40 in single precision, whose steps are 4e-6 there
    np.testing.assert_allclose(maps.interpolation(size, resized) @ line, expected[0, 0].numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [SIZES, SAME], ids=["resized", "same size"])
@pytest.mark.parametrize("seed", range(4))
def test_panoptic_maps_are_those_of_the_model(sizes, seed, monkeypatch):
    monkeypatch.setattr(maps, "_BLOCK", 20_000)  # several blocks of rows
    class_logits, masks, own = random_masks(sizes, seed)
    thresholds = {"object_mask_threshold": 0.3, "overlap_threshold": 0.5}
    expected, records = panoptic_inference(class_logits, masks, thing_classes=(0, 1), **thresholds)
    ids, segments = maps.panoptic(class_logits.softmax(-1).numpy(), own, THINGS, NAMES, **thresholds)
    assert ids.dtype == np.int32 and ids.shape == sizes["output_size"]
    assert (ids == expected.numpy()).mean() > 0.999  # a pixel between two masks may go to either
    found = {segment.id: segment for segment in segments}
    assert found.keys() == {record["id"] for record in records}
    for record in records:
        segment = found[record["id"]]
        assert (segment.category_id, segment.isthing) == (record["category_id"], record["isthing"])
        assert segment.score == pytest.approx(record["score"], abs=1e-6) and abs(segment.area - record["area"]) <= 5
        assert segment.name == NAMES[record["category_id"]] and segment.mask.sum() == segment.area


def test_segments_of_one_stuff_class_share_an_id_and_things_do_not():
    logits = np.full((4, 8, 8), -9, np.float32)
    for query, (row, column) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        logits[query, row : row + 4, column : column + 4] = 9
    masks = maps.Masks(logits, padded_size=(8, 8), image_size=(8, 8), output_size=(8, 8))
    probabilities = np.array([[0.9, 0, 0, 0.1], [0.8, 0, 0, 0.2], [0, 0, 0.7, 0.3], [0, 0, 0.6, 0.4]], np.float32)
    ids, segments = maps.panoptic(probabilities, masks, THINGS, NAMES, object_mask_threshold=0.0, overlap_threshold=0.8)
    assert [(one.id, one.name, one.area) for one in segments] == [(1, "cat", 16), (2, "cat", 16), (3, "sand", 32)]
    assert [one.query for one in segments] == [0, 1, 2]
    assert np.array_equal(ids[::4, ::4], [[1, 2], [3, 3]]) and segments[2].score == pytest.approx(0.7)


def test_nothing_is_found_where_every_query_is_void():
    _, _, own = random_masks(SIZES)
    void = np.tile(np.array([0, 0, 0, 1], np.float32), (12, 1))
    ids, segments = maps.panoptic(void, own, THINGS, NAMES, object_mask_threshold=0.0, overlap_threshold=0.8)
    assert not ids.any() and segments == ()


@pytest.mark.parametrize("masks_first", [True, False])
@pytest.mark.parametrize("sizes", [SIZES, SAME], ids=["resized", "same size"])
def test_semantic_maps_are_those_of_the_model(masks_first, sizes, monkeypatch):
    monkeypatch.setattr(maps, "_BLOCK", 20_000)
    class_logits, masks, own = random_masks(sizes)
    expected = semantic_labels(class_logits, masks, masks_first=masks_first).numpy()
    assert (maps.semantic(class_logits.softmax(-1).numpy(), own, masks_first=masks_first) == expected).mean() > 0.999


def test_instances_are_those_of_the_model():
    class_logits, masks, own = random_masks(SIZES)
    expected = instance_inference(class_logits, masks, thing_classes=(0, 1), topk=20)
    order = expected.scores.argsort(descending=True)
    order = order[expected.pred_masks[order].flatten(1).any(1)]
    found = maps.instances(class_logits.softmax(-1).numpy(), own, THINGS, NAMES, topk=20)
    assert [one.category_id for one in found] == expected.pred_classes[order].tolist()
    np.testing.assert_allclose([one.score for one in found], expected.scores[order], atol=1e-5)
    assert all((one.mask == expected.pred_masks[index].numpy()).mean() > 0.999 for one, index in zip(found, order))
    assert all(one.mask.sum() == one.area > 0 for one in found)
