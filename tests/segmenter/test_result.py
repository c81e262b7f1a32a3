"""What a result holds, named anew, and written."""

import json

import numpy as np
import pytest
import supervision as sv
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import fcclip.modeling.text
from fcclip.vocabulary import Vocabulary
from tests.segmenter.conftest import NAMES

OTHERS = "yellow heart; red circle, red disc; orange circle; sand:stuff; water:stuff"


def same(one, other):
    for part in ("panoptic", "semantic", "embeddings"):
        np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
    assert one.segments == other.segments and one.instances == other.instances
    np.testing.assert_array_equal(one.outputs.scores, other.outputs.scores)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ensemble": (0.2, 1.0), "min_score": 0.5},
        {"unknown": True},
        {"unknown": "green cross; blue star; water"},
        {"others": True},
    ],
    ids=str,
)
def test_a_result_named_anew_is_that_of_a_fresh_call(segmenter, image, result, options):
    same(result.relabel(OTHERS, **options), segmenter(image, OTHERS, **options))


def test_what_is_not_said_stays_as_it_was(segmenter, image):
    first = segmenter(image, NAMES, unknown=True, min_score=0.3, ensemble=(0.5, 0.5))
    same(first.relabel(OTHERS), segmenter(image, OTHERS, unknown=True, min_score=0.3, ensemble=(0.5, 0.5)))
    same(first.relabel(unknown=False), segmenter(image, NAMES, min_score=0.3, ensemble=(0.5, 0.5)))


def test_what_other_names_fit_better_is_left_out(segmenter, image, result):
    found = segmenter(image, "green circle; blue star", others="shapes")
    assert found.class_names == ("green circle", "blue star")
    assert {segment.name for segment in found.segments} == {"blue star"}
    assert {segment.name for segment in found.relabel(others=False).segments} == {"green circle", "blue star"}
    assert found.relabel(unknown=True).class_names == ("green circle", "blue star", "unknown")
    with pytest.raises(ValueError, match="is called unknown .* or left out .*: give one"):
        segmenter(image, "green circle", others=True, unknown=True)


def test_naming_anew_looks_at_no_image_and_the_second_time_at_no_text(segmenter, result, monkeypatch):
    monkeypatch.setattr(segmenter.model, "score", lambda *_: pytest.fail("looked at the image"))
    result.relabel(OTHERS)
    monkeypatch.setattr(fcclip.modeling.text, "encode_class_names", lambda *_: pytest.fail("read names again"))
    assert result.relabel(Vocabulary.from_names(OTHERS)).segments
    segmenter.model.text_encoder._memory.clear()
    assert result.relabel(OTHERS).segments  # from the disk


def test_a_result_is_not_changed_by_naming_it_anew(result):
    before = result.segments
    assert result.relabel("yellow heart").class_names == ("yellow heart",)
    assert result.segments == before and result.class_names == ("red circle", "blue star", "sand")


def test_every_segment_knows_its_pixels_and_what_clip_sees_in_them(segmenter, image, result):
    assert [segment.score for segment in result.segments] == sorted((s.score for s in result.segments), reverse=True)
    for segment in result.segments:
        mask = result.panoptic == segment.id
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert segment.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert segment.area == mask.sum()
        np.testing.assert_array_equal(segment.mask, mask)
    np.testing.assert_allclose(np.linalg.norm(result.embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(result.embed(np.stack([s.mask for s in result.segments])), result.embeddings, atol=1e-6)
    texts = segmenter.model.text_encoder.encode(result.vocabulary).vectors.numpy()[[0, 1, 3]]  # azure star left out
    nearest = (result.embeddings @ texts.T).argmax(1)
    assert [result.class_names[index] for index in nearest] == [segment.name for segment in result.segments]


def test_the_json_holds_names_scores_and_masks(result):
    content = json.loads(result.to_json())
    assert content["class_names"] == ["red circle", "blue star", "sand"]
    assert (content["height"], content["width"]) == result.panoptic.shape
    assert [segment["name"] for segment in content["segments"]] == [segment.name for segment in result.segments]
    for record in content["segments"]:
        np.testing.assert_array_equal(coco_mask.decode(record["segmentation"]), result.panoptic == record["id"])
        assert record["bbox"] == coco_mask.toBbox(record["segmentation"]).astype(int).tolist()


def test_the_coco_tools_read_what_is_written_for_them(result, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(result.to_coco(image_id=7)))
    coco = COCO(tmp_path / "a.json")
    assert coco.getImgIds() == [7]
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[7])):
        assert coco.loadCats(annotation["category_id"])[0]["name"] == annotation["name"]
        np.testing.assert_array_equal(coco.annToMask(annotation), result.panoptic == annotation["id"])


def test_supervision_gets_boxes_masks_and_names(result):
    detections = result.to_supervision()
    assert detections["class_name"].tolist() == [segment.name for segment in result.segments]
    np.testing.assert_array_equal(detections.xyxy, sv.mask_to_xyxy(detections.mask) + np.array([0, 0, 1, 1]))
    assert len(result.to_supervision(result.instances)) == len(result.instances)
    assert len(result.to_supervision([])) == 0


def test_instances_lie_where_the_coco_tools_find_them(result):
    assert [instance.id for instance in result.instances] == list(range(1, 1 + len(result.instances)))
    for instance in result.instances:
        left, top, right, bottom = instance.box
        assert instance.record()["bbox"] == coco_mask.toBbox(dict(instance.rle)).astype(int).tolist()
        assert instance.mask[top:bottom, left:right].sum() == instance.mask.sum() == instance.area


def test_saving_writes_the_drawing_or_the_json_by_the_extension_and_makes_folders(result, tmp_path):
    result.save(tmp_path / "new" / "a.png")
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "new" / "a.png")), result.draw())
    result.save(tmp_path / "new" / "a.json")
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == json.loads(result.to_json())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.json", "a.png"]


def test_saving_into_a_folder_writes_both_under_the_name_of_the_image(segmenter, image, result, tmp_path):
    Image.fromarray(image).save(tmp_path / "beach.photo.png")
    segmenter(tmp_path / "beach.photo.png", NAMES).save(tmp_path / "out")
    result.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "beach.photo.json",
        "beach.photo.png",
        "image.json",
        "image.png",
    ]


def test_an_unknown_extension_is_refused_and_nothing_is_written(result, tmp_path):
    with pytest.raises(ValueError, match=r"'\.xyz' is not an image format; use \.png"):
        result.save(tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


def test_every_kind_is_drawn_and_another_is_refused(result):
    drawings = [result.draw(kind) for kind in ("panoptic", "instances", "semantic")]
    assert {drawing.shape for drawing in drawings} == {(768, 768, 3)}
    assert len({drawing.tobytes() for drawing in drawings}) == 3
    assert result.draw(legend=True).shape[0] > 768
    with pytest.raises(ValueError, match="unknown kind of drawing 'masks'"):
        result.draw("masks")


def test_a_result_without_segments_can_be_drawn_and_written(segmenter, image):
    result = segmenter(image, "yellow heart", min_score=1.0)
    assert json.loads(result.to_json())["segments"] == [] and result.to_coco()["annotations"] == []
    assert result.draw().dtype == np.uint8 and result.embeddings.shape == (0, 64)
