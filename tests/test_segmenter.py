import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

import fcclip.segmenter
from fcclip import Segmenter
from fcclip.config import get_cfg, load_config
from fcclip.data import read_image
from fcclip.segmenter import Segmentation
from fcclip.vocabulary import Vocabulary
from tests.weight_files import save_weights

HEIGHT, WIDTH = 40, 60


class HalvesModel(nn.Module):
    """Finds the first class in the upper half of every image and the last class in the lower half."""

    def __init__(self):
        super().__init__()
        self.test_vocabulary = Vocabulary.from_names("shape; ground:stuff")
        self.seen = []

    def forward(self, inputs, *, vocabulary=None, heads=None):
        assert not torch.is_grad_enabled()
        vocabulary = vocabulary or self.test_vocabulary
        self.seen.append((inputs, vocabulary, heads))
        return [{"panoptic_seg": self.halves(sample, vocabulary)} for sample in inputs]

    def halves(self, sample, vocabulary):
        height, width = sample["height"], sample["width"]
        ids = torch.ones(height, width, dtype=torch.int32)
        ids[height // 2 :] = 2
        last = len(vocabulary) - 1
        return ids, [
            {
                "id": number,
                "category_id": index,
                "isthing": index in vocabulary.thing_classes,
                "score": score,
                "area": height // 2 * width,
            }
            for number, index, score in ((1, 0, 0.4), (2, last, 0.6))
        ]


@pytest.fixture
def segmenter(monkeypatch):
    monkeypatch.setattr(fcclip.segmenter, "build_model", lambda cfg: HalvesModel())
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 80
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.DEVICE = "cpu"
    return Segmenter(cfg, weights="random")


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_segments_carry_the_class_names_of_the_user_and_no_other(segmenter, image):
    result = segmenter(image, vocabulary="red circle, crimson circle; blue star; sand:stuff")
    assert result.class_names == ("red circle", "blue star", "sand")
    assert [(segment.name, segment.isthing) for segment in result.segments] == [("sand", False), ("red circle", True)]
    assert result.panoptic_map.shape == (HEIGHT, WIDTH)
    assert result.panoptic_map.dtype == np.int32
    assert result.mask(result.segments[0]).sum() == HEIGHT * WIDTH // 2


def test_without_a_vocabulary_the_config_names_the_classes(segmenter, image):
    assert segmenter(image).class_names == ("shape", "ground")


def test_without_a_vocabulary_and_without_a_test_set_there_is_nothing_to_look_for(segmenter, image):
    segmenter.model.test_vocabulary = None
    with pytest.raises(ValueError, match=r"DATASETS\.TEST"):
        segmenter(image)


def test_the_network_gets_the_image_resized_by_the_test_rule_and_only_the_panoptic_head_runs(segmenter, image):
    segmenter(image)
    ((sample,), _, heads) = segmenter.model.seen[-1]
    assert sample["image"].shape == (3, 80, 120)
    assert sample["image"].dtype == torch.uint8
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
    assert heads == ("panoptic",)


@pytest.mark.parametrize(("channel_order", "first"), [("RGB", 200), ("BGR", 10)])
def test_the_network_gets_the_channels_in_the_order_of_the_config(monkeypatch, channel_order, first):
    monkeypatch.setattr(fcclip.segmenter, "build_model", lambda cfg: HalvesModel())
    cfg = get_cfg()
    cfg.INPUT.FORMAT = channel_order
    segmenter = Segmenter(cfg, weights="random", device="cpu")
    segmenter(np.full((HEIGHT, WIDTH, 3), (200, 90, 10), np.uint8), vocabulary="cat")
    ((sample,), _, _) = segmenter.model.seen[-1]
    assert (sample["image"][0] == first).all()


def test_paths_arrays_and_pil_images_give_the_same_result(segmenter, image, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    results = segmenter([str(path), path, image, Image.fromarray(image)], vocabulary="cat")
    for result in results:
        np.testing.assert_array_equal(result.image, image)
        assert result.segments == results[0].segments
    assert [result.file_name for result in results] == [str(path), str(path), "", ""]


def test_images_stored_sideways_are_turned_upright(segmenter, image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    stored = Image.open(tmp_path / "a.png")
    for result in segmenter([tmp_path / "a.png", stored], vocabulary="cat"):
        assert result.panoptic_map.shape == (WIDTH, HEIGHT)


def test_things_below_min_score_are_left_out_and_stuff_stays(segmenter, image):
    result = segmenter(image, vocabulary="cat; grass:stuff", min_score=0.7)
    assert [segment.name for segment in result.segments] == ["grass"]
    assert (result.panoptic_map[: HEIGHT // 2] == 0).all()
    assert (result.panoptic_map[HEIGHT // 2 :] == 2).all()


def test_the_json_holds_names_scores_and_masks(segmenter, image):
    result = segmenter(image, vocabulary="песок:stuff; cat")
    content = json.loads(result.to_json())
    assert content["class_names"] == ["песок", "cat"]
    assert (content["height"], content["width"]) == (HEIGHT, WIDTH)
    (first, second) = content["segments"]
    assert (first["name"], first["score"], first["isthing"]) == ("cat", 0.6, True)
    assert first["bbox"] == [0, HEIGHT // 2, WIDTH, HEIGHT // 2]
    assert second["area"] == HEIGHT // 2 * WIDTH
    np.testing.assert_array_equal(coco_mask.decode(first["segmentation"]), result.panoptic_map == first["id"])


def test_saving_writes_the_drawing_or_the_json_by_the_extension_and_makes_folders(segmenter, image, tmp_path):
    result = segmenter(image, vocabulary="cat")
    result.save(tmp_path / "new" / "a.png")
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "new" / "a.png")), result.draw())
    result.save(tmp_path / "new" / "a.json")
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == json.loads(result.to_json())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.json", "a.png"]


def test_an_unknown_extension_is_refused_and_nothing_is_written(segmenter, image, tmp_path):
    with pytest.raises(ValueError, match=r"'\.xyz' is not an image format; use \.png"):
        segmenter(image, vocabulary="cat").save(tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


def test_a_result_without_segments_can_be_drawn_and_written(image):
    result = Segmentation(image, np.zeros((HEIGHT, WIDTH), np.int32), (), ("cat",))
    assert json.loads(result.to_json())["segments"] == []
    assert result.draw().dtype == np.uint8


def test_a_missing_image_is_named(segmenter, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image '.*none\.jpg' does not exist"):
        segmenter(tmp_path / "none.jpg", vocabulary="cat")


def test_an_unreadable_image_is_named(segmenter, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg"):
        segmenter(tmp_path / "text.jpg", vocabulary="cat")


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), torch.zeros(3, 4, 4), None],
)
def test_something_that_is_no_image_is_refused(segmenter, wrong):
    with pytest.raises(ValueError, match=r"RGB array \(h, w, 3\) uint8 with pixels, got"):
        segmenter(wrong, vocabulary="cat")


def test_a_path_a_pil_image_and_an_array_give_the_same_pixels(segmenter, tmp_path):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (40, 60), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray((deep >> 8).astype(np.uint8)).save(tmp_path / "turned.png", exif=turned)
    for path in (tmp_path / "deep.png", tmp_path / "turned.png"):
        in_memory = io.BytesIO(path.read_bytes())
        with Image.open(path) as image, Image.open(in_memory) as streamed:
            expected = read_image(path)
            for source in (path, image, streamed, expected):
                np.testing.assert_array_equal(segmenter(source, vocabulary="cat").image, expected)


def test_pixels_without_a_fixed_white_are_refused_from_a_file_and_from_memory(segmenter, tmp_path):
    Image.fromarray(np.ones((40, 60), np.float32)).save(tmp_path / "float.tif")
    for source in (tmp_path / "float.tif", Image.open(tmp_path / "float.tif")):
        with pytest.raises(ValueError, match="black and what is white"):
            segmenter(source, vocabulary="cat")


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_a_score_outside_its_range_is_refused(segmenter, image, score):
    with pytest.raises(ValueError, match="min_score must be in"):
        segmenter(image, vocabulary="cat", min_score=score)


def test_a_config_without_weights_is_refused(monkeypatch):
    monkeypatch.setattr(fcclip.segmenter, "build_model", lambda cfg: HalvesModel())
    with pytest.raises(ValueError, match=r"no weights: the config's MODEL\.WEIGHTS is empty"):
        Segmenter(get_cfg())


def test_missing_weights_are_named_before_the_model_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(fcclip.segmenter, "build_model", lambda cfg: pytest.fail("built"))
    with pytest.raises(FileNotFoundError, match=r"weights '.*none\.pth' not found"):
        Segmenter(get_cfg(), weights=tmp_path / "none.pth")


def test_an_unknown_pretrained_name_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown pretrained segmenter 'shape'\. Did you mean 'shapes'\?"):
        Segmenter.from_pretrained("shape")


def test_the_given_config_is_not_changed(monkeypatch):
    seen = []
    monkeypatch.setattr(fcclip.segmenter, "build_model", lambda cfg: seen.append(cfg) or HalvesModel())
    cfg = get_cfg()
    before = cfg.dump()
    Segmenter(cfg, weights="random", device="cpu")
    assert cfg.dump() == before
    assert seen[0].MODEL.DEVICE == "cpu"


def test_a_real_model_gives_a_map_of_the_images_size_that_holds_only_its_segments(tiny_cfg, image):
    torch.manual_seed(0)
    tiny_cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.0
    result = Segmenter(tiny_cfg, weights="random")(image, vocabulary="red circle; blue star, azure star; sand:stuff")
    assert result.panoptic_map.shape == (HEIGHT, WIDTH)
    assert set(np.unique(result.panoptic_map)) - {0} == {segment.id for segment in result.segments}
    assert {segment.name for segment in result.segments} <= {"red circle", "blue star", "sand"}
    for segment in result.segments:
        assert 0 < segment.area == result.mask(segment).sum()
        assert 0 <= segment.score <= 1


def test_weights_of_another_config_are_refused(tiny_cfg, tmp_path):
    save_weights(Segmenter(tiny_cfg, weights="random").model, tmp_path / "a.safetensors", full=True)
    Segmenter(tiny_cfg, weights=tmp_path / "a.safetensors")
    tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 9
    with pytest.raises(ValueError, match=r"(?s)do not fit the model.*NUM_OBJECT_QUERIES 8"):
        Segmenter(tiny_cfg, weights=tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", ["ade20k_r50", "coco"], ids=["RN50", "ConvNeXt-L"])
def test_published_configs_build_with_random_clip_weights_and_segment_a_image_on_the_cpu(suffix, image):
    name = f"coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_{suffix}.yaml"
    cfg = load_config(name, ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "", "INPUT.MIN_SIZE_TEST", "64"])
    result = Segmenter(cfg, weights="random", device="cpu")(image, vocabulary="red circle; sand:stuff")
    assert result.panoptic_map.shape == (HEIGHT, WIDTH)
    assert set(np.unique(result.panoptic_map)) <= {0, *(segment.id for segment in result.segments)}
