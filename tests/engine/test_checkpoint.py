"""Checkpoints of a run: written whole, one after the other, and read again."""

import os
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch

from fcclip.engine import Checkpointer, load_checkpoint, save_checkpoint
from fcclip.files import write_atomically

# ---- writing ----


def test_a_failing_write_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"value": 1})

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*No space left.*untouched; is the disk full"):
        write_atomically(path, fail)
    assert load_checkpoint(path) == {"value": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"value": 1})
    (tmp_path / ".a.pth.writing").symlink_to("/dev/full")
    with pytest.raises(OSError, match="is the disk full"):
        save_checkpoint(path, {"value": torch.zeros(100_000)})
    assert load_checkpoint(path) == {"value": 1}


def test_a_crash_before_the_rename_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"value": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"value": 2})
    assert load_checkpoint(path) == {"value": 1}


def test_last_checkpoint_names_the_newest_and_old_periodic_ones_are_removed(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.last() is None
    for iteration in (9, 19, 29):
        checkpointer.save_periodic(iteration, {"iteration": iteration})
        checkpointer.wait()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000029.pth"
    checkpointer.save("model_final", {"iteration": 30})
    checkpointer.wait()
    assert checkpointer.last() == tmp_path / "model_final.pth"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000019.pth",
        "model_0000029.pth",
        "model_final.pth",
    ]


def test_keep_zero_keeps_every_checkpoint(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=0)
    for iteration in range(5):
        checkpointer.save_periodic(iteration, {})
    checkpointer.wait()
    assert len(list(tmp_path.glob("model_*.pth"))) == 5


def test_checkpoints_of_an_earlier_longer_run_neither_count_nor_vanish(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_periodic(99, {})
    checkpointer.wait()
    checkpointer.save_periodic(9, {})
    checkpointer.wait()
    checkpointer.save_periodic(19, {})
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model_0000019.pth", "model_0000099.pth"]


def test_a_purge_that_fails_is_a_warning_and_the_new_checkpoint_stands(tmp_path, monkeypatch, caplog):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_periodic(9, {})
    checkpointer.wait()
    monkeypatch.setattr(type(tmp_path), "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("read-only")))
    checkpointer.save_periodic(19, {"value": 2})
    checkpointer.wait()
    assert "could not remove" in caplog.text and load_checkpoint(checkpointer.last()) == {"value": 2}


def test_a_last_checkpoint_that_names_a_missing_file_says_what_is_there(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    save_checkpoint(tmp_path / "model_0000004.pth", {})
    with pytest.raises(FileNotFoundError, match=r"names 'model_0000009.pth'.*in the folder: model_0000004.pth"):
        Checkpointer(tmp_path).last()


def test_what_a_killed_run_half_wrote_is_cleaned_up(tmp_path):
    (tmp_path / ".model_final.pth.writing").write_bytes(b"half")
    (tmp_path / "keep.txt").write_text("x")
    Checkpointer(tmp_path).remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


# ---- writing while the training goes on ----


@pytest.fixture
def disk(monkeypatch):
    """What `torch.save` does: `full` makes it fail with `error`, `go` cleared makes it wait; `wrote` lists contents."""
    error = OSError(28, "No space left on device")
    disk = SimpleNamespace(full=False, error=error, go=threading.Event(), wrote=[])
    disk.go.set()
    real = torch.save

    def save(content, file):
        assert disk.go.wait(20), "nobody let the write go on"
        if disk.full:
            file.write(b"half")
            raise disk.error
        real(content, file)
        disk.wrote.append(content)

    monkeypatch.setattr(torch, "save", save)
    yield disk
    disk.go.set()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_what_was_handed_over_whatever_happens_to_it_later(tmp_path, disk):
    disk.go.clear()
    weight, inner = torch.zeros(3), torch.zeros(2)
    content = {"a": weight, "state": {0: {"b": [inner, (inner[:1], "word")]}}, "numbers": [1, 2]}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save("model_final", content)
    assert names(tmp_path) in ([], [".model_final.pth.writing"])
    weight.fill_(7)
    inner.fill_(7)
    content["numbers"].append(3)
    content["late"] = True
    disk.go.set()
    checkpointer.wait()
    loaded = load_checkpoint(tmp_path / "model_final.pth")
    assert not loaded["a"].any() and not loaded["state"][0]["b"][0].any() and not loaded["state"][0]["b"][1][0].any()
    assert loaded["state"][0]["b"][1][1] == "word" and loaded["numbers"] == [1, 2] and "late" not in loaded


def test_files_are_written_one_after_the_other_in_the_order_they_were_handed_over(tmp_path, disk):
    checkpointer = Checkpointer(tmp_path, keep=0)
    disk.go.clear()
    handed_over = threading.Thread(
        target=lambda: [checkpointer.save_periodic(number, {"number": number}) for number in range(5)]
    )
    handed_over.start()
    handed_over.join(0.2)
    assert handed_over.is_alive() and len(list(tmp_path.glob("*.writing"))) <= 1  # the second waits for the first
    disk.go.set()
    handed_over.join()
    checkpointer.wait()
    assert [content["number"] for content in disk.wrote] == list(range(5))
    assert checkpointer.last().name == "model_0000004.pth"


def test_a_write_that_fails_harms_nothing_is_told_and_is_tried_again_with_the_next(tmp_path, disk, caplog):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_periodic(1, {"iteration": 1})
    checkpointer.settle()
    disk.full = True
    checkpointer.save_periodic(3, {"iteration": 3})
    checkpointer.settle()
    checkpointer.check()
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    assert load_checkpoint(checkpointer.last()) == {"iteration": 1}
    assert "model_0000003.pth" in caplog.text and "No space left on device" in caplog.text
    disk.full = False
    checkpointer.save_periodic(5, {"iteration": 5})
    checkpointer.wait()
    assert names(tmp_path) == ["last_checkpoint", "model_0000005.pth"]


def test_the_second_failure_in_a_row_is_raised_and_the_one_before_a_good_write_is_forgotten(tmp_path, disk):
    checkpointer = Checkpointer(tmp_path)
    for number, full in enumerate((True, False, True)):
        disk.full = full
        checkpointer.save_periodic(number, {})
        checkpointer.settle()
        checkpointer.check()
    checkpointer.save_periodic(3, {})
    checkpointer.settle()
    with pytest.raises(OSError, match="cannot write .*model_0000003.pth"):
        checkpointer.check()
    with pytest.raises(OSError, match="cannot write .*model_0000003.pth"):
        checkpointer.save_periodic(4, {})
    assert checkpointer.last().name == "model_0000001.pth"


def test_a_failure_at_the_end_is_raised_even_when_an_evaluation_was_noted_after_it(tmp_path, disk):
    checkpointer = Checkpointer(tmp_path)
    disk.full = True
    checkpointer.save("model_final", {})
    checkpointer.save_evaluation({"iteration": 5})
    with pytest.raises(OSError, match="cannot write .*model_final.pth"):
        checkpointer.wait()
    assert checkpointer.noted_evaluation() == {"iteration": 5}
    checkpointer.wait()  # told once


def test_our_own_mistake_in_a_write_is_raised_at_once(tmp_path, disk):
    disk.full, disk.error = True, TypeError("cannot pickle a lambda")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save("model_final", {})
    checkpointer.settle()
    with pytest.raises(TypeError, match="cannot pickle a lambda"):
        checkpointer.check()


def test_as_a_context_it_waits_and_hides_no_other_error(tmp_path, disk):
    disk.go.clear()
    threading.Timer(0.2, disk.go.set).start()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save("model_final", {})
    assert names(tmp_path) == ["last_checkpoint", "model_final.pth"]
    disk.full = True
    with pytest.raises(OSError, match="cannot write"), checkpointer:
        checkpointer.save("model_final", {})
    with pytest.raises(LookupError), checkpointer:
        checkpointer.save("model_final", {})
        raise LookupError


def test_best_weights_are_neither_named_as_the_last_checkpoint_nor_purged(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save_evaluation({"iteration": 0, "best": {"value": 2.0}}, best={"iteration": 0})
    checkpointer.wait()
    assert checkpointer.last() is None
    assert checkpointer.noted_evaluation() == {"iteration": 0, "best": {"value": 2.0}}
    for number in range(3):
        checkpointer.save_periodic(number, {})
    checkpointer.save_evaluation({"iteration": 2})
    checkpointer.wait()
    assert names(tmp_path) == ["best.pth", "last_checkpoint", "last_evaluation", "model_0000002.pth"]
    assert checkpointer.last().name == "model_0000002.pth" and load_checkpoint(tmp_path / "best.pth")["iteration"] == 0
    checkpointer.forget_evaluation()
    checkpointer.forget_evaluation()
    assert checkpointer.noted_evaluation() == {} and (tmp_path / "best.pth").exists()


def test_an_evaluation_is_noted_only_when_its_best_weights_are_written(tmp_path, disk):
    checkpointer = Checkpointer(tmp_path)
    disk.full = True
    checkpointer.save_evaluation({"iteration": 1}, best={"iteration": 1})
    checkpointer.settle()
    assert names(tmp_path) == []
    disk.full = False
    checkpointer.save_evaluation({"iteration": 3})
    checkpointer.wait()
    assert load_checkpoint(tmp_path / "best.pth") == {"iteration": 1}
    assert checkpointer.noted_evaluation() == {"iteration": 3}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_disk_that_is_really_full_leaves_what_was_there(small_disk, pieces, caplog):
    """With one large tensor torch tells of an unexpected position instead of the full disk."""
    checkpointer = Checkpointer(small_disk, keep=1)
    checkpointer.save_periodic(1, {"value": torch.rand(20_000)})
    checkpointer.settle()
    before = (small_disk / "model_0000001.pth").read_bytes()
    for number in (3, 5):
        checkpointer.save_periodic(number, {str(piece): torch.rand(80_000 // pieces) for piece in range(pieces)})
        checkpointer.settle()
    with pytest.raises(OSError, match="cannot write .*model_0000005.pth.*No space left on device.*disk full"):
        checkpointer.check()
    assert (small_disk / "model_0000001.pth").read_bytes() == before
    assert names(small_disk) == ["last_checkpoint", "model_0000001.pth"]
    assert checkpointer.last().name == "model_0000001.pth" and caplog.text.count("No space left on device") == 2


def test_a_folder_that_has_become_read_only_leaves_what_was_there(small_disk, caplog):
    checkpointer = Checkpointer(small_disk)
    checkpointer.save_periodic(1, {"value": 1})
    checkpointer.settle()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    checkpointer.save_periodic(3, {"value": 3})
    checkpointer.save_evaluation({"iteration": 3})
    with pytest.raises(OSError, match="cannot write .*Read-only file system.*read-only"):
        checkpointer.wait()
    assert load_checkpoint(checkpointer.last()) == {"value": 1} and "last_evaluation" in caplog.text


# ---- reading it again ----


@pytest.mark.parametrize(("place", "damaged", "good"), [("in a tensor", (5,), 3), ("in the pickle", (5, 3), 1)])
def test_one_wrong_bit_is_found_and_a_good_checkpoint_of_the_run_is_named(tmp_path, place, damaged, good):
    checkpointer = Checkpointer(tmp_path)
    for iteration in (1, 3, 5):
        checkpointer.save_periodic(iteration, {"model": {"weight": torch.rand(50_000)}, "iteration": iteration})
    checkpointer.save_evaluation({}, best={"iteration": 5})
    checkpointer.wait()
    for iteration in (1, 3, 5):
        path = tmp_path / f"model_000000{iteration}.pth"
        if iteration in damaged:
            content = bytearray(path.read_bytes())
            content[100_000 if place == "in a tensor" else content.index(b"iteration") + 3] ^= 1
            path.write_bytes(content)
        os.utime(path, (iteration, iteration))  # the order in which they were written
    with pytest.raises(ValueError, match="model_0000005.pth' (is damaged|cannot be read).*earlier checkpoint"):
        load_checkpoint(checkpointer.last())
    name = f"model_000000{good}.pth"
    with pytest.raises(ValueError, match=f"can be read is {name}: .* write that name into .*last_checkpoint"):
        checkpointer.load(checkpointer.last())
    (tmp_path / "last_checkpoint").write_text(name)
    assert checkpointer.load(checkpointer.last())["iteration"] == good


def test_a_damaged_checkpoint_without_another_says_so(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save("model_final", {"value": torch.rand(1000)})
    checkpointer.wait()
    (tmp_path / "model_final.pth").write_bytes((tmp_path / "model_final.pth").read_bytes()[:-100])
    with pytest.raises(ValueError, match="no other checkpoint that can be read"):
        checkpointer.load(tmp_path / "model_final.pth")
