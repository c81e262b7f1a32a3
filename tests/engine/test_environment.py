import logging
import random

import numpy as np
import pytest
import torch

from fcclip.config import get_cfg
from fcclip.engine import (
    apply_numeric_settings,
    close_logging,
    environment_report,
    load_checkpoint,
    log_exception,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
    setup_logging,
)
from fcclip.engine.environment import git_state


def draws():
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item()


def test_random_states_go_through_a_checkpoint(tmp_path):
    np.random.randn()  # leaves a cached Gaussian behind
    save_checkpoint(tmp_path / "a.pth", {"random": random_state()})
    expected = draws()
    set_random_state(load_checkpoint(tmp_path / "a.pth")["random"])
    assert draws() == expected


def test_a_seed_fixes_every_generator():
    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first


def test_the_report_names_versions_and_device():
    report = environment_report(torch.device("cpu"))
    assert report["torch"] == torch.__version__.split("+")[0] and report["device"] == "cpu" and "fcclip" in report


def test_outside_a_checkout_there_is_no_commit(tmp_path):
    assert git_state(tmp_path) == "none"


def test_an_unknown_precision_is_refused():
    cfg = get_cfg()
    cfg.FLOAT32_PRECISION = "low"
    with pytest.raises(ValueError, match="FLOAT32_PRECISION must be '', highest, high or medium, got 'low'"):
        apply_numeric_settings(cfg, training=True)


@pytest.fixture
def package_log():
    yield logging.getLogger("fcclip.test")
    close_logging()


def test_the_log_goes_to_log_txt_and_to_standard_output(tmp_path, capsys, package_log):
    setup_logging(tmp_path)
    package_log.info("hello")
    assert "hello" in (tmp_path / "log.txt").read_text() and "hello" in capsys.readouterr().out
    setup_logging(tmp_path)  # a second run in the folder appends
    package_log.info("again")
    assert (tmp_path / "log.txt").read_text().count("\n") == 2


def test_other_ranks_write_to_files_of_their_own(tmp_path, capsys, package_log):
    setup_logging(tmp_path, rank=1)
    package_log.info("hello")
    assert "hello" in (tmp_path / "log.txt.rank1").read_text() and capsys.readouterr().out == ""


def test_a_traceback_goes_to_the_file_only(tmp_path, capsys, package_log):
    setup_logging(tmp_path)
    try:
        raise ValueError("broken")
    except ValueError:
        log_exception()
    assert "Traceback" in (tmp_path / "log.txt").read_text() and "Traceback" not in capsys.readouterr().out
