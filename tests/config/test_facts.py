"""What a key affects is said where it is defined."""

import pytest

from fcclip.config import affects, flatten, get_cfg, keys_that, why_without_effect

RESUME = [  # of each kind: what would go wrong were the mark lost
    ("SOLVER.BASE_LR", "training"),
    ("DATASETS.TRAIN", "training"),
    ("SEED", "training"),
    ("FINETUNE.METHOD", "training"),
    ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "model"),
    ("INPUT.FORMAT", "model"),
    ("MODEL.FC_CLIP.GEOMETRIC_ENSEMBLE_BETA", "prediction"),
    ("MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", "prediction"),
    ("INPUT.MIN_SIZE_TEST", "prediction"),
    ("MODEL.WEIGHTS", "nothing"),
    ("MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", "nothing"),
    ("SOLVER.CHECKPOINT_KEEP", "nothing"),
    ("WANDB.NAME", "nothing"),
    ("MODEL.SWIN.DEPTHS", "nothing"),
]


@pytest.mark.parametrize(("key", "affected"), RESUME)
def test_a_key_affects_what_its_mark_says(key, affected):
    assert key in flatten(get_cfg())
    assert affects(key) == affected
    assert (key in keys_that("harmless_at_resume")) == (affected in ("prediction", "nothing"))
    assert (key in keys_that("decides_predictions")) == (affected in ("model", "prediction"))


def test_a_key_that_is_not_known_affects_what_its_group_does():
    assert affects("TEST.LATER") == affects("WANDB.LATER.STILL") == "nothing"
    assert affects("MODEL.LATER") == "model" and affects("LATER") == "training"


def test_facts_name_leaves_only_and_an_unknown_fact_is_our_mistake():
    assert "MODEL.SWIN.DEPTHS" in keys_that("without_effect") and "MODEL.SWIN" not in keys_that("without_effect")
    assert set(keys_that("chooses_clip")) == {
        f"MODEL.FC_CLIP.{name}" for name in ("CLIP_MODEL_NAME", "CLIP_PRETRAINED_WEIGHTS", "QUICK_GELU")
    }
    assert "MODEL.MASK_FORMER.NHEADS" in keys_that("changes_meaning")
    assert "MODEL.MASK_FORMER.HIDDEN_DIM" in keys_that("changes_shapes")
    with pytest.raises(AssertionError):
        keys_that("chooses_clipp")


def test_only_keys_without_effect_have_a_reason():
    assert {key for key in flatten(get_cfg()) if why_without_effect(key)} == set(keys_that("without_effect"))


def test_every_tree_of_defaults_is_a_fresh_one():
    first, second = get_cfg(), get_cfg()
    first.MODEL.PIXEL_STD.append(2.0)
    first.SOLVER.STEPS = (7,)
    assert second.MODEL.PIXEL_STD == [1.0, 1.0, 1.0] and second.SOLVER.STEPS == (30000,)
