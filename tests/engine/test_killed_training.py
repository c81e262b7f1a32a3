"""A training that is killed anywhere and resumed ends where an uninterrupted one does, bit for bit."""

import os
import signal

import pytest

from tests.conftest import tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork"),
]


@pytest.fixture(scope="module")
def reports(run_forked_trainings) -> dict[str, dict]:
    """What became of every killed training, by the name of the point."""
    cfg = tiny_config()
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 4, 2, 8, (5,)
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_KEEP = 2, 1
    return run_forked_trainings("killed_training.py", cfg)


def is_at_random(name: str) -> bool:
    return name.startswith("random ")


def test_every_named_point_was_reached(reports):
    assert len(reports) == 13 and sum(map(is_at_random, reports)) == 3
    ended = {report["ended"] for name, report in reports.items() if not is_at_random(name)}
    assert ended == {-signal.SIGKILL}
    assert {report["ended"] for name, report in reports.items() if is_at_random(name)} <= {-signal.SIGKILL, 0}


@pytest.mark.parametrize(
    ("name", "last", "checkpoints", "half_written"),
    [
        ("before the first checkpoint", "", "", ""),
        ("mid-forward", "3", "3", ""),
        ("mid-accumulation", "3", "3", ""),
        ("before the flush", "1", "1", "3"),
        ("between write and rename", "1", "1", "3"),
        ("between rename and last_checkpoint", "1", "13", ""),
        ("in the purge", "3", "13", ""),
        ("after the purge", "3", "3", ""),
        ("in the overlapped write", "1", "1", "3"),
    ],
)
def test_each_point_is_where_its_name_says(reports, name, last, checkpoints, half_written):
    """By the iterations of the checkpoints that are left."""
    left = reports[name]["left"]
    assert reports[name]["last"] == (f"model_000000{last}.pth" if last else "")
    assert [one for one in left if one.startswith("model_")] == [f"model_000000{one}.pth" for one in checkpoints]
    expected = [f".model_000000{one}.pth.writing" for one in half_written]
    assert [one for one in left if one.startswith(".model_")] == expected


def test_no_kill_leaves_an_unreadable_checkpoint(reports):
    assert {name: report["unreadable"] for name, report in reports.items() if report["unreadable"]} == {}


def test_every_resumed_training_ends_bit_identical_with_the_same_losses(reports):
    assert {name: report["differences"] for name, report in reports.items() if report["differences"]} == {}
    assert {report["resumed"] for report in reports.values()} == {0}


def test_resuming_removes_what_was_half_written(reports):
    assert {name: report["half_written"] for name, report in reports.items() if report["half_written"]} == {}
