"""The shipped segmenter called in every way there is."""

import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fcclip.segmenter.segmenter as module
from fcclip import Segmenter
from fcclip.config import get_cfg, load_config
from fcclip.vocabulary import Vocabulary
from tests.segmenter.conftest import IMAGES, NAMES
from tests.weight_files import save_weights


def masks(result):
    return result.outputs.scored.masks.mask_logits


def contents(result):
    return [(segment.name, segment.score, segment.area) for segment in result.segments]


def test_only_my_names_are_found(result):
    assert result.class_names == ("red circle", "blue star", "sand")
    assert {(segment.name, segment.isthing) for segment in result.segments} == {
        ("red circle", True),
        ("blue star", True),
        ("sand", False),
    }
    assert set(np.unique(result.semantic)) <= {0, 1, 2}
    assert {instance.name for instance in result.instances} <= {"red circle", "blue star"}
    assert result.panoptic.shape == result.semantic.shape == result.image.shape[:2]


def test_without_a_vocabulary_the_weights_bring_one(segmenter, image):
    assert segmenter(image).class_names == Vocabulary.builtin("shapes").class_names


def test_without_a_vocabulary_and_without_a_test_set_there_is_nothing_to_look_for(segmenter, image, monkeypatch):
    monkeypatch.setattr(segmenter.model, "test_vocabulary", None)
    with pytest.raises(ValueError, match=r"DATASETS\.TEST"):
        segmenter(image)


class LargestTensor(TorchDispatchMode):
    """Notes the number of values of the largest tensor that is made."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return made


@pytest.mark.parametrize("number", [300, 2000])
def test_more_names_change_no_mask_and_take_no_map_of_the_image_each(segmenter, no_text_tower, number):
    pixels = np.random.default_rng(0).integers(0, 256, (160, 240, 3), dtype=np.uint8)
    largest = []
    for names in (
        "cat; dog; grass:stuff",
        ["cat", "dog", "grass:stuff", *(f"name {index}" for index in range(number))],
    ):
        with LargestTensor() as noted:
            result = segmenter(pixels, names)
            assert result.panoptic.shape == result.semantic.shape == (160, 240)
            assert len(result.instances) <= 100
        largest.append((masks(result), noted.values))
    (few, values), (many, more_values) = largest
    assert torch.equal(few, many)
    # 100 masks of the image are 3.8 M values, a block of semantic scores is 4.2 M; 300 maps would be 11.5 M, 2,000 77 M
    assert values <= more_values <= 2**22


def test_a_list_gives_what_each_image_gives_alone_in_its_order(segmenter, image):
    # eight of one padded size, and two others
    sizes = [(256, 256), (230, 256), (100, 256), (256, 240), (64, 64), (245, 250), (256, 90), (240, 256), (200, 220)]
    sizes.append((250, 231))
    images = [image[:height, :width] for height, width in sizes]
    vocabulary = Vocabulary.from_names(NAMES)
    for part, size, together in zip(images, sizes, segmenter(images, NAMES)):
        alone = segmenter(part, vocabulary)
        assert together.image.shape[:2] == size
        for one, other in ((masks(alone), masks(together)), (alone.outputs.scores, together.outputs.scores)):
            one, other = torch.as_tensor(one), torch.as_tensor(other)
            # the order of sums of a convolution depends on the batch: rounding, relative to the spread of the values
            assert float((one - other).abs().max()) <= 1e-5 * float(one.max() - one.min())
        np.testing.assert_array_equal(alone.panoptic, together.panoptic)


def test_a_list_is_seen_in_batches_of_equal_padded_size(segmenter, image, monkeypatch):
    batches, score = [], segmenter.model.score
    monkeypatch.setattr(
        segmenter.model, "score", lambda samples, vocabulary: batches.append(len(samples)) or score(samples, vocabulary)
    )
    assert len(segmenter([image] * 9 + [image[:100]], "red circle")) == 10
    assert batches == [8, 1, 1]
    assert segmenter([], "red circle") == []


@pytest.mark.parametrize(("channel_order", "first"), [("RGB", 200), ("BGR", 10)])
def test_the_network_gets_the_test_size_and_the_channel_order_of_the_config(tiny_cfg, channel_order, first):
    tiny_cfg.INPUT.FORMAT, tiny_cfg.INPUT.MIN_SIZE_TEST = channel_order, 80
    segmenter = Segmenter(tiny_cfg, weights="random")
    seen = []
    score = segmenter.model.score
    segmenter.model.score = lambda samples, vocabulary: seen.extend(samples) or score(samples, vocabulary)
    segmenter(np.full((40, 60, 3), (200, 90, 10), np.uint8), vocabulary="cat")
    [sample] = seen
    assert sample["image"].shape == (3, 80, 120) and sample["image"].dtype == torch.uint8
    assert (sample["height"], sample["width"]) == (40, 60)
    assert (sample["image"][0] == first).all()


def test_things_below_min_score_are_left_out_and_stuff_stays(segmenter, image):
    result = segmenter(image, "red circle; yellow heart; sand:stuff", min_score=1.0)
    assert [segment.name for segment in result.segments] == ["sand"]
    assert set(np.unique(result.panoptic)) == {0, result.segments[0].id}
    assert result.instances == ()


@pytest.mark.parametrize("options", [{"min_score": -0.1}, {"min_score": float("nan")}, {"ensemble": (0.4, 1.1)}])
def test_a_number_outside_its_range_is_refused(segmenter, image, options):
    with pytest.raises(ValueError, match=r"(min_score|beta) must be in 0\.\.1, got"):
        segmenter(image, vocabulary="cat", **options)


def test_the_weights_of_the_ensemble_are_those_of_the_call(segmenter, image):
    fixed = segmenter(image, "red circle; orange circle; sand:stuff")
    own = segmenter(image, "red circle; orange circle; sand:stuff", ensemble=segmenter.model.ensemble)
    other = segmenter(image, "red circle; orange circle; sand:stuff", ensemble=(1.0, 1.0))
    np.testing.assert_array_equal(own.outputs.scores, fixed.outputs.scores)
    assert np.abs(other.outputs.scores - fixed.outputs.scores).max() > 1e-3


def test_emoji_and_other_alphabets_are_names(segmenter, image):
    result = segmenter(image, "🐈‍⬛ cat; песок:stuff; 🎉")
    assert result.class_names == ("🐈⬛ cat", "песок", "🎉")
    assert {segment.name for segment in result.segments} <= set(result.class_names)


def test_a_name_that_clip_cannot_read_to_its_end_is_said(segmenter, image, caplog):
    segmenter(image, f"red circle; {'very ' * 80}large star")
    assert "makes 92 tokens with its prompt, CLIP reads 77" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [("", "no class names given"), ("cat;;dog", None), ("cat; dog, hound; Cat", "'cat' and 'Cat'")],
)
def test_empty_and_repeated_names(segmenter, image, names, message):
    if message is None:
        assert segmenter(image, names).class_names == ("cat", "dog")
        return
    with pytest.raises(ValueError, match=message):
        segmenter(image, names)


def test_threads_with_different_vocabularies_do_not_see_each_others_names(segmenter, image):
    lists = [NAMES, "yellow heart; blue star; sand:stuff", "green cross; water:stuff", "shapes"]
    expected = [contents(segmenter(image, names)) for names in lists]
    found = [[] for _ in lists]

    def call(index):
        for _ in range(3):
            found[index].append(contents(segmenter(image, lists[index])))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(lists))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[each] * 3 for each in expected]


# ---- what it is built from ----


def test_a_config_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"no weights: the config's MODEL\.WEIGHTS is empty"):
        Segmenter(get_cfg())


def test_missing_weights_are_named_before_the_model_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "build_model", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(FileNotFoundError, match=r"weights '.*none\.pth' not found"):
        Segmenter(get_cfg(), weights=tmp_path / "none.pth")


def test_the_given_config_is_not_changed(tiny_cfg):
    tiny_cfg.MODEL.DEVICE = "auto"
    before = tiny_cfg.dump()
    segmenter = Segmenter(tiny_cfg, weights="random", device="cpu")
    assert tiny_cfg.dump() == before
    assert segmenter.cfg.MODEL.DEVICE == "cpu"


def test_weights_of_another_config_are_refused(tiny_cfg, tmp_path):
    save_weights(Segmenter(tiny_cfg, weights="random").model, tmp_path / "a.safetensors", full=True)
    Segmenter(tiny_cfg, weights=tmp_path / "a.safetensors")
    tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 9
    with pytest.raises(ValueError, match=r"(?s)do not fit the model.*NUM_OBJECT_QUERIES 8"):
        Segmenter(tiny_cfg, weights=tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", ["ade20k_r50", "coco"], ids=["RN50", "ConvNeXt-L"])
def test_published_configs_build_with_random_clip_weights_and_segment_an_image_on_the_cpu(suffix):
    name = f"coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_{suffix}.yaml"
    cfg = load_config(name, ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "INPUT.MIN_SIZE_TEST", "64"])
    result = Segmenter(cfg, weights="random", device="cpu")(IMAGES / "shapes_1.jpg", "red circle; sand:stuff")
    assert result.panoptic.shape == result.image.shape[:2]
    assert set(np.unique(result.panoptic)) <= {0, *(segment.id for segment in result.segments)}
