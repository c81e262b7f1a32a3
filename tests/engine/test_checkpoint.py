"""Checkpoints of a run: written whole, one after the other, and read again."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from fcclip.engine import Checkpointer, load_checkpoint, save_checkpoint


def save_periodic(checkpointer, iteration, content):
    checkpointer.save(f"model_{iteration:07d}", content)


# ---- writing ----


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("pieces", [1, 40])
def test_a_full_disk_is_reported_while_a_checkpoint_is_written(tmp_path, pieces):
    """With one large tensor torch tells of an unexpected position instead of the full disk."""
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"value": 1})
    (tmp_path / ".a.pth.writing").symlink_to("/dev/full")
    with pytest.raises(OSError, match="is the disk full"):
        save_checkpoint(path, {str(piece): torch.rand(100_000 // pieces) for piece in range(pieces)})
    assert load_checkpoint(path) == {"value": 1}


def test_last_checkpoint_names_the_newest_and_old_periodic_ones_are_removed(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.last() is None
    for iteration in (9, 19, 29):
        save_periodic(checkpointer, iteration, {"iteration": iteration})
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


def test_checkpoints_of_an_earlier_longer_run_neither_count_nor_vanish(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    save_periodic(checkpointer, 99, {})
    checkpointer.wait()
    save_periodic(checkpointer, 9, {})
    checkpointer.wait()
    save_periodic(checkpointer, 19, {})
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model_0000019.pth", "model_0000099.pth"]


def test_a_purge_that_fails_is_a_warning_and_the_new_checkpoint_stands(tmp_path, monkeypatch, caplog):
    checkpointer = Checkpointer(tmp_path, keep=1)
    save_periodic(checkpointer, 9, {})
    checkpointer.wait()
    monkeypatch.setattr(type(tmp_path), "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("read-only")))
    save_periodic(checkpointer, 19, {"value": 2})
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
        target=lambda: [save_periodic(checkpointer, number, {"number": number}) for number in range(5)]
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
    save_periodic(checkpointer, 1, {"iteration": 1})
    checkpointer.settle()
    disk.full = True
    save_periodic(checkpointer, 3, {"iteration": 3})
    checkpointer.settle()
    checkpointer.check()
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    assert load_checkpoint(checkpointer.last()) == {"iteration": 1}
    assert "model_0000003.pth" in caplog.text and "No space left on device" in caplog.text
    disk.full = False
    save_periodic(checkpointer, 5, {"iteration": 5})
    checkpointer.wait()
    assert names(tmp_path) == ["last_checkpoint", "model_0000005.pth"]


def test_the_second_failure_in_a_row_is_raised_and_the_one_before_a_good_write_is_forgotten(tmp_path, disk):
    checkpointer = Checkpointer(tmp_path)
    for number, full in enumerate((True, False, True)):
        disk.full = full
        save_periodic(checkpointer, number, {})
        checkpointer.settle()
        checkpointer.check()
    save_periodic(checkpointer, 3, {})
    checkpointer.settle()
    with pytest.raises(OSError, match="cannot write .*model_0000003.pth"):
        checkpointer.check()
    with pytest.raises(OSError, match="cannot write .*model_0000003.pth"):
        save_periodic(checkpointer, 4, {})
    assert checkpointer.last().name == "model_0000001.pth"


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
    assert checkpointer.last() is None
    assert checkpointer.noted_evaluation() == {"iteration": 0, "best": {"value": 2.0}}
    for number in range(3):
        save_periodic(checkpointer, number, {})
    checkpointer.save_evaluation({"iteration": 2})
    checkpointer.wait()
    assert names(tmp_path) == ["best.pth", "last_checkpoint", "last_evaluation", "model_0000002.pth"]
    assert checkpointer.last().name == "model_0000002.pth" and load_checkpoint(tmp_path / "best.pth")["iteration"] == 0
    checkpointer.forget_evaluation()
    checkpointer.forget_evaluation()
    assert checkpointer.noted_evaluation() == {} and (tmp_path / "best.pth").exists()


# ---- reading it again ----


@pytest.mark.parametrize("place", ["in a tensor", "in the pickle", "at the end"])
def test_damage_is_found_and_the_way_to_an_earlier_checkpoint_is_told(tmp_path, place):
    path = tmp_path / "model_0000005.pth"
    save_checkpoint(path, {"model": {"weight": torch.rand(50_000)}, "iteration": 5})
    content = bytearray(path.read_bytes())
    if place == "at the end":
        del content[-100:]
    else:
        content[100_000 if place == "in a tensor" else content.index(b"iteration") + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model_0000005.pth' (is damaged|cannot be read).*earlier checkpoint"):
        load_checkpoint(path)
