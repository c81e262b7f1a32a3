import pytest

from fcclip.config import get_cfg
from fcclip.engine.run_folder import check_resume, compare_configs


def changed(**values):
    """A config with other values; A__B stands for A.B."""
    cfg = get_cfg()
    cfg.SEED = 1
    cfg.merge_from_list([word for key, value in values.items() for word in (key.replace("__", "."), value)])
    return cfg


STORED = changed().dump()


def test_a_config_is_equal_to_itself_after_a_round_trip():
    assert compare_configs(STORED, changed()) == ([], [])
    assert compare_configs(changed(SOLVER__STEPS=(3, 5), SOLVER__BASE_LR=1e-5).dump(), changed())[0] == [
        "SOLVER.BASE_LR: 1e-05 -> 0.001",
        "SOLVER.STEPS: [3, 5] -> [30000]",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("OUTPUT_DIR", "elsewhere"),
        ("MODEL__FC_CLIP__GEOMETRIC_ENSEMBLE_ALPHA", 0.1),
        ("DATALOADER__NUM_WORKERS", 0),
        ("SOLVER__CHECKPOINT_PERIOD", 7),
        ("SOLVER__MAX_ITER", 50000),
        ("SEED", -1),
    ],
)
def test_keys_that_training_does_not_depend_on_may_change(key, value):
    refused, (line,) = compare_configs(STORED, changed(**{key: value}))
    assert not refused and line.startswith(f"{key.replace('__', '.')}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEED", 2),
        ("DATASETS__TRAIN", ("shapes_train",)),
        ("SOLVER__BASE_LR", 0.002),
        ("SOLVER__STEPS", (100,)),
        ("MODEL__MASK_FORMER__NUM_OBJECT_QUERIES", 50),
    ],
)
def test_keys_that_change_what_is_trained_are_refused(key, value):
    (line,), harmless = compare_configs(STORED, changed(**{key: value}))
    assert not harmless and line.startswith(f"{key.replace('__', '.')}: ") and " -> " in line


def test_a_schedule_that_stretches_over_the_training_does_not_allow_another_length():
    stored = changed(SOLVER__LR_SCHEDULER_NAME="WarmupPolyLR").dump()
    longer = changed(SOLVER__LR_SCHEDULER_NAME="WarmupPolyLR", SOLVER__MAX_ITER=50000)
    assert compare_configs(stored, longer) == (["SOLVER.MAX_ITER: 40000 -> 50000"], [])


@pytest.mark.parametrize(
    ("iteration", "steps", "allowed"),
    [
        (29999, (35000,), True),
        (30000, (35000,), True),  # the next iteration is the first with the lower rate
        (30001, (35000,), False),
        (30001, (30000, 35000), True),
        (20000, (10000, 30000), False),
    ],
)
def test_steps_may_change_where_training_has_not_come_yet(iteration, steps, allowed):
    refused, harmless = compare_configs(STORED, changed(SOLVER__STEPS=steps), iteration=iteration)
    assert (len(refused), len(harmless)) == ((0, 1) if allowed else (1, 0))


def test_keys_of_another_version_count_when_they_are_switched_on():
    older, newer = changed(), changed()
    del older.SOLVER["CE_NORM"]
    newer.SOLVER.NEW_LOSS, newer.SOLVER.OLD_TRICK = 0.0, True
    assert compare_configs(older.dump(), changed()) == ([], [])
    assert compare_configs(older.dump(), changed(SOLVER__CE_NORM="global"))[0] == [
        "SOLVER.CE_NORM: no such key -> 'global'"
    ]
    assert compare_configs(newer.dump(), changed())[0] == ["SOLVER.OLD_TRICK: True -> no such key"]


def test_the_refusal_names_every_key_and_what_to_do():
    with pytest.raises(ValueError) as error:
        check_resume(
            STORED, changed(SOLVER__BASE_LR=0.002, SEED=9, TEST__EVAL_PERIOD=5), source="out/model_0000019.pth"
        )
    assert str(error.value).splitlines() == [
        "the training in 'out/model_0000019.pth' was begun with another config (there -> here):",
        "  SEED: 1 -> 9",
        "  SOLVER.BASE_LR: 0.001 -> 0.002",
        "Restore these keys to resume; or start a new run from its weights: another OUTPUT_DIR, MODEL.WEIGHTS "
        "out/model_0000019.pth, without --resume.",
    ]


def test_the_refusal_explains_scaling_to_the_number_of_processes():
    stored = changed(SOLVER__REFERENCE_WORLD_SIZE=8, SOLVER__IMS_PER_BATCH=16).dump()
    with pytest.raises(ValueError, match="as many as it was begun with"):
        check_resume(stored, changed(SOLVER__REFERENCE_WORLD_SIZE=4, SOLVER__IMS_PER_BATCH=8), source="x")


def test_harmless_changes_are_one_line_of_the_log(caplog):
    caplog.set_level("INFO")
    check_resume(STORED, changed(SOLVER__MAX_ITER=7, TEST__EVAL_PERIOD=5), source="x")
    (line,) = caplog.messages
    assert line.endswith("(there -> here): SOLVER.MAX_ITER: 40000 -> 7; TEST.EVAL_PERIOD: 0 -> 5")


def test_a_checkpoint_without_a_config_is_not_compared_and_the_log_says_so(caplog):
    check_resume("", changed(), source="old.pth")
    assert "old.pth holds no config" in caplog.text


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "7"])
def test_a_stored_config_that_is_none_is_an_error(text):
    with pytest.raises(ValueError, match="stored config"):
        compare_configs(text, changed())
