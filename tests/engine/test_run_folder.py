import json
import multiprocessing
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fcclip.config import get_cfg
from fcclip.engine import run_folder
from fcclip.engine.run_folder import RunLock, check_resume, compare_configs

posix = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX systems")
QUICK_S = 0.1  # between heartbeats


def lock_file(folder: Path) -> Path:
    return folder / ".lock"


def leave_a_lock(folder: Path, **changes) -> Path:
    """The file of a run that has not cleaned up."""
    note = {"host": "far-away", "pid": 4711, "what": "training", "started": "2026-01-02 03:04:05"} | changes
    lock_file(folder).write_text(json.dumps(note))
    return lock_file(folder)


def hold(folder: Path, ready, heartbeat_s: float = 30.0, with_worker: bool = False) -> None:
    with RunLock(folder, heartbeat_s=heartbeat_s):
        if with_worker and os.fork() == 0:
            ready.set()
            time.sleep(5)
            os._exit(0)
        if not with_worker:
            ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of the test's folder."""
    context = multiprocessing.get_context("fork")
    with ExitStack() as stack:

        def start(**options):
            ready = context.Event()
            process = context.Process(target=hold, args=(tmp_path, ready), kwargs=options)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            assert ready.wait(20)
            return process

        yield start


# ---- one training at a time ----


@posix
def test_a_second_training_is_refused_with_the_name_of_the_first(tmp_path, holder):
    first = holder()
    with pytest.raises(ValueError) as error, RunLock(tmp_path):
        pytest.fail("entered")
    text = str(error.value)
    assert f"OUTPUT_DIR '{tmp_path}' is in use by process {first.pid} on " in text
    assert f"training there since {time.strftime('%Y-')}" in text
    assert f"another OUTPUT_DIR, or stop the other first (kill {first.pid} on " in text


@posix
def test_a_refused_training_leaves_the_lock_to_its_owner(tmp_path, holder):
    first = holder()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"process {first.pid}"), RunLock(tmp_path):
            pytest.fail("entered")


def test_a_folder_is_free_again_when_a_training_has_ended(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), RunLock(tmp_path):
            note = json.loads(lock_file(tmp_path).read_text())
            assert note["pid"] == os.getpid() and note["what"] == "training"
            raise KeyError
        assert list(tmp_path.iterdir()) == []


@posix
def test_two_trainings_of_one_process_exclude_each_other(tmp_path):
    with RunLock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()}"), RunLock(tmp_path):
        pytest.fail("entered")


def test_other_folders_are_free(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with RunLock(tmp_path), RunLock(other):
        pass


@posix
@pytest.mark.parametrize("with_worker", [False, True])
def test_a_killed_training_does_not_block_the_next(tmp_path, holder, with_worker):
    first = holder(with_worker=with_worker)  # the worker outlives it, and had inherited its files
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    began = time.perf_counter()
    with RunLock(tmp_path):
        assert json.loads(lock_file(tmp_path).read_text())["pid"] == os.getpid()
    assert time.perf_counter() - began < 1


@posix
@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_a_lock_without_a_name_is_taken_over(tmp_path, content):
    lock_file(tmp_path).write_text(content)
    with RunLock(tmp_path, heartbeat_s=QUICK_S):
        pass


# ---- locks of other machines, which the system's lock may not reach ----


def test_a_training_on_another_machine_is_seen_by_its_heartbeat(tmp_path):
    path = leave_a_lock(tmp_path)
    beat = subprocess.Popen(["sh", "-c", f"while :; do sleep {QUICK_S}; touch '{path}'; done"])
    try:
        with pytest.raises(ValueError, match="process 4711 on far-away"), RunLock(tmp_path, heartbeat_s=QUICK_S):
            pytest.fail("entered")
    finally:
        beat.kill()
        beat.wait()
    assert json.loads(path.read_text())["pid"] == 4711


def test_a_training_that_died_on_another_machine_costs_three_heartbeats(tmp_path, caplog):
    leave_a_lock(tmp_path)
    began = time.perf_counter()
    with RunLock(tmp_path, heartbeat_s=QUICK_S):
        assert 3 * QUICK_S <= time.perf_counter() - began < 1
    assert "left by process 4711 on far-away; waiting up to 0 s" in caplog.text


def test_an_old_lock_of_another_machine_costs_nothing(tmp_path, caplog):
    path = leave_a_lock(tmp_path)
    os.utime(path, (time.time() - run_folder.STALE_S - 5,) * 2)
    with RunLock(tmp_path):
        pass
    assert not caplog.records


def test_the_heart_beats(tmp_path):
    with RunLock(tmp_path, heartbeat_s=QUICK_S):
        before = lock_file(tmp_path).stat().st_mtime_ns
        time.sleep(3 * QUICK_S)
        assert lock_file(tmp_path).stat().st_mtime_ns > before


@posix
@pytest.mark.parametrize("with_heart", [True, False])
def test_where_the_system_cannot_lock_the_process_and_its_heartbeat_decide(tmp_path, holder, monkeypatch, with_heart):
    monkeypatch.setattr(run_folder, "_lock", lambda _: None)
    first = holder(heartbeat_s=QUICK_S)
    if with_heart:
        with pytest.raises(ValueError, match=f"process {first.pid}"), RunLock(tmp_path, heartbeat_s=QUICK_S):
            pytest.fail("entered")
    else:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        began = time.perf_counter()
        with RunLock(tmp_path, heartbeat_s=QUICK_S):
            assert time.perf_counter() - began < 2 * QUICK_S


def test_a_lock_that_its_owner_gives_back_meanwhile_is_taken(tmp_path):
    path = leave_a_lock(tmp_path)
    gone = subprocess.Popen(["sh", "-c", f"sleep {QUICK_S}; rm '{path}'"])
    with RunLock(tmp_path, heartbeat_s=QUICK_S):
        gone.wait()
        assert json.loads(path.read_text())["pid"] == os.getpid()


# ---- the same config ----


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
        ("MODEL__WEIGHTS", "x.pth"),
        ("MODEL__DEVICE", "cpu"),
        ("MODEL__MSDA_ENGINE", "torch"),
        ("MODEL__COMPILE", "backbone"),
        ("MODEL__FC_CLIP__VOCABULARIES", "words"),
        ("MODEL__FC_CLIP__GEOMETRIC_ENSEMBLE_ALPHA", 0.1),
        ("MODEL__MASK_FORMER__TEST__PANOPTIC_ON", True),
        ("MODEL__RESNETS__DEPTH", 101),
        ("DATASETS__TEST", ("shapes_val",)),
        ("DATALOADER__NUM_WORKERS", 0),
        ("INPUT__MAX_SIZE_TEST", 640),
        ("SOLVER__CHECKPOINT_PERIOD", 7),
        ("SOLVER__CHECKPOINT_KEEP", 7),
        ("SOLVER__NON_FINITE", "skip:3"),
        ("SOLVER__BEST__METRIC", "sem_seg/mIoU"),
        ("SOLVER__MAX_ITER", 50000),
        ("TEST__EVAL_PERIOD", 7),
        ("TEST__AUG__FLIP", False),
        ("SEED", -1),
        ("DETERMINISTIC", True),
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
        ("INPUT__IMAGE_SIZE", 512),
        ("INPUT__MIN_SIZE_TRAIN", (640,)),
        ("SOLVER__BASE_LR", 0.002),
        ("SOLVER__IMS_PER_BATCH", 8),
        ("SOLVER__ACCUMULATE", 2),
        ("SOLVER__CLIP_GRADIENTS__CLIP_VALUE", 0.5),
        ("SOLVER__AMP__ENABLED", True),
        ("SOLVER__STEPS", (100,)),
        ("MODEL__MASK_FORMER__NUM_OBJECT_QUERIES", 50),
        ("MODEL__MASK_FORMER__DICE_WEIGHT", 5.0),
        ("MODEL__FC_CLIP__CLIP_MODEL_NAME", "RN50"),
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
