import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from fcclip.engine import RunLock
from fcclip.errors import InputError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")


def hold(folder: Path, ready, with_worker: bool) -> None:
    with RunLock(folder):
        is_worker = with_worker and os.fork() == 0
        if is_worker or not with_worker:
            ready.set()
        time.sleep(10)
        os._exit(0)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of the test's folder."""
    context = multiprocessing.get_context("fork")
    processes = []

    def start(*, with_worker: bool = False):
        ready = context.Event()
        processes.append(context.Process(target=hold, args=(tmp_path, ready, with_worker)))
        processes[-1].start()
        assert ready.wait(20)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_second_training_is_refused_with_the_name_of_the_first(tmp_path, holder):
    first = holder()
    for _ in range(2):  # a refused one leaves the lock to its owner
        with pytest.raises(InputError) as error, RunLock(tmp_path):
            pytest.fail("entered")
        text = str(error.value)
        assert f"OUTPUT_DIR '{tmp_path}' is in use by process {first.pid} on {os.uname().nodename}" in text
        assert f"training there since {time.strftime('%Y-')}" in text


def test_a_folder_is_free_again_when_a_training_has_ended(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), RunLock(tmp_path):
            assert f"process {os.getpid()} " in (tmp_path / ".locked_by").read_text()
            raise KeyError
        assert not (tmp_path / ".locked_by").exists()


def test_two_trainings_of_one_process_exclude_each_other_but_not_in_other_folders(tmp_path):
    (tmp_path / "other").mkdir()
    refused = pytest.raises(InputError, match=f"process {os.getpid()} ")
    with RunLock(tmp_path), RunLock(tmp_path / "other"), refused, RunLock(tmp_path):
        pytest.fail("entered")


@pytest.mark.parametrize("with_worker", [False, True])
def test_a_killed_training_does_not_block_the_next(tmp_path, holder, with_worker):
    first = holder(with_worker=with_worker)  # the worker outlives it, and had inherited its files
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with RunLock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".locked_by").read_text()


def test_a_file_system_that_cannot_lock_is_warned_of(tmp_path, monkeypatch, caplog):
    def fail(_) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", fail)
    with RunLock(tmp_path):
        assert "No locks available" in caplog.text
