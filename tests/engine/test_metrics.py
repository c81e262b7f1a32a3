import errno
import importlib.machinery
import io
import json
import logging
import os
import random
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from fcclip.config import get_cfg
from fcclip.engine import Recorder
from fcclip.engine.build import build_recorder
from fcclip.engine.logs import close_logging, setup_logging
from fcclip.engine.metrics import History, JsonWriter, LineWriter, TensorBoardWriter, WandbWriter, check_wandb
from fcclip.engine.progress_bar import ProgressBar, build_progress_bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def records(folder, name="metrics.json"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def events_of(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def curve(folder, name):
    return [(event.step, event.value) for event in events_of(folder).Scalars(name)]


# ---- medians ----


def test_medians_forget_what_left_the_window():
    history = History(window=3)
    for value in (100.0, 1.0, 5.0, 3.0):
        history.add({"loss": value, "time": 2.0})
    assert history.medians() == {"loss": 3.0, "time": 2.0}


# ---- metrics.json ----


@pytest.mark.parametrize("half", ['{"iteration": 39, "total_lo', '{"iteration": 39, "total_loss": 2.0}', "\0\0\0"])
def test_a_half_written_line_is_dropped(tmp_path, half):
    (tmp_path / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0}\n' + half)
    writer = JsonWriter(tmp_path / "metrics.json", start=40)
    writer.write(39, {"total_loss": 1.0})
    expected = [{"iteration": 19, "total_loss": 2.0}, {"iteration": 39, "total_loss": 1.0}]
    assert records(tmp_path) == expected  # before it is closed
    writer.close()
    assert records(tmp_path) == expected


def test_a_resumed_run_writes_later_records_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    lines = [{"iteration": n, "total_loss": 1.0} for n in (19, 39, 40, 59, 79)] + [{"iteration": 39, "PQ": 3.0}]
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    JsonWriter(path, start=40).close()
    assert [line["iteration"] for line in records(tmp_path)] == [19, 39, 39]
    assert f"dropped 3 records of {path}" in caplog.text


def test_a_new_run_moves_the_records_of_an_earlier_one_aside(tmp_path):
    for value in (1.0, 2.0, 3.0):
        writer = JsonWriter(tmp_path / "metrics.json", start=0)
        writer.write(19, {"total_loss": value})
        writer.close()
    names = ("metrics_1.json", "metrics_2.json", "metrics.json")
    assert [records(tmp_path, name)[0]["total_loss"] for name in names] == [1.0, 2.0, 3.0]


class FullDisk(io.FileIO):
    """A file that takes `room` bytes more and then fails, like a file on a full disk."""

    room = 0

    def write(self, content):
        content = bytes(content)[: self.room]
        if not content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(content)
        return super().write(content)


def test_records_wait_for_room_on_the_disk(tmp_path, caplog):
    writer = JsonWriter(tmp_path / "metrics.json", start=0)
    writer._file.close()
    disk = FullDisk(tmp_path / "metrics.json", "ab")
    writer._file = io.BufferedWriter(disk)
    disk.room = 60  # the first record and half of the second
    for iteration in (19, 39, 59):
        writer.write(iteration, {"total_loss": 1.0})
    assert "No space left on device" in caplog.text
    disk.room = 10_000
    writer.write(79, {"total_loss": 1.0})
    writer.close()
    assert [line["iteration"] for line in records(tmp_path)] == [19, 39, 59, 79]


# ---- TensorBoard ----


def test_tensorboard_has_scalars_and_images_before_the_next_ones_are_written(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    writer = TensorBoardWriter(tmp_path, start=0)
    writer.write(19, {"total_loss": 2.5, "panoptic_seg/PQ": 3.0})
    writer.images(19, {"000123.jpg": image})
    assert curve(tmp_path, "total_loss") == [(19, 2.5)] and curve(tmp_path, "panoptic_seg/PQ") == [(19, 3.0)]
    (event,) = events_of(tmp_path).Images("images/000123.jpg")
    assert event.step == 19
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), image)
    writer.close()


def test_a_resumed_run_hides_the_later_events_of_the_interrupted_one(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    first = TensorBoardWriter(tmp_path, start=0)
    for iteration in (19, 39, 59):
        first.write(iteration, {"total_loss": 1.0})
        first.images(iteration, {"a": image})
    first.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])  # the last record is half written
    second = TensorBoardWriter(tmp_path, start=40)
    second.write(59, {"total_loss": 2.0})
    second.close()
    assert curve(tmp_path, "total_loss") == [(19, 1.0), (39, 1.0), (59, 2.0)]
    assert [event.step for event in events_of(tmp_path).Images("images/a")] == [19, 39]


def test_a_writer_that_fails_ends_and_the_training_does_not(tmp_path, caplog, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    events = TensorBoardWriter(tmp_path, start=0)
    monkeypatch.setattr(events._events, "add_scalar", fail)
    recorder = Recorder(writers=lambda start: [events, JsonWriter(tmp_path / "metrics.json", start=start)])
    with recorder.recording(0):
        for iteration in (19, 39):
            recorder.write(iteration, {"total_loss": 1.0})
    assert len(caplog.messages) == 1 and "TensorBoardWriter failed ([Errno 28] No space left on device)" in caplog.text
    assert [line["iteration"] for line in records(tmp_path)] == [19, 39]


# ---- wandb ----


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.axes, self.finished, self.broken = options, [], [], 0, False

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, values):
        if self.broken:
            raise sys.modules["wandb"].Error("the service is gone")
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def runs(monkeypatch):
    """The runs that a fake wandb was asked for."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    started = []

    def init(**options):
        started.append(FakeRun(**options))
        return started[-1]

    module.init, module.Error = init, type("Error", (Exception,), {})
    module.Image = lambda image: ("image", image.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return started


def wandb_writer(folder, start=0, **changes):
    return WandbWriter(folder, start=start, **({"project": "p", "name": "", "entity": "", "config": {}} | changes))


def test_wandb_gets_scalars_and_images_over_the_iteration(tmp_path, runs):
    writer = wandb_writer(tmp_path, name="n", config={"SEED": 1})
    writer.write(19, {"total_loss": 1.0})
    writer.images(19, {"a.jpg": np.zeros((4, 6, 3), np.uint8)})
    writer.close()
    (run,) = runs
    expected = {"project": "p", "name": "n", "entity": None, "dir": str(tmp_path), "config": {"SEED": 1}}
    assert expected.items() <= run.options.items() and run.options["resume"] == "allow"
    assert run.axes == [("iteration", None), ("*", "iteration")] and run.finished == 1
    assert run.logged == [
        {"iteration": 19, "total_loss": 1.0},
        {"iteration": 19, "images/a.jpg": ("image", (4, 6, 3))},
    ]


def test_a_config_with_a_project_is_recorded_at_wandb(tmp_path, runs):
    cfg = get_cfg()
    cfg.WANDB.PROJECT, cfg.SEED = "p", 7
    with build_recorder(cfg, tmp_path).recording(0):
        pass
    assert runs[0].options["project"] == "p" and runs[0].options["config"]["SEED"] == 7


def test_a_resumed_training_continues_its_wandb_run_and_a_new_one_does_not(tmp_path, runs):
    for start in (0, 40, 0):
        wandb_writer(tmp_path, start).close()
    identities = [run.options["id"] for run in runs]
    assert identities[0] == identities[1] != identities[2]
    assert (tmp_path / "wandb_id").read_text() == identities[2]


def test_an_error_of_wandb_does_not_end_the_training(tmp_path, runs, caplog):
    recorder = Recorder(writers=lambda start: [wandb_writer(tmp_path)])
    with recorder.recording(0):
        runs[0].broken = True
        for iteration in (19, 39):
            recorder.write(iteration, {"total_loss": 1.0})
    assert len(caplog.messages) == 1 and "the service is gone" in caplog.text


def test_without_the_package_wandb_is_refused_with_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb("")
    with pytest.raises(ImportError, match=r"WANDB.PROJECT is 'p', but .* pip install .*WANDB.PROJECT"):
        check_wandb("p")


# ---- all together ----


def run_of(folder, *, start, stop, history, max_iter=100):
    """The records of iterations start..stop of a training whose losses depend on the iteration only."""
    writers = [JsonWriter(folder / "metrics.json", start=start), TensorBoardWriter(folder, start=start)]
    for iteration in range(start, stop):
        history.add({"total_loss": random.Random(iteration).random()})
        if (iteration + 1) % 20 == 0 or iteration + 1 == max_iter:
            for writer in writers:
                writer.write(iteration, history.medians())
        if iteration == 49:
            for writer in writers:
                writer.write(iteration, {"panoptic_seg/PQ": 12.5})
    return writers


def test_a_killed_and_resumed_run_has_the_records_of_an_uninterrupted_one(tmp_path, monkeypatch):
    # Files of one second and one process are read in the order of this number, as text.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    for writer in run_of(whole, start=0, stop=100, history=History()):
        writer.close()
    history = History()
    run_of(parts, start=0, stop=50, history=history)  # a checkpoint is written here
    state = history.state_dict()
    run_of(parts, start=50, stop=90, history=history)  # killed: nothing is closed
    with (parts / "metrics.json").open("a") as file:
        file.write('{"iteration": 99, "total')
    history = History()
    history.load_state_dict(state)
    for writer in run_of(parts, start=50, stop=100, history=history):
        writer.close()
    assert records(parts) == records(whole)
    assert [line["iteration"] for line in records(parts)] == [19, 39, 49, 59, 79, 99]
    for name in ("total_loss", "panoptic_seg/PQ"):
        assert curve(parts, name) == curve(whole, name)


# ---- the line and the bar ----


def test_the_line_says_where_the_time_goes(caplog):
    caplog.set_level(logging.INFO)
    times = {"time": 0.5, "data_time": 0.02, "forward_time": 0.18, "backward_time": 0.25, "step_time": 0.05}
    writer = LineWriter(max_iter=100)
    writer.write(19, {"total_loss": 3.25, **times, "max_memory_mb": 40960.4})
    writer.write(39, {"total_loss": 3.25, "time": 0.5, "data_time": 0.02})
    writer.write(59, {"total_loss": 3.25, "time": 0.0, "data_time": 0.0})
    writer.write(59, {"panoptic_seg/PQ": 3.0})
    assert caplog.messages == [
        "iter: 20/100  total_loss: 3.25  time: 0.5 s (data 4%, forward 36%, backward 50%, step 10%)  max_mem: 40960M",
        "iter: 40/100  total_loss: 3.25  time: 0.5 s (data 4%)",
        "iter: 60/100  total_loss: 3.25  time: 0 s",
    ]


@pytest.fixture
def terminal(monkeypatch):
    """(columns) -> a terminal of that width, which is also standard output."""

    def build(columns=140):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", Terminal())
        return sys.stdout

    return build


@pytest.mark.parametrize("columns", [70, 140])
def test_the_bar_shows_progress_and_can_step_aside(terminal, columns):
    """The time left is estimated from the time of an iteration."""
    stream = terminal(columns)
    bar = ProgressBar(max_iter=10_000, start=2, stream=stream)
    bar.write(5999, {"total_loss": 3.5, "time": 9.0})
    bar.pause()
    assert all(part in stream.getvalue() for part in ("6000/10000", "eta 10:00:00", "loss 3.50, 9.00 s"))
    bar.write(9999, {"total_loss": 3.5, "time": 9.0})
    bar.resume()
    bar.close()
    assert "took 0:00:0" in stream.getvalue()


@pytest.mark.parametrize(("name", "has_bar"), [("xterm", True), ("dumb", False)])
def test_where_no_bar_is_drawn_the_terminal_gets_lines(terminal, tmp_path, monkeypatch, name, has_bar):
    stream = terminal()
    monkeypatch.setenv("TERM", name)
    setup_logging(tmp_path)
    try:
        bar = build_progress_bar(max_iter=10)
        assert (bar is not None) == has_bar
        LineWriter(max_iter=10).write(4, {"total_loss": 3.5})
        logging.getLogger("fcclip.engine.metrics").error("the disk is full")
        if bar:
            bar.close()
    finally:
        close_logging()
    assert ("iter: 5/10" in stream.getvalue()) != has_bar and "the disk is full" in stream.getvalue()
    assert "iter: 5/10" in (tmp_path / "log.txt").read_text()
