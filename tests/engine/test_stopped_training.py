"""A training that is asked to stop leaves with 75 and goes on alike; an evaluation that was cut short is done again."""

import os
import signal

import pytest

from fcclip.engine import REQUEUE_EXIT_CODE
from tests.conftest import tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork"),
]

# Point -> how the run ended, the checkpoint it left, and after which iteration the evaluation is done again.
EXPECTED = {
    "SIGTERM while the first batch is loaded": (REQUEUE_EXIT_CODE, "model_0000000.pth", None),
    "SIGUSR1 in a step": (REQUEUE_EXIT_CODE, "model_0000002.pth", None),
    "SIGTERM in the step before an evaluation": (REQUEUE_EXIT_CODE, "model_0000003.pth", 3),
    "SIGTERM in an evaluation": (REQUEUE_EXIT_CODE, "model_0000001.pth", 1),
    "SIGUSR1 in the evaluation that chooses the best": (REQUEUE_EXIT_CODE, "model_0000001.pth", 1),
    "SIGTERM in the last evaluation": (REQUEUE_EXIT_CODE, "model_final.pth", None),
    "SIGKILL in an evaluation": (-signal.SIGKILL, "model_0000003.pth", 3),
    "SIGKILL in the write of best.pth": (-signal.SIGKILL, "model_0000001.pth", 1),
    "SIGKILL between best.pth and the note": (-signal.SIGKILL, "model_0000001.pth", 1),
    "SIGKILL after an evaluation": (-signal.SIGKILL, "model_0000003.pth", None),
}


@pytest.fixture(scope="module")
def reports(run_forked_trainings) -> dict[str, dict]:
    """What became of every stopped training, by the name of the point."""
    cfg = tiny_config()
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = ("shapes_val",), 2
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 64
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    cfg.SOLVER.BEST.METRIC = "sem_seg/mIoU"
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 2, 6, (5,), 2
    return run_forked_trainings("stopped_training.py", cfg)


def test_every_point_was_reached(reports):
    assert reports.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_stopped_training_leaves_the_checkpoint_and_the_code_that_it_should(reports, name):
    ended, last, _ = EXPECTED[name]
    assert (reports[name]["ended"], reports[name]["last"]) == (ended, last)
    asked = name.split()[0]
    if ended == REQUEUE_EXIT_CODE:
        assert f"{asked}: finishing this iteration, then saving and leaving" in reports[name]["log"]
    assert reports[name]["unreadable"] == []


@pytest.mark.parametrize("name", EXPECTED)
def test_the_resumed_training_ends_bit_identical_and_records_every_evaluation_once(reports, name):
    assert reports[name]["resumed"] == 0
    assert reports[name]["differences"] == []


@pytest.mark.parametrize("name", EXPECTED)
def test_an_evaluation_is_done_again_only_if_it_was_cut_short(reports, name):
    again = EXPECTED[name][2]
    text = "the evaluation after iteration"
    if again is None:
        assert text not in reports[name]["log"]
    else:
        assert f"{text} {again} was not finished; doing it now" in reports[name]["log"]
