import importlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fcclip.errors import run_program
from fcclip.preparation import shapes_world
from fcclip.preparation.shapes_world import (
    COLOURS,
    IMAGE_SIZE,
    MIN_NOISE_SIGMA,
    SETS,
    SHAPES,
    render_image,
    world_classes,
)

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "datasets"))  # processes that a test starts find the script by this path too
prepare_shapes = importlib.import_module("prepare_shapes")
AREA = IMAGE_SIZE**2
SEEN = {c.id: c.seen for c in world_classes()}


@pytest.fixture(scope="module")
def images():
    """Thirty images of each set."""
    return {name: [render_image(0, name, i) for i in range(30)] for name in SETS}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    prepare_shapes.prepare(out=out, seed=3, num_images=4, num_workers=1, num_evaluation=3)
    return out / "shapes"


# -------------------------------------------------------------------------------------------------------------- classes


def test_a_third_of_the_things_and_of_the_grounds_is_unseen():
    things, grounds = [c for c in world_classes() if c.thing], [c for c in world_classes() if not c.thing]
    assert (len(things), sum(not c.seen for c in things)) == (48, 16)
    assert (len(grounds), sum(not c.seen for c in grounds)) == (12, 4)


def test_every_colour_and_every_shape_is_seen_in_some_pair():
    seen = [c for c in world_classes() if c.thing and c.seen]
    assert {c.colour for c in seen} == set(COLOURS)
    assert {c.shape for c in seen} == set(SHAPES)


def test_no_word_stands_for_two_classes():
    words = Counter(word for c in world_classes() for word in (c.name, *c.synonyms))
    assert max(words.values()) == 1
    assert "azure star" in words and "sand" in words


@pytest.mark.parametrize("seen_only", [False, True])
def test_the_vocabulary_files_hold_exactly_the_classes_of_the_world(seen_only):
    name = "shapes_seen" if seen_only else "shapes"
    file = REPOSITORY / "fcclip" / "vocabulary" / "names" / f"{name}.json"
    assert json.loads(file.read_text(encoding="utf-8"))["classes"] == [
        {"id": c.id, "name": c.name, "synonyms": list(c.synonyms), "thing": c.thing}
        for c in world_classes()
        if c.seen or not seen_only
    ]


# ------------------------------------------------------------------------------------------------------------- images


def test_the_same_seed_set_and_index_give_the_same_image():
    first, second = render_image(4, "val", 7), render_image(4, "val", 7)
    assert np.array_equal(first.image, second.image) and np.array_equal(first.piece_map, second.piece_map)
    assert first.pieces == second.pieces


@pytest.mark.parametrize("other", [(5, "val", 7), (4, "tune", 7), (4, "val", 8)])
def test_another_seed_set_or_index_gives_another_image(other):
    assert not np.array_equal(render_image(4, "val", 7).image, render_image(*other).image)


def test_there_are_four_shapes_on_average_and_never_none(images):
    for found in images.values():
        counts = [sum(piece.thing for piece in image.pieces) for image in found]
        assert np.mean(counts) >= 4 and min(counts) >= 1


def test_every_shape_covers_two_to_twelve_percent_and_shows_at_least_forty_percent_of_itself(images):
    for piece in (piece for found in images.values() for image in found for piece in image.pieces if piece.thing):
        assert 0.02 <= piece.visible_area / AREA <= piece.full_area / AREA <= 0.12
        assert piece.visible_area >= 0.4 * piece.full_area


def test_shapes_are_about_forty_to_ninety_pixels_across(images):
    extents = []
    for image in (image for found in images.values() for image in found):
        for number, piece in enumerate(image.pieces):
            if piece.thing and piece.visible_area == piece.full_area:
                rows, columns = np.nonzero(image.piece_map == number)
                extents.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert min(extents) >= 38 and max(extents) <= 110
    assert np.percentile(extents, 5) >= 42 and np.percentile(extents, 95) <= 95


def test_at_least_three_images_in_ten_have_an_occlusion(images):
    everything = [image for found in images.values() for image in found]
    occluded = [any(piece.visible_area < 0.95 * piece.full_area for piece in image.pieces) for image in everything]
    assert np.mean(occluded) >= 0.3


def test_every_pixel_belongs_to_one_of_one_to_three_grounds_or_to_a_shape(images):
    for image in (image for found in images.values() for image in found):
        grounds = [piece for piece in image.pieces if not piece.thing]
        assert 1 <= len(grounds) <= 3 and len({piece.category_id for piece in grounds}) == len(grounds)
        assert np.bincount(image.piece_map.ravel()).tolist() == [piece.visible_area for piece in image.pieces]


def test_unseen_classes_are_where_they_belong(images):
    def unseen(image, thing):
        return [not SEEN[piece.category_id] for piece in image.pieces if piece.thing == thing]

    for name in ("train", "val_seen"):
        assert not any(any(unseen(image, thing)) for image in images[name] for thing in (True, False))
    assert all(any(unseen(image, True)) for image in images["val_unseen"])
    for name in ("tune", "val"):
        share = np.mean([value for image in images[name] for value in unseen(image, True)])
        assert 0.2 < share < 0.47
        assert any(any(unseen(image, False)) for image in images[name])


def test_noise_is_at_least_six_levels(images):
    """Estimated where the image is smooth: the difference of diagonal neighbours inside plain shapes."""
    sigmas = []
    for image in images["val"]:
        grey = image.image[..., 1].astype(float)
        residual = (grey[:-1, :-1] - grey[1:, :-1] - grey[:-1, 1:] + grey[1:, 1:]) / 2
        inside = image.piece_map >= sum(not piece.thing for piece in image.pieces)
        inside = cv2.erode(inside.astype(np.uint8), np.ones((15, 15), np.uint8))[:-1, :-1] > 0
        inside &= (grey[:-1, :-1] > 40) & (grey[:-1, :-1] < 215)
        if inside.sum() > 500:
            sigmas.append(1.4826 * np.median(np.abs(residual[inside])))
    assert MIN_NOISE_SIGMA >= 6 / 255
    assert np.median(sigmas) >= 6


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_soft(shape):
    coverage, _ = shapes_world._shape_coverage(np.random.default_rng(0), shape)
    border = (coverage > 0) & (coverage < 1)
    outline_px = 4 * math.sqrt((coverage > 0.5).sum())
    assert border.sum() > 0.6 * outline_px and len(np.unique(coverage[border])) > 5


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("set_name", SETS)
def test_the_files_agree_with_each_other(written, set_name):
    panoptic = json.loads((written / "annotations" / f"panoptic_{set_name}.json").read_text())
    instances = json.loads((written / "annotations" / f"instances_{set_name}.json").read_text())
    assert len(panoptic["images"]) == len(panoptic["annotations"]) == (4 if set_name == "train" else 3)
    contiguous = {category["id"]: i for i, category in enumerate(panoptic["categories"])}
    things = {category["id"] for category in panoptic["categories"] if category["isthing"]}
    for image, annotation in zip(panoptic["images"], panoptic["annotations"], strict=True):
        assert annotation["image_id"] == image["id"]
        assert cv2.imread(str(written / set_name / image["file_name"])).shape == (image["height"], image["width"], 3)
        blue, green, red = np.moveaxis(
            cv2.imread(str(written / f"panoptic_{set_name}" / annotation["file_name"])).astype(int), -1, 0
        )
        id_map = red + 256 * green + 65536 * blue
        semantic = cv2.imread(
            str(written / f"panoptic_semseg_{set_name}" / annotation["file_name"]), cv2.IMREAD_UNCHANGED
        )
        assert semantic.dtype == np.uint8 and semantic.ndim == 2
        assert set(np.unique(id_map)) == {segment["id"] for segment in annotation["segments_info"]}
        masks = []
        for segment in annotation["segments_info"]:
            mask = id_map == segment["id"]
            rows, columns = np.nonzero(mask)
            assert segment["area"] == mask.sum() and segment["iscrowd"] == 0
            assert segment["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert (semantic[mask] == contiguous[segment["category_id"]]).all()
            if segment["category_id"] in things:
                masks.append((segment["category_id"], mask))
        found = [instance for instance in instances["annotations"] if instance["image_id"] == image["id"]]
        for (category_id, mask), instance in zip(masks, found, strict=True):
            assert instance["category_id"] == category_id and instance["area"] == mask.sum()
            assert np.array_equal(coco_mask.decode(instance["segmentation"]).astype(bool), mask)
    assert len({instance["id"] for instance in instances["annotations"]}) == len(instances["annotations"])


def test_training_files_know_the_seen_classes_only_and_the_others_all(written):
    for set_name, expected in (("train", 40), ("tune", 60), ("val_seen", 60)):
        panoptic = json.loads((written / "annotations" / f"panoptic_{set_name}.json").read_text())
        assert len(panoptic["categories"]) == expected
        assert all(
            category["id"] == next(c.id for c in world_classes() if c.name == category["name"])
            for category in panoptic["categories"]
        )


def test_two_processes_write_the_same_bytes_as_one(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prepare_shapes", prepare_shapes)  # pickling finds it, whoever imported it anew
    prepare_shapes.prepare(out=tmp_path, seed=3, num_images=4, num_workers=2, num_evaluation=3)
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "shapes") for path in (tmp_path / "shapes").rglob("*") if path.is_file()
    )
    for file in files:
        assert (written / file).read_bytes() == (tmp_path / "shapes" / file).read_bytes(), file


def test_a_complete_world_is_kept_and_another_one_refused(written, capsys):
    prepare_shapes.prepare(out=written.parent, seed=3, num_images=4, num_workers=1, num_evaluation=3)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds another world"):
        prepare_shapes.prepare(out=written.parent, seed=4, num_images=4, num_workers=1, num_evaluation=3)


def test_a_half_written_folder_is_refused(tmp_path, capsys):
    (tmp_path / "shapes" / "val").mkdir(parents=True)
    assert run_program(lambda: prepare_shapes.main(["--out", str(tmp_path), "--images", "1", "--workers", "1"])) == 1
    assert "has no world.json" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing_and_its_leftovers_are_removed(tmp_path, monkeypatch):
    (tmp_path / ".shapes.partial" / "val").mkdir(parents=True)
    monkeypatch.setattr(prepare_shapes, "write_set", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes.prepare(out=tmp_path, seed=0, num_images=1, num_workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [("--seed", "-1"), ("--images", "0"), ("--workers", "0")])
def test_bad_numbers_are_refused_by_name(tmp_path, capsys, option, value):
    assert run_program(lambda: prepare_shapes.main(["--out", str(tmp_path), option, value])) == 1
    assert f"{option} must be at least" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_program(lambda: prepare_shapes.main(["--out", str(tmp_path / "file"), "--images", "1"])) == 1
    assert f"cannot write into {tmp_path / 'file'}" in capsys.readouterr().err
