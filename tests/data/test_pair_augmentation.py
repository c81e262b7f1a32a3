"""What Fusioner is trained on: an image and one of its classes, cropped and warped."""

import numpy as np
import pytest
import torch
from PIL import Image

from fcclip.config import get_cfg
from fcclip.data import build_test_mapper, build_train_mapper
from fcclip.data.pair_augmentation import PairAugmentation

SIZE = (60, 90)


@pytest.fixture
def record(tmp_path):
    """Left half class 3, right half class 7, ignored border on top; the image has the value of the mask."""
    mask = np.full(SIZE, 3, np.uint8)
    mask[:, 45:], mask[:4] = 7, 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.stack([mask] * 3, -1)).save(tmp_path / "image.png")
    files = {"file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / "mask.png")}
    return {**files, "image_id": "image__07", "mask_value": 7, "class_name": "cat", "category_id": 2}


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.IMAGE_SIZE, cfg.INPUT.FORMAT = "fusioner_pairs", 32, "RGB"
    cfg.INPUT.PAIRS.JITTER = 0.0
    return cfg


def samples(cfg, record, number=40):
    mapper = build_train_mapper(cfg, {"ignore_label": 255})
    return [mapper(record, np.random.default_rng(seed)) for seed in range(number)]


def test_a_sample_prompts_one_class_and_all_else_is_negative_or_ignored(cfg, record):
    for sample in samples(cfg, record):
        assert sample["image"].shape == (3, 32, 32) and sample["image"].dtype == torch.uint8
        assert sample["vocabulary"].class_names == ("cat",) and sample["targets"].labels.tolist() == [0]
        truth = sample["targets"].expand()[0]
        assert truth.shape == sample["ignored"].shape == (32, 32) and not (truth & sample["ignored"]).any()


def test_image_and_mask_move_together(cfg, record):
    cfg.INPUT.PAIRS.BORDER = "background"
    near = [
        (sample["image"][0][sample["targets"].expand()[0]].float() - 7).abs().median()
        for sample in samples(cfg, record)
        if sample["targets"].expand().any()
    ]
    assert np.median(near) <= 1 and len(near) > 20  # noise and resized edges aside


@pytest.mark.parametrize("border", ["ignore", "background"])
def test_what_a_warp_brings_in_is_ignored_or_background(cfg, border):
    augmentation = PairAugmentation(side=32, probability=1.0, border=border)
    everything, values = np.ones(SIZE, np.uint8), set()
    for seed in range(20):
        geometry = augmentation.draw(*SIZE, np.random.default_rng(seed))
        values |= set(np.unique(geometry.apply_label_map(everything, padding=255)).tolist())
    assert values == {1, 255 if border == "ignore" else 0}


def test_without_augmentation_the_whole_shorter_side_is_seen(record):
    augmentation = PairAugmentation(side=32, probability=0.0)
    for seed in range(5):
        geometry = augmentation.draw(*SIZE, np.random.default_rng(seed))
        rows, columns = geometry.box
        assert rows == slice(0, 60) and columns.stop - columns.start == 60 and not geometry.warps


def test_the_same_random_numbers_give_the_same_sample(cfg, record):
    cfg.INPUT.PAIRS.JITTER = 0.5
    for first, second in zip(samples(cfg, record, 8), samples(cfg, record, 8)):
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["targets"].id_map, second["targets"].id_map)


def test_a_test_sample_brings_its_class_and_may_be_squashed(cfg, record):
    cfg.INPUT.MIN_SIZE_TEST = 0
    sample = build_test_mapper(cfg)(record)
    assert sample["image"].shape == (3, *SIZE) and sample["vocabulary"].class_names == ("cat",)
    cfg.INPUT.SQUARE_TEST = 16
    sample = build_test_mapper(cfg)(record)
    assert sample["image"].shape == (3, 16, 16) and (sample["height"], sample["width"]) == SIZE


@pytest.mark.parametrize(
    ("key", "value"), [("AUG_PROB", 1.5), ("SCALE_RANGE", [0.0, 1.0]), ("BORDER", "black"), ("JITTER", 0.7)]
)
def test_values_that_cannot_work_are_refused(cfg, key, value):
    cfg.INPUT.PAIRS[key] = value
    with pytest.raises(ValueError, match=r"INPUT.PAIRS"):
        build_train_mapper(cfg, {"ignore_label": 255})


def test_other_data_sets_are_told_which_mapper_reads_them(cfg, record):
    del record["mask_value"]
    with pytest.raises(ValueError, match="has no mask_value"):
        samples(cfg, record, 1)
